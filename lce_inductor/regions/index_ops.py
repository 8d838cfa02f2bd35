"""What index tensors pick, and where they put values: facts as those of aten_ops.py."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from .aten_ops import Crossing, Fact, Map, aten, bound, prims, rank, rule
from .tags import same_size, shape_of


@rule(aten.index.Tensor, aten._unsafe_index.Tensor)
def index(node: Node) -> Fact:
    x: Any = node.args[0]
    indices: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    m, given = rank(x), [(d, i) for d, i in enumerate(indices) if i is not None]
    if len(given) == 2 and m == 2 and given[0][0] == 0 and counts_rows(given[0][1], x):
        return Fact([(x, [0, None]), (given[1][1], [0])], kind="pick")
    if len(given) != 1:
        raise Crossing("an index along several dimensions")
    d, i = given[0]
    if i.meta["val"].dtype in (torch.bool, torch.uint8):
        raise Crossing("a mask of another number of results")
    k = rank(i)
    mapped: Map = [None if e == d else e if e < d else e + k - 1 for e in range(m)]
    return Fact([(x, mapped), (i, [d + e for e in range(k)])], kind="index")


@rule(aten.index_put.default, aten._unsafe_index_put.default)
def index_put(node: Node) -> Fact:
    a = bound(node)
    x, indices, values = a["self"], list(a["indices"]), a["values"]
    m, given = rank(x), [(d, i) for d, i in enumerate(indices) if i is not None]
    few = rank(values)
    if is_masked(node):
        same: Map = list(range(m))
        return Fact([(x, same), (indices[0], same), (values, [])], kind="masked")
    if len(given) == 2 and m == 2 and given[0][0] == 0 and counts_rows(given[0][1], x) and few <= 1:
        return Fact([(x, [0, None]), (given[1][1], [0]), (values, [0] if few else [])], kind="put")
    if len(given) != 1 or (few and (few != m or rank(given[0][1]) != 1)):
        raise Crossing("values put along several dimensions")
    d, i = given[0]
    mapped: Map = [None if e == d else e for e in range(m)]
    return Fact([(x, mapped), (i, [None] * rank(i)), (values, mapped if few else [])], kind="index_put")


def is_masked(node: Node) -> bool:
    """Is one number put wherever a bool for each element says so?"""
    a = bound(node)
    indices, shape = list(a["indices"]), shape_of(a["self"]) or ()
    if len(indices) != 1 or not isinstance(indices[0], Node) or rank(a["values"]) != 0:
        return False
    here = shape_of(indices[0]) or ()
    alike = len(here) == len(shape) > 0 and all(map(same_size, here, shape))
    return alike and indices[0].meta["val"].dtype == torch.bool


def counts_rows(index: Node, x: Node) -> bool:
    """Is this 0, 1, 2, ... up to the number of rows of x?"""
    while index.target in (aten.alias.default, aten.detach.default, prims.convert_element_type.default):
        index = index.args[0]  # type: ignore[assignment]
    if index.target is prims.iota.default:
        plain = index.kwargs.get("start", 0) == 0 and index.kwargs.get("step", 1) == 1
    else:
        plain = index.target is aten.arange.default and len(index.args) == 1
    shape = shape_of(index)
    return bool(plain) and shape is not None and same_size(shape[0], (shape_of(x) or (0,))[0])
