"""Reference implementation, for the CPU and for any device without Triton: a chunk loop over ATen products.

A chunk of logits is what a product computes at a time; it keeps the dtype of x and turns into its gradient in place.
The arithmetic between goes over it in blocks of a few rows, in the statistics' dtype, small enough for the caches.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..spec.epilogue import apply, apply_with_slope
from ..spec.statistics import (
    ARGMAX,
    LSE,
    LSE_DTYPE,
    MAX,
    NEG_ENTROPY,
    NO_TARGET,
    SUM,
    TARGET,
    HeadArgs,
    RowGrads,
    Stats,
    empty_stats,
    grad_dtype,
    stat_dtype,
)
from .device_policy import BLOCK
from .plan import Mask, Plan
from .sums import add_widened


def forward(a: HeadArgs, stats: int, p: Plan) -> Stats:
    """Statistics only: one product, nothing kept."""
    out = _Rows(a, stats)
    for rows, z in _Logits(a, p):
        for part, block in _blocks(rows, z):
            out.fill(part, apply(a.epilogue, _wide(a, block)))
    return out.stats


def backward(
    a: HeadArgs, lse: Tensor, neg_entropy: Tensor | None, grads: RowGrads, mask: Mask, p: Plan
) -> tuple[Tensor, ...]:
    """Gradients by recomputing the logits of each chunk."""
    chunks = _Logits(a, p)
    out = _Grads(a, mask, a.weight.dtype, len(chunks))
    for rows, z in chunks:
        gradient(a, rows, z, lse, neg_entropy, grads, out.hidden, out.db)
        out.add(rows, z)
        del z
    return out.result()


def gradient(
    a: HeadArgs, rows: slice, z: Tensor, lse: Tensor, neg_entropy: Tensor | None, grads: RowGrads,
    hidden: Tensor | None, db: Tensor,
) -> None:  # fmt: skip
    """Logits of some rows [n, V] become their gradient, whose sum is added to db [V] if that is not empty.

    lse, neg_entropy and the tensors of a and grads have all N rows.
    """
    for part, block in _blocks(rows, z):
        y, slope = apply_with_slope(a.epilogue, _wide(a, block))
        found = None if neg_entropy is None else neg_entropy[part]
        _put(block, _dz(a, part, y, slope, lse[part], found, grads, hidden), db)
        del y, slope  # before the next ones are made


def with_grad(
    a: HeadArgs, stats: int, grads: RowGrads, mask: Mask, wide: bool, p: Plan
) -> tuple[Stats, Tensor, Tensor, Tensor]:
    """Statistics and gradients of each chunk while its logits are there; wide: dW and db in fp32."""
    rows_out = _Rows(a, stats | LSE | (NEG_ENTROPY if grads.neg_entropy is not None else 0))
    chunks = _Logits(a, p)
    out = _Grads(a, mask, grad_dtype(a.weight.dtype, wide), len(chunks))
    for rows, z in chunks:
        _stats_and_gradient(rows_out, rows, z, grads, out)
        out.add(rows, z)
        del z
    return (rows_out.stats.only(stats), *out.result())


def _stats_and_gradient(rows_out: _Rows, rows: slice, z: Tensor, grads: RowGrads, out: _Grads) -> None:
    a, found = rows_out.a, rows_out.stats
    for part, block in _blocks(rows, z):
        y, slope = apply_with_slope(a.epilogue, _wide(a, block))
        if rows_out.asked & NEG_ENTROPY:
            rows_out.fill(part, y)
            dz = _dz(a, part, y, slope, found.lse[part], found.neg_entropy[part], grads, out.hidden)
        else:  # one exponential serves the statistics and the gradient
            total = rows_out.fill_and_exp(part, y)
            dz = _dz(a, part, y, slope, found.lse[part], None, grads, out.hidden, total)
        _put(block, dz, out.db)
        del y, slope, dz  # before the next ones are made


def _put(block: Tensor, dz: Tensor, db: Tensor) -> None:
    """The gradient of a block of logits, in their place."""
    if dz.data_ptr() != block.data_ptr():
        block.copy_(dz)
    if len(db):
        db += dz.sum(0)


class _Logits:
    """Chunks of logits, one after the other in the same memory."""

    def __init__(self, a: HeadArgs, p: Plan) -> None:
        self.a = a
        self.chunks = [slice(row0, row0 + n) for row0, n in p.chunks.bounds(a.x.shape[0])]

    def __len__(self) -> int:
        return len(self.chunks)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        memory = self.a.x.new_empty(self.chunks[0].stop if self.chunks else 0, len(self.a.weight))
        for rows in self.chunks:
            logits(self.a, self.a.x[rows], memory[: rows.stop - rows.start])
            yield rows, memory[: rows.stop - rows.start]


def logits(a: HeadArgs, x: Tensor, z: Tensor) -> None:
    """z = x @ weight^T, and a bias of its dtype, rounded as F.linear rounds them."""
    if a.bias is not None and a.bias.dtype == x.dtype:
        torch.addmm(a.bias, x, a.weight.t(), out=z)
    else:
        torch.mm(x, a.weight.t(), out=z)


def _blocks(rows: slice, z: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """A chunk in pieces: which of all rows, and their part of it."""
    size = max(BLOCK // max(z.shape[1], 1), 1)
    for start in range(0, len(z), size):
        block = z[start : start + size]
        yield slice(rows.start + start, rows.start + start + len(block)), block


def _wide(a: HeadArgs, block: Tensor) -> Tensor:
    """Logits in the statistics' dtype, with a bias that is wider than they are. The block itself if that is it."""
    y = block.to(stat_dtype(a.x))
    return y if a.bias is None or a.bias.dtype == a.x.dtype else y.add_(a.bias)


