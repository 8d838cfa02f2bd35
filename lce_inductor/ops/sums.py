"""dW as a sum of chunks where no product has a result wider than its factors: on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of a chunk that are widened at a time: 4 MiB in fp32.
_WIDENED = 1 << 20


def add_product(dw: Tensor, dz: Tensor, x: Tensor, first: bool) -> None:
    """dw (+)= dz^T x, no part of it rounded to the factors' dtype before it is added.

    Parts that are independent of each other would add one more rounding of dW, however many there are.

    Args:
        dw: [V, H], as wide as dz and x or wider. dz: [n, V]. x: [n, H].
        first: overwrites what is in dw.
    """
    x, V = x.to(dw.dtype), dz.shape[1]
    size = max(V if dz.dtype == dw.dtype else _WIDENED // max(len(dz), 1), 1)
    for start in range(0, V, size):
        part, own = dz[:, start : start + size].to(dw.dtype).t(), dw[start : start + size]
        torch.addmm(own, part, x, beta=0 if first else 1, out=own)
