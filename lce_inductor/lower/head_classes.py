"""Gradients in blocks of classes, where logits are computed again.

lse is known then, and dZ of a block of classes needs nothing of the others: its rows of dW are there at once, one
product, rounded once. So dW has no sums in fp32 beside it; dX has, [N, H], which all blocks add to.

    for classes v of V:     Z = x W[v]^T        [N, v]
                            dZ in place of Z    (the known softmax: by the product that makes Z, which is never there)
                            dX += dZ W[v]       fp32
                            dW[v] = dZ^T x

A block of classes is a head of fewer classes, whose targets are counted from its first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec.sizes import round_up
from ..spec.statistics import NO_TARGET, HeadArgs, RowGrads, stat_dtype
from . import head_cpu, head_cuda
from .device_policy import BLOCKS, KNOWN
from .known_softmax import Known
from .plan import Mask, Plan
from .products import input_gradient, weight_gradient, with_factors
from .sums import add_widened


def backward(
    a: HeadArgs, lse: Tensor, neg_entropy: Tensor | None, grads: RowGrads, mask: Mask, p: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """dX, dW, and db as summed, in the blocks that p.classes has."""
    dx, dw, db = _run(a, lse, neg_entropy, grads, mask, p)
    return dx.to(a.x.dtype), dw, db  # the block is free by now: here both forms of dX exist


def _run(
    a: HeadArgs, lse: Tensor, neg_entropy: Tensor | None, grads: RowGrads, mask: Mask, p: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    assert p.classes is not None
    work = _work(with_factors(a), lse, neg_entropy, grads, p.algorithm)
    a, several = work.a, p.classes.count > 1
    (N, H), V, wide = a.x.shape, len(a.weight), stat_dtype(a.x)
    memory = a.x.new_empty(N * round_up(p.classes.classes, p.classes.align))
    dx = a.x.new_empty((N, H) if mask[0] else 0, dtype=wide if several else a.x.dtype)
    dw = a.x.new_empty((V, H) if mask[1] else 0)
    db = a.x.new_zeros(V if mask[2] else 0, dtype=wide)
    for first, n in p.classes.bounds(V):
        block, here = block_of(a, first, n), slice(first, first + n)
        apart = round_up(n, p.classes.align)
        z = memory[: N * apart].view(N, apart)
        work.gradient(block, first, z, db[here])
        if mask[0]:
            work.add_dx(dx, z, block.weight, first > 0)
        if mask[1]:
            work.dw(dw[here], z, a.x)
    return dx, dw, db


def _work(
    a: HeadArgs, lse: Tensor, neg_entropy: Tensor | None, grads: RowGrads, algorithm: str
) -> _ATen | _RowKernel | _Known:
    if algorithm == BLOCKS:
        return _ATen(a, lse, neg_entropy, grads)
    known = Known.of(a, lse, grads) if algorithm == KNOWN else None
    return _RowKernel(a, lse, neg_entropy, grads) if known is None else _Known(known)


def block_of(a: HeadArgs, first: int, n: int) -> HeadArgs:
    """The head of n classes of this one, from `first` on; a target among the others is none there."""
    here, target = slice(first, first + n), a.target
    bias, class_weight = (None if t is None else t[here] for t in (a.bias, a.class_weight))
    if target is not None:
        target = (target - first).masked_fill_((target < first) | (target >= first + n), NO_TARGET)
    return a._replace(weight=a.weight[here], bias=bias, class_weight=class_weight, target=target)


class _ATen:
    """What a block takes on the CPU, and on any device without Triton. a: what is cut. z: [N, at least n]."""

    def __init__(self, a: HeadArgs, lse: Tensor, neg_entropy: Tensor | None, grads: RowGrads) -> None:
        self.a, self.rows, self.known = a, slice(0, len(a.x)), (lse, neg_entropy, grads)

    def gradient(self, block: HeadArgs, first: int, z: Tensor, db: Tensor) -> None:
        """The gradient of the logits of a block that begins at class `first`, into z; its sum into db if asked."""
        z = z[:, : len(block.weight)]
        head_cpu.logits(block, block.x, z)
        head_cpu.gradient(block, self.rows, z, *self.known, head_cpu.hidden_classes(block), db)

    def add_dx(self, dx: Tensor, dz: Tensor, weight: Tensor, accumulate: bool) -> None:
        add_widened(dx, dz[:, : len(weight)].t(), weight, first=not accumulate)

    def dw(self, out: Tensor, dz: Tensor, x: Tensor) -> None:
        torch.mm(dz[:, : len(out)].t(), x, out=out)


class _RowKernel:
    """The same with the row kernel and products of the library."""

    def __init__(self, a: HeadArgs, lse: Tensor, neg_entropy: Tensor | None, grads: RowGrads) -> None:
        self.a, self.found, self.grads = a, head_cuda.known(a, lse, neg_entropy), grads

    def gradient(self, block: HeadArgs, first: int, z: Tensor, db: Tensor) -> None:
        from ..kernels import rows

        V, bias = len(block.weight), head_cuda.logits(block, block.x, z)
        rows.launch(
            z, V, 0, bias, block.target, block.class_weight, block.epilogue, 0, self.found, self.grads,
            hidden=block.bias is not None,
        )  # fmt: skip
        _add_columns(db, z)

    def add_dx(self, dx: Tensor, dz: Tensor, weight: Tensor, accumulate: bool) -> None:
        input_gradient(dx, dz, weight, accumulate=accumulate)

    def dw(self, out: Tensor, dz: Tensor, x: Tensor) -> None:
        weight_gradient(out, dz, x, accumulate=False)


class _Known(_RowKernel):
    """The same with a product that leaves dZ."""

    def __init__(self, known: Known) -> None:
        self.a, self.product = known.a, known

    def gradient(self, block: HeadArgs, first: int, z: Tensor, db: Tensor) -> None:
        self.product.gradient(z, 0, block, first)
        _add_columns(db, z)


def _add_columns(db: Tensor, dz: Tensor) -> None:
    if len(db):
        torch.sum(dz[:, : len(db)], 0, dtype=db.dtype, out=db)