class _Rows:
    """Fills the statistics that were asked for, chunk by chunk."""

    def __init__(self, a: HeadArgs, stats: int) -> None:
        self.a, self.asked = a, stats
        self.stats = empty_stats(a.x, a.target, stats)
        if stats & TARGET and a.target is not None:
            check_target(a.target, a.weight.shape[0])

    def fill_and_exp(self, rows: slice, y: Tensor) -> Tensor:
        """fill(), and y becomes exp(y - its maximum) in place; returns the sum of that, row by row."""
        self._fill_others(rows, y)
        top = _finite_top(y)
        total = y.sub_(top[:, None]).exp_().sum(1)
        self.stats.lse[rows] = _lse(top, total)
        return total

    def fill(self, rows: slice, y: Tensor) -> None:
        s, asked = self.stats, self.asked
        if asked & (LSE | NEG_ENTROPY):
            top = _finite_top(y)
            lse = _lse(top, (y - top[:, None]).exp_().sum(1))
            if asked & LSE:
                s.lse[rows] = lse
            if asked & NEG_ENTROPY:
                log_p = _minus(y.clone(), lse)
                s.neg_entropy[rows] = log_p.exp().mul_(log_p).sum(1)
        self._fill_others(rows, y)

    def _fill_others(self, rows: slice, y: Tensor) -> None:
        a, s, asked = self.a, self.stats, self.asked
        if asked & TARGET and a.target is not None:
            index = a.target[rows]
            picked = y.gather(1, index.clamp(min=0))
            s.target_logit[rows] = torch.where(index >= 0, picked, 0)
        if asked & SUM:
            s.sum_logits[rows] = y.sum(1) if a.class_weight is None else y @ a.class_weight.to(y.dtype)
        if asked & MAX:
            s.max_logit[rows] = y.amax(1)
        if asked & ARGMAX:
            s.argmax[rows] = y.argmax(1)


def _finite_top(y: Tensor) -> Tensor:
    """The maximum of each row, 0 where subtracting it would make NaN of what logsumexp gives as +-inf."""
    top = y.amax(1)
    return torch.where(top.isfinite(), top, 0)


def _lse(top: Tensor, total: Tensor) -> Tensor:
    return top.to(LSE_DTYPE) + total.log()


def _minus(y: Tensor, lse: Tensor) -> Tensor:
    """y - lse in place, with the digits of lse that y's dtype has no room for."""
    high = lse.to(y.dtype)
    y.sub_(high[:, None])
    rest = torch.where(high.isfinite(), lse - high, 0).to(y.dtype)
    return y.sub_(rest[:, None])


