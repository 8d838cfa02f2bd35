"""One Triton kernel over the rows of a chunk of logits: their statistics, then their gradient in place.

Program n owns row n. A first pass over blocks of V takes the statistics (softmax online: running maximum and
sum of exponentials); a second pass, backwards because the end of the row is what the cache still holds,
overwrites the logits with the gradient of the loss. All arithmetic is fp32 (fp64 for fp64 logits).

Infinite and NaN logits come out as torch.logsumexp, softmax and max make them.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..spec.epilogue import Steps, flatten
from ..spec.statistics import ARGMAX, LSE, MAX, NEG_ENTROPY, SUM, TARGET, RowGrads, Stats


class RowConfig(NamedTuple):
    """How the kernel is laid out: elements of V at a time, warps of a program."""

    block: int
    warps: int


def config(V: int, itemsize: int) -> RowConfig:
    """Layout for rows of V elements: enough loads in flight, few enough registers (NOTES.md has the others)."""
    block = min(triton.next_power_of_2(max(V, 16)), 8192 // itemsize)
    return RowConfig(block, min(max(block * itemsize // 1024, 1), 8))


def launch(
    z: Tensor,
    V: int,
    row0: int,
    bias: Tensor | None,
    target: Tensor | None,
    class_weight: Tensor | None,
    steps: Steps,
    stats: int,
    found: Stats,
    grads: RowGrads | None,
    hidden: bool = False,
) -> None:
    """Fill `found` for rows row0 ... row0 + len(z) and, with `grads`, turn z into the gradient of the loss.

    z: [n, row_stride] chunk of logits before bias and epilogue, of which V columns count; the rest is free to
    be overwritten. target: int64 [N, K]. The tensors of `found` and `grads` have all N rows.

    hidden: logits of -inf come from a bias and get no gradient, whatever the row's is (see hidden in the kernel).
    stats: bits to compute. The gradient of lse needs lse, that of neg_entropy needs both: computed here if `stats`
    has their bits, else read from `found`.
    """
    n, row_stride = z.shape
    if n == 0:
        return
    assert z.stride() == (row_stride, 1) or n == 1
    itemsize = z.element_size()
    layout = config(V, itemsize)
    g = grads or RowGrads()
    k = 0 if target is None else target.shape[1]
    rows_kernel[(n,)](
        z, row_stride, row0, V,
        bias, class_weight,
        target, *_strides(target, 2),
        found.lse, found.target_logit, found.sum_logits, found.neg_entropy, found.max_logit, found.argmax,
        g.lse, *_strides(g.lse, 1),
        g.lse_slope, *_strides(g.lse_slope, 1),
        g.target if k else None, *_strides(g.target, 2),
        g.sum, *_strides(g.sum, 1),
        g.neg_entropy, *_strides(g.neg_entropy, 1),
        K=k,
        LSE=bool(stats & LSE),
        TARGET=bool(stats & TARGET) and k > 0,
        SUM=bool(stats & SUM),
        NEG_ENTROPY=bool(stats & NEG_ENTROPY),
        MAX=bool(stats & MAX),
        ARGMAX=bool(stats & ARGMAX),
        GRAD=grads is not None,
        HIDDEN=hidden,
        STEPS=flatten(steps),
        ACC=tl.float64 if itemsize == 8 else tl.float32,
        BLOCK_V=layout.block,
        BLOCKS=triton.cdiv(V, layout.block),
        num_warps=layout.warps,
    )  # fmt: skip


def launch_lse(sums: Tensor, maxima: Tensor, lse: Tensor) -> None:
    """lse [n], fp64, from the [tiles, n] that hopper.launch_logits leaves."""
    tiles, n = sums.shape
    block = 32
    lse_kernel[(triton.cdiv(n, block),)](
        sums, maxima, lse, tiles, n, BLOCK_N=block, BLOCK_T=block, BLOCKS=triton.cdiv(tiles, block), num_warps=4
    )  # fmt: skip


def _strides(t: Tensor | None, dims: int) -> tuple[int, ...]:
    return (0,) * dims if t is None else t.stride()


@triton.jit
def _tanh(x):
    # exp alone loses the small arguments to cancellation; a rational function (Lambert's continued fraction)
    # has them to the last bit. One division serves both.
    e = tl.exp(-2 * tl.abs(x))
    sign = tl.where(x < 0, -1.0, 1.0)
    s = x * x
    if x.dtype == tl.float64:
        small = tl.abs(x) < 0.5
        num = x
        den = tl.full(x.shape, 17.0, x.dtype)
        for i in tl.static_range(8):
            den = (15 - 2 * i) + s / den
    else:
        small = tl.abs(x) < 0.6
        num = x * ((21 * s + 1260) * s + 10395)
        den = ((s + 210) * s + 4725) * s + 10395
    return tl.where(small, num, sign * (1 - e)) / tl.where(small, den, 1 + e)


@triton.jit
def epilogue(y, STEPS: tl.constexpr, FAST: tl.constexpr = False):
    """f(y) and f'(y); the numbers are spec.epilogue.CODES. FAST: tanh is good to 1e-7 of its range alone."""
    slope = tl.full(y.shape, 1.0, y.dtype)
    for i in tl.static_range(0, len(STEPS), 3):
        if STEPS[i] == 0:
            y = y * STEPS[i + 1]
            slope = slope * STEPS[i + 1]
        elif STEPS[i] == 1:
            y = y + STEPS[i + 1]
        elif STEPS[i] == 2:
            if FAST:
                y = 1 - 2 / (1 + tl.exp(2 * y))
            else:
                y = _tanh(y)
            slope = slope * (1 - y * y)
        elif STEPS[i] == 3:
            y = 1 / (1 + tl.exp(-y))
            slope = slope * (y * (1 - y))
        else:
            square = y * y + STEPS[i + 2]
            root = tl.sqrt(square)
            y = STEPS[i + 1] * y / root
            slope = slope * (STEPS[i + 1] * STEPS[i + 2] / (square * root))
    return y, slope


