"""Another way to write a product that makes logits, for one that is left alone as it is written.

turned        mm(w, x^T) = mm(x, w^T)^T: the rows come first, where labels look for them
taken apart   addmm(b, x, w^T, alpha=2) = 2 * mm(x, w^T) + b: the scaling is one step more behind the product

Whether the head is rewritten then is for `decide` to say; if not, the graph goes back to what it was.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from ..graph.write import Writer
from .aten_ops import bound, rank
from .heads import factors
from .labels import Problem

aten = torch.ops.aten

# Codes of heads that may be left alone for how their product is written.
TURNED, APART = "crossing", "foreign-product"


def can_respell(node: Node, problem: Problem) -> bool:
    """Is there another way, for a product that is left alone for this? Not for a row of many that is selected: turned,
    it is a class of many rows, and what selects it still computes all."""
    code = problem.code
    if code == TURNED and problem.node is node:  # nothing reads along its rows
        return False
    if node.target is aten.addmm.default:
        # Eager rounds the logits once; in 16 bits two roundings would count.
        a = bound(node)
        numbers = all(isinstance(a.get(k, 1), (int, float)) for k in ("alpha", "beta"))
        numbers = numbers and a.get("alpha", 1) != 0  # then a NaN in the product is not read
        return code in (TURNED, APART) and numbers and node.meta["val"].dtype in (torch.float32, torch.float64)
    return node.target in (aten.mm.default, aten.bmm.default) and code == TURNED


def respell(graph: Graph, node: Node, code: str) -> Node:
    """The product that stands for it now; the old one is still there."""
    writer = Writer(graph, node, node)
    left, right = factors(node)
    if code == TURNED:
        left, right = _turned(writer, right), _turned(writer, left)
    product = out = writer.call(aten.bmm.default if rank(left) == 3 else aten.mm.default, left, right)
    if code == TURNED:
        out = _turned(writer, out)
    if node.target is aten.addmm.default:
        a = bound(node)
        out = _times(writer, out, a.get("alpha", 1))
        if a.get("beta", 1) != 0:  # then a NaN in it is not read
            out = writer.call(aten.add.Tensor, out, _times(writer, a["self"], a.get("beta", 1)))
    for new in writer.new:
        new.meta |= {k: node.meta[k] for k in ("recompute", "ac_graph_id") if k in node.meta}
    node.replace_all_uses_with(out)
    return product


def _turned(writer: Writer, matrix: Node) -> Node:
    order = [0, 2, 1] if rank(matrix) == 3 else [1, 0]
    if matrix.target is aten.permute.default and matrix.args[1] == order:
        before: Any = matrix.args[0]
        return before  # type: ignore[no-any-return]
    return writer.call(aten.permute.default, matrix, order)


def _times(writer: Writer, value: Node, factor: float) -> Node:
    return value if factor == 1 else writer.call(aten.mul.Tensor, value, factor)
