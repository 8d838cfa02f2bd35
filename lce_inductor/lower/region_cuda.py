"""What a row region does on a GPU: library products (on sm_90 our own), the program compiled for whole chunks."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import region_compiled as compiled
from .plan import Products, pieces, products_on, triton_is_installed
from .products import input_gradient, weight_gradient
from .region_steps import Chunk, Values, step_by_step, with_code

# Elements of a block where there is no code: 64 MiB in fp32, enough to fill a GPU.
_BLOCK = 1 << 24


def guard(t: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launches go to the current device, which need not be the tensor's."""
    here = t.get_device() == torch._C._cuda_getDevice()
    return contextlib.nullcontext() if here else torch.cuda.device(t.device)


def logits(z: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """z = x @ weight, and the bias: one rounding, as in eager."""
    for c in pieces(z.shape[1], z.element_size()):
        if bias is None:
            torch.mm(x, weight[:, c], out=z[:, c])
        else:
            torch.addmm(bias[c], x, weight[:, c], out=z[:, c])


def dx(out: Tensor, dz: Tensor, matrix: Tensor) -> None:
    input_gradient(out, dz, matrix, _ours(dz, matrix).dx)


def dw(out: Tensor, dz: Tensor, x: Tensor, first: bool) -> None:
    weight_gradient(out, dz, x, _ours(dz, x).dw, accumulate=not first)


def _ours(dz: Tensor, other: Tensor) -> Products:
    """other: a factor [..., H] of dX or dW."""
    return products_on(dz.shape[0], other.shape[1], dz.shape[1], dz.dtype, dz.device)


def elements() -> int:
    """Logits that code is given at a time: whole chunks."""
    return sys.maxsize


def compiles(device: torch.device) -> bool:
    return device.type in compiled.DEVICES and triton_is_installed()


def program(chunk: Chunk, n: int) -> Iterator[Values]:
    """See steps.Values."""
    code = compiles(chunk.key.device)
    return with_code(chunk, n, elements(), _BLOCK) if code else step_by_step(chunk, n, _BLOCK)
