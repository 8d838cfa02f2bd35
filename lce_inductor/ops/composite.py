"""Composite ops: ordinary tensor arithmetic around row_stats. AOTAutograd traces through them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .types import NO_TARGET


def head_stats(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: list[Tensor],
    ignore_indices: list[int],
    class_weight: Tensor | None,
    epilogue: str,
    stats: int,
    chunk_tokens: int,
    workspace_bytes: int,
) -> tuple[Tensor, ...]:
    """Row statistics of `linear(x, weight, bias)` for x of any rank.

    x [..., H]; each of `targets` holds one integer per row of x (any shape, in row-major order) and becomes a
    column of the op's target; the value in `ignore_indices` at its place means "no target" in it.
    Returns statistics shaped [...], target_logit [..., K]; what `stats` does not ask for is empty.
    """
    rows = x.shape[:-1]
    # A label that happens to be NO_TARGET (NaN.long() is) has to stay out of bounds.
    columns = [
        torch.where(t == ignored, NO_TARGET, t.long().clamp(min=NO_TARGET + 1)).reshape(-1)
        for t, ignored in zip(targets, ignore_indices)
    ]
    target = torch.stack(columns, 1) if columns else None
    flat = x.reshape(math.prod(rows), x.shape[-1])
    found = torch.ops.lce_inductor.row_stats(
        flat, weight, bias, target, class_weight, epilogue, stats, chunk_tokens, workspace_bytes
    )
    return tuple(
        found_one.reshape((*rows, *found_one.shape[1:])) if stats & (1 << i) else found_one
        for i, found_one in enumerate(found)
    )


def cross_entropy(
    lse: Tensor,
    target_logit: Tensor,
    sum_logits: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    num_classes: int,
    dtype: torch.dtype,
) -> Tensor:
    """F.cross_entropy from row statistics.

    lse, target_logit and sum_logits hold one value per element of target [...], in row-major order; weight [V].
    sum_logits is the sum over classes weighted by `weight`; it is read only with label smoothing. Returns
    [...] or a scalar of `dtype`.
    The formulas are ATen's: with weights, "mean" divides by the weights of the valid targets.
    """
    valid = target != ignore_index
    lse = lse.reshape(target.shape)
    loss = lse - target_logit.reshape(target.shape)
    row_weight = None
    if weight is not None:
        index = torch.where(valid, target, 0)  # indexing by a target of no dimensions would read its value
        row_weight = weight.to(loss.dtype).index_select(0, index.reshape(-1)).reshape(target.shape)
        loss = loss * row_weight
    if label_smoothing > 0.0:
        assert sum_logits is not None
        mass = num_classes if weight is None else weight.to(loss.dtype).sum()
        smooth = lse * mass - sum_logits.reshape(target.shape)
        loss = loss * (1 - label_smoothing) + smooth * (label_smoothing / num_classes)
    loss = torch.where(valid, loss, 0)
    if reduction == "none":
        return loss.to(dtype)
    total = loss.sum()
    if reduction == "mean":
        count = valid.sum() if row_weight is None else torch.where(valid, row_weight, 0).sum()
        total = total / count
    return total.to(dtype)
