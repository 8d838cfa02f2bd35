"""Which rows of a head's statistics can anything that the graph returns depend on?

A loss reads most statistics through a mask: labels that are ignored, padding, weights of zero. So the graph is walked
from its results back to the statistics; a value is needed only where what reads it is needed, and not where that
multiplies it by zero or selects something else. Nothing is assumed of gradients: what is detached is a path like any
other, and an op without a rule of its own needs all of what it reads.

before                                              after
stats = row_stats(x, w, None, y, ...)               stats = row_stats(x, w, None, y, ..., needed=(y != -100) & (m != 0))
sum(where(y != -100, stats[0] - stats[1], 0) * m)   the same

The answer is a formula over values that are there before the head, a bool [N] when it runs: which rows count is data.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from ..graph.values import dependents, is_zero, same
from .tangents import HEAD_ARGS, LSE_ARG, ROW_GRADIENTS, is_size

aten = torch.ops.aten
prims = torch.ops.prims
ops = torch.ops.lce_inductor


class Literal(NamedTuple):
    """Elements of `node`, broadcast to `shape` (numbers and expressions of sizes), that are not zero; or that are, if
    not `nonzero`."""

    node: Node
    shape: tuple[Any, ...]
    nonzero: bool


# Where something holds, element by element in the order of memory: any of these, each of them all of its literals.
Where = frozenset[frozenset[Literal]]
ALL: Where = frozenset([frozenset()])
NOWHERE: Where = frozenset()
# A longer formula is not worth its passes over [N].
_LONGEST = 8


def either(*parts: Where) -> Where:
    found = frozenset().union(*parts)
    if len(found) > _LONGEST:
        return ALL
    return frozenset(a for a in found if not any(b < a for b in found))


def both(a: Where, b: Where) -> Where:
    return either(frozenset(p | q for p in a for q in b))


class Needed(NamedTuple):
    """Rows of the statistics that are needed, and where values on their way are that would be none elsewhere.

    Attributes:
        rows: ALL if nothing is known; `why` says what reads all of them.
        risky: values that may be infinite or NaN where they are not needed and made of statistics that are not there:
            zero times that would be NaN.
    """

    rows: Where
    why: str
    risky: dict[Node, Where]


def needed_rows(graph: Graph, op: Node) -> Needed:
    """What is needed of the statistics of a row_stats or row_stats_with_grad node. Changes nothing."""
    return _Walk(graph, op).result()


def unavailable(graph: Graph, op: Node) -> set[Node]:
    """What can't be read before the head, sizes included: they may be read off what is not there."""
    tangents = [n for n in graph.find_nodes(op="placeholder") if "tangents" in str(n.target)]
    return dependents(graph, {op, *tangents}, sizes=True)


_RESHAPES = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.alias.default, aten.detach.default, aten.clone.default,
    ops.once.default,
}  # fmt: skip
_SIZES = {aten.sym_size.int, aten.sym_stride.int, aten.sym_numel.default, aten.sym_storage_offset.default}
_CASTS = {prims.convert_element_type.default, aten._to_copy.default}
_MUL = {aten.mul.Tensor, aten.mul.Scalar}
_DIV = {aten.div.Tensor, aten.div.Scalar}
_ADD = {aten.add.Tensor, aten.sub.Tensor}
# Finite where what they read is, or as infinite with a statistic of zero as with any other.
_TAME = {
    *_MUL, *_ADD, aten.neg.default, aten.where.self, aten.abs.default, aten.minimum.default, aten.maximum.default,
    aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.relu.default, aten.sigmoid.default,
    aten.tanh.default,
}  # fmt: skip


