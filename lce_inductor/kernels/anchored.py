"""Anchored softmax: bf16 heads whose logits are never rounded, and no pass over the rows of logits.

Instead of the row's maximum, which is known only after the whole row, subtract a logit that is known before: the
target's, a dot product away. With anchor a and target t of a row,

    E_v = exp(Y_v - a) for v != t, 0 for v = t         written in bf16 by the first product's own epilogue
    lse = a + log(sum E + exp(Y_t - a))
    dZ  = u E + d onehot(t)                             u = g_lse exp(a - lse), d in fp32
    dX  = u (E W) + d W[t]          dW = E^T (u x) + rows of d x, summed class by class

bf16 has the exponents of fp32, so E has 88 nats of room above the anchor. A row that needs more (its sum is
beyond SATURATED, or not a number) is done again with its largest logit as the anchor. Whether there is such a row
is known on the device alone: the launches that would do it again are always there and return at once.

Rows without a target take the largest of a few logits as their anchor. Where lse is known beforehand (the
backward that recomputes), it is the anchor, and nothing can saturate.

The target's entry is kept out of E: it carries half of the row's gradient, and rounding it to bf16 would cost as
much as rounding the result. Rows are sorted by target once, so that its part of dW is summed in a fixed order.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..ops.chunking import ChunkPlan, plan
from ..ops.epilogue import Steps, reciprocal
from ..ops.products import product
from ..ops.types import LSE, SUM, TARGET, HeadArgs, RowGrads, Stats
from . import anchored_kernels as kernels
from . import hopper
from .rows import flatten
from .tuning import OWN_DW, Tiles, tiles

Mask = tuple[bool, bool, bool]

# Rows without a target look at this many classes for an anchor.
_SAMPLES = 16
# Bytes of the partial sums of a forward without gradients: it stores nothing else.
_SUMS_BYTES = 32 << 20
# Rows that share a mark "one of these is saturated".
PAIR = hopper.PAIR


def forward(a: HeadArgs, stats: int) -> Stats:
    """Statistics LSE, TARGET and SUM: one product, of which only partial sums are written."""
    head = _Head(a, stats, None)
    N = head.N
    layout = tiles(head.capability, "sums", head.H)
    rows = max(_SUMS_BYTES // (8 * head.across(layout)) // PAIR, 1) * PAIR
    rows = triton.cdiv(triton.cdiv(N, triton.cdiv(N, rows)), PAIR) * PAIR if N else 1
    head.prepare(ChunkPlan(min(rows, max(N, 1)), triton.cdiv(N, rows), 0), layout, None)
    for row0, n in head.plan.bounds(N):
        head.logits(row0, n)
    return head.stats()


def with_grad(a: HeadArgs, stats: int, grads: RowGrads, mask: Mask) -> tuple[Stats, Tensor, Tensor, Tensor]:
    """Statistics and gradients with three products."""
    head = _Head(a, stats, grads)
    return (head.stats(), *_gradients(head, mask))


def backward(a: HeadArgs, lse: Tensor, grads: RowGrads, mask: Mask) -> tuple[Tensor, ...]:
    """Gradients from the forward's lse, by computing the logits again."""
    return _gradients(_Head(a, 0, grads, lse.contiguous()), mask)


