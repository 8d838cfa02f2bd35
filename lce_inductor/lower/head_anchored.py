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
from torch import Tensor

from ..kernels import anchored_triton, hopper
from ..kernels.call import Call
from ..spec.epilogue import affine_slope
from ..spec.sizes import round_up
from ..spec.statistics import LSE, SUM, TARGET, HeadArgs, RowGrads, Stats, grad_dtype
from .device_policy import ANCHORED
from .plan import Mask, Plan
from .products import on_sectors, product, weight_gradient

# Rows without a target look at this many classes for an anchor.
_SAMPLES = 16


def forward(a: HeadArgs, stats: int, p: Plan, needed: Tensor | None = None) -> Stats:
    """Statistics LSE, TARGET and SUM: one product, of which only partial sums are written."""
    head = Head(a, stats, p, needed=needed)
    head.start(store=False)
    head.first_product(None)
    for row0, n in p.chunks.bounds(head.N):
        head.logits(row0, n)
    return head.stats()


def with_grad(
    a: HeadArgs, stats: int, grads: RowGrads, mask: Mask, wide: bool, p: Plan, needed: Tensor | None = None
) -> tuple[Stats, Tensor, Tensor, Tensor]:
    """Statistics and gradients with three products; wide: dW and db in fp32."""
    head = Head(a, stats, p, needed=needed)
    gradients = _gradients(head, grads, mask, grad_dtype(a.x.dtype, wide))
    return (head.stats(), *gradients)


def backward(
    a: HeadArgs, lse: Tensor, neg_entropy: Tensor | None, grads: RowGrads, mask: Mask, p: Plan
) -> tuple[Tensor, ...]:
    """Gradients from the forward's lse, by computing the logits again."""
    assert neg_entropy is None
    return _gradients(Head(a, 0, p, lse.float().contiguous()), grads, mask, a.x.dtype)


