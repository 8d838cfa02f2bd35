"""Library products around one Triton row kernel: what computes a head on CUDA where the anchored softmax does not.

For each chunk of rows, logits into a buffer with padded rows, statistics and then the logits' gradient in place
(kernels/rows.py), dX and dW from it. The logits are rounded to the dtype of x exactly where eager rounds them; with the
known softmax there are none, and the first product leaves their gradient. Every product has `out=`, which ambient
autocast leaves alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..spec.statistics import LSE, HeadArgs, RowGrads, Stats, computed, empty_stats, grad_dtype
from .device_policy import KNOWN
from .known_softmax import Known
from .plan import Mask, Plan, Products, pieces
from .products import input_gradient, logits_with_lse, weight_gradient, with_factors


def forward(a: HeadArgs, stats: int, p: Plan) -> Stats:
    found = empty_stats(a.x, a.target, stats)
    _run(a, stats, found, None, None, p)
    return found


def backward(
    a: HeadArgs, lse: Tensor, neg_entropy: Tensor | None, grads: RowGrads, mask: Mask, p: Plan
) -> tuple[Tensor, ...]:
    out = _Gradients(a, mask, a.weight.dtype)
    if any(mask) and not grads.all_none():
        _run(a, 0, known(a, lse, neg_entropy), grads, out, p)
    return out.result()


def known(a: HeadArgs, lse: Tensor, neg_entropy: Tensor | None) -> Stats:
    """The statistics that a backward has, as the row kernel takes them."""
    found = empty_stats(a.x, a.target, 0)._replace(lse=lse.contiguous())
    return found if neg_entropy is None else found._replace(neg_entropy=neg_entropy.contiguous())


def with_grad(
    a: HeadArgs, stats: int, grads: RowGrads, mask: Mask, wide: bool, p: Plan
) -> tuple[Stats, Tensor, Tensor, Tensor]:
    wanted = computed(stats, grads.bits())
    found = empty_stats(a.x, a.target, wanted)
    out = _Gradients(a, mask, grad_dtype(a.weight.dtype, wide))
    _run(a, wanted, found, grads if any(mask) and not grads.all_none() else None, out, p)
    return (found.only(stats), *out.result())


def _run(a: HeadArgs, stats: int, found: Stats, grads: RowGrads | None, out: _Gradients | None, p: Plan) -> None:
    from ..kernels import rows

    N, V = a.x.shape[0], a.weight.shape[0]
    a = with_factors(a)
    product = Known.of(a, found.lse, grads) if p.algorithm == KNOWN and grads is not None else None
    a = a if product is None else product.a
    buffer = a.x.new_empty(p.chunks.rows, p.chunks.row_stride)
    for row0, n in p.chunks.bounds(N):
        z, x_chunk, ours = buffer[:n], a.x[row0 : row0 + n], p.products_of(n)
        if product is not None:
            product.gradient(z, row0)
        else:
            left = ours.logits and logits_with_lse(z, a.x, a.weight, row0, found.lse[row0 : row0 + n])
            bias = a.bias if left else logits(a, x_chunk, z)
            rows.launch(
                z, V, row0, bias, a.target, a.class_weight, a.epilogue,
                stats & ~LSE if left else stats, found, grads, hidden=a.bias is not None,
            )  # fmt: skip
        if grads is not None and out is not None:
            out.add(row0, z, x_chunk, a.weight, ours, last=row0 + n == N)


def logits(a: HeadArgs, x: Tensor, z: Tensor) -> Tensor | None:
    """z [n, at least V] = x @ weight^T and, as in eager in one rounding, a bias of its dtype; returns another bias."""
    within = a.bias is not None and a.bias.dtype == x.dtype
    for c in pieces(len(a.weight), x.element_size()):
        if within:
            torch.addmm(a.bias[c], x, a.weight[c].t(), out=z[:, c])  # type: ignore[index]
        else:
            torch.mm(x, a.weight[c].t(), out=z[:, c])
    return None if within else a.bias


class _Gradients:
    """dX by rows; dW and db summed over chunks, in fp32 (fp64) as soon as there are several."""

    def __init__(self, a: HeadArgs, mask: Mask, dtype: torch.dtype) -> None:
        self.like, self.shape, self.dtype, self.mask = a.x, a.weight.shape, dtype, mask
        self.wide = torch.float64 if a.x.dtype == torch.float64 else torch.float32
        # Until the first chunk: before its product, the GPU waits.
        self.dx: Tensor | None = None
        self.dw: Tensor | None = None
        self.db: Tensor | None = None

    def add(self, row0: int, dz: Tensor, x: Tensor, weight: Tensor, ours: Products, last: bool) -> None:
        """Take in a chunk's dZ: [n, row_stride], of which V columns count."""
        if self.mask[0]:
            if self.dx is None:
                self.dx = x.new_empty(self.like.shape)
            input_gradient(self.dx[row0 : row0 + len(dz)], dz, weight, ours.dx)
        if self.mask[1]:
            first = self.dw is None
            if self.dw is None:
                self.dw = x.new_empty(self.shape, dtype=self.dtype if last else self.wide)
            weight_gradient(self.dw, dz, x, ours.dw, accumulate=not first)
        if self.mask[2]:
            column = dz[:, : self.shape[0]].sum(0, dtype=self.wide)
            self.db = column if self.db is None else self.db.add_(column)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """dX, dW, and db as summed. The chunk must be free by now: the cast below is where both forms of dW exist."""

        def zeros(shape: Sequence[int], needed: bool, dtype: torch.dtype) -> Tensor:
            """Where there are no rows, or nothing depends on them."""
            return self.like.new_zeros(shape if needed else (0,), dtype=dtype)

        dx = zeros(self.like.shape, self.mask[0], self.like.dtype) if self.dx is None else self.dx
        dw = zeros(self.shape, self.mask[1], self.dtype) if self.dw is None else self.dw
        db = zeros(self.shape[:1], self.mask[2], self.wide) if self.db is None else self.db
        return dx, dw.to(self.dtype), db
