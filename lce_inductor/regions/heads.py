"""Products that may make logits: the last ones of the forward, as far as anything but the backward reads them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.fx import Graph, Node

from ..graph.values import equal_values
from .aten_ops import bound
from .labels import PRODUCTS
from .tags import is_one, shape_of

aten = torch.ops.aten
# Products that nothing here computes, and layers that are made of products. Not every torch has all of them.
_FOREIGN = {
    getattr(aten, name)
    for name in """
    _addmm_activation _dyn_quant_matmul_4bit _foreach_mm _grouped_mm _int_mm _mixed_dtypes_linear _scaled_grouped_mm
    _scaled_grouped_mm_v2 _scaled_mm _scaled_mm_v2 _sparse_mm _sparse_semi_structured_linear _sparse_semi_structured_mm
    _trilinear _weight_int4pack_mm _weight_int4pack_mm_for_cpu _weight_int8pack_mm addbmm addmv addr baddbmm bilinear
    dot einsum linalg_matmul linear matmul mkldnn_linear mv
    _conv_depthwise2d _convolution _slow_conv2d_forward conv_depthwise3d convolution convolution_overrideable
    cudnn_convolution miopen_convolution mkldnn_convolution slow_conv3d slow_conv_dilated2d slow_conv_dilated3d
    slow_conv_transpose2d slow_conv_transpose3d
    _cudnn_attention_forward _efficient_attention_forward _flash_attention_forward _native_multi_head_attention
    _scaled_dot_product_attention_math _scaled_dot_product_cudnn_attention _scaled_dot_product_efficient_attention
    _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu
    _scaled_dot_product_fused_attention_overrideable scaled_dot_product_attention
    _cudnn_rnn _thnn_fused_gru_cell _thnn_fused_lstm_cell gru gru_cell lstm lstm_cell miopen_rnn mkldnn_rnn_layer
    quantized_gru quantized_lstm rnn_relu rnn_relu_cell rnn_tanh rnn_tanh_cell
    convolution_backward linear_backward matmul_backward mkldnn_linear_backward
    _efficient_attention_backward _flash_attention_backward _scaled_dot_product_cudnn_attention_backward
    _scaled_dot_product_efficient_attention_backward _scaled_dot_product_flash_attention_backward
    _scaled_dot_product_flash_attention_for_cpu_backward _cudnn_rnn_backward mkldnn_rnn_layer_backward
    """.split()
    if hasattr(aten, name)
}
_ATTENTION = {
    getattr(torch.ops.higher_order, name)
    for name in ("flex_attention", "flex_attention_backward")
    if hasattr(torch.ops.higher_order, name)
}


class Head(NamedTuple):
    """x [N, H], weight [H, V] and bias [V] of a product that makes logits."""

    x: Node
    weight: Node
    bias: Node | None

    @staticmethod
    def of(node: Node) -> Head:
        """The operands of a product."""
        a = bound(node)
        names = list(a)
        if node.target in (aten.mm.default, aten.bmm.default):
            return Head(a[names[0]], a[names[1]], None)
        return Head(a[names[1]], a[names[2]], a["self"])


def is_other_product(node: Node) -> bool:
    """addmm(b, x, w, beta=..., alpha=...), or b with rows of its own: no product that anything here computes."""
    a = bound(node)
    bias = shape_of(a["self"]) or () if "beta" in a else ()
    return any(a.get(k, 1) != 1 for k in ("beta", "alpha")) or not all(map(is_one, bias[:-1]))


def factors(node: Node) -> tuple[Node, Node]:
    """x and weight of any product, scaled ones included."""
    a = bound(node)
    names = list(a)
    first = 0 if node.target in (aten.mm.default, aten.bmm.default) else 1
    return a[names[first]], a[names[first + 1]]


def tangents_of(graph: Graph) -> set[Node]:
    """Incoming gradients, as AOTAutograd names them. None in a graph of inference."""
    return {n for n in graph.find_nodes(op="placeholder") if "tangents" in str(n.target)}


def candidates(graph: Graph, on_tangent: set[Node]) -> list[Node]:
    """Products [N, V] of the forward that no other product of the forward reads, in order."""
    feeds: set[Node] = set()  # nodes that a product of the forward depends on
    found = []
    for node in reversed(graph.nodes):
        if node in on_tangent or node.op not in ("call_function", "placeholder", "get_attr"):
            continue
        users = [u for u in node.users if u not in on_tangent or u.op == "output"]
        if any(u in feeds or is_product(u) for u in users):
            feeds.add(node)
        elif node.op == "call_function" and node.target in PRODUCTS and users and _is_head(node):
            found.append(node)
    return [n for n in found[::-1] if not _is_weight(n, found)]


def _is_weight(node: Node, others: list[Node]) -> bool:
    """Has this the shape of a head's weight, and another weight itself? The product of an adapter's factors is no head,
    but H rows of logits are."""
    shape, own = shape_of(node), factors(node)[1]
    weights = [w for n in others if n is not node and not equal_values(w := factors(n)[1], own)]
    return any(len(w) == 2 and shape in (w, w[::-1]) for w in (shape_of(w) or () for w in weights))


def is_product(node: Node) -> bool:
    """A product of matrices or what is made of some, ours or not."""
    if node.op != "call_function":
        return False
    target = node.target
    return target in PRODUCTS or target in _ATTENTION or getattr(target, "overloadpacket", None) in _FOREIGN


def _is_head(node: Node) -> bool:
    """Rows and classes: two dimensions of more than one."""
    shape = shape_of(node)
    if shape is None or not node.meta["val"].dtype.is_floating_point:
        return False
    several = [s for s in shape if not is_one(s)]
    return len(several) == 2 and not is_one(shape[-1]) and not is_one(shape[-2])