@triton.jit
def _logits(z_row, row_stride, V, bias_ptr, offs_v, STEPS: tl.constexpr, ACC: tl.constexpr):
    """A block of Y and the epilogue's slope; what lies beyond V is arbitrary."""
    # Masked by the row stride, a multiple of the vector width, and not by V, which would make the loads scalar.
    y = tl.load(z_row + offs_v, mask=offs_v < row_stride, other=0.0).to(ACC)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_v, mask=offs_v < V, other=0.0).to(ACC)
    return epilogue(y, STEPS)


@triton.jit
def _column(target_ptr, stride_tk, V, k):
    """The k-th target of the row, -1 where there is none (or one that the caller's check will report)."""
    t = tl.load(target_ptr + k * stride_tk)
    return tl.where((t >= 0) & (t < V), t, -1).to(tl.int32)


@triton.jit(do_not_specialize=["row0"])
def rows_kernel(
    z_ptr, row_stride, row0, V,
    bias_ptr, class_weight_ptr,
    target_ptr, stride_tn, stride_tk,
    lse_ptr, target_logit_ptr, sum_ptr, neg_entropy_ptr, max_ptr, argmax_ptr,
    g_lse_ptr, stride_gl,
    g_slope_ptr, stride_gs,
    g_target_ptr, stride_gtn, stride_gtk,
    g_sum_ptr, stride_gsum,
    g_neg_entropy_ptr, stride_gne,
    K: tl.constexpr,
    LSE: tl.constexpr, TARGET: tl.constexpr, SUM: tl.constexpr, NEG_ENTROPY: tl.constexpr, MAX: tl.constexpr,
    ARGMAX: tl.constexpr, GRAD: tl.constexpr, HIDDEN: tl.constexpr, STEPS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    pid_n = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + pid_n * row_stride
    n = pid_n + row0
    if K > 0:
        target_row = target_ptr + n * stride_tn

    if TARGET:
        for k in range(K):
            t = _column(target_row, stride_tk, V, k)
            y = tl.load(z_row + t, mask=t >= 0, other=0.0).to(ACC)
            if bias_ptr is not None:
                y += tl.load(bias_ptr + t, mask=t >= 0, other=0.0).to(ACC)
            y, _ = epilogue(y, STEPS)
            tl.store(target_logit_ptr + n * K + k, tl.where(t >= 0, y, 0.0))

    high = tl.full((), float("-inf"), ACC)
    exps = tl.full((), 0.0, ACC)
    exps_y = tl.full((), 0.0, ACC)  # of exponentials times (y - base)
    last_base = tl.full((), 0.0, ACC)
    total = tl.full((), 0.0, ACC)
    where_high = tl.full((), 0, tl.int32)
    where_nan = tl.full((), 0, tl.int32) + V
    if LSE or SUM or NEG_ENTROPY or MAX or ARGMAX:
        for i in range(BLOCKS):
            offs_v = i * BLOCK_V + tl.arange(0, BLOCK_V)
            y, _ = _logits(z_row, row_stride, V, bias_ptr, offs_v, STEPS, ACC)
            inside = offs_v < V
            if SUM:
                term = y
                if class_weight_ptr is not None:
                    term = y * tl.load(class_weight_ptr + offs_v, mask=inside, other=0.0).to(ACC)
                total += tl.sum(tl.where(inside, term, 0.0), 0)
            if LSE or NEG_ENTROPY or MAX or ARGMAX:
                y = tl.where(inside, y, float("-inf"))
                block_high = tl.max(y, 0)
                if ARGMAX:
                    # Strictly higher: on a tie the lowest index stays.
                    here = tl.min(tl.where((y == block_high) & inside, offs_v, V), 0)
                    where_high = tl.where(block_high > high, here, where_high)
                if MAX or ARGMAX:
                    number = y <= float("inf")
                    where_nan = tl.minimum(where_nan, tl.min(tl.where(number, V, offs_v), 0))
                new_high = tl.maximum(high, block_high)
            if LSE or NEG_ENTROPY:
                # Subtracting an infinite maximum would make NaN of what logsumexp gives as +-inf.
                base = tl.where(tl.abs(new_high) == float("inf"), 0.0, new_high)
                scale = tl.where(high == float("-inf"), 0.0, tl.exp(high - base))
                e = tl.exp(y - base)
                if NEG_ENTROPY:
                    exps_y = (exps_y + (last_base - base) * exps) * scale
                    exps_y += tl.sum(tl.where(inside, e * (y - base), 0.0), 0)
                    last_base = base
                exps = exps * scale + tl.sum(e, 0)
            if LSE or NEG_ENTROPY or MAX or ARGMAX:
                high = new_high

    if LSE:
        # Two numbers, and fp64 in memory: a large maximum would swallow the digits of the logarithm.
        lse_high = tl.where(tl.abs(high) == float("inf"), 0.0, high)
        lse_low = tl.log(exps)
        tl.store(lse_ptr + n, lse_high.to(tl.float64) + lse_low.to(tl.float64))
    if SUM:
        tl.store(sum_ptr + n, total)
    if NEG_ENTROPY:
        neg_entropy = exps_y / exps - tl.log(exps)
        tl.store(neg_entropy_ptr + n, neg_entropy)
    if MAX:
        tl.store(max_ptr + n, tl.where(where_nan < V, float("nan"), high))
    if ARGMAX:
        tl.store(argmax_ptr + n, tl.where(where_nan < V, where_nan, where_high).to(tl.int64))

    if GRAD:
        # The threads that read the targets' logits are not those that overwrite them.
        tl.debug_barrier()
        NEED_P: tl.constexpr = (g_lse_ptr is not None) or (g_slope_ptr is not None) or (g_neg_entropy_ptr is not None)
        g_lse = tl.full((), 0.0, ACC)
        if NEED_P:
            if not LSE:
                lse = tl.load(lse_ptr + n)
                lse_high = lse.to(ACC)
                rest = (lse - lse_high.to(tl.float64)).to(ACC)
                lse_low = tl.where(tl.abs(lse_high) < float("inf"), rest, 0.0)
            if g_lse_ptr is not None:
                g_lse += tl.load(g_lse_ptr + n * stride_gl).to(ACC)
            if g_slope_ptr is not None:
                g_lse += tl.load(g_slope_ptr + n * stride_gs).to(ACC) * (lse_high + lse_low)
            # Masked classes have no gradient, where probability zero times an infinite factor would be NaN.
            hidden = tl.where(tl.abs(lse_high + lse_low) < float("inf"), float("-inf"), float("nan"))
        if g_neg_entropy_ptr is not None:
            if not NEG_ENTROPY:
                neg_entropy = tl.load(neg_entropy_ptr + n)
            g_neg_entropy = tl.load(g_neg_entropy_ptr + n * stride_gne).to(ACC)
        if g_sum_ptr is not None:
            g_sum = tl.load(g_sum_ptr + n * stride_gsum).to(ACC)
        for i in range(BLOCKS):
            offs_v = (BLOCKS - 1 - i) * BLOCK_V + tl.arange(0, BLOCK_V)
            y, slope = _logits(z_row, row_stride, V, bias_ptr, offs_v, STEPS, ACC)
            d = tl.full((BLOCK_V,), 0.0, ACC)
            if NEED_P:
                log_p = (y - lse_high) - lse_low
                factor = g_lse
                if g_neg_entropy_ptr is not None:
                    factor = g_lse + g_neg_entropy * (log_p - neg_entropy)
                d = tl.exp(log_p) * factor
                if HIDDEN:
                    d = tl.where(y == hidden, 0.0, d)
            if g_sum_ptr is not None:
                if class_weight_ptr is not None:
                    d += g_sum * tl.load(class_weight_ptr + offs_v, mask=offs_v < V, other=0.0).to(ACC)
                else:
                    d += g_sum
            if g_target_ptr is not None:
                for k in range(K):
                    t = _column(target_row, stride_tk, V, k)
                    g_target = tl.load(g_target_ptr + n * stride_gtn + k * stride_gtk).to(ACC)
                    d += tl.where(offs_v == t, g_target, 0.0)
            d = tl.where(offs_v < V, d * slope, 0.0)
            tl.store(z_row + offs_v, d.to(z_ptr.dtype.element_ty), mask=offs_v < row_stride)


@triton.jit
def lse_kernel(
    sums_ptr, maxima_ptr, lse_ptr, tiles, n, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    """logsumexp of rows from the largest logit of each tile and the sum of the exponentials below it."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    high = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    for i in range(BLOCKS):
        t = i * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
        inside = (t < tiles) & (rows < n)[None, :]
        high = tl.maximum(high, tl.max(tl.load(maxima_ptr + t * n + rows, mask=inside, other=float("-inf")), 0))
    # Nothing is subtracted where the largest is infinite, in a tile and in a row, as in logsumexp.
    base = tl.where(tl.abs(high) == float("inf"), 0.0, high)
    total = tl.full((BLOCK_N,), 0.0, tl.float32)
    for i in range(BLOCKS):
        t = i * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
        inside = (t < tiles) & (rows < n)[None, :]
        here = tl.load(maxima_ptr + t * n + rows, mask=inside, other=0.0)
        below = tl.where(tl.abs(here) == float("inf"), 0.0, here)
        sums = tl.load(sums_ptr + t * n + rows, mask=inside, other=0.0)
        total += tl.sum(tl.where(sums == 0, 0.0, sums * tl.exp(below - base[None, :])), 0)
    tl.store(lse_ptr + rows, base.to(tl.float64) + tl.log(total).to(tl.float64), mask=rows < n)
