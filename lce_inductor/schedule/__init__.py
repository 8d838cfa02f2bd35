"""Schedule: decide in the joint graph whether gradients are computed in the forward, and which rows need not be at all.

tangents (is it legal, and what are the row gradients with the tangent set to one?) -> rewrite (plan -> graph);
needed (which rows can anything depend on?) -> rewrite; one_weight (which heads add into one dW?) -> write_one_weight.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch.fx import Graph, Node

from ..config import Config
from ..graph.values import collectives
from ..graph.write import sort
from ..lower.plan import capabilities, policy_of, training
from ..ops import schema  # noqa: F401  (registers the ops)
from . import rewrite
from .held_inputs import hold_inputs
from .needed import ALL, needed_rows
from .one_weight import REGION, next_to_join, too_many
from .request import leaves_rows_out, request_of
from .tangents import Illegal, heads_of, row_gradients
from .write_one_weight import join, postpone

log = logging.getLogger("lce_inductor")
ops = torch.ops.lce_inductor


class Scheduled(NamedTuple):
    """What became of a call: where its gradients are computed, "forward" or "recompute", and what computes it now."""

    gradients: str
    ops: tuple[Node, ...]


def schedule(graph: Graph, config: Config) -> dict[Node, Scheduled]:
    """move(), restrict(), add_up() and hold_inputs().

    Returns what became of the calls that were there, for those with gradients that this stage has decided about. What
    nobody reads any more is still there.
    """
    found = move(graph, config)
    if found:
        sort(graph)
    restrict(graph)
    add_up(graph, config, found)
    hold_inputs(graph)
    return found


def move(graph: Graph, config: Config) -> dict[Node, Scheduled]:
    """Move the gradients of every head whose backward allows it into its forward.

    Each head is decided and rewritten on its own. Without a backward (inference) there is nothing to do. The graph is
    not in order afterwards.
    """
    where: dict[Node, Scheduled] = {}
    for forward, backward in heads_of(graph):
        name = rewrite.describe(forward)
        where |= {op: Scheduled("recompute", (op,)) for op in (forward, backward)}
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
        merged = rewrite.merge(graph, forward, backward, gradients)
        where |= {op: Scheduled("forward", (merged,)) for op in (forward, backward)}
        sort(graph)  # what the next head's gradients depend on is read off the order
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


def add_up(graph: Graph, config: Config, found: dict[Node, Scheduled]) -> None:
    """Keep one dW where several heads' would be added: one call for all of their rows, or gradients in the backward."""

    def became(calls: list[Node], now: Scheduled) -> None:
        origins = [k for k, s in found.items() if any(c in s.ops for c in calls)]
        found.update(dict.fromkeys([*origins, *(c for c in calls if c.target is REGION)], now))
        sort(graph)

    while group := next_to_join(graph):
        node = join(graph, group)
        log.debug("%s: one call for %d heads of one weight", node.name, len(group))
        became([c.node for c in group], Scheduled("forward", (node,)))
    if collectives(graph):  # a call that waits for a tangent could come to stand on the other side of one
        return
    while config.gradients == "auto" and (call := next(iter(too_many(graph)), None)):
        log.debug("%s: gradients recompute the logits: another dW than that of its sum would be kept", call.node.name)
        became([call.node], Scheduled("recompute", postpone(graph, call)))


def restrict(graph: Graph) -> None:
    """Tell every head which of its rows anything depends on.

    Not where the op would compute them all the same: on a GPU, but for the kernels that take their number from there.
    """
    targets = (ops.row_stats.default, ops.row_stats_with_grad.default)
    heads = [n for target in targets for n in graph.find_nodes(op="call_function", target=target)]
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
            log.debug("%s: only rows that something depends on are computed", name)
