"""Schedule: decide in the joint graph whether gradients are computed in the forward, and which rows need not be at all.

tangents (is it legal, and what are the row gradients with the tangent set to one?) -> rewrite (plan -> graph);
needed (which rows can anything depend on?) -> rewrite.
"""

from __future__ import annotations

import logging

import torch
from torch.fx import Graph, Node

from ..config import Config
from ..graph.write import sort
from ..lower.plan import capabilities, policy_of, training
from ..ops import schema  # noqa: F401  (registers the ops)
from . import rewrite
from .needed import ALL, needed_rows
from .request import leaves_rows_out, request_of
from .tangents import Illegal, heads_of, row_gradients

log = logging.getLogger("lce_inductor")
ops = torch.ops.lce_inductor


def schedule(graph: Graph, config: Config) -> dict[Node, str]:
    """move() and restrict(), and what nobody reads any more is dropped."""
    where = move(graph, config)
    if where:
        sort(graph)
    if restrict(graph) or where:
        graph.lint()
        graph.eliminate_dead_code()
    return where


def move(graph: Graph, config: Config) -> dict[Node, str]:
    """Move the gradients of every head whose backward allows it into its forward.

    Heads are independent of each other: each is decided and rewritten on its own. Without a backward
    (inference) there is nothing to do. Returns, for each head's forward op, where its gradients are computed; the graph
    is not in order afterwards.
    """
    found = heads_of(graph)
    where = {}
    for forward, backward in found:
        name = rewrite.describe(forward)
        where[forward] = "recompute"
        if setting := _recomputed(forward, backward, config):
            log.debug("%s: gradients recompute the logits (4 products): %s", name, setting)
            rewrite.recompute(graph, forward, backward)
            continue
        gradients = row_gradients(graph, forward, backward)
        if isinstance(gradients, Illegal):
            level = logging.WARNING if config.gradients == "forward" else logging.DEBUG
            log.log(level, "%s: gradients recompute the logits (4 products): %s", name, gradients.why)
            rewrite.recompute(graph, forward, backward)
            continue
        rewrite.merge(graph, forward, backward, gradients)
        sort(graph)  # what the next head's gradients depend on is read off the order
        where[forward] = "forward"
        log.debug("%s: gradients are computed in the forward (3 products)", name)
    return where


def _recomputed(forward: Node, backward: Node, config: Config) -> str:
    """The setting that leaves a head's gradients to its backward, whether or not the forward could have them."""
    if config.gradients == "recompute":
        return "gradients='recompute'"
    if config.prefer == "memory" and config.gradients == "auto":
        device = forward.args[0].meta["val"].device  # type: ignore[union-attr]
        if training(request_of(forward, backward), capabilities(device), policy_of(device.type)).recompute:
            return "prefer='memory'"
    return ""


def restrict(graph: Graph) -> bool:
    """Tell every head which of its rows anything depends on; was there one to tell?

    Not where the op would compute them all the same: on a GPU, but for the kernels that take their number from there.
    """
    targets = (ops.row_stats.default, ops.row_stats_with_grad.default)
    heads = [n for target in targets for n in graph.find_nodes(op="call_function", target=target)]
    told = False
    for head in heads:
        if not leaves_rows_out(head):
            continue
        name, needed = rewrite.describe(head), needed_rows(graph, head)
        if needed.rows == ALL or not needed.rows:
            log.debug("%s: all rows are computed: %s", name, needed.why)
        elif not rewrite.restrict(graph, head, needed):
            log.debug("%s: all rows are computed: which are needed is not known before the head", name)
        else:
            sort(graph)  # what the next head's rows depend on is read off the order
            told = True
            log.debug("%s: only rows that something depends on are computed", name)
    return told
