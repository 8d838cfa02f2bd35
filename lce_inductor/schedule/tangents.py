"""Are a head's row gradients known before the head runs, up to one scalar tangent?

A row gradient g of the joint graph qualifies if

    g = tangent * (a + c * lse)

with one scalar tangent, and with a and c free of anything the head computes. Then a and c are g's own
formula with the tangent set to one. The formula is copied: other uses of the tangent stay as they are.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from ..graph.values import dependents, is_collective, is_zero
from ..ops.schema import ROW_STATS, ROW_STATS_BACKWARD
from ..spec.statistics import GRADIENTS

aten = torch.ops.aten
prims = torch.ops.prims
ops = torch.ops.lce_inductor

# Positions in the ops' arguments: of row gradients and lse in row_stats_backward, of what follows a head's tensors.
ROW_GRADIENTS = {name: ROW_STATS_BACKWARD[name] for name in GRADIENTS}
LSE_ARG = ROW_STATS_BACKWARD["lse"]
HEAD_ARGS = ROW_STATS["epilogue"]


class Illegal(NamedTuple):
    """Why the gradients can't move into the forward."""

    why: str


class Affine(NamedTuple):
    """A value `const + slope * lse`, row by row; None means zero."""

    const: Node | None
    slope: Node | None


@dataclasses.dataclass(frozen=True)
class RowGradients:
    """Row gradients with the tangent set to one; `new` are the nodes written for them, in order."""

    tangent: Node
    grads: dict[str, Affine]
    new: list[Node]


# Elementwise or shape-only in their first argument, and zero for zero: g stays linear through them.
LINEAR = {
    aten.neg.default, aten.expand.default, aten.view.default, aten.reshape.default, aten._unsafe_view.default,
    aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.alias.default,
    aten.clone.default, aten.permute.default, aten.select.int, aten.slice.Tensor, aten.t.default,
    aten.transpose.int, aten._to_copy.default, prims.convert_element_type.default, aten.detach.default,
    aten.select_backward.default, aten.slice_backward.default, aten.constant_pad_nd.default,
    aten.gather.default,
}  # fmt: skip
_REDUCING = {aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim}
_ADD = {aten.add.Tensor: 1, aten.sub.Tensor: -1}
SCATTER = {aten.select_scatter.default, aten.slice_scatter.default}


def origin(value: Any) -> Any:
    """The value behind aliases: what autograd saves for the backward shows as an alias."""
    while isinstance(value, Node) and value.target in (aten.alias.default, aten.detach.default):
        value = value.args[0]
    return value


def heads_of(graph: Graph) -> list[tuple[Node, Node]]:
    """Pairs of a row_stats node and its row_stats_backward node."""
    pairs = []
    forwards = list(graph.find_nodes(op="call_function", target=ops.row_stats.default))
    for backward in graph.find_nodes(op="call_function", target=ops.row_stats_backward.default):
        if is_zero(backward.args[LSE_ARG]):
            continue  # of a gradient without a softmax
        own = [f for f in forwards if has_lse_of(backward, f)]
        alike = [f for f in forwards if _inputs(f) == _inputs(backward)]  # whose lse is that of all processes
        pairs += [(forward, backward) for forward in (own or alike)[:1]]
    return pairs


def has_lse_of(backward: Node, forward: Node) -> bool:
    lse = origin(backward.args[LSE_ARG])
    return isinstance(lse, Node) and lse.target is operator.getitem and lse.args[0] is forward


def _inputs(op: Node) -> list[Any]:
    return [origin(a) for a in op.args[:HEAD_ARGS]]


def row_gradients(graph: Graph, forward: Node, backward: Node) -> RowGradients | Illegal:
    """The row gradients of a head with the tangent set to one, or why there are none. Writes nodes before `forward`,
    which nobody uses yet."""
    lse = origin(backward.args[LSE_ARG])
    if sum(1 for f, _ in heads_of(graph) if f is forward) > 1:
        return Illegal("the head has several backwards")
    if _inputs(forward) != _inputs(backward):
        return Illegal("the backward reads other inputs than the forward")
    if not has_lse_of(backward, forward):
        return Illegal("the softmax is over the classes of other processes, too")
    evaluate = _Evaluate(graph, forward, lse)
    try:
        grads = {name: evaluate(backward.args[i]) for name, i in ROW_GRADIENTS.items() if backward.args[i] is not None}
        for name, value in grads.items():
            if value.slope is not None and name != "g_lse":
                raise _NotLinear("a row gradient other than that of lse depends on lse")
        if len(evaluate.roots) != 1:
            raise _NotLinear("the row gradients depend on several tangents, or on none")
    except _NotLinear as reason:
        for node in reversed(evaluate.new):
            graph.erase_node(node)
        return Illegal(str(reason))
    return RowGradients(next(iter(evaluate.roots)), grads, evaluate.new)


