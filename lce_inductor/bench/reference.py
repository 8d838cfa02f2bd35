"""Inputs of a measurement, the exact results for them, and the bare products."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from .shapes import Shape

IGNORE = -100
IGNORED_ROWS = 16  # one in so many
REFERENCE_ROWS = 1024  # rows of logits that the reference holds at a time
_PIECE = 1 << 24  # elements that are compared at a time
PRODUCT_ROWS = {"cpu": 2048, "cuda": 4096}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Largest relative error that still counts as right: far above rounding, far below a wrong gradient.
ERROR_LIMITS = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 5e-2}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """x [N, H] and weight [V, H] that require gradients, target int64 [N].

    `cotangent` [N] fp32 weighs the losses of the rows where nothing reduces them; else it is None.
    """

    x: Tensor
    weight: Tensor
    target: Tensor
    cotangent: Tensor | None

    def clear(self) -> None:
        self.x.grad = self.weight.grad = None


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, reduction: str, peaked: bool) -> Inputs:
    """The same numbers for every implementation. Logits are standard normal, or peaked at the target."""
    random = torch.Generator(device).manual_seed(0)
    x = torch.randn(shape.N, shape.H, device=device, generator=random)
    weight = torch.randn(shape.V, shape.H, device=device, generator=random) * shape.H**-0.5
    target = torch.randint(shape.V, (shape.N,), device=device, generator=random)
    if peaked:
        # A row of weight has norm 1, so this adds 10 to 20 to the target's logit and little to any other.
        height = 10 + 10 * torch.rand(shape.N, 1, device=device, generator=random)
        x += height * torch.nn.functional.normalize(weight[target])
    target[::IGNORED_ROWS] = IGNORE
    cotangent = torch.rand(shape.N, device=device, generator=random) if reduction == "none" else None
    return Inputs(x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), target, cotangent)


@torch.no_grad()
def reference(inputs: Inputs, reduction: str, gradients: bool) -> list[Tensor]:
    """Loss and, if asked for, dX [N, H] and dW [V, H], in chunks of rows.

    In fp64 for fp32 inputs; in fp32 for bf16 and fp16, whose own rounding is far larger.
    """
    dtype = torch.float64 if inputs.x.dtype == torch.float32 else torch.float32
    weight, target = inputs.weight.to(dtype), inputs.target
    valid = target != IGNORE
    tangent = valid.to(dtype) / (valid.sum() if reduction == "mean" else 1)
    if inputs.cotangent is not None:
        tangent = tangent * inputs.cotangent
    losses = torch.zeros(len(target), dtype=torch.float64, device=target.device)
    dx = torch.empty(inputs.x.shape, dtype=dtype, device=target.device) if gradients else None
    dw = torch.zeros_like(weight) if gradients else None
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    for start in range(0, len(target), REFERENCE_ROWS):
        rows = slice(start, start + REFERENCE_ROWS)
        x = inputs.x[rows].to(dtype)
        index = target[rows].clamp(min=0)[:, None]
        logits = x @ weight.T
        lse = logits.logsumexp(1, keepdim=True)
        losses[rows] = ((lse - logits.gather(1, index))[:, 0] * valid[rows]).double()
        if dx is not None and dw is not None:
            dz = logits.sub_(lse).exp_().scatter_add_(1, index, -torch.ones_like(lse)).mul_(tangent[rows, None])
            dx[rows] = dz @ weight
            dw.addmm_(dz.T, x)
    torch.backends.cuda.matmul.allow_tf32 = tf32
    loss = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / valid.sum()}[reduction]
    return [t for t in (loss, dx, dw) if t is not None]


def relative_error(found: Tensor, exact: Tensor) -> float:
    """2-norm of the difference through that of the exact values; NaN where either is not finite.

    Piece by piece, where the exact values are.
    """
    pieces = zip(found.detach().reshape(-1).split(_PIECE), exact.reshape(-1).split(_PIECE))
    squares = [((f.to(e.dtype) - e).double().square().sum(), e.double().square().sum()) for f, e in pieces]
    different, whole = (torch.stack(parts).sum() for parts in zip(*squares))
    return (different / whole).sqrt().item()


def bare_products(shape: Shape, dtype: torch.dtype, device: torch.device, forward_only: bool) -> Callable[[], None]:
    """The matrix products of a step and nothing else: logits and, unless forward_only, dX and dW."""
    rows = min(PRODUCT_ROWS[device.type], shape.N)
    classes = -(-shape.V // 64) * 64  # what an unaligned row costs is no limit: it can be padded

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, dtype=dtype, device=device)

    x, weight, z = normal(shape.N, shape.H), normal(classes, shape.H), normal(rows, classes)
    dx, dw = torch.empty_like(x), torch.empty_like(weight)

    def step() -> None:
        for start in range(0, shape.N, rows):
            part = x[start : start + rows]
            logits = z[: len(part)]
            torch.mm(part, weight.T, out=logits)
            if not forward_only:
                torch.mm(logits, weight, out=dx[start : start + rows])
                torch.mm(logits.T, part, out=dw)

    return step
