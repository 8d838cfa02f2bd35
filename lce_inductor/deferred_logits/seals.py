"""What tells deferred logits that the values of their head are no longer those of the call.

Fused optimizers raise no version counter, and neither do writes through `.data` or through a numpy array of the same
memory. So a call keeps sums of the values' bits (`seal`), and who reads the logits compares them (`same`); see
optimizer_steps.py for what is known without that.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

PIECE_BYTES = 256 << 20
"""A seal that is made to compare takes pieces of the weight, as integers, of about this size."""


def traced(t: Tensor) -> bool:
    return isinstance(t, FakeTensor | FunctionalTensor)


def seal(t: Tensor) -> Tensor:
    """What changes if t does. Of a vector its values; of a matrix, for each row (or column, if those are contiguous),
    the sum of the values' bits, each times a factor of its place.

    One changed value always shows, and so do exchanged ones; several changes of one row cancel only by coincidence. It
    is exact integer arithmetic, the same in any order, compiled or not.
    """
    if t.dim() != 2:
        return t.clone()
    t = t if t.stride(1) == 1 or t.stride(0) != 1 else t.t()
    if t.device.type == "cpu":
        sums: Tensor = torch.ops.lce_inductor.row_sums.default(t)
        return sums
    if traced(t):
        return _sums(t)  # Inductor makes one pass over the weight of it
    return torch.cat([_sums(piece) for piece in t.split(_rows(t))])


def same(t: Tensor, before: Tensor) -> bool:
    return torch.equal(_bits(seal(t)), _bits(before))


def _rows(t: Tensor) -> int:
    return max(1, PIECE_BYTES // max(1, 8 * t.shape[1]))


def _bits(t: Tensor) -> Tensor:
    return t.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])  # NaN equals NaN


def _factors(t: Tensor) -> Tensor:
    """An odd number for each column. Every intermediate that the mask keeps is the same whether or not int32 wraps as
    signed numbers do; no two neighbours are in a fixed ratio."""
    i = torch.arange(t.shape[1], dtype=torch.int32, device=t.device)
    return (((i * i * 0x2545F491 + i * 0x1E3779B1) & 0x3FFFFFFF) | 1).to(torch.int64)


def _sums(t: Tensor) -> Tensor:
    bits = _bits(t)
    if t.element_size() == 8:
        bits = bits ^ (bits >> 32)  # the sign is the highest bit, and two of them would cancel modulo 2**64
    return (bits * _factors(t)).sum(-1)  # the factors make an int64 of the product, in one kernel also in eager


def _row_sums(t: Tensor) -> Tensor:
    """On the CPU: ATen's integer product reads eight bytes at a time, ten times as fast as what Inductor generates.

    The price: an even number of changes in the highest bits of these words, and nowhere else in the row, cancels.
    """
    if t.element_size() < 8:
        with contextlib.suppress(RuntimeError):  # rows that do not begin and end at eight bytes
            words = t.view(torch.int64)
            return torch.mv(words, _factors(words))
    return torch.cat([_sums(piece) for piece in t.split(_rows(t))])


_lib = torch.library.Library("lce_inductor", "FRAGMENT")
_lib.define("row_sums(Tensor t) -> Tensor")
_lib.impl("row_sums", _row_sums, "CPU")
torch.library.register_fake("lce_inductor::row_sums", lambda t: t.new_empty(t.shape[0], dtype=torch.int64), lib=_lib)
