"""What a row region does on a CPU, and on any device without Triton: ATen products, the program in small blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import region_compiled as compiled
from .region_steps import Chunk, Values, step_by_step, with_code
from .sums import add_product

# Elements of a block for each thread, 1 MiB in fp32, so that a few of them stay in a core's own cache; and at most.
_BLOCK, _LARGEST = 1 << 18, 1 << 21


def guard(t: Tensor) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext()


def logits(z: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """z = x @ weight, and the bias: one rounding, as in eager."""
    if bias is None:
        torch.mm(x, weight, out=z)
    else:
        torch.addmm(bias, x, weight, out=z)


def dx(out: Tensor, dz: Tensor, matrix: Tensor) -> None:
    if out.dtype == dz.dtype:
        torch.mm(dz, matrix, out=out)
    else:
        torch.mm(dz.to(out.dtype), matrix.to(out.dtype), out=out)


def dw(out: Tensor, dz: Tensor, x: Tensor, first: bool) -> None:
    add_product(out, dz, x, first)


def elements() -> int:
    """Logits that code is given at a time."""
    return min(_BLOCK * torch.get_num_threads(), _LARGEST)


def compiles(device: torch.device) -> bool:
    return device.type in compiled.DEVICES


def program(chunk: Chunk, n: int) -> Iterator[Values]:
    """See steps.Values."""
    size = elements()
    return with_code(chunk, n, size, size) if compiles(chunk.key.device) else step_by_step(chunk, n, size)
