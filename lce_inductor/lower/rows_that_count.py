"""Rows that count: the others are packed away before the products. On a CPU, where their number is simply read.

A row counts if its statistics are needed, if a gradient comes in, or if its logits may be infinite or NaN: what eager
multiplies such statistics and gradients by may be zero, and the result is NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec.epilogue import apply
from ..spec.statistics import HeadArgs, RowGrads, Stats, stat_dtype

# A bound on logits below which sums over classes, and squares, don't overflow in fp32 either.
_LARGE = 2.0**60


def counting(a: HeadArgs, needed: Tensor | None, grads: RowGrads | None = None) -> Tensor | None:
    """Indices of the rows that count; None if all do. needed: bool [N], None for none."""
    if a.x.device.type != "cpu":
        return None
    counts = a.x.new_zeros(len(a.x), dtype=torch.bool) if needed is None else needed
    for g in grads or ():
        if g is not None:
            counts = counts | ((g != 0).any(1) if g.dim() > 1 else g != 0)
    if counts.all() or not a.weight.numel():
        return None
    counts = counts | ~_are_finite(a)
    return None if counts.all() else counts.nonzero()[:, 0]


def _are_finite(a: HeadArgs) -> Tensor:
    """bool [N]: rows whose logits are finite for sure, with room for sums over them, by the norms of x and weight."""
    of_rows, of_classes = (torch.linalg.vector_norm(t, dim=1).to(stat_dtype(a.x)) for t in (a.x, a.weight))
    bound = of_rows * of_classes.amax()
    if a.bias is not None:
        bound = bound + a.bias.to(bound.dtype).abs().amax()
    small: Tensor = bound < min(torch.finfo(a.x.dtype).max / 4, _LARGE)  # not so if it is NaN
    # Every step of an epilogue is monotone, and so at its largest at one of the ends; or not defined at zero.
    small &= apply(a.epilogue, torch.stack([bound, -bound, bound * 0])).abs().amax(0) < _LARGE
    return small if a.class_weight is None else small & a.class_weight.isfinite().all()


def packed(a: HeadArgs, rows: Tensor) -> HeadArgs:
    """The head with these rows of x and target alone."""
    target = None if a.target is None else a.target[rows]
    return a._replace(x=a.x[rows], target=target)


def packed_grads(grads: RowGrads, rows: Tensor) -> RowGrads:
    return RowGrads(*(None if g is None else g[rows] for g in grads))


def unpacked(value: Tensor, rows: Tensor, N: int) -> Tensor:
    """[N, ...] with these rows; zeros elsewhere."""
    return value.new_zeros(N, *value.shape[1:]).index_copy_(0, rows, value)


def unpacked_stats(found: Stats, stats: int, rows: Tensor, N: int) -> Stats:
    """The same of each statistic that was asked for."""
    return Stats(*(unpacked(s, rows, N) if stats & (1 << i) else s for i, s in enumerate(found)))
