"""Labels -> what to write: for each set of rows one or two programs, and which nodes of the graph their results are.

A head has a forward part (values of each row) and a backward part (dX, dW, sums over rows). Both are one program where
the backward part is linear in a scalar tangent and reads nothing that rows were added up to: it is then evaluated in
the forward, with that tangent set to one. Else there are two, and the second computes the logits again.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Graph, Node

from ..graph.values import is_collective
from .aten_ops import Crossing
from .emit import Emitter
from .fused import NotFused
from .heads import candidates, is_other_product, tangents_of
from .labels import Labels, Problem, Sink
from .match import fused_calls
from .spaces import Space, ancestors
from .tangent import Tangent


@dataclasses.dataclass
class Part:
    """One program and the nodes that its results are: (node, rows it is a part of)."""

    emitter: Emitter
    nodes: list[tuple[Node, str]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Region:
    """Heads that belong together. merged: the backward part is in the forward's program, up to `tangent`.
    fused_only: the programs would read what processes make of their own results, and only the kernels compute these."""

    heads: list[Node]
    spaces: set[Space]
    forward: dict[Space, Part]
    backward: dict[Space, Part]
    merged: bool = False
    tangent: Tangent | None = None
    why_not_merged: str = ""
    fused_only: bool = False


@dataclasses.dataclass
class Found:
    """What was found in a graph: regions that can be written, and heads that stay, with the reason."""

    labels: Labels
    regions: list[Region]
    problems: dict[Node, Problem]


def find(graph: Graph, deferred: frozenset[Node] = frozenset(), merge: bool = True) -> Found:
    """Regions of a joint graph, or of one of inference. Pure: nothing is changed.

    deferred: nodes among the graph's outputs that stand for logits which will not be computed. merge: may gradients be
    computed in the forward?
    """
    tangents = tangents_of(graph)
    labels = Labels(graph, tangents, deferred)
    labels.run(candidates(graph, labels.on_tangent))
    for head in filter(is_other_product, labels.sources):
        why = "a product that is scaled, or has a bias for each row"
        labels.problems.setdefault(head, Problem("foreign-product", head, why))
    regions, problems = [], dict(labels.problems)
    for heads, spaces in components(labels):
        trouble = next((labels.problems[h] for h in heads if h in labels.problems), None)
        if trouble is None and not _reads_anything(labels, spaces):
            trouble = Problem("no-loss", heads[0], "nothing in this graph reduces the logits")
        if trouble is None:
            try:
                regions.append(assemble(labels, heads, spaces, tangents, merge))
                continue
            except Crossing as crossing:
                trouble = Problem(crossing.code, crossing.node or heads[0], str(crossing))
        for head in heads:
            problems.setdefault(head, trouble)
    return Found(labels, regions, problems)


def components(labels: Labels) -> list[tuple[list[Node], set[Space]]]:
    """Heads that share rows anywhere, and all their rows."""
    groups: list[tuple[list[Node], set[Space]]] = []
    spaces: dict[Space, None] = {}
    for label in labels.of.values():
        spaces[label.space.find()] = None
    for space in spaces:
        heads, related = labels.heads_of(space), {space, *ancestors(space)}
        mine = [g for g in groups if g[1] & related or set(g[0]) & set(heads)]
        merged = (list(dict.fromkeys([*(h for g in mine for h in g[0]), *heads])), related.union(*(g[1] for g in mine)))
        groups = [g for g in groups if g not in mine] + [merged]
    order = {h: i for i, h in enumerate(labels.sources)}
    return [(sorted(h, key=order.__getitem__), s) for h, s in groups if h]


def _reads_anything(labels: Labels, spaces: set[Space]) -> bool:
    return any(labels.of[n].space.find() in spaces for n in labels.outputs) or any(
        labels.of[s.wide].space.find() in spaces for s in labels.sinks
    )


def assemble(labels: Labels, heads: list[Node], spaces: set[Space], tangents: set[Node], merge: bool = True) -> Region:
    """The programs of one component. Raises Crossing where something in it can't be computed row by row."""
    sinks = [s for s in labels.sinks if labels.of[s.wide].space.find() in spaces and _alive(s.node)]
    late = [s for s in sinks if s.node in labels.on_tangent]
    early = [s for s in sinks if s.node not in labels.on_tangent]
    if any(s.kind in ("dx", "dw") for s in early):
        raise Crossing("a matrix product of the forward reads the logits", "product")
    narrow = [n for n in labels.outputs if labels.of[n].space.find() in spaces]
    values = frontier(labels, narrow)
    if late and merge:
        region = _merged(labels, heads, spaces, values, early, late, tangents)
        if isinstance(region, Region):
            return region
        why = region
    else:
        why = "" if merge else "gradients='recompute'"
    backward = _parts(labels, [n for n in values if n in labels.on_tangent], late, lambda n: n not in labels.behind)
    read = [n for part in backward.values() for kind in ("rows", "whole") for n in _nodes(part.emitter, kind)]
    values = [n for n in values if n not in labels.on_tangent]
    values += [n for n in frontier(labels, [n for n in read if n in labels.of]) if n not in values]
    forward = _parts(labels, values, early, lambda n: False)
    for part in forward.values():
        for node in [n for kind in ("rows", "whole") for n in _nodes(part.emitter, kind)]:
            if node not in labels.reduced and (unknown := _unknown_size(labels, node)) is not None:
                raise Crossing(f"a size is read off the logits: {unknown.format_node() or unknown.name}")
    region = Region(heads, spaces, forward, backward, why_not_merged=why)
    if _circular(labels, forward, labels.of) or _circular(labels, backward, labels.behind):
        region.fused_only = True
        try:
            fused_calls(labels, heads, spaces)
        except NotFused as reason:
            node = next(n for n in labels.of if n in labels.reduced and labels.of[n].space.find() in spaces)
            raise Crossing(f"what comes back is read by more than a softmax: {reason}", "collective", node) from reason
    return region


