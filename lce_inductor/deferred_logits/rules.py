"""Operations that deferred logits answer without computing all of them.

A rule takes the ATen op, the logits and the op's other arguments, and returns the result, or NotImplemented to have the
logits computed. An op that has no rule computes them, except for a view, which waits until they are: what it returns is
deferred, too, because a write to it has to be refused.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .seals import traced

if TYPE_CHECKING:
    from .tensor import DeferredLogits

aten = torch.ops.aten

CHUNK_BYTES = 256 << 20
"""Reductions over the vocabulary are answered from pieces of the logits of about this size."""


@dataclasses.dataclass(frozen=True)
class View:
    """A view of the logits, once they are computed; of those that the op returns, number `index`."""

    func: Any
    args: tuple[Any, ...]
    index: int | None

    def __call__(self, z: Tensor) -> Tensor:
        out = self.func(z, *self.args)
        view: Tensor = out if self.index is None else out[self.index]
        return view


def answer(func: Any, z: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
    """The result of an op on deferred logits, or NotImplemented: compute them."""
    rule = _RULES.get(func) or (None if z.spec.views else _ROW_RULES.get(func))
    out = NotImplemented if rule is None else rule(func, z, *args, **kwargs)
    if out is NotImplemented and any(r.alias_info is not None and not r.is_write for r in func._schema.returns):
        out = _view_later(func, z, *args)
    return out


def keeps_values(func: Any) -> bool:
    return _RULES.get(func) is _same


def _same(func: Any, z: DeferredLogits) -> Any:
    return z.derive()


def _view_later(func: Any, z: DeferredLogits, *args: Any) -> Any:
    layout = (2, *z.shape), (z.storage_offset(), *z.stride())  # of two, the second is at its offset
    shapes = func(torch.empty_strided(*layout, dtype=z.dtype, device="meta")[1], *args)
    if isinstance(shapes, Tensor):
        return z.derive(like=shapes, views=(*z.spec.views, View(func, args, None)))
    return [z.derive(like=s, views=(*z.spec.views, View(func, args, i))) for i, s in enumerate(shapes)]


def _clone(func: Any, z: DeferredLogits, **kwargs: Any) -> Any:
    # A clone is how a user makes the logits real. But where DDP looks for unused parameters, it clones every output of
    # every step, inside a Function of its own that hooks the backward: that copy stays deferred.
    return z.derive() if z.requires_grad and not torch.is_grad_enabled() and not kwargs else NotImplemented


def _view(func: Any, z: DeferredLogits, size: list[int]) -> Any:
    x, rows, last = z.tensors["x"], size[:-1], size[-1] if size else 0
    keeps = last == z.shape[-1] or (last == -1 and math.prod(rows) * z.shape[-1] == z.numel())
    return z.derive(x.reshape([*rows, x.shape[-1]])) if keeps and x.numel() and z.numel() else NotImplemented


def _cast(func: Any, z: DeferredLogits, *, dtype: Any = None, device: Any = None, **kwargs: Any) -> Any:
    here = device in (None, z.device) and not kwargs.get("pin_memory")
    return (
        z.derive(dtypes=(*z.spec.dtypes, dtype))
        if here and dtype is not None and dtype.is_floating_point
        else NotImplemented
    )


def _index(func: Any, z: DeferredLogits, indices: list[Tensor | None]) -> Any:
    dims = sum(i.dim() if i is not None and i.dtype in (torch.bool, torch.uint8) else 1 for i in indices)
    return z.derive(func(z.tensors["x"], indices), copied=True) if dims < z.dim() else NotImplemented


def _rows(position: int) -> Callable[..., Any]:
    """An operation along a dimension (its argument `position`) other than the vocabulary: applied to x."""

    def rule(func: Any, z: DeferredLogits, *args: Any) -> Any:
        dim, ndim = args[position] if len(args) > position else 0, z.dim() + (func is aten.unsqueeze.default)
        if not -ndim <= dim < ndim or dim % ndim == ndim - 1:
            return NotImplemented
        out = func(z.tensors["x"], *args)
        return z.derive(out) if isinstance(out, Tensor) else [z.derive(x) for x in out]

    return rule


def _reduce(func: Any, z: DeferredLogits, dim: Any = None, *args: Any) -> Any:
    """A reduction over the vocabulary, or a gather from it, on a chunk of rows at a time."""
    rows = max(1, CHUNK_BYTES // max(1, z.shape[-1] * z.element_size()))
    if traced(z.tensors["x"]) or z.numel() <= rows * z.shape[-1] or dim not in (-1, z.dim() - 1, [-1], [z.dim() - 1]):
        return NotImplemented
    rest = [args] * math.ceil(z.numel() / (rows * z.shape[-1]))
    if func is aten.gather.default:
        if args[0].shape[:-1] != z.shape[:-1]:
            return NotImplemented
        rest = [(index,) for index in args[0].reshape(-1, args[0].shape[-1]).split(rows)]
    last = [-1] if isinstance(dim, list) else -1
    x, head = z.tensors["x"], z.head()
    pieces = x.reshape(-1, x.shape[-1]).split(rows)
    outs = [func(head(piece), last, *more) for piece, more in zip(pieces, rest, strict=True)]

    def join(parts: Any) -> Tensor:
        return torch.cat(parts).reshape(*z.shape[:-1], *parts[0].shape[1:])

    return join(outs) if isinstance(outs[0], Tensor) else tuple(map(join, zip(*outs, strict=True)))


def _total(func: Any, z: DeferredLogits, *, dtype: torch.dtype | None = None) -> Any:
    """The sum or the mean of all of them, as metrics ask for, on a chunk of rows at a time."""
    rows = max(1, CHUNK_BYTES // max(1, z.shape[-1] * z.element_size()))
    if traced(z.tensors["x"]) or z.numel() <= rows * z.shape[-1]:
        return NotImplemented
    x, head = z.tensors["x"], z.head()
    wide = torch.promote_types(z.dtype, torch.float32)
    pieces = x.reshape(-1, x.shape[-1]).split(rows)
    total = torch.stack([head(piece).sum(dtype=wide) for piece in pieces]).sum()
    return (total / z.numel() if func is aten.mean.default else total).to(dtype or z.dtype)


_RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((aten.detach.default, aten.alias.default), _same),
    aten.clone.default: _clone,
    aten._to_copy.default: _cast,
}

_ROW_RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((aten.view.default, aten._unsafe_view.default), _view),
    **dict.fromkeys((aten.slice.Tensor, aten.select.int, aten.unsqueeze.default, aten.unbind.int), _rows(0)),
    **dict.fromkeys((aten.split.Tensor, aten.split_with_sizes.default), _rows(1)),
    aten.index.Tensor: _index,
    **dict.fromkeys((aten.argmax.default, aten.max.dim, aten.amax.default), _reduce),
    **dict.fromkeys((aten.logsumexp.default, aten.gather.default), _reduce),
    **dict.fromkeys((aten.sum.default, aten.mean.default), _total),
}
