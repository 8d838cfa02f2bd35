"""Schedule: decide in the joint graph whether gradients are computed in the forward.

tangents (is it legal, and what are the row gradients with the tangent set to one?) -> rewrite (plan -> graph).
"""

from __future__ import annotations

import logging

from torch.fx import Graph, Node

from ..config import Config
from ..graph.write import sort
from ..ops import schema  # noqa: F401  (registers the ops)
from . import rewrite
from .tangents import Illegal, heads_of, row_gradients

log = logging.getLogger("lce_inductor")


def schedule(graph: Graph, config: Config) -> dict[Node, str]:
    """move(), and what nobody reads any more is dropped."""
    where = move(graph, config)
    if where:
        sort(graph)
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
        if config.gradients == "recompute":
            log.debug("%s: gradients recompute the logits (4 products): gradients='recompute'", name)
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