class _Walk:
    def __init__(self, graph: Graph, op: Node) -> None:
        self.graph = graph
        self.stats = {n for n in op.users if n.target is operator.getitem and n.args[1] in range(6)}
        self.on_stats = dependents(graph, self.stats)
        self.late = unavailable(graph, op)
        self.needs: dict[Node, Where] = {}
        self.because: dict[Node, Node] = {}  # what reads all of a value
        self.risky: dict[Node, Where] = {}

    def result(self) -> Needed:
        for node in reversed(self.graph.nodes):
            if any(value in self.on_stats for value in node.all_input_nodes):
                self._reads(node)
        rows = either(*(self.needs.get(s, NOWHERE) for s in self.stats))
        reader = next((self.because[s] for s in self.stats if s in self.because), None)
        return Needed(rows, "nothing is known" if reader is None else f"{reader.name} reads all of them", self.risky)

    # -- where is a value needed?

    def _need(self, value: Any, where: Where, reader: Node) -> None:
        if not isinstance(value, Node) or value not in self.on_stats:
            return
        if self._is_columns(value) and reader.target is not aten.select.int:
            where = ALL  # the order of its elements is not that of rows
        self.needs[value] = either(self.needs.get(value, NOWHERE), where)
        if self.needs[value] == ALL:
            self.because.setdefault(value, self.because.get(reader, reader))

    def _is_columns(self, value: Any) -> bool:
        """Is that the logits of several targets?"""
        return value in self.stats and value.args[1] == 1 and not same(value.meta["val"].shape[1], 1)

    def _reads(self, node: Node) -> None:
        """Needs of what a node reads."""
        where, args = self.needs.get(node, NOWHERE), node.args
        if node.target in _SIZES:
            return
        if node.op == "output" or node.is_impure() or is_size(node):  # a size that is made of values
            for value in node.all_input_nodes:
                self._need(value, ALL, node)
        elif where == NOWHERE:
            return
        elif node.target is ops.row_stats_backward.default:
            self._reads_of_backward(node)
        elif node.target is aten.select.int and self._is_columns(args[0]):
            self._need(args[0], where if args[1] in (1, -1) else ALL, node)
        elif node.target in _RESHAPES or self._takes_all(node):
            self._need(args[0], where, node)
        elif self._puts_all(node):
            self._need(args[1], where, node)
        elif self._is_pointwise(node):
            self._is_risky(node, where)
            for value, place in self._reads_of_pointwise(node, where):
                same_shape = _is_tensor(value) and sizes_of(value) == sizes_of(node)
                self._need(value, place if same_shape else ALL, node)
        else:
            for value in node.all_input_nodes:
                self._need(value, ALL, node)

    def _reads_of_pointwise(self, node: Node, where: Where) -> Iterable[tuple[Any, Where]]:
        args = node.args
        if node.target in _MUL:
            yield args[0], both(where, self._nonzero(args[1], node))
            yield args[1], both(where, self._nonzero(args[0], node))
        elif node.target is aten.where.self:
            chosen, other, zero = self._condition(node)
            yield args[0], both(where, zero)
            yield args[1], both(where, chosen)
            yield args[2], both(where, other)
        else:  # a divisor also where what it divides is zero: zero by zero is NaN
            for value in node.all_input_nodes:
                yield value, where

    def _reads_of_backward(self, node: Node) -> None:
        """It reads statistics where a row's gradient is not zero."""
        gradients = [g for i in ROW_GRADIENTS.values() if isinstance(g := node.args[i], Node)]
        for value in (*node.args[:HEAD_ARGS], *gradients):
            self._need(value, ALL, node)
        for value in node.args[LSE_ARG : min(ROW_GRADIENTS.values())]:
            self._need(value, either(*map(self._nonzero_rows, gradients)), node)

    def _is_pointwise(self, node: Node) -> bool:
        if not _is_tensor(node):
            return False
        known = node.target in _CASTS or node.target in _TAME
        return known or (isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags)

    def _is_risky(self, node: Node, where: Where) -> None:
        """Keep in mind a value that must be made zero where it is not needed."""
        dtype = node.meta["val"].dtype
        tame = node.target in _TAME or (node.target in _DIV and node.args[1] not in self.on_stats)
        if node.target is aten.pow.Tensor_Scalar:
            tame = bool(node.args[1] == 2)
        if node.target in _CASTS:
            tame = dtype != torch.float16  # which ends at 65504
        if where != ALL and dtype.is_floating_point and not tame:
            self.risky[node] = where

    def _takes_all(self, node: Node) -> bool:
        """Is that the only entry along a dimension?"""
        return node.target is aten.select.int and same(node.args[0].meta["val"].shape[node.args[1]], 1)  # type: ignore[union-attr]

    def _puts_all(self, node: Node) -> bool:
        return node.target is aten.select_scatter.default and same(node.meta["val"].shape[node.args[2]], 1)

    # -- where is a value not zero?

    def _nonzero(self, value: Any, like: Node) -> Where:
        """Where a value, broadcast to the shape of `like`, is not known to be zero whatever the statistics are."""
        if not _is_tensor(value):
            return ALL
        if is_zero(value):
            return NOWHERE
        if value not in self.late:
            return _literal(value, like)
        args = value.args
        if value.target in _MUL:
            return both(self._nonzero(args[0], like), self._nonzero(args[1], like))
        if value.target in _DIV or value.target in _CASTS or value.target is aten.neg.default:
            return self._nonzero(args[0], like)
        if value.target in _ADD:
            return either(*(self._nonzero(a, like) for a in args[:2]))
        if value.target is aten.where.self:
            return self._condition(value, like)[2]
        if sizes_of(value) != sizes_of(like):
            return ALL
        if value.target is aten.expand.default:
            return self._nonzero(args[0], like)
        if value.target in _RESHAPES or self._takes_all(value):
            return self._nonzero(args[0], args[0])
        if self._puts_all(value):
            return self._nonzero(args[1], args[1])
        return ALL

    def _condition(self, node: Node, like: Node | None = None) -> tuple[Where, Where, Where]:
        """Where a `where` takes its second argument, its third, and where the result is not zero."""
        like = node if like is None else like
        condition, *values = node.args
        a, b = (self._nonzero(v, like) for v in values)
        if condition in self.late:
            return ALL, ALL, either(a, b)
        chosen, other = (_literal(condition, like, wanted) for wanted in (True, False))  # type: ignore[arg-type]
        return chosen, other, either(both(chosen, a), both(other, b))

    def _nonzero_rows(self, gradient: Node) -> Where:
        """The same of a row gradient, [N] or [N, K], row by row."""
        if len(gradient.meta["val"].shape) == 1 or same(gradient.meta["val"].shape[1], 1):
            return self._nonzero(gradient, gradient)
        columns = gradient.args[0] if gradient.target is aten.stack.default and gradient.args[1:] == (1,) else None
        return ALL if columns is None else either(*(self._nonzero(c, c) for c in columns))  # type: ignore[union-attr,arg-type]


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Node) and isinstance(value.meta.get("val"), torch.Tensor)


def _literal(node: Node, like: Node, nonzero: bool = True) -> Where:
    # A number for all rows says nothing of rows.
    if all(same(s, 1) for s in node.meta["val"].shape):
        return ALL
    return frozenset([frozenset([Literal(node, sizes_of(like), nonzero)])])


def sizes_of(node: Node) -> tuple[Any, ...]:
    """A shape of numbers and expressions, which compares without a guard."""
    return tuple(s if isinstance(s, int) else s.node.expr for s in node.meta["val"].shape)