def _gradients(head: _Head, mask: Mask) -> tuple[Tensor, Tensor, Tensor]:
    a, grads, N, H, V = head.a, head.grads, head.N, head.H, head.V
    assert grads is not None and (mask[1] or not mask[2])
    layout = tiles(head.capability, "logits", H)
    p = plan(N, H, V, 2, a.chunk_tokens, a.workspace_bytes, device="cuda")
    buffer = a.x.new_empty(p.rows, p.row_stride)
    head.prepare(p, layout, buffer)
    dx = a.x.new_empty((N, H) if mask[0] else (0,))
    scratch = head.f32(p.rows, H) if mask[0] else None
    scaled = a.x.new_empty(p.rows, H) if mask[1] else None
    dw = head.f32(V, H) if mask[1] else None
    db = head.f32(V).zero_() if mask[2] else None
    own_dw = None
    if dw is not None and scaled is not None and head.capability in OWN_DW:
        own_dw = hopper.WeightGradient(dw, buffer, scaled)
    # The last few classes apart: cuBLAS looks at the sizes too, and an odd V costs several times the time.
    tail = V % 8 if V >= 8 else V
    whole = head.weight[: V - tail]
    for row0, n in p.bounds(N):
        e = buffer[:n]
        head.logits(row0, n)
        if scratch is not None:
            if tail < V:
                product(scratch[:n], e[:, : V - tail], whole)
            else:
                scratch.zero_()
        head.spread(row0, n, scratch, e, tail, dx if mask[0] else None, scaled)
        if own_dw is not None:
            own_dw.launch(n, accumulate=row0 > 0)
        elif dw is not None and scaled is not None:
            for c in (slice(0, V - tail), slice(V - tail, V)):
                if c.start < c.stop:
                    product(dw[c], e[:, c].t(), scaled[:n], accumulate=row0 > 0)
        if db is not None:
            db += head.column_sums(e[:, :V], head.u)
    # What is below needs room for dW in both precisions: the chunk goes first.
    e = own_dw = None
    del buffer, scratch, scaled
    head.free()
    nothing = a.x.new_empty(0)
    return dx, *((nothing, nothing) if dw is None else head.collect(dw, db))


