"""Triton kernels of the anchored softmax (see lower/head_anchored.py for the idea and the order of launches).

One product of their own and a few small kernels. The product is persistent: each program takes tiles in turn, and
the next tile's operands arrive while this one's exponentials are taken. Operands come through tensor descriptors,
so that nothing here cares whether N, H or V is a multiple of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import epilogue

_LOG2E = tl.constexpr(1.4426950408889634)

# Exponentials are taken relative to the anchor. Beyond this sum (60 nats) the row is done again with its maximum
# as the anchor: fp32 and bf16 end at 88 nats, and the other side of that room belongs to the row's coefficient,
# exp(-60) times a gradient and an element of x.
SATURATED = tl.constexpr(1.0e26)


@triton.jit
def _column(target_ptr, offset, V, mask):
    """Target column, -1 where there is none (or one that the caller's check will report)."""
    t = tl.load(target_ptr + offset, mask=mask, other=-1)
    return tl.where((t >= 0) & (t < V), t, -1).to(tl.int32)


@triton.jit
def _tile(tile, tiles_n, tiles_v, GROUP: tl.constexpr):
    """Tile number -> row tile, column tile: GROUP row tiles at a time, so that both operands stay in L2."""
    per_group = GROUP * tiles_v
    first = (tile // per_group) * GROUP
    size = tl.minimum(tiles_n - first, GROUP)
    inside = tile % per_group
    return first + inside % size, inside // size


@triton.jit
def _redone(anchor, row_max):
    """The anchor of a saturated row: its largest logit. With an infinite one exp(y) itself is as in logsumexp."""
    high = tl.maximum(anchor, row_max)
    return tl.where(tl.abs(high) < float("inf"), high, 0.0)


@triton.jit
def anchor_kernel(
    x_ptr, stride_x, w_ptr, stride_w, bias_ptr, target_ptr, stride_t, V, H,
    anchor_ptr, target_logit_ptr, raw_ptr, class_sum_ptr, sum_ptr, sum_shift_ptr,
    SAMPLES: tl.constexpr, STEPS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Program n: the logit at row n's target, in fp32; without a target the largest of a few others.

    raw_ptr gets the target's logit before the epilogue, target_logit_ptr after it (0 without a target). With
    class_sum_ptr = sum of c_v * weight[v], also the row's weighted sum of logits, for an affine epilogue.
    """
    n = tl.program_id(0).to(tl.int64)
    t = tl.full((), -1, tl.int32)
    if target_ptr is not None:
        t = _column(target_ptr, n * stride_t, V, n >= 0)
    offs_h = tl.arange(0, BLOCK_H)
    x_row = x_ptr + n * stride_x
    anchor = tl.full((), float("-inf"), tl.float32)
    raw = tl.full((), 0.0, tl.float32)
    for i in range(tl.where(t >= 0, 1, SAMPLES)):
        v = tl.where(t >= 0, t, ((V + SAMPLES - 1) // SAMPLES * i) % V).to(tl.int64)
        product = tl.zeros((BLOCK_H,), tl.float32)
        for h in range(0, H, BLOCK_H):
            xs = tl.load(x_row + h + offs_h, mask=offs_h + h < H, other=0.0).to(tl.float32)
            ws = tl.load(w_ptr + v * stride_w + h + offs_h, mask=offs_h + h < H, other=0.0).to(tl.float32)
            product += xs * ws
        raw = tl.sum(product, 0)
        if bias_ptr is not None:
            raw += tl.load(bias_ptr + v).to(tl.float32)
        y, _ = epilogue(raw, STEPS, FAST=True)
        anchor = tl.where(y == y, tl.maximum(anchor, y), y)
    tl.store(anchor_ptr + n, anchor)
    tl.store(raw_ptr + n, raw)
    if target_logit_ptr is not None:
        tl.store(target_logit_ptr + n, tl.where(t >= 0, anchor, 0.0))
    if sum_ptr is not None:
        product = tl.zeros((BLOCK_H,), tl.float32)
        for h in range(0, H, BLOCK_H):
            xs = tl.load(x_row + h + offs_h, mask=offs_h + h < H, other=0.0).to(tl.float32)
            product += xs * tl.load(class_sum_ptr + h + offs_h, mask=offs_h + h < H, other=0.0)
        shift, slope = epilogue(tl.full((), 0.0, tl.float32), STEPS, FAST=True)
        # sum_v c_v (slope (x w_v + b_v) + shift), with the sums of c_v b_v and of c_v beforehand
        total = slope * (tl.sum(product, 0) + tl.load(sum_shift_ptr)) + shift * tl.load(sum_shift_ptr + 1)
        tl.store(sum_ptr + n, total)


@triton.jit
def _exps(acc, cols, y_col, a, V, bias_ptr, STEPS: tl.constexpr):
    """A piece of the accumulator: what it adds to its rows, their largest logits, and what is to be stored of it."""
    z = acc
    if bias_ptr is not None:
        z += tl.load(bias_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    if len(STEPS) > 0:
        z, slope = epilogue(z, STEPS, FAST=True)
    # The target's own entry is known better than bf16 can hold it: it stays out, here and in the products.
    out = (cols[None, :] == y_col[:, None]) | (cols[None, :] >= V)
    high = tl.max(tl.where(out, float("-inf"), z), 1)
    e = tl.where(out, 0.0, tl.exp2((z - a[:, None]) * _LOG2E))
    row = tl.sum(e, 1)
    if len(STEPS) > 0:
        e = tl.where(e == 0, 0.0, e * slope)
    return row, high, e


@triton.jit(do_not_specialize=["n", "row0", "part_stride"])
def logits_kernel(
    x_desc, w_desc, e_desc,
    anchor_ptr, bias_ptr, target_ptr, stride_t,
    sums_ptr, maxima_ptr, part_stride, row_max_ptr, flag_ptr, any_ptr,
    n, row0, V, H,
    STEPS: tl.constexpr, STORE: tl.constexpr, SUM: tl.constexpr, REDO: tl.constexpr,
    COMPILED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """E = exp(Y - anchor) of a chunk, from the fp32 accumulators: E in bf16 and its sums over each column tile.

    x_desc [N, H], w_desc [V, H], e_desc [chunk rows, row_stride]; sums, maxima [column tiles, part_stride].
    STORE: write E (times the epilogue's slope); rows beyond n come out arbitrary. SUM: write each row's sum of E and
    its largest logit in this tile. REDO: only row tiles with a saturated row (flag), with row_max as their anchor.
    """
    if REDO:  # noqa: SIM102
        if tl.load(any_ptr) == 0:
            return
    tiles_n = tl.cdiv(n, BLOCK_N)
    tiles_v = tl.cdiv(V, BLOCK_V)
    for tile in tl.range(tl.program_id(0), tiles_n * tiles_v, tl.num_programs(0), flatten=FLATTEN):
        pid_n, pid_v = _tile(tile, tiles_n, tiles_v, GROUP)
        first_n = pid_n * BLOCK_N
        first_v = pid_v * BLOCK_V
        rows = first_n + tl.arange(0, BLOCK_N)
        inside = rows < n
        steps = tl.cdiv(H, BLOCK_H)
        wanted = 1
        if REDO:
            wanted = tl.max(tl.load(flag_ptr + rows, mask=inside, other=0), 0)
            steps = steps * wanted
        acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for k in range(steps):
            xs = x_desc.load([row0 + first_n, k * BLOCK_H])
            ws = w_desc.load([first_v, k * BLOCK_H])
            if not COMPILED:  # the interpreter multiplies the bits of bf16
                xs = xs.to(tl.float32)
                ws = ws.to(tl.float32)
            acc = tl.dot(xs, ws.T, acc)

        if wanted > 0:
            a = tl.load(anchor_ptr + row0 + rows, mask=inside, other=0.0)
            if REDO:
                flag = tl.load(flag_ptr + rows, mask=inside, other=0)
                a = tl.where(flag > 0, _redone(a, tl.load(row_max_ptr + rows, mask=inside, other=0.0)), a)
            y_col = tl.full((BLOCK_N,), -1, tl.int32)
            if target_ptr is not None:
                y_col = _column(target_ptr, (row0 + rows).to(tl.int64) * stride_t, V, inside)
            total, high, e = _exps(acc, first_v + tl.arange(0, BLOCK_V), y_col, a, V, bias_ptr, STEPS)
            if STORE:
                e_desc.store([first_n, first_v], e.to(tl.bfloat16))
            if SUM:
                where = pid_v.to(tl.int64) * part_stride + rows
                tl.store(sums_ptr + where, total, mask=inside)
                tl.store(maxima_ptr + where, high, mask=inside)


@triton.jit(do_not_specialize=["n", "row0", "part_stride"])
def normalise_kernel(
    sums_ptr, maxima_ptr, part_stride, tiles_v, row_max_ptr, flag_ptr, any_ptr,
    anchor_ptr, raw_ptr, target_ptr, stride_t, lse_ptr,
    g_lse_ptr, stride_gl, g_slope_ptr, stride_gs, g_target_ptr, stride_gt,
    u_ptr, d_ptr, n, row0, V,
    STEPS: tl.constexpr, KNOWN: tl.constexpr, GRAD: tl.constexpr, REDO: tl.constexpr, PAIR: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """From the sums over column tiles to lse and to each row's coefficients of the gradient.

    dZ = u * E + d * onehot(target). KNOWN: lse is given and was the anchor. In the first run (not REDO), mark
    the saturated rows, those whose sum is beyond SATURATED or not a number, and find their largest logits.
    """
    if REDO:  # noqa: SIM102
        if tl.load(any_ptr) == 0:
            return
    local = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = local < n
    rows = (row0 + local).to(tl.int64)
    t = tl.full((BLOCK_N,), -1, tl.int32)
    if target_ptr is not None:
        t = _column(target_ptr, rows * stride_t, V, inside)
    if KNOWN:
        lse = tl.load(lse_ptr + rows, mask=inside, other=0.0)
        rest = tl.full((BLOCK_N,), 0.0, tl.float32)
        total = rest
    else:
        sums = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        for i in range(0, tiles_v, BLOCK_T):
            tile = (i + tl.arange(0, BLOCK_T)).to(tl.int64)
            where = tile[:, None] * part_stride + local[None, :]
            sums += tl.load(sums_ptr + where, mask=(tile < tiles_v)[:, None] & inside[None, :], other=0.0)
        rest = tl.sum(sums, 0)
        y_t = tl.load(anchor_ptr + rows, mask=inside, other=0.0)
        a = y_t
        if REDO:
            flag = tl.load(flag_ptr + local, mask=inside, other=0)
            a = tl.where(flag > 0, _redone(a, tl.load(row_max_ptr + local, mask=inside, other=0.0)), a)
        at_target = tl.where(t >= 0, tl.exp(y_t - a), 0.0)
        total = rest + at_target
        if not REDO:
            # A row without a target has its anchor among what was summed.
            flag = tl.where((total <= SATURATED) & (total > 0), 0, 1)
            tl.store(flag_ptr + local, flag, mask=inside)
            found = tl.max(tl.where(inside, flag, 0), 0)
            if found > 0:
                tl.atomic_max(any_ptr, found)
                tl.atomic_max(any_ptr + 1 + tl.program_id(0) * BLOCK_N // PAIR, found)
                high = tl.full((BLOCK_T, BLOCK_N), float("-inf"), tl.float32)
                for i in range(0, tiles_v, BLOCK_T):
                    tile = (i + tl.arange(0, BLOCK_T)).to(tl.int64)
                    where = tile[:, None] * part_stride + local[None, :]
                    here = (tile < tiles_v)[:, None] & inside[None, :]
                    high = tl.maximum(high, tl.load(maxima_ptr + where, mask=here, other=float("-inf")))
                tl.store(row_max_ptr + local, tl.max(high, 0), mask=inside)
        lse = a + tl.log(total)
        tl.store(lse_ptr + rows, lse, mask=inside)
    if GRAD:
        g = tl.zeros((BLOCK_N,), tl.float32)
        if g_lse_ptr is not None:
            g += tl.load(g_lse_ptr + rows * stride_gl, mask=inside, other=0.0)
        if g_slope_ptr is not None:
            g += tl.load(g_slope_ptr + rows * stride_gs, mask=inside, other=0.0) * lse
        g_t = tl.zeros((BLOCK_N,), tl.float32)
        if g_target_ptr is not None:
            g_t = tl.load(g_target_ptr + rows * stride_gt, mask=inside, other=0.0)
        if KNOWN:
            u = g
            d = g * tl.exp(tl.load(anchor_ptr + rows, mask=inside, other=0.0) - lse) + g_t
        else:
            u = g / total
            # g p_t + g_t with p_t = 1 - rest / total: nothing cancels where g_t = -g.
            d = (g + g_t) * (at_target / total) + g_t * (rest / total)
        _, slope = epilogue(tl.load(raw_ptr + rows, mask=inside, other=0.0), STEPS, FAST=True)
        tl.store(u_ptr + local, u, mask=inside)
        tl.store(d_ptr + rows, tl.where(t >= 0, d * slope, 0.0), mask=inside)


@triton.jit(do_not_specialize=["row0"])
def spread_kernel(
    sums_ptr, e_ptr, row_stride, x_ptr, stride_x, w_ptr, stride_w, target_ptr, stride_t, u_ptr, d_ptr,
    g_sum_ptr, stride_g, class_sum_ptr, dx_ptr, xs_ptr, row0, V, H,
    TAIL: tl.constexpr, SLOPE: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Row by row: dX = u * (E @ weight) + d * weight[target] (+ the sum's term), and xs = u * x for dW.

    sums [n, H]: E @ weight over all but the last TAIL classes, which no library product likes; they come here.
    """
    local = tl.program_id(0).to(tl.int64)
    n = local + row0
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = offs_h < H
    u = tl.load(u_ptr + local)
    if xs_ptr is not None:
        x = tl.load(x_ptr + n * stride_x + offs_h, mask=inside, other=0.0).to(tl.float32)
        tl.store(xs_ptr + local * H + offs_h, (x * u).to(tl.bfloat16), mask=inside)
    if dx_ptr is not None:
        dx = tl.load(sums_ptr + local * H + offs_h, mask=inside, other=0.0)
        for j in tl.static_range(TAIL):
            v = (V - TAIL + j).to(tl.int64)
            e = tl.load(e_ptr + local * row_stride + v).to(tl.float32)
            dx += e * tl.load(w_ptr + v * stride_w + offs_h, mask=inside, other=0.0).to(tl.float32)
        dx *= u
        if target_ptr is not None:
            t = _column(target_ptr, n * stride_t, V, n >= 0).to(tl.int64)
            w = tl.load(w_ptr + t * stride_w + offs_h, mask=offs_h < tl.where(t >= 0, H, 0), other=0.0).to(tl.float32)
            dx += tl.load(d_ptr + n) * w
        if g_sum_ptr is not None:
            g = tl.load(g_sum_ptr + n * stride_g) * SLOPE
            dx += g * tl.load(class_sum_ptr + offs_h, mask=inside, other=0.0)
        tl.store(dx_ptr + n * H + offs_h, dx.to(tl.bfloat16), mask=inside)


@triton.jit
def collect_kernel(
    key_ptr, order_ptr, ends_ptr, x_ptr, stride_x, d_ptr, dw_ptr, db_ptr, V, H,
    BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """dW[v] += sum of d_i x_i over the rows i whose target is v, and db[v] likewise, in the order of rows.

    key: targets in rising order, V for none; order: their rows; ends: where the entries of the same class end. The
    program of a class's first entry adds them all; dw [V, H] and db [V] are fp32.
    """
    entry = tl.program_id(0)
    v = tl.load(key_ptr + entry).to(tl.int64)
    before = tl.load(key_ptr + entry - 1, mask=entry > 0, other=-1)
    if (v >= V) | (before == v):
        return
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = offs_h < H
    dw = tl.load(dw_ptr + v * H + offs_h, mask=inside, other=0.0)
    d_sum = tl.zeros((BLOCK_R,), tl.float32)
    end = tl.load(ends_ptr + entry).to(tl.int32)
    for first in range(entry, end, BLOCK_R):
        place = first + tl.arange(0, BLOCK_R)
        rows = tl.load(order_ptr + place, mask=place < end, other=0)
        d = tl.load(d_ptr + rows, mask=place < end, other=0.0)
        where = x_ptr + rows[:, None] * stride_x + offs_h[None, :]
        x = tl.load(where, mask=(place < end)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        dw += tl.sum(x * d[:, None], 0)
        d_sum += d
    tl.store(dw_ptr + v * H + offs_h, dw, mask=inside)
    if db_ptr is not None:  # noqa: SIM102
        if tl.program_id(1) == 0:
            tl.store(db_ptr + v, tl.load(db_ptr + v) + tl.sum(d_sum, 0))


@triton.jit
def column_sums_kernel(
    m_ptr, stride_m, scale_ptr, stride_s, out_ptr, rows, columns, rows_each,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[split, column] = sum of scale[row] * m[row, column] over the split's rows; scale None is all ones."""
    split = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)  # summed over its rows at the end: that takes all threads
    end = tl.minimum((split + 1) * rows_each, rows)
    for first in range(split * rows_each, end, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        where = m_ptr + r[:, None] * stride_m + cols[None, :]
        m = tl.load(where, mask=(r < end)[:, None] & (cols < columns)[None, :], other=0.0).to(tl.float32)
        if scale_ptr is not None:
            m *= tl.load(scale_ptr + r * stride_s, mask=r < end, other=0.0).to(tl.float32)[:, None]
        total += m
    tl.store(out_ptr + split * columns + cols, tl.sum(total, 0), mask=cols < columns)