def _circular(labels: Labels, parts: dict[Space, Part], behind: Any) -> bool:
    """Does a program read what processes make of its own results?"""
    given = (node for part in parts.values() for node in _nodes(part.emitter, "rows"))
    return any(node in labels.reduced and node in behind for node in given)


def _merged(
    labels: Labels,
    heads: list[Node],
    spaces: set[Space],
    values: list[Node],
    early: list[Sink],
    late: list[Sink],
    tangents: set[Node],
) -> Region | str:
    """All in one program, or why that can't be."""
    if any(head.meta["val"].dtype == torch.float16 for head in heads):
        return "fp16 has no room for gradients without the loss scale, which comes with the tangent"
    tangent = Tangent(labels, tangents)
    if any(s.wide.meta["val"].dtype == torch.float16 for s in late):
        return "in fp16 the gradients of a mean vanish without the loss scale, which comes with the tangent"
    try:
        for sink in late:
            tangent.check(sink.wide)
        extra = [n for n in values if n in labels.on_tangent]
        for node in extra:
            tangent.check(node)
        if len(tangent.roots) != 1:
            return "the gradients depend on several tangents, or on none"
        parts = _parts(labels, [n for n in values if n not in extra], early, lambda n: False)
        for node in extra:
            _add(labels, parts, node, node, lambda n: False)
        for sink in late:
            _add(labels, parts, sink, sink.wide, lambda n: False)
        for part in parts.values():
            if any(m in labels.on_tangent or m in labels.beyond for m, _ in part.emitter.matrices):
                return "a gradient is multiplied by a matrix that is not there before the head"
            for kind in ("rows", "whole"):
                for node in _nodes(part.emitter, kind):
                    if node in labels.of or node in labels.beyond:
                        return "a gradient reads what several rows were added up to"
                    tangent.check(node)
                    if (unknown := _unknown_size(labels, node)) is not None:
                        return f"a size is read off the loss: {unknown.format_node() or unknown.name}"
    except Crossing as crossing:
        return str(crossing)
    return Region(heads, spaces, parts, {}, merged=True, tangent=tangent)


def _unknown_size(labels: Labels, node: Node) -> Node | None:
    """A size on the way to a node that is known only once the head is there."""
    from ..graph.write import can_size
    from .write import behind_heads, unsized

    behind, avoid = behind_heads(labels.graph, labels), unsized(labels.graph, labels)
    todo, seen = [node], set()
    while todo:
        now = todo.pop()
        if now in seen or now not in behind:
            continue
        seen.add(now)
        if is_collective(now):  # it must not be done twice
            return now
        value = now.meta.get("val")
        if isinstance(value, torch.SymInt):
            if not can_size(labels.graph, value.node.expr, avoid):
                return now
            continue
        todo += now.all_input_nodes
    return None


def frontier(labels: Labels, wanted: list[Node]) -> list[Node]:
    """The narrow nodes that these follow from and that themselves follow from wide ones."""
    found: dict[Node, None] = {}
    todo, seen = list(wanted), set()
    while todo:
        node = todo.pop(0)
        if node in seen:
            continue
        seen.add(node)
        mine = [a for a in node.all_input_nodes if a in labels.of]
        if any(labels.wide(a) for a in mine):
            found[node] = None
        else:
            todo += mine
    return list(found)


def _parts(labels: Labels, values: list[Node], sinks: list[Sink], stop: Any) -> dict[Space, Part]:
    parts: dict[Space, Part] = {}
    for node in values:
        _add(labels, parts, node, node, stop)
    for sink in sinks:
        _add(labels, parts, sink, sink.wide, stop)
    return parts


def _add(labels: Labels, parts: dict[Space, Part], what: Any, labelled: Node, stop: Any) -> None:
    """One result, in the program of each set of rows that it is made of."""
    label = labels.of[labelled]
    for space in label.parts or (label.space,):
        part = parts.setdefault(space.find(), Part(Emitter(labels, space, stop)))
        if isinstance(what, Node):
            part.emitter.row(what)
            part.nodes.append((what, "row"))
        else:
            getattr(part.emitter, what.kind)(what.node, what.wide)
            part.nodes.append((what.node, what.kind))


def _nodes(emitter: Emitter, kind: str) -> list[Node]:
    return [what[0] for what in emitter.given[kind]]


def _alive(node: Node) -> bool:
    return bool(node.users)