def hidden_classes(a: HeadArgs) -> Tensor | None:
    """The classes whose bias is -inf, as masks have it; None where there are none.

    Their probability is zero, and zero times a row gradient that is not finite is NaN. Eager selects instead:
    masked_fill gives masked logits a gradient of zero.
    """
    hidden = None if a.bias is None else a.bias.isneginf().nonzero()[:, 0]
    return hidden if hidden is not None and len(hidden) else None


def check_target(target: Tensor, classes: int) -> None:
    """As eager on the CPU: an IndexError that names the first bad target."""
    bad = (target >= classes) | ((target < 0) & (target != NO_TARGET))
    if bad.any():
        raise IndexError(f"Target {int(target[bad][0])} is out of bounds.")


def _dz(
    a: HeadArgs,
    rows: slice,
    y: Tensor,
    slope: Tensor | float | None,
    lse: Tensor,
    neg_entropy: Tensor | None,
    grads: RowGrads,
    hidden: Tensor | None,
    total: Tensor | None = None,
) -> Tensor:
    """Gradient of a block of logits, in the dtype of y. y may be overwritten; with `total` it holds exponentials
    of that sum already. `hidden`: see hidden_classes."""
    g_lse = None if grads.lse is None else grads.lse[rows].to(y.dtype)
    if grads.lse_slope is not None:
        sloped = (grads.lse_slope[rows] * lse).to(y.dtype)
        g_lse = sloped if g_lse is None else g_lse + sloped
    if grads.neg_entropy is not None:
        assert neg_entropy is not None
        log_p = _minus(y, lse)
        factor = (log_p - neg_entropy[:, None]).mul_(grads.neg_entropy[rows, None])
        if g_lse is not None:
            factor.add_(g_lse[:, None])
        d = log_p.exp_().mul_(factor)
    elif g_lse is not None and total is not None:
        d = y.mul_((g_lse / total)[:, None])
    elif g_lse is not None:
        d = _minus(y, lse).exp_().mul_(g_lse[:, None])
    else:
        d, hidden = torch.zeros_like(y), None
    if hidden is not None:
        spoilt = (d[:, hidden[0]].isnan() & lse.isfinite()).nonzero()
        d[spoilt, hidden] = 0
    if grads.target is not None and a.target is not None:
        index = a.target[rows]
        d.scatter_add_(1, index.clamp(min=0), torch.where(index >= 0, grads.target[rows], 0))
    if grads.sum is not None:
        g_sum = grads.sum[rows, None]
        d += g_sum if a.class_weight is None else g_sum * a.class_weight.to(d.dtype)
    if slope is not None:
        d *= slope
    return d


class _Grads:
    """Accumulates dX by rows, dW and db over chunks; a gradient that is not needed costs no product."""

    def __init__(self, a: HeadArgs, mask: Mask, dtype: torch.dtype, chunks: int) -> None:
        self.a, self.mask, self.dtype, self.hidden = a, mask, dtype, hidden_classes(a)
        wide = stat_dtype(a.x)
        self.dx = torch.empty_like(a.x, memory_format=torch.contiguous_format) if mask[0] else a.x.new_empty(0)
        # The only chunk's product is dW itself, rounded once, as eager's is. A part of several must not be: parts that
        # are independent of each other would add, together, one more rounding of dW, however many there are.
        self.whole = chunks == 1 and dtype == a.x.dtype
        self.dw = a.x.new_empty(a.weight.shape if mask[1] else (0,), dtype=dtype if self.whole else wide)
        self.db = a.x.new_zeros(a.weight.shape[0] if mask[2] else 0, dtype=wide)
        self.first = True

    def add(self, rows: slice, dz: Tensor) -> None:
        x = self.a.x[rows]
        if self.mask[0]:
            torch.mm(dz, self.a.weight, out=self.dx[rows])
        if self.mask[1]:
            add_widened(self.dw, dz, x, self.first)
        self.first = False

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.first:  # no rows, no chunk
            self.dw.zero_()
        return self.dx, self.dw.to(self.dtype), self.db
