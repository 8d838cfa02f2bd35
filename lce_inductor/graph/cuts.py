"""Values that were cut from one value along its first dimension."""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from .values import same_shape

aten = torch.ops.aten

_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)


def uncut(parts: Sequence[Node]) -> Node | None:
    """What these were cut from, if they are all of it and in order. Where each was made [n, ...] of [b, t, ...], what
    all are made of by the same view."""
    sources = [p.args[0] if p.op == "call_function" and p.args else None for p in parts]
    if all(p.target in _VIEWS and _has_rows_of(p, b) for p, b in zip(parts, sources)):
        return uncut(sources)  # type: ignore[arg-type]
    source = sources[0]
    if not isinstance(source, Node) or any(s is not source for s in sources):
        return None
    if all(p.target is operator.getitem for p in parts) and source.target in _SPLITS:
        in_order = [p.args[1] for p in parts] == list(range(len(source.meta["val"])))
        return source.args[0] if in_order and _dim(source, 2) == 0 else None  # type: ignore[return-value]
    if all(p.target is aten.slice.Tensor for p in parts):
        return source if _are_all(source.meta["val"].shape[0], list(map(_bounds, parts))) else None
    return None


def _has_rows_of(part: Node, before: Any) -> bool:
    """Are the first dimensions one dimension now?"""
    new, old = part.meta["val"].shape, before.meta["val"].shape
    return len(old) >= len(new) > 0 and same_shape(new[1:], old[len(old) - len(new) + 1 :])


def _dim(node: Node, place: int) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get("dim", 0)


def _bounds(node: Node) -> tuple[Any, Any]:
    """Start and end of a slice; None for what is no slice of the first dimension, or not known as a number."""
    start, end = [*node.args[2:4], None, None][:2]
    start, end = 0 if start is None else start, sys.maxsize if end is None else end
    known = isinstance(start, int) and isinstance(end, int) and 0 <= start <= end
    plain = not node.kwargs and _dim(node, 1) == 0 and node.args[4:] in ((), (1,))
    return (start, end) if known and plain else (None, None)


def _are_all(size: Any, bounds: list[tuple[Any, Any]]) -> bool:
    starts, ends = zip(*bounds)
    if None in starts or starts[0] != 0 or starts[1:] != ends[:-1]:
        return False
    return bool(ends[-1] == sys.maxsize or (isinstance(size, int) and ends[-1] >= size))
