"""Outputs of a graph that may be logits: what depends on a matrix product that no other product reads.

Products are known by what they are, not by what they are called: a function of that name may be anybody's.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, GraphModule, Node

from ..config import Config
from ..graph.values import info, numel_hint

aten = torch.ops.aten

PRODUCTS = {
    F.linear, torch.matmul, torch.mm, torch.addmm, torch.bmm, torch.baddbmm, torch.einsum, torch.tensordot, torch.inner,
    torch.linalg.matmul, operator.matmul, operator.imatmul, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.addmm,
    torch.Tensor.addmm_, torch.Tensor.bmm, torch.Tensor.baddbmm, torch.Tensor.inner, torch.Tensor.__matmul__,
    torch.Tensor.__rmatmul__, aten.linear.default, aten.matmul.default, aten.mm.default, aten.addmm.default,
    aten.bmm.default, aten.baddbmm.default, aten.einsum.default,
}  # fmt: skip


def is_product(node: Node) -> bool:
    """A matrix product, or a higher-order operation (a checkpoint, an autograd.Function) with one inside."""
    if node.op == "call_method":
        return getattr(torch.Tensor, str(node.target), None) in PRODUCTS
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return any(is_product(inner) for body in _bodies(node) for inner in body.nodes)
    return node.target in PRODUCTS


def _bodies(node: Node) -> Iterator[Graph]:
    for arg in node.all_input_nodes:
        body = attribute(arg) if arg.op == "get_attr" else None
        if isinstance(body, GraphModule):
            yield body.graph


def attribute(node: Node) -> Any:
    """What a get_attr node stands for."""
    value: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        value = getattr(value, name)
    return value


def is_size(node: Node) -> bool:
    """A size says nothing about the values of what it is the size of."""
    return isinstance(node.meta.get("example_value", node.meta.get("val")), (int, torch.SymInt))


def last_products(graph: Graph) -> list[Node]:
    """Products that no other product depends on, in order: heads, and what else ends in the graph's outputs."""
    feeds: set[Node] = set()
    found = []
    for node in reversed(graph.nodes):
        if node.op == "output" or is_size(node):
            continue
        product = is_product(node)
        if any(user in feeds for user in node.users):
            feeds.add(node)
        elif product:
            found.append(node)
        if product:
            feeds.update(node.all_input_nodes)
    return found[::-1]


def large_outputs(graph: Graph, config: Config) -> list[Node]:
    """Outputs of the size and kind of logits, each once."""
    (output,) = graph.find_nodes(op="output")
    found = []
    for node in output.all_input_nodes:
        known = info(node)
        if known is None or not known.plain or not known.dtype.is_floating_point or len(known.shape) < 2:
            continue
        large = numel_hint(known.shape) * known.dtype.itemsize >= config.min_logits_bytes
        if large and node.op in ("call_function", "call_method"):
            found.append(node)
    return found
