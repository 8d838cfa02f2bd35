"""Match -> graph: row_stats in place of the forward, row_stats_backward in place of the products of the backward.

z = mm(x, w); m = amax(z); ...; lp = gather(z - m - log(s), y)    stats = row_stats(x, w', None, y, ...)
dz = exp(...) * g - ...                                           lp = stats[1] - stats[0]
dx = mm(dz, w'); dw = mm(dz.t(), x)                               dx, dw, db = row_stats_backward(x, w', ..., g)
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from ..config import Config
from ..graph.write import Writer
from ..spec.epilogue import unparse
from ..spec.statistics import GRADIENTS, LSE, LSE_DTYPE, NO_TARGET, PLACES, stat_dtype
from .algebra import Poly
from .heads import Head
from .labels import Labels
from .match import Match, _matrix
from .spaces import Space
from .tags import ROW, shape_of
from .write import Copies, back, before_writes, behind_heads, moved, replace, rows, two, unsized

aten = torch.ops.aten
prims = torch.ops.prims
ops = torch.ops.lce_inductor

_ONE_OR_ZERO = (Poly.number(1.0).key(), Poly({}).key())


def write_fused(graph: Graph, labels: Labels, matches: list[Match], config: Config) -> list[Node]:
    """Write the matches of one region. Returns the nodes of the ops."""
    behind = behind_heads(graph, labels)
    writer = Writer(graph, before_writes(graph), matches[0].source, unsized(graph, labels))
    calls = [_Stats(writer, labels, match, config, behind) for match in matches]
    values = {node: call.value(node, poly) for call in calls for node, poly in call.match.values.items()}
    for node, value in values.items():
        replace(node, value)
    for node in list(graph.nodes):  # sizes read off what is not there any more
        if node.target is aten.sym_size.int and node.args[0] in labels.of and labels.wide(node.args[0]) and node.users:
            node.replace_all_uses_with(writer.size(node.meta["val"].node.expr))
    made = [call.node for call in calls]
    sums: dict[Node, Node] = {}
    for call in calls:
        if call.match.gradients is not None:
            made.append(call.backward(values, sums))
    for node, value in sums.items():
        replace(node, value)
    return made


class _Stats:
    """The call of row_stats, and what is read of it."""

    def __init__(self, writer: Writer, labels: Labels, match: Match, config: Config, behind: set[Node]) -> None:
        self.writer, self.labels, self.match = writer, labels, match
        self.copies = Copies(writer, labels, None, behind)
        self.space: Space = match.space
        head, home = Head.of(match.source), labels.of[match.source].space
        call = writer.call
        x = moved(writer, two(writer, self.copies(head.x)), home, self.space, list((shape_of(head.x) or ())[-1:]))
        matrix, turned = _matrix(head.weight)
        rank = len(shape_of(matrix) or ())
        weight = matrix if turned and rank == 2 else call(aten.permute.default, two(writer, head.weight), [1, 0])
        bias = self._vector(match.bias) if match.bias is not None else head.bias
        if match.cut is not None:
            first, last = match.cut
            weight = call(aten.slice.Tensor, weight, 0, first, last)
            bias = None if head.bias is None else call(aten.slice.Tensor, head.bias, 0, first, last)
        self.columns = {k: self._row(t) for k, t in sorted(match.targets.items())}
        self.places = {k: i for i, k in enumerate(self.columns)}
        target = None
        if self.columns:
            wide = [
                c if c.meta["val"].dtype == torch.int64 else call(prims.convert_element_type.default, c, torch.int64)
                for c in self.columns.values()
            ]
            # A label that happens to be NO_TARGET (NaN.long() is) has to stay out of bounds.
            wide = [call(aten.clamp_min.default, c, NO_TARGET + 1) for c in wide]
            target = call(aten.stack.default, wide, 1) if len(wide) > 1 else call(aten.unsqueeze.default, wide[0], 1)
        self.class_weight = None if match.class_weight is None else self._vector(match.class_weight)
        self.head = (x, weight, bias, target, self.class_weight)
        self.plan = (unparse(match.epilogue), config.chunk_tokens or 0, config.workspace_bytes)
        self.prefer = {} if config.prefer == "speed" else {"prefer": config.prefer}
        epilogue, chunk, workspace = self.plan
        self.node = call(ops.row_stats.default, *self.head, epilogue, match.stats, chunk, workspace, **self.prefer)
        self._of: dict[Any, Node] = {}
        self.values: dict[Node, Node] = {}

    def _row(self, what: Any) -> Node:
        value = rows(self.writer, what, self.space, self._now)
        if what.node in self.labels.reduced:  # a maximum of all processes takes as many digits as lse
            value = self.writer.call(prims.convert_element_type.default, value, LSE_DTYPE)
        return self.writer.call(aten.reshape.default, value, [self.space.find().count])

    def _now(self, node: Node) -> Any:
        if node in getattr(self, "values", {}):
            return self.values[node]
        return node if self._late or node in self.labels.reduced else self.copies(node)

    _late = False

    def _vector(self, what: Any) -> Node:
        return self.writer.call(aten.reshape.default, what[0], [-1])

    def stat(self, name: str, rest: Any) -> Node:
        key = (name, *rest)
        if key not in self._of:
            out = self.writer.call(operator.getitem, self.node, PLACES[name])
            if name == "target":
                out = self.writer.call(aten.select.int, out, 1, self.places[rest[0]])
            self._of[key] = out
        return self._of[key]

    def value(self, node: Node, poly: Poly) -> Node:
        """The node that stands for a narrow one."""
        label, call = self.labels.of[node], self.writer.call
        out = back(self.writer, self.poly(poly), label.space, self.space, [])
        wanted = node.meta["val"].dtype
        if out.meta["val"].dtype != wanted:
            out = call(prims.convert_element_type.default, out, wanted)
        return call(aten.reshape.default, out, list(shape_of(node) or ()))

    def poly(self, p: Poly) -> Node:
        """A row value [N]."""
        call, out = self.writer.call, None
        for monomial, c in sorted(p.terms.items(), key=lambda t: -t[1]):
            term: Any = None
            masks = [a for a in monomial if a[:2] == ("call", "where") and a[3:] == _ONE_OR_ZERO]
            for atom in monomial:
                if atom in masks:  # selected at last: a factor of zero makes NaN of an infinity
                    continue
                value = self.atom(atom)
                term = value if term is None else call(aten.mul.Tensor, term, value)
            if masks:
                term = self._selected(masks, term, c)
                out = term if out is None else call(aten.add.Tensor, term, out)
                continue
            if term is None:
                term = c
            elif out is not None and c == -1:
                out = call(aten.sub.Tensor, out, term)
                continue
            elif c == -1:
                term = call(aten.neg.default, term)
            elif c != 1:
                term = call(aten.mul.Tensor, term, c)
            out = (
                term if out is None else call(aten.add.Tensor, *((out, term) if isinstance(out, Node) else (term, out)))
            )
        if not isinstance(out, Node):
            x = self.head[0].meta["val"]
            fill, count = 0.0 if out is None else out, self.space.find().count
            return call(aten.full.default, [count], fill, dtype=stat_dtype(x), device=x.device)
        if not p_has_rows(p):
            out = call(aten.expand.default, call(aten.reshape.default, out, [1]), [self.space.find().count])
        return out

    def _selected(self, masks: list[Any], term: Any, c: float) -> Any:
        """c * term where all conditions hold, else zero."""
        call = self.writer.call
        if term is None:
            term = self.poly(Poly.number(c))
        elif c != 1:
            term = call(aten.mul.Tensor, term, c)
        for mask in masks:
            value = term.meta["val"]
            zero = call(aten.full.default, [], 0, dtype=value.dtype, device=value.device)
            term = call(aten.where.self, call(aten.ne.Scalar, self.poly(Poly(dict(mask[2]))), 0), term, zero)
        return term

    def atom(self, atom: Any) -> Node:
        if atom not in self._of:
            self._of[atom] = self._atom(atom)
        return self._of[atom]

    def _atom(self, atom: Any) -> Node:
        kind, name, *rest = atom
        call = self.writer.call
        if kind == "stat":
            return self.stat(name, rest if name == "target" else ())
        if kind == "call":
            args = [self.poly(Poly(dict(a))) for a in rest]
            if name == "where":
                return call(aten.where.self, call(aten.ne.Scalar, args[0], 0), *args[1:])
            if name == "eq":
                return call(aten.eq.Tensor, *args)
            # aten makes fp32 of integers, such as a count of labels, even where all else is fp64.
            args = [a if a.meta["val"].dtype.is_floating_point else self._in_stat_dtype(a) for a in args]
            return call(getattr(aten, name).default, *args)
        if name == "rows":
            return self._row(self.match.atoms[atom])
        if name == "whole":
            return call(aten.reshape.default, self._now(self.match.atoms[atom][0]), [])
        vector = self._vector(self.match.atoms[("in", "total", rest[0])])
        if name == "total":
            return call(aten.sum.default, vector)
        return call(aten.gather.default, vector, 0, self.columns[rest[1]])  # Inductor has no index_select

    # -- the backward

    def backward(self, values: dict[Node, Node], sums: dict[Node, Node]) -> Node:
        """row_stats_backward; its results are added to what `sums` has for the products that they are parts of."""
        g, call = self.match.gradients, self.writer.call
        assert g is not None
        self.values, self._late = values, True
        targets = [self.poly(g.targets.get(k, Poly({}))) for k in self.columns] if g.targets else []
        g_target = None
        if targets:
            targets = [self._in_stat_dtype(t) for t in targets]
            g_target = (
                call(aten.stack.default, targets, 1)
                if len(targets) > 1
                else call(aten.unsqueeze.default, targets[0], 1)
            )
        polys = {"g_lse": g.lse, "g_sum": g.sum, "g_neg_entropy": g.neg_entropy}
        row = {name: None if p is None else self._in_stat_dtype(self.poly(p)) for name, p in polys.items()}
        row["g_target"] = g_target
        lse = self.poly(g.norm) if g.norm is not None else self.stat("lse", ()) if self.match.stats & LSE else call(
            aten.full.default, [self.space.find().count], 0.0, dtype=torch.float64,
            device=self.head[0].meta["val"].device,
        )  # fmt: skip
        negent = self.stat("neg_entropy", ()) if g.neg_entropy is not None else None
        mask = [k in g.sinks for k in ("dx", "dw", "sum")]
        given = (row[name] for name in GRADIENTS)
        op = call(
            ops.row_stats_backward.default, *self.head, lse, negent, *given, *self.plan, mask, **self.prefer,
            stats=self.match.stats,
        )  # fmt: skip
        for kind, node in g.sinks.items():
            part = self._result(op, kind, node)
            sums[node] = part if node not in sums else call(aten.add.Tensor, sums[node], part)
        return op

    def _in_stat_dtype(self, node: Node) -> Node:
        wanted = stat_dtype(self.head[0].meta["val"])
        same = node.meta["val"].dtype == wanted
        return node if same else self.writer.call(prims.convert_element_type.default, node, wanted)

    def _result(self, op: Node, kind: str, node: Node) -> Node:
        call = self.writer.call
        out = call(operator.getitem, op, {"dx": 0, "dw": 1, "sum": 2}[kind])
        if self.match.cut is not None and kind != "dx":  # zeros for the classes that were cut off
            value, all_classes = out.meta["val"], self.match.source.meta["val"].shape[-1]
            zeros = call(aten.full.default, [all_classes, *value.shape[1:]], 0, dtype=value.dtype, device=value.device)
            out = call(aten.slice_scatter.default, zeros, out, 0, *self.match.cut)
        shape = list(shape_of(node) or ())
        if kind != "sum":
            wide = next(a for a in node.args if a in self.labels.of)
            turned = node.args[0] is not wide
            if kind == "dx":
                out = back(self.writer, out, self.labels.of[wide].space, self.space, [shape[-1 if not turned else -2]])  # type: ignore[index]
            elif not turned and self.labels.of[wide].tags[-1] != ROW:  # type: ignore[index]
                turned = not turned
            if turned:
                out = call(aten.permute.default, out, [1, 0])
        wanted = node.meta["val"].dtype
        if out.meta["val"].dtype != wanted:
            out = call(prims.convert_element_type.default, out, wanted)
        return call(aten.reshape.default, out, shape) if len(shape) != out.meta["val"].dim() else out


def p_has_rows(p: Poly) -> bool:
    return any(a[0] == "stat" or a[:2] == ("in", "rows") for a in p.atoms())
