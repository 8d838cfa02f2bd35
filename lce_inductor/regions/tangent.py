"""Is a backward part linear in one scalar tangent?"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from ..graph.values import is_zero
from .aten_ops import FMA, Crossing
from .labels import Labels
from .tags import is_one, shape_of

aten = torch.ops.aten
prims = torch.ops.prims

# Linear in the first argument, and of degree zero in the others.
_FIRST = {
    aten.neg.default, aten.expand.default, aten.view.default, aten.reshape.default, aten._unsafe_view.default,
    aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.alias.default,
    aten.clone.default, aten.permute.default,
    aten.select.int, aten.slice.Tensor, aten.t.default, aten.transpose.int, aten._to_copy.default,
    prims.convert_element_type.default, aten.detach.default, aten.sum.default, aten.sum.dim_IntList, aten.mean.default,
    aten.mean.dim, aten.div.Tensor, aten.div.Scalar, aten.gather.default, aten.index.Tensor, aten.index_select.default,
    aten.constant_pad_nd.default, aten.cumsum.default, aten.flip.default, prims.rev.default, aten.split.Tensor,
    aten.split_with_sizes.default, aten.unbind.int, aten.mul.Scalar,
}  # fmt: skip
# Linear in two arguments together, by position.
_BOTH = {
    aten.add.Tensor: (0, 1), aten.sub.Tensor: (0, 1), aten.where.self: (1, 2), aten.slice_scatter.default: (0, 1),
    aten.select_scatter.default: (0, 1), aten.scatter.src: (0, 3), aten.scatter_add.default: (0, 3),
    aten.index_put.default: (0, 2), aten._unsafe_index_put.default: (0, 2), aten.masked_fill.Scalar: (0, 2),
    aten.scatter.value: (0, 3),
}  # fmt: skip


class Tangent:
    """Checks nodes, and collects the tangents that they are linear in."""

    def __init__(self, labels: Labels, tangents: set[Node]) -> None:
        self.labels, self.tangents = labels, tangents
        self.roots: dict[Node, None] = {}
        self._seen: set[Node] = set()

    def check(self, node: Any) -> None:
        """Raises Crossing unless the node is linear in the tangent, or does not depend on it at all."""
        todo = [node]
        while todo:
            node = todo.pop()
            if node in self._seen or node not in self.labels.on_tangent:
                continue
            self._seen.add(node)
            if node in self.tangents:
                if any(not is_one(s) for s in shape_of(node) or ()):
                    raise Crossing("the tangent is not a scalar")
                self.roots[node] = None
                continue
            todo += self._linear(node)

    def _on(self, value: Any) -> bool:
        found: list[Node] = []
        torch.fx.map_arg(value, found.append)
        return any(n in self.labels.on_tangent for n in found)

    def _linear(self, node: Node) -> list[Node]:
        """The operands that have to be linear, too."""
        target, args = node.target, node.args
        if target is aten.mul.Tensor and self._on(args[0]) != self._on(args[1]):
            return [args[self._on(args[1])]]  # type: ignore[list-item]
        if target in _FIRST and not self._on(args[1:]):
            return [args[0]]  # type: ignore[list-item]
        if target in _BOTH:
            both = {args[i] for i in _BOTH[target] if i < len(args)}
            others = [a for a in args if not isinstance(a, (Node, int, float)) or a not in both]
            if not self._on(others) and all(self._on(a) or is_zero(a) for a in both):
                return [a for a in both if isinstance(a, Node)]
        if target is aten.copy.default:  # its shape is that of the first, its values those of the second
            return [args[1]]  # type: ignore[list-item]
        if target is aten.pow.Tensor_Scalar and args[1] == 1:
            return [args[0]]  # type: ignore[list-item]
        if target is aten.cat.default and all(self._on(a) or is_zero(a) for a in args[0]):  # type: ignore[union-attr]
            return [a for a in args[0] if self._on(a)]  # type: ignore[union-attr,misc]
        if target is operator.getitem:
            return [args[0]]  # type: ignore[list-item]
        if target is FMA and FMA is not None:  # a * b + c
            a, b, c = args
            if self._on(a) != self._on(b) and (self._on(c) or is_zero(c)):
                return [x for x in args if self._on(x)]  # type: ignore[misc]
        raise Crossing(f"not linear in the tangent: {node.format_node() or node.name}")