class _Head:
    """What the launches of one call share: inputs as the kernels take them, statistics, coefficients."""

    def __init__(self, a: HeadArgs, stats: int, grads: RowGrads | None, lse: Tensor | None = None) -> None:
        self.a, self.asked, self.grads = a, stats, grads
        self.N, self.H = a.x.shape
        self.V = a.weight.shape[0]
        self.x = a.x if aligned(a.x) else a.x.contiguous()
        self.weight = a.weight
        self.bias = None if a.bias is None else a.bias.float().contiguous()
        self.class_weight = None if a.class_weight is None else a.class_weight.contiguous()
        self.target = None if a.target is None or a.target.shape[1] == 0 else a.target[:, 0]
        self.stride_t = 0 if self.target is None else self.target.stride(0)
        self.steps = flatten(a.epilogue)
        self.known = lse is not None
        self.lse = self.f32(self.N) if lse is None else lse
        self.anchor, self.raw = self.f32(self.N), self.f32(self.N)
        self.d = self.f32(self.N) if grads is not None else None
        columns = 0 if a.target is None else a.target.shape[1]
        self.target_logit = self.f32(self.N, columns) if stats & TARGET else None
        self.sum_logits = self.f32(self.N) if stats & SUM else None
        self.class_sum: Tensor | None = None
        self.capability = torch.cuda.get_device_capability(a.x.device) if a.x.is_cuda else None
        self.hopper = hopper.supported(a.x.device)
        self.compiled: hopper.Logits | None = None

    def f32(self, *shape: int) -> Tensor:
        return self.a.x.new_empty(shape, dtype=torch.float32)

    def i32(self, *shape: int) -> Tensor:
        return self.a.x.new_zeros(shape, dtype=torch.int32)

    def across(self, layout: Tiles) -> int:
        """Tiles that a row of logits is cut into."""
        return triton.cdiv(self.V, hopper.COLUMNS if self.hopper else layout.columns)

    def prepare(self, p: ChunkPlan, layout: Tiles, e: Tensor | None) -> None:
        """Everything before the first chunk: anchors, sums over classes, scratch of a chunk's size.

        e: [p.rows, row_stride], where each chunk's exponentials go; None where only sums are wanted.
        """
        g, t = self.grads, layout
        self.plan, self.layout = p, layout
        if self.N == 0:
            return
        self.store = e is not None
        if not self.hopper:
            self.x_desc = _descriptor(self.x, t.rows, t.depth)
            self.w_desc = _descriptor(self.weight, t.columns, t.depth)
            self.e_desc = None if e is None else _descriptor(e, t.rows, t.columns // t.split)
        # A chunk's marks: whether any row is saturated, then whether one of each PAIR rows is.
        self.any = self.i32(max(p.count, 1), 1 + triton.cdiv(p.rows, PAIR))
        self.u, self.row_max, self.flag = self.f32(p.rows), self.f32(p.rows), self.i32(p.rows)
        self.tiles_v = self.across(t)
        self.sums = None if self.known else self.f32(self.tiles_v, p.rows)
        self.maxima = None if self.known else self.f32(self.tiles_v, p.rows)
        if self.hopper:
            self.compiled = hopper.Logits(
                self.x, self.weight, e, self.bias, self.target, self.a.epilogue,
                anchor=self.lse if self.known else self.anchor, sums=self.sums, maxima=self.maxima,
                row_max=self.row_max, flag=self.flag, known=self.known,
            )  # fmt: skip
        shift = None
        if self.asked & SUM or (g is not None and g.sum is not None):
            self.class_sum = self.column_sums(self.weight, self.class_weight)
        if self.asked & SUM:
            c = torch.ones_like(self.weight[:, 0]) if self.class_weight is None else self.class_weight
            c = c.float()
            b = c.new_zeros(()) if self.bias is None else (self.bias * c).sum()
            shift = torch.stack([b, c.sum()])
        kernels.anchor_kernel[(self.N,)](
            self.x, self.x.stride(0), self.weight, self.weight.stride(0), self.bias, self.target, self.stride_t,
            self.V, self.H, self.anchor, self.target_logit if self.target is not None else None, self.raw,
            self.class_sum if self.asked & SUM else None, self.sum_logits, shift,
            SAMPLES=min(_SAMPLES, self.V), STEPS=self.steps, BLOCK_H=_block(self.H),
            num_warps=4 if self.H > 256 else 1,
        )  # fmt: skip

    def free(self) -> None:
        """Let go of what only the chunks needed."""
        self.e_desc = self.sums = self.maxima = self.compiled = None

    def logits(self, row0: int, n: int) -> None:
        """The first product of a chunk, then its rows' statistics and coefficients; saturated rows twice."""
        index = row0 // self.plan.rows
        found = self.any[index]
        self._product(row0, n, found, "first")
        self._normalise(row0, n, found, redo=False)
        if not self.known:
            self._product(row0, n, found, "redo")
            self._normalise(row0, n, found, redo=True)

    def _product(self, row0: int, n: int, found: Tensor, run: str) -> None:
        if self.compiled is not None:
            self.compiled.launch(row0, n, run, found)
            return
        t, first = self.layout, run == "first"
        kernels.logits_kernel[(self._programs(triton.cdiv(n, t.rows) * self.tiles_v, t),)](
            self.x_desc, self.w_desc, self.e_desc if self.store else None,
            self.lse if self.known else self.anchor, self.bias, self.target, self.stride_t,
            self.sums, self.maxima, self.plan.rows, self.row_max, self.flag, found,
            n, row0, self.V, self.H,
            STEPS=self.steps, STORE=self.store, SUM=not self.known, REDO=not first,
            COMPILED=self.capability is not None, BLOCK_N=t.rows, BLOCK_V=t.columns, BLOCK_H=t.depth, SPLIT=t.split,
            GROUP=t.group, FLATTEN=t.flatten and first, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip

    def _normalise(self, row0: int, n: int, found: Tensor, redo: bool) -> None:
        g = self.grads or RowGrads()
        block = 8
        kernels.normalise_kernel[(triton.cdiv(n, block),)](
            self.sums, self.maxima, self.plan.rows, self.tiles_v, self.row_max, self.flag, found,
            self.anchor, self.raw, self.target, self.stride_t, self.lse,
            g.lse, _stride(g.lse), g.lse_slope, _stride(g.lse_slope),
            None if self.target is None else g.target, _stride(g.target), self.u, self.d, n, row0, self.V,
            STEPS=self.steps, KNOWN=self.known, GRAD=self.grads is not None, REDO=redo, PAIR=PAIR, BLOCK_N=block,
            BLOCK_T=128, num_warps=4,
        )  # fmt: skip

    def spread(
        self, row0: int, n: int, sums: Tensor | None, e: Tensor, tail: int, dx: Tensor | None, scaled: Tensor | None
    ) -> None:
        assert self.grads is not None
        block = min(_block(self.H), 1024)
        kernels.spread_kernel[(n, triton.cdiv(self.H, block))](
            sums, e, e.stride(0), self.x, self.x.stride(0), self.weight, self.weight.stride(0),
            self.target, self.stride_t, self.u, self.d, self.grads.sum, _stride(self.grads.sum), self.class_sum,
            dx, scaled, row0, self.V, self.H,
            TAIL=tail, SLOPE=slope_of(self.a.epilogue), BLOCK_H=block, num_warps=4 if block > 256 else 1,
        )  # fmt: skip

    def collect(self, sums: Tensor, db: Tensor | None) -> tuple[Tensor, Tensor]:
        """dW and db in their own dtype, the targets' part added."""
        assert self.grads is not None and self.d is not None
        a, V, H = self.a, self.V, self.H
        order = starts = row_sum = g_total = None
        if self.target is not None:
            key = torch.where(self.target >= 0, self.target, V).to(torch.int32)
            key, order = torch.sort(key, stable=True)
            starts = torch.searchsorted(key, torch.arange(V + 1, device=key.device, dtype=torch.int32))
        if self.grads.sum is not None:
            g_sum = self.grads.sum * slope_of(a.epilogue)
            row_sum, g_total = self.column_sums(self.x, g_sum), g_sum.sum()
        dw = a.x.new_empty(V, H)
        db_out = a.x.new_empty(0 if db is None else V)
        block = min(_block(H), 1024)
        kernels.collect_kernel[(V, triton.cdiv(H, block))](
            sums, self.x, self.x.stride(0), order, starts, self.d, row_sum, self.class_weight, db, g_total,
            dw, None if db is None else db_out, H, BLOCK_R=8, BLOCK_H=block, num_warps=4 if block > 256 else 1,
        )  # fmt: skip
        return dw, db_out

    def column_sums(self, m: Tensor, scale: Tensor | None) -> Tensor:
        """sum over rows of scale[row] * m[row], fp32, in a fixed order."""
        rows, columns = m.shape
        block = 256
        across = triton.cdiv(columns, block)
        splits = min(max(512 // across, 1), triton.cdiv(rows, 32))
        out = self.f32(splits, columns)
        kernels.column_sums_kernel[(across, splits)](
            m, m.stride(0), scale, _stride(scale), out, rows, columns, triton.cdiv(rows, splits),
            BLOCK_R=16, BLOCK_C=block, num_warps=4,
        )  # fmt: skip
        return out.sum(0)

    def _programs(self, count: int, t: Tiles) -> int:
        return min(count, 3 if self.capability is None else hopper.multiprocessors(self.a.x.device) * t.per_sm)

    def stats(self) -> Stats:
        """Filled in by the launches, possibly after this returns."""
        nothing = self.f32(0)
        if self.target is None and self.target_logit is not None:
            self.target_logit.zero_()
        return Stats(
            self.lse if self.asked & LSE else nothing,
            nothing if self.target_logit is None else self.target_logit,
            nothing if self.sum_logits is None else self.sum_logits,
            nothing,
            nothing,
            nothing.to(torch.int64),
        )


def slope_of(steps: Steps) -> float:
    """f' of an affine epilogue: the product of its factors."""
    slope = 1.0
    for name, *c in steps:
        slope *= c[0] if name == "mul" else reciprocal(c[0]) if name == "div" else 1.0
    return slope


def aligned(t: Tensor) -> bool:
    """True where a tensor descriptor takes t [rows, columns] as it is."""
    step = 16 // t.element_size()
    return t.stride(1) == 1 and t.stride(0) % step == 0 and t.stride(0) >= t.shape[1] and t.data_ptr() % 16 == 0


def _descriptor(t: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, columns])


def _stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def _block(H: int) -> int:
    return min(triton.next_power_of_2(max(H, 16)), 2048)
