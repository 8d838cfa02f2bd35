"""What the implementations of the fused ops take and return."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .epilogue import Steps

# Bits of `stats`: logsumexp, logit at the target, (weighted) sum, sum of p log p, maximum, its index.
LSE, TARGET, SUM, NEG_ENTROPY, MAX, ARGMAX = 1, 2, 4, 8, 16, 32

NO_TARGET = -(2**63)  # torch.iinfo(torch.int64).min: this row has no target in this column


def stat_dtype(x: Tensor) -> torch.dtype:
    """dtype of the statistics of logits of x: fp64 for fp64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def lse_dtype(x: Tensor) -> torch.dtype:
    """dtype of lse: fp64 wherever the device has it.

    lse = maximum + log of a sum. Rounded to fp32, a large maximum takes the digits of the small logarithm with it, and
    with them those of every `logit - lse`: the loss and the probabilities. One number per row costs nothing.
    """
    return torch.float32 if x.device.type == "mps" else torch.float64


def grad_dtype(weight: torch.dtype, wide: bool) -> torch.dtype:
    """dtype of dW and db from row_stats_with_grad.

    fp16 row gradients come normalised to a maximum of one, and their sum over rows may pass fp16's 65504:
    those stay fp32 until the real scale is multiplied in. wide: so do those of bf16.
    """
    half = (torch.float16, torch.bfloat16) if wide else (torch.float16,)
    return torch.float32 if weight in half else weight


class HeadArgs(NamedTuple):
    """One linear head: `Y = epilogue(x @ weight.T + bias)`, never held as a whole.

    Attributes:
        x: [N, H], any strides; fp64, fp32, bf16 or fp16.
        weight: [V, H], any strides, dtype of x.
        bias: [V], dtype of x, or None.
        target: int64 [N, K] with entries in [0, V) or NO_TARGET, or None for K = 0.
        class_weight: [V], any float dtype, or None for all ones.
        epilogue: parsed elementwise steps (see epilogue.py); () is the identity.
        chunk_tokens: rows of logits that may exist at a time; 0 lets the chunk plan decide.
        workspace_bytes: upper limit in bytes for one chunk of logits.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor | None
    class_weight: Tensor | None
    epilogue: Steps
    chunk_tokens: int
    workspace_bytes: int


class RowGrads(NamedTuple):
    """Gradient of the loss with respect to each row statistic; None means zero.

    Each in the dtype of its statistic or any other, any strides, 0 included.

    Attributes:
        lse: [N].
        lse_slope: [N]; the effective gradient of lse is `lse_slope * lse` more. Only where lse is computed
            in the same call.
        target: [N, K].
        sum: [N].
        neg_entropy: [N].
    """

    lse: Tensor | None = None
    lse_slope: Tensor | None = None
    target: Tensor | None = None
    sum: Tensor | None = None
    neg_entropy: Tensor | None = None

    def all_none(self) -> bool:
        """True where the loss does not depend on the head at all."""
        return all(g is None for g in self)

    def bits(self) -> int:
        """Bits of the statistics whose gradient is not zero."""
        lse = LSE if self.lse is not None or self.lse_slope is not None else 0
        given = ((TARGET, self.target), (SUM, self.sum), (NEG_ENTROPY, self.neg_entropy))
        return lse | sum(bit for bit, g in given if g is not None)


def needed(stats: int, grads: int) -> int:
    """The statistics that have to be there for those asked for and for gradients of others: bits in, bits out."""
    return stats | grads & LSE | (LSE | NEG_ENTROPY if grads & NEG_ENTROPY else 0)


class Stats(NamedTuple):
    """Row statistics of Y; what was not asked for has shape [0].

    lse: [N], fp64 (see lse_dtype). sum_logits, neg_entropy, max_logit: [N]; target_logit: [N, K]; fp64 for fp64
    inputs, else fp32.
    argmax: int64 [N].
    """

    lse: Tensor
    target_logit: Tensor
    sum_logits: Tensor
    neg_entropy: Tensor
    max_logit: Tensor
    argmax: Tensor
