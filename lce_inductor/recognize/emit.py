"""Writing nodes: the small vocabulary in which rules say what replaces a node."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Graph, Node

from ..ops.types import ARGMAX
from .canon import Attr
from .forms import CLASSES, Ref, RowOp, Want

if TYPE_CHECKING:
    from .forms import ClassMap, Terminal

aten = torch.ops.aten
PROVENANCE = ("stack_trace", "nn_module_stack", "source_fn_stack", "custom")
VALUES = ("example_value", "val", "tensor_meta")


def materialize(graph: Graph, value: Any, replaced: dict[Node, Node]) -> Any:
    """An Attr becomes a get_attr node, a node that was rewritten its replacement."""
    if isinstance(value, Attr):
        return graph.get_attr(value.path)
    while isinstance(value, Node) and value in replaced:
        value = replaced[value]
    return value


def replay(graph: Graph, op: RowOp, value: Node, classes: Any) -> Node:
    """Apply a row operation to a tensor whose last dimension, in the class dimension's place, has size `classes`."""
    if op.name == "getitem":
        return graph.call_function(operator.getitem, (value, op.args[0]))
    args = tuple(classes if a is CLASSES else a for a in op.args)
    if op.name in ("reshape", "permute"):
        return graph.call_function(getattr(aten, op.name).default, (value, list(args)))
    if op.name == "unflatten":
        return graph.call_function(aten.unflatten.int, (value, op.args[0], list(op.args[1])))
    overload = {"flatten": aten.flatten.using_ints, "unsqueeze": aten.unsqueeze.default, "squeeze": aten.squeeze.dim}
    return graph.call_function(overload[op.name], (value, *args))


class Emitter:
    """Writes the replacement of one terminal, right before it.

    Statistics come with the shape of the rows that the head computed; `rows` brings them to the rows of the
    terminal's form, class dimension of size 1 in its place.
    """

    def __init__(
        self,
        graph: Graph,
        terminal: Terminal,
        columns: dict[Want, Node],
        done: int,
        num_classes: Any,
        replaced: dict[Node, Node],
    ) -> None:
        self.graph, self.terminal, self.num_classes = graph, terminal, num_classes
        self._columns, self._done, self._replaced = columns, done, replaced

    @property
    def form(self) -> ClassMap:
        return self.terminal.form

    def stat(self, want: Want) -> Node:
        """The wanted statistic, row by row of the head's own rows."""
        node = self._columns[want]
        return self.call(aten.detach.default, node) if self.form.detached else node

    def rows(self, stat: Node) -> Node:
        """A statistic in the shape of the form, class dimension of size 1."""
        node = self.call(aten.unsqueeze.default, stat, -1)
        for op in self.form.rows[self._done :]:
            node = replay(self.graph, op, node, 1)
        if not self.form.class_last:
            node = self.call(aten.movedim.int, node, -1, self.form.class_dim)
        return node

    def per_row(self, want: Want) -> Node:
        """The wanted statistic with one value per row of the form, in whatever shape."""
        stat = self.stat(want)
        return self.rows(stat) if any(op.selects for op in self.form.rows[self._done :]) else stat

    def keep(self, node: Node, keepdim: bool) -> Node:
        return node if keepdim else self.call(aten.squeeze.dim, node, self.form.class_dim)

    def finish(self, node: Node, dtype: torch.dtype) -> Node:
        """In the dtype that the replaced node had; a tensor of its own, since the user may write to it."""
        like = self.terminal.node
        return self.call(aten._to_copy.default, node, like=like, dtype=dtype)

    def own(self, node: Node) -> Node:
        """A tensor of its own in place of the replaced node."""
        return self.call(aten.clone.default, node, like=self.terminal.node)

    def with_zeros(self, value: Any) -> Any:
        """The replacement, plus zero times the offsets that cancelled: so they get a gradient of zero."""
        if self.form.detached or all(w.bit == ARGMAX for w in self.terminal.wants):
            return value
        if isinstance(value, tuple):
            return (None if value[0] is None else self.with_zeros(value[0]), *value[1:])
        for offset in self.form.cancelled:
            finite = self.call(aten.nan_to_num.default, self.ref(offset))
            zero = self.call(aten.sum.default, self.times(finite, 0.0))
            value = self.call(aten.add.Tensor, value, self.call(aten.type_as.default, zero, value), like=value)
        return value

    def plus(self, a: Node, b: Node, sign: int = 1) -> Node:
        return self.call(aten.add.Tensor if sign > 0 else aten.sub.Tensor, a, b)

    def minus(self, a: Node, b: Node) -> Node:
        return self.plus(a, b, -1)

    def times(self, a: Node, factor: Any) -> Node:
        return self.call(aten.mul.Tensor, a, factor)

    def divided(self, a: Node, divisor: Any) -> Node:
        return self.call(aten.div.Tensor, a, divisor)

    def unary(self, name: str, a: Node) -> Node:
        return self.call(getattr(aten, name).default, a)

    def cat(self, nodes: list[Node], dim: int) -> Node:
        return self.call(aten.cat.default, nodes, dim)

    def ref(self, value: Ref | None) -> Any:
        return materialize(self.graph, value, self._replaced)

    def call(self, target: Callable[..., Any], *args: Any, like: Node | None = None, **kwargs: Any) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        source = self.terminal.node if like is None else like
        keep = PROVENANCE if like is None else (*PROVENANCE, *VALUES)
        node.meta = {k: v for k, v in source.meta.items() if k in keep}
        return node

    def op(self, name: str, *args: Any, like: Node | None = None) -> Node:
        return self.call(getattr(torch.ops.lce_inductor, name).default, *args, like=like)