class _NotLinear(Exception):
    pass


class _Evaluate:
    """Evaluates nodes as Affine values with the tangent set to one."""

    def __init__(self, graph: Graph, forward: Node, lse: Any) -> None:
        self.graph, self.forward, self.lse = graph, forward, lse
        tangents = [n for n in graph.nodes if n.op == "placeholder" and "tangents" in str(n.target)]
        # Through data only; `behind` counts what merely reads a size, too.
        self.on_tangent = dependents(graph, set(tangents))
        self.on_head = dependents(graph, {forward})
        self.behind = dependents(graph, {forward, *tangents}, sizes=True)
        self._cleaned: dict[Node, Any] = {}
        self.tangents = set(tangents)
        self.roots: set[Node] = set()
        self.new: list[Node] = []
        self._known: dict[Node, Affine] = {}

    def __call__(self, node: Any) -> Affine:
        """The value of a node; a node that depends on neither tangent nor head is its own constant."""
        if not isinstance(node, Node):
            raise _NotLinear("a row gradient is not a tensor")
        if node not in self._known:
            self._known[node] = self._evaluate(node)
        return self._known[node]

    def _free(self, value: Any) -> bool:
        """Are the tensors in a value known without the tangent and the head?"""
        found: list[Node] = []
        torch.fx.map_arg(value, found.append)
        return all(n not in self.on_tangent and n not in self.on_head for n in found)

    def _clean(self, node: Node) -> Any:
        """A free node, made anew if a size in its making is read off something that is not there yet."""
        if node not in self.behind:
            return node
        if node not in self._cleaned:
            self._cleaned[node] = self._size(node) if is_size(node) else self._copy(node, {})
        return self._cleaned[node]

    def _size(self, node: Node) -> Any:
        """A symbolic size, read off something that is there before the head."""
        size = node.meta["val"]
        if isinstance(size, int):
            return size
        for other in self.graph.nodes:
            if other not in self.behind and is_size(other):
                value = other.meta["val"]
                if isinstance(value, torch.SymInt) and value.node.expr == size.node.expr:
                    return other
        x = self.forward.args[0]
        for dim, value in enumerate(x.meta["val"].shape):  # type: ignore[union-attr]
            if isinstance(value, torch.SymInt) and value.node.expr == size.node.expr:
                return self._sym_size(x, dim, value)
        if node.op == "call_function" and not node.kwargs and all(map(is_size, node.all_input_nodes)):
            return self._copy(node, {})  # arithmetic of sizes
        raise _NotLinear(f"a size depends on the head: {node.format_node() or node.name}")

    def _sym_size(self, x: Any, dim: int, value: Any) -> Node:
        with self.graph.inserting_before(self.forward):
            node = self.graph.call_function(aten.sym_size.int, (x, dim))
        node.meta["val"] = value
        self.new.append(node)
        return node

    def _evaluate(self, node: Node) -> Affine:
        if node in self.tangents:
            return Affine(self._one(node), None)
        if is_zero(node):
            return Affine(None, None)
        if self._free(node):
            return Affine(self._clean(node), None)
        if node is self.lse:
            return Affine(None, self._ones_like(node))
        if node.target in LINEAR and all(self._free(a) for a in node.args[1:]):
            return self._map(node, 0)
        if node.target in _REDUCING and all(self._free(a) for a in node.args[1:]):
            if self(node.args[0]).slope is not None:
                raise _NotLinear("lse is summed on the way to a row gradient")
            return self._map(node, 0)
        if node.target in (aten.mul.Tensor, aten.mul.Scalar):
            return self._product(node)
        if node.target is aten.pow.Tensor_Scalar and node.args[1] == 1:
            return self(node.args[0])
        if node.target in (aten.div.Tensor, aten.div.Scalar) and self._free(node.args[1]):
            return self._map(node, 0)
        if node.target is aten.where.self and self._free(node.args[0]):
            return self._each(node, (1, 2))
        if node.target in _ADD and not node.kwargs:
            return self._each(node, (0, 1))
        if node.target in SCATTER:
            return self._each(node, (0, 1))
        if node.target is aten.stack.default:
            return self._stacked(node)
        raise _NotLinear(f"not linear in the tangent: {node.format_node() or node.name}")

    def _stacked(self, node: Node) -> Affine:
        """Gradients of several targets, side by side."""
        columns = []
        for column in node.args[0]:  # type: ignore[union-attr]
            zero = is_zero(column)
            value = self(column)
            if value.slope is not None or (value.const is None and not zero) or not (zero or column in self.on_tangent):
                raise _NotLinear(f"not linear in the tangent: {node.format_node() or node.name}")
            columns.append(self._clean(column) if zero else value.const)  # type: ignore[arg-type]
        return Affine(self._copy(node, {0: columns}), None)

    def _map(self, node: Node, index: int) -> Affine:
        value = self(node.args[index])
        parts = (None if p is None else self._copy(node, {index: p}) for p in value)
        return Affine(*parts)

    def _each(self, node: Node, indices: tuple[int, int]) -> Affine:
        """Operations that are linear in two arguments together: where, add, sub, and the scatters."""
        if node in self.on_tangent:
            for i in indices:
                arg = node.args[i]
                if not is_zero(arg) and arg not in self.on_tangent:
                    raise _NotLinear(f"not linear in the tangent: {node.format_node() or node.name}")
        values = [self(node.args[i]) if isinstance(node.args[i], Node) else Affine(None, None) for i in indices]
        if any(not isinstance(node.args[i], Node) and node.args[i] != 0 for i in indices):
            raise _NotLinear(f"a constant is added: {node.format_node() or node.name}")
        parts: list[Node | None] = []
        for part in zip(*values):
            if part == (None, None):
                parts.append(None)
                continue
            shape = node.meta["val"].shape
            whole = node.target not in SCATTER and any(
                p is not None and len(p.meta["val"].shape) == len(shape) for p in part
            )
            filled = {i: p if p is not None else self._zeros_like(node.args[i], whole) for i, p in zip(indices, part)}
            parts.append(self._copy(node, filled))
        return Affine(*parts)

    def _product(self, node: Node) -> Affine:
        left, right = node.args[0], node.args[1]
        if isinstance(left, Node) and isinstance(right, Node) and {left, right} <= self.on_tangent:
            raise _NotLinear(f"not linear in the tangent: {node.format_node() or node.name}")
        if not isinstance(right, Node):
            return self._map(node, 0)
        if not isinstance(left, Node):
            return self._map(node, 1)
        a, b = self(left), self(right)
        if a.slope is not None and b.slope is not None:
            raise _NotLinear("a row gradient depends on lse squared")

        def times(p: Node | None, q: Node | None) -> Node | None:
            return None if p is None or q is None else self._copy(node, {0: p, 1: q})

        slope = times(a.slope, b.const) if a.slope is not None else times(a.const, b.slope)
        return Affine(times(a.const, b.const), slope)

    def _copy(self, node: Node, args: dict[int, Any]) -> Node:
        if is_collective(node):
            raise _NotLinear("a collective would be done twice")
        filled = tuple(args[i] if i in args else torch.fx.map_arg(a, self._clean) for i, a in enumerate(node.args))
        return self._write(node.target, filled, node, node.kwargs)

    def _write(self, target: Any, args: tuple[Any, ...], like: Node, kwargs: Any = None) -> Node:
        with self.graph.inserting_before(self.forward):
            new = self.graph.call_function(target, args, kwargs or {})
        new.meta = {k: like.meta[k] for k in ("val", "stack_trace", "recompute", "ac_graph_id") if k in like.meta}
        self.new.append(new)
        return new

    def _one(self, tangent: Node) -> Node:
        self.roots.add(tangent)
        value = tangent.meta["val"]
        if any(not isinstance(s, int) or s != 1 for s in value.shape):
            raise _NotLinear("the tangent is not a scalar")
        return self._write(
            aten.full.default, (list(value.shape), 1), tangent, {"dtype": value.dtype, "device": value.device}
        )

    def _ones_like(self, node: Node) -> Node:
        # lse itself is not there yet: a tensor of its shape is made from x, which is.
        return self._rows(1)

    def _rows(self, fill: int) -> Node:
        value = self.lse.meta["val"]
        rows = value.shape[0]
        if not isinstance(rows, int):
            rows = self._sym_size(self.forward.args[0], 0, rows)
        return self._write(aten.full.default, ([rows], fill), self.lse, {"dtype": value.dtype, "device": value.device})

    def _zeros_like(self, node: Any, scalar: bool) -> Any:
        if not isinstance(node, Node):
            return node
        if is_zero(node):
            return self._clean(node)
        value = node.meta["val"]
        # Where the other operand has the result's shape, a scalar broadcasts.
        if value.dim() == 0 or scalar:
            return self._write(aten.full.default, ([], 0), node, {"dtype": value.dtype, "device": value.device})
        raise _NotLinear("a part of a row gradient depends on lse, another does not")


def is_size(node: Node) -> bool:
    """Is the value a size rather than a tensor?"""
    return isinstance(node.meta.get("val"), (int, torch.SymInt))
