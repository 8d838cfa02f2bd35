"""What keeps rows of zeros as they are."""

from __future__ import annotations

import torch
from torch.fx import Node

from ..graph.values import is_zero

aten = torch.ops.aten

_LINEAR = {
    aten.mul.Tensor, aten.mul.Scalar, aten.neg.default, aten.clone.default, aten.alias.default, aten.detach.default,
    torch.ops.prims.convert_element_type.default, aten._to_copy.default, aten.expand.default, aten.unsqueeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.permute.default, aten.sum.dim_IntList, aten.mean.dim, aten.slice.Tensor,
    aten.select.int,
}  # fmt: skip


def keeps_zeros(node: Node, arg: Node) -> bool:
    """Is a row of the result zero where that of `arg` is, and linear in it?"""
    if node.target in _LINEAR:
        return True
    if node.target in (aten.div.Tensor, aten.div.Scalar):
        return node.args[0] is arg
    if node.target is aten.where.self:
        return all(a is arg or is_zero(a) for a in node.args[1:])
    if node.target in (aten.slice_scatter.default, aten.select_scatter.default):
        return node.args[1] is arg and is_zero(node.args[0])
    if node.target is aten.index_put.default:
        return node.args[2] is arg and is_zero(node.args[0])
    return node.target is aten.constant_pad_nd.default and (len(node.args) < 3 or bool(node.args[2] == 0))
