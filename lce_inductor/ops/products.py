"""Products whose result may be wider than their factors: the library's, and for dW on sm_90 our own."""

from __future__ import annotations

import torch
from torch import Tensor

from .chunking import round_up

# Below this many classes an unaligned product costs less than one more launch.
_LEAST_SPLIT = 1024


def product(out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False) -> None:
    """out = a @ b, or out += a @ b; out may be wider than a and b. Having `out`, it is left alone by autocast."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif not a.is_cuda:  # the interpreter's tests: only CUDA has products with a wider result
        a, b = a.to(out.dtype), b.to(out.dtype)
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif accumulate:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def weight_gradient(dw: Tensor, dz: Tensor, x: Tensor, accumulate: bool) -> None:
    """dW (+)= dZ^T x, on the current device.

    Args:
        dw: [V, H], possibly wider than dz and x.
        dz: [n, at least V], rows padded to 64 elements. x: [n, H].
        accumulate: False overwrites what is in dw.
    """
    V, H = dw.shape
    if dw.dtype == torch.float32 and aligned(x) and aligned(dw):
        from ..kernels import hopper

        kernel = hopper.dw_kernel(x.device, x.dtype) if hopper.fills_tiles(H) else None
        if kernel is not None:
            hopper.launch_dw(kernel, dw, dz, x, accumulate)
            return
    for c in pieces(V, dz.element_size()):
        product(dw[c], dz[:, c].t(), x, accumulate)


def pieces(V: int, itemsize: int) -> list[slice]:
    """The classes, in pieces that the library's products run well on.

    Padded rows are not enough: cuBLAS looks at the sizes too, and an odd V costs up to seven times the time (93
    TFLOP/s at V = 50257 against 628 at 50304, H100). So the last few classes get products of their own.
    """
    rest = V % (16 // itemsize)
    return [slice(0, V - rest), slice(V - rest, V)] if rest and V >= _LEAST_SPLIT else [slice(0, V)]


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
