"""What the implementations of the fused ops take and return."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .epilogue import Steps


class Statistic(NamedTuple):
    """One number of each row of logits; of the logit at the target, one for each target.

    name: what the passes call it. result: its name among the ops' results. has_gradient: is its gradient an argument of
    the ops, g_<name>? That of a maximum is one of the logit at its index.
    """

    name: str
    result: str
    has_gradient: bool = True


# In the order of the ops' results and of their gradients. All else that lists statistics is made from this, but for
# Stats and RowGrads, whose fields a type checker has to see (test_ops.py compares them).
STATISTICS = (
    Statistic("lse", "lse"),
    Statistic("target", "target_logit"),
    Statistic("sum", "sum_logits"),  # weighted, where there are class weights
    Statistic("neg_entropy", "neg_entropy"),  # sum of p log p
    Statistic("max", "max_logit", has_gradient=False),
    Statistic("argmax", "argmax", has_gradient=False),
)
# Bits of `stats`, places among the ops' results, and the ops' arguments that are gradients with the bits they are of.
BITS = {s.name: 1 << i for i, s in enumerate(STATISTICS)}
PLACES = {s.name: i for i, s in enumerate(STATISTICS)}
GRADIENTS = {f"g_{s.name}": BITS[s.name] for s in STATISTICS if s.has_gradient}
LSE, TARGET, SUM, NEG_ENTROPY, MAX, ARGMAX = BITS.values()

NO_TARGET = -(2**63)  # torch.iinfo(torch.int64).min: this row has no target in this column


def stat_dtype(x: Tensor) -> torch.dtype:
    """dtype of the statistics of logits of x: fp64 for fp64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# Of lse = maximum + log of a sum. Rounded to fp32, a large maximum takes the digits of the small logarithm with it, and
# with them those of every `logit - lse`: the loss and the probabilities. One number per row costs nothing.
LSE_DTYPE = torch.float64


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
        prefer: "speed", or "memory" where less of it is worth time.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor | None
    class_weight: Tensor | None
    epilogue: Steps
    chunk_tokens: int
    workspace_bytes: int
    prefer: str = "speed"


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
        given = LSE if self.lse_slope is not None else 0
        for name, bit in GRADIENTS.items():
            if getattr(self, name[2:]) is not None:
                given |= bit
        return given


def computed(stats: int, grads: int) -> int:
    """The statistics that have to be there for those asked for and for gradients of others: bits in, bits out."""
    return stats | grads & LSE | (LSE | NEG_ENTROPY if grads & NEG_ENTROPY else 0)


class Stats(NamedTuple):
    """Row statistics of Y; what was not asked for has shape [0].

    lse: [N], fp64 (see LSE_DTYPE). sum_logits, neg_entropy, max_logit: [N]; target_logit: [N, K]; fp64 for fp64
    inputs, else fp32.
    argmax: int64 [N].
    """

    lse: Tensor
    target_logit: Tensor
    sum_logits: Tensor
    neg_entropy: Tensor
    max_logit: Tensor
    argmax: Tensor

    def only(self, stats: int) -> Stats:
        """These bits' alone, the others empty."""
        return Stats(*(t if stats & 1 << i else t.new_empty(0) for i, t in enumerate(self)))


def empty_stats(x: Tensor, target: Tensor | None, stats: int) -> Stats:
    """Memory for the statistics whose bits are asked for."""
    columns, dtypes = 0 if target is None else target.shape[1], {"lse": LSE_DTYPE, "argmax": torch.int64}

    def new(name: str) -> Tensor:
        shape = (x.shape[0], columns) if name == "target" else (x.shape[0],)
        return x.new_empty(shape if stats & BITS[name] else (0,), dtype=dtypes.get(name, stat_dtype(x)))

    return Stats(*map(new, BITS))
