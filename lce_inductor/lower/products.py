"""Products whose result may be wider than their factors, the library's; on sm_90 our own of logits, for dX and dW."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec.sizes import ceil_div, round_up
from ..spec.statistics import HeadArgs
from .plan import pieces, widens


def product(out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False) -> None:
    """out = a @ b, or out += a @ b; out may be wider than a and b. Having `out`, it is left alone by autocast."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif not (a.is_cuda and widens(a.device, a.dtype)):
        # The interpreter's tests; and a setting that has changed since the head was compiled.
        a, b = a.to(out.dtype), b.to(out.dtype)
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif accumulate:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def logits_with_lse(z: Tensor, x: Tensor, weight: Tensor, row0: int, lse: Tensor) -> bool:
    """z = x[row0 : row0 + n] @ weight^T and the rows' logsumexp without a pass over z; False: there is no such product.

    Args:
        z: [n, at least V], rows padded to 64 elements. x: [N, H], weight: [V, H]. lse: fp64 [n].
    """
    if not (aligned(x) and aligned(weight)):
        return False
    from ..kernels import hopper, hopper_source, rows

    kernels = hopper.products(x.device, x.dtype)
    if kernels is None:
        return False
    sums, maxima = z.new_empty(2, ceil_div(len(weight), hopper_source.COLUMNS), len(z), dtype=torch.float32)
    hopper.launch_logits(kernels.logits, z, x, weight, row0, sums, maxima)
    rows.launch_lse(sums, maxima, lse)
    return True


def input_gradient(dx: Tensor, dz: Tensor, weight: Tensor, ours: bool = False, accumulate: bool = False) -> None:
    """dX (+)= dZ weight, on the current device.

    Args:
        dx: [n, H], possibly wider than dz and weight, and so where it accumulates.
        dz: [n, at least V], rows padded to 64 elements. weight: [V, H].
        ours: by our product, where there is one; it overwrites.
        accumulate: False overwrites what is in dx.
    """
    (n, H), V = dx.shape, len(weight)
    if ours and not accumulate and dx.element_size() == 2 and aligned(weight):
        from ..kernels import hopper

        kernels = hopper.products(weight.device, weight.dtype)
        if kernels is not None:
            sums = dx.new_empty(n, H, dtype=torch.float32)
            counts = dx.new_zeros(hopper.counts_of_dx(n, H), dtype=torch.int32)
            hopper.launch_dx(kernels.dx, sums, dz, weight, counts.data_ptr(), 0)
            dx.copy_(sums)
            return
    # The few columns first: their sum is rounded once more.
    for i, c in enumerate(reversed(pieces(V, dz.element_size()))):
        product(dx, dz[:, c], weight[c], accumulate or i > 0)


def weight_gradient(dw: Tensor, dz: Tensor, x: Tensor, ours: bool = False, *, accumulate: bool) -> None:
    """dW (+)= dZ^T x, on the current device.

    Args:
        dw: [V, H], possibly wider than dz and x.
        dz: [n, at least V], rows padded to 64 elements. x: [n, H].
        ours: by our product, where there is one and dw is in fp32.
        accumulate: False overwrites what is in dw.
    """
    if ours and dw.dtype == torch.float32 and aligned(x) and aligned(dw):
        from ..kernels import hopper

        kernels = hopper.products(x.device, x.dtype)
        if kernels is not None:
            hopper.launch_dw(kernels.dw, dw, dz, x, accumulate)
            return
    for c in pieces(len(dw), dz.element_size()):
        product(dw[c], dz[:, c].t(), x, accumulate)


def as_factor(t: Tensor) -> Tensor:
    """A matrix itself where the library takes its strides, else a copy made once and not by every product."""
    rows, columns = t.stride()
    taken = (columns == 1 and rows >= t.shape[1]) or (rows == 1 and columns >= t.shape[0])
    return t if taken else t.contiguous()


def with_factors(a: HeadArgs) -> HeadArgs:
    """The head with tensors that all its products and kernels take as they are."""
    bias, class_weight = (None if t is None else t.contiguous() for t in (a.bias, a.class_weight))
    return a._replace(x=as_factor(a.x), weight=as_factor(a.weight), bias=bias, class_weight=class_weight)


def aligned(t: Tensor) -> bool:
    """True where a tensor descriptor takes t [rows, columns] as it is."""
    step = 16 // t.element_size()
    return t.stride(1) == 1 and t.stride(0) % step == 0 and t.stride(0) >= t.shape[1] and t.data_ptr() % 16 == 0


def on_sectors(t: Tensor) -> Tensor:
    """t [rows, columns] if its rows begin on 32 bytes, else a copy whose rows do.

    L2 hands out sectors of 32 bytes. The copy engine takes rows on 16, but then every line of 128 bytes costs five
    sectors for four: 460 TFLOP/s for 588 at H = 1000, H100.
    """
    step, (rows, columns), (apart, unit) = 32 // t.element_size(), t.shape, t.stride()
    if unit == 1 and apart % step == 0 and apart >= columns and t.data_ptr() % 32 == 0:
        return t
    return t.new_empty(rows, round_up(columns, step))[:, :columns].copy_(t)