def _gradients(head: Head, grads: RowGrads, mask: Mask, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    assert mask[1] or not mask[2]
    a, p, N, V = head.a, head.plan, head.N, head.V
    head.take(grads)
    head.start(store=True)
    buffer = a.x.new_empty(p.chunks.rows, p.chunks.row_stride)
    head.first_product(buffer)
    # From here on the GPU is busy.
    head.prepare_gradients(mask)
    for row0, n in p.chunks.bounds(N):
        head.logits(row0, n)
        tail, ours = 0, p.products_of(n)
        if head.product is not None and not (ours.dx and head.launches.product(head, row0, n)):
            tail = head.product_by_library(n)
        head.launches.spread(head, row0, n, tail)
        if head.dw is not None and head.packs:
            head.launches.weight_gradient(head, row0, n)
        elif head.dw is not None:
            assert head.xs is not None
            weight_gradient(head.dw, buffer[:n], head.xs[:n], ours.dw, accumulate=row0 > 0)
        if head.db is not None:
            head.db += head.column_sums(buffer[:n, :V], head.launches.u)
    # What is below needs room for dW in both precisions: the chunk goes first.
    del buffer
    head.free_chunk()
    if head.dw is not None and N:
        head.collect()
    dx, dw, db = (a.x.new_empty(0) if t is None else t for t in (head.dx, head.dw, head.db))
    return dx, dw.to(dtype), db.to(dtype)


class Head(Call):
    """A call, and the order of its launches; the engine's `launches` see all of it."""

    def __init__(
        self, a: HeadArgs, stats: int, p: Plan, lse: Tensor | None = None, needed: Tensor | None = None
    ) -> None:
        self.a, self.asked, self.plan = a, stats, p
        self.rows, self.chunks = p.chunks.rows, p.chunks.count
        self.N, self.H = a.x.shape
        self.V = a.weight.shape[0]
        self.x = on_sectors(a.x)
        self.weight = a.weight
        self.bias = None if a.bias is None else a.bias.float().contiguous()
        self.class_weight = None if a.class_weight is None else a.class_weight.contiguous()
        self.target = None if a.target is None or a.target.shape[1] == 0 else a.target[:, 0]
        self.stride_t = 0 if self.target is None else self.target.stride(0)
        self.steps = a.epilogue
        self.samples = min(_SAMPLES, self.V)
        self.known = lse is not None
        self.lse = lse
        ours = p.algorithm == ANCHORED and hopper.supported(a.x.device)
        self.engine = hopper if ours else anchored_triton
        self.packs = p.packs and ours
        self.needed = needed if needed is None else needed.contiguous()
        columns = 0 if a.target is None else a.target.shape[1]
        self.target_logit = self.f32(self.N, columns) if stats & TARGET else None
        self.sum_logits = self.f32(self.N) if stats & SUM else None
        self.tiles = self.engine.tiles(self)
        self.grads = RowGrads()
        self.class_sum = self.shift = self.d = None
        self.product = self.xs = self.dx = self.dw = self.db = self.x_packed = None

    def take(self, grads: RowGrads) -> None:
        """What comes in from the statistics: rows may count for it."""
        self.grads = RowGrads(*(None if t is None else t.float() for t in grads))

    def start(self, store: bool) -> None:
        """Anchors. Until they are launched the GPU waits, and every microsecond of the host is one of the step.

        store: there will be room for a chunk's exponentials.
        """
        self.store = store
        if self.lse is None:
            self.lse = self.f32(self.N)
        if self.N:
            if self.sum_logits is not None:
                c = torch.ones_like(self.weight[:, 0]) if self.class_weight is None else self.class_weight
                c = c.float()
                b = c.new_zeros(()) if self.bias is None else (self.bias * c).sum()
                self.class_sum, self.shift = self.column_sums(self.weight, self.class_weight), torch.stack([b, c.sum()])
            self.launches = self.engine.Launches(self)
            if self.packs:
                self.launches.pack(self)
            self.launches.anchors(self)
        if self.packs:
            self.x_packed = self.x.new_empty(self.rows, round_up(self.H, 16))[:, : self.H]

    def first_product(self, e: Tensor | None) -> None:
        """That of the first chunk. e: where each chunk's exponentials go; None where only sums are wanted."""
        self.e = e
        if self.N:
            self.launches.prepare_products(self)
            self.launches.exponentials(self, 0, min(self.rows, self.N), redo=False)

    def prepare_gradients(self, mask: Mask) -> None:
        g, x, rows = self.grads, self.x, self.rows
        if g.sum is not None and self.class_sum is None:
            self.class_sum = self.column_sums(self.weight, self.class_weight)
        self.slope = 1.0 if g.sum is None else affine_slope(self.steps)
        self.d = self.f32(self.N)
        if mask[0]:
            self.dx, self.product = x.new_empty(self.N, self.H), self.f32(rows, self.H)
            if self.packs:
                self.dx.zero_()
        if mask[1]:
            self.dw, self.xs = self.f32(self.V, self.H), x.new_empty(rows, self.H)
        if mask[2]:
            self.db = self.f32(self.V).zero_()
        if self.N:
            self.launches.prepare_gradients(self)
        elif self.dw is not None:
            self.dw.zero_()

    def logits(self, row0: int, n: int) -> None:
        """The first product of a chunk, then its rows' statistics and coefficients; saturated rows twice."""
        if row0 > 0:
            self.launches.exponentials(self, row0, n, redo=False)
        self.launches.normalise(self, row0, n, redo=False)
        if not self.known:
            self.launches.exponentials(self, row0, n, redo=True)
            self.launches.normalise(self, row0, n, redo=True)

    def product_by_library(self, n: int) -> int:
        """product[:n] = E @ weight but for the last few classes; how many they are.

        cuBLAS looks at the sizes too, and an odd V costs several times the time.
        """
        assert self.product is not None and self.e is not None
        tail = self.V % 8 if self.V >= 8 else self.V
        if tail < self.V:
            product(self.product[:n], self.e[:n, : self.V - tail], self.weight[: self.V - tail])
        else:
            self.product.zero_()
        return tail

    def free_chunk(self) -> None:
        """Let go of what only the chunks needed."""
        self.e = self.product = self.xs = self.x_packed = None

    def collect(self) -> None:
        """The targets' part of dW and db, class by class in the order of rows, and that of the sums of logits."""
        assert self.dw is not None
        if self.grads.sum is not None:
            g_sum = self.grads.sum * self.slope
            c = self.dw.new_ones(self.V) if self.class_weight is None else self.class_weight.float()
            self.dw.addr_(c, self.column_sums(self.x, g_sum))
            if self.db is not None:
                self.db += c * g_sum.sum()
        if self.target is not None:
            # Before it is narrowed: a label out of range must not become another one, or a negative one.
            some = (self.target >= 0) & (self.target < self.V)
            if self.packs:
                some &= self.launches.counts(self)
            key = torch.where(some, self.target, self.V).to(torch.int32)
            key, order = torch.sort(key, stable=True)
            self.launches.collect(self, key, order, torch.searchsorted(key, key, right=True))

    def column_sums(self, m: Tensor, scale: Tensor | None) -> Tensor:
        """sum over rows of scale[row] * m[row], fp32, in a fixed order."""
        return anchored_triton.column_sums(m, scale)

    def stats(self) -> Stats:
        """Filled in by the launches, possibly after this returns."""
        nothing = self.f32(0)
        assert self.lse is not None
        if self.target is None and self.target_logit is not None:
            self.target_logit.zero_()
        return Stats(
            self.lse.double() if self.asked & LSE else nothing.double(),
            nothing if self.target_logit is None else self.target_logit,
            nothing if self.sum_logits is None else self.sum_logits,
            nothing,
            nothing,
            nothing.to(torch.int64),
        )
