"""dW as a sum of chunks where no product has a result wider than its factors: on a CPU."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .device_policy import WIDENED


def add_product(dw: Tensor, dz: Tensor, x: Tensor, first: bool) -> None:
    """dw (+)= dz^T x, no part of it rounded to the factors' dtype before it is added.

    Parts that are independent of each other would add one more rounding of dW, however many there are.

    Args:
        dw: [V, H], as wide as dz and x or wider. dz: [n, V]. x: [n, H].
        first: overwrites what is in dw.
    """
    V, H = dw.shape
    if dw.dtype != dz.dtype == torch.bfloat16 and _has_tiles():
        size = max(WIDENED // max(H, 1), 1)
        for start in range(0, V, size):
            _add_twice(dw[start : start + size], dz[:, start : start + size].t(), x, first)
    else:
        add_widened(dw, dz, x, first)


def add_widened(dw: Tensor, dz: Tensor, x: Tensor, first: bool) -> None:
    """The same by products of the wider dtype: it costs what the smaller products save, and no rounding."""
    x = x.to(dw.dtype)
    size = len(dw) if dz.dtype == dw.dtype else max(WIDENED // max(len(dz), 1), 1)
    for start in range(0, len(dw), size or 1):
        own, part = dw[start : start + size], dz[:, start : start + size].to(dw.dtype).t()
        torch.addmm(own, part, x, beta=0 if first else 1, out=own)
        del part  # before the next one is made


def _add_twice(out: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Two products in bf16 give sixteen bits: the second is what the first has lost. They sum up in fp32 inside."""
    high = a @ b
    rest = torch.addmm(high, a, b, beta=-1)
    (out.copy_(high) if first else out.add_(high)).add_(rest)


@functools.cache
def _has_tiles() -> bool:
    """Is a product in bf16 much faster than two in fp32 on this processor?"""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and supported()
