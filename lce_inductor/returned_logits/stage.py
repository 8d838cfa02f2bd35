"""The stage as a whole: candidates, tail, trace, regions, and what of it is deferred."""

from __future__ import annotations

import logging
from typing import Any

from torch.fx import Graph, Node

from ..config import Config
from ..graph.values import info
from ..regions.aten_ops import Crossing
from ..regions.labels import Labels
from ..regions.region import Found, find
from .products import large_outputs, last_products
from .tail import NotDeferred, cut
from .trace import Joint, fake_mode, quietly, trace
from .value import Value, read
from .write import Deferral

log = logging.getLogger("lce_inductor")


def defer_returned(graph: Graph, config: Config) -> list[Node]:
    """Replace returned logits that a loss of this graph reads by deferred ones. Returns the new nodes.

    Only in Dynamo's graphs: their outputs are the user's values. An exception leaves the graph as it was.
    """
    owner = graph.owning_module
    if config.returned_logits != "defer" or owner is None or "dynamo_compile_id" not in owner.meta:
        return []
    try:
        deferrals, mode = plan(graph, config)
    except NotDeferred as why:
        log.debug("no returned logits are deferred: %s", why)
        return []
    if not deferrals:
        return []
    (output,) = graph.find_nodes(op="output")
    before, args = set(graph.nodes), output.args
    try:
        return [d.write(mode) for d in deferrals]
    except Exception:
        output.args = args  # all that is written are new nodes, and what the output reads
        for node in reversed(graph.nodes):
            if node not in before:
                graph.erase_node(node)
        raise


def plan(graph: Graph, config: Config) -> tuple[list[Deferral], Any]:
    """What is to be deferred, and the fake mode of the graph. Pure. Raises NotDeferred."""
    large = large_outputs(graph, config)
    products = last_products(graph) if large else []
    if not products:
        raise NotDeferred("no output has the size of logits, or there is no matrix product")
    tail = cut(graph, products)
    candidates = [n for n in large if n in tail.outputs]
    if not candidates:
        raise NotDeferred("no large output depends on a matrix product that no other product reads")
    mode = fake_mode(graph)
    joint = trace(graph, tail, candidates, mode)
    with quietly(mode):
        while candidates:
            # Of logits that stay, the head stays, and then all that is returned of it may as well.
            found = find(joint.graph, frozenset(joint.detached[n] for n in candidates))
            deferrals = {}
            for node in candidates:
                try:
                    value = _value(found, joint, node)
                    deferrals[node] = Deferral(graph, tail, joint, found.labels, value, node)
                except (NotDeferred, Crossing) as why:
                    log.debug("%s is returned as it is: %s", node.name, why)
            if len(deferrals) == len(candidates):
                return list(deferrals.values()), mode
            candidates = list(deferrals)
    return [], None


def _value(found: Found, joint: Joint, node: Node) -> Value:
    labels, returned = found.labels, joint.detached[node]
    label = labels.of.get(returned)
    if label is None or not labels.wide(returned):
        raise NotDeferred("no logits, or not known row by row")
    heads = labels.heads_of(label.space)
    for head in heads:
        if head in found.problems:
            raise NotDeferred(f"the head stays: {found.problems[head].code}: {found.problems[head].why}")
    known = info(node)
    if known is not None and known.requires_grad and not _trains(labels, heads):
        raise NotDeferred("the losses of this graph have no gradient: who calls it differentiates the logits")
    return read(labels, returned)


def _trains(labels: Labels, heads: list[Node]) -> bool:
    """Does a gradient flow from the graph's own losses?"""
    wide = (n for n in labels.on_tangent if n in labels.of)
    return any(set(labels.heads_of(labels.of[n].space)) & set(heads) for n in wide)
