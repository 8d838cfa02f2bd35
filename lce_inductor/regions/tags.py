"""What each dimension of a tensor is to a region: rows, or classes and whatever else belongs to one row.

Tags are a string, one letter a dimension:

    r  rows: all `r` dimensions together, in order, count the rows of the region
    l  local: classes, columns of several targets, ... of one row
    .  size one, or broadcast

Inside a region's program rows are one dimension, the first: a tensor `rrl` [B, T, V] is [n, V] there, and `lrl`
[3, N, V] is [n, 3, V]. Sizes may be symbolic: they are compared as expressions, so that no guard comes of it.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch

ROW, LOCAL, ONE = "r", "l", "."
Size = Any  # int or sympy expression


def size(value: Any) -> Size:
    """A size as something that compares without guards."""
    if isinstance(value, torch.SymInt):
        return value.node.expr if value.node.maybe_as_int() is None else value.node.maybe_as_int()
    return value


def shape_of(node: Any) -> tuple[Size, ...] | None:
    """Sizes of a node's value (of the first, where there are several); None where it is no tensor."""
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    return tuple(size(s) for s in value.shape) if isinstance(value, torch.Tensor) else None


def is_one(s: Size) -> bool:
    return isinstance(s, int) and s == 1


def product(sizes: Any) -> Size:
    return math.prod(sizes, start=1)


def same_size(a: Size, b: Size) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(a == b)


def through_view(tags: str, old: tuple[Size, ...], new: tuple[Size, ...]) -> str | None:
    """Tags behind a view from `old` to `new`: rows merge and split among themselves, locals too. None: they mix."""
    if any(isinstance(s, int) and s == 0 for s in old):
        return None
    before = [(s, t) for s, t in zip(old, tags) if not is_one(s)]
    after = [i for i, s in enumerate(new) if not is_one(s)]
    out = [ONE] * len(new)
    i = j = 0
    while i < len(before) or j < len(after):
        group = _group(before, after, new, i, j)
        if group is None:
            return None
        p, q = group
        kinds = {t for _, t in before[i : i + p]}
        if len(kinds) != 1:
            return None
        kind = kinds.pop()
        if kind == ONE:  # broadcast by an operand that is not known: no view of it is
            return None
        for k in after[j : j + q]:
            out[k] = kind
        i, j = i + p, j + q
    return "".join(out)


def _group(before: list[Any], after: list[int], new: tuple[Size, ...], i: int, j: int) -> tuple[int, int] | None:
    """How many dimensions from i and from j on have the same number of elements; the fewest."""
    left, right = len(before) - i, len(after) - j
    for p, q in sorted(itertools.product(range(1, left + 1), range(1, right + 1)), key=sum):
        if same_size(product(s for s, _ in before[i : i + p]), product(new[k] for k in after[j : j + q])):
            return p, q
    return None


def position(tags: str, dim: int) -> int:
    """Where a dimension that is not of rows stands in a program."""
    return (ROW in tags) + sum(t != ROW for t in tags[:dim])


def local_sizes(tags: str, sizes: tuple[Size, ...]) -> list[Size]:
    """The sizes behind the rows in a program."""
    return [s for s, t in zip(sizes, tags) if t != ROW]


def aligned(tags: str, rank: int) -> str:
    """Tags of an operand that is broadcast to more dimensions."""
    return ONE * (rank - len(tags)) + tags


def tags_of_broadcast(here: str, dims: list[int | None], tags: str) -> str:
    """Tags of an operand that is broadcast to all dimensions of rows first."""
    out = [ROW if t == ROW else ONE for t in tags]
    for d, k in enumerate(dims):
        if k is not None and here[d] == LOCAL:
            out[k] = LOCAL
    return "".join(out)
