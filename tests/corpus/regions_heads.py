"""Heads made of several products, losses as functions with a backward of their own, heads that are computed again."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .registry import case

BF16 = torch.bfloat16


def ce(logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
    return F.cross_entropy(logits.reshape(-1, logits.size(-1)), labels.reshape(-1), **kwargs)


# Adapters.


@case("adapter/lora", heads=2, low=(BF16,))
def lora(h: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, labels: Tensor) -> Tensor:
    return ce(F.linear(h, weight) + F.linear(F.linear(h, lora_a), lora_b) * 2.0, labels)


@case("adapter/lora-frozen-base", heads=2, frozen=("weight",), low=(BF16,))
def lora_frozen(h: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, labels: Tensor) -> Tensor:
    return ce(F.linear(h, weight) + F.linear(F.linear(h, lora_a), lora_b) * 2.0, labels)


@case("adapter/lora-of-detached-state", heads=2, frozen=("weight", "h"))
def lora_detached(h: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, labels: Tensor) -> Tensor:
    return ce(F.linear(h, weight) + F.linear(F.linear(h, lora_a), lora_b), labels)


@case("adapter/lora-capped", heads=2, frozen=("weight",))
def lora_capped(h: Tensor, weight: Tensor, bias: Tensor, lora_a: Tensor, lora_b: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight, bias) + (h @ lora_a.T) @ lora_b.T
    return ce(5.0 * torch.tanh(logits / 5.0), labels)


@case("adapter/two-loras", heads=3, frozen=("weight",))
def two_loras(h: Tensor, h2: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight) + F.linear(F.linear(h, lora_a), lora_b)
    return ce(logits + 0.5 * F.linear(F.linear(h2, lora_a), lora_b), labels)


@case("adapter/dora", heads=2, frozen=("weight",))
def dora(h: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, gain: Tensor, labels: Tensor) -> Tensor:
    norm = (weight + 2.0 * lora_b @ lora_a).norm(dim=1).detach()
    base = F.linear(h, weight)
    scale = gain / norm
    result = (scale - 1) * base + scale * F.linear(F.linear(h, lora_a), lora_b) * 2.0
    return ce(base + result, labels)


@case("adapter/dora-merged", frozen=("weight",))
def dora_merged(h: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, gain: Tensor, labels: Tensor) -> Tensor:
    merged = weight + 2.0 * lora_b @ lora_a
    return ce(F.linear(h, gain[:, None] * merged / merged.norm(dim=1, keepdim=True).detach()), labels)


@case("adapter/residual-head", heads=2)
def residual(h: Tensor, h2: Tensor, weight: Tensor, weight2: Tensor, labels: Tensor) -> Tensor:
    return ce(F.linear(h, weight) + F.linear(h2, weight2), labels)


# Functions with a backward of their own.


class CrossEntropy(torch.autograd.Function):
    """As Megatron writes it: the probabilities are saved and become the gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        logits = logits - logits.amax(-1, keepdim=True)
        own = logits.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        exp = logits.exp()
        total = exp.sum(-1)
        ctx.save_for_backward(exp / total.unsqueeze(-1), target)
        return total.log() - own

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        p, target = ctx.saved_tensors
        hot = torch.zeros_like(p).scatter(-1, target.unsqueeze(-1), 1.0)
        return (p - hot) * grad.unsqueeze(-1), None


@case("function/cross-entropy", low=(BF16,))
def function(h: Tensor, weight: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    loss = CrossEntropy.apply(F.linear(h, weight), targets)
    return (loss * mask).sum() / mask.sum()


class FromLogits(torch.autograd.Function):
    """The logits are saved, and the softmax is computed again; labels of -100 count nothing."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        keep = target != -100
        count = keep.sum()
        ctx.save_for_backward(logits, target, count)
        own = logits.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return ((logits.logsumexp(-1) - own) * keep).sum() / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, target, count = ctx.saved_tensors
        hot = F.one_hot(target.clamp(min=0), logits.size(-1))
        keep = (target != -100).unsqueeze(-1)
        return (logits.softmax(-1) - hot) * keep * grad / count, None


@case("function/softmax-computed-again")
def function_again(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return FromLogits.apply(F.linear(h, weight), labels)


@case("function/capped-before")
def function_capped(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return FromLogits.apply(3.0 * torch.tanh(F.linear(h, weight) / 3.0), labels)


# Computed again in the backward.


@case("checkpointed/head-with-temperatures", no_grad=None)
def checkpointed_rows(h: Tensor, weight: Tensor, row_temperatures: Tensor, labels: Tensor) -> Tensor:
    def head(state: Tensor, w: Tensor) -> Tensor:
        return ce(F.linear(state, w) / row_temperatures.unsqueeze(-1), labels)

    return checkpoint(head, torch.tanh(h), weight, use_reentrant=False)


@case("checkpointed/head-alone", no_grad=None)
def checkpointed_head(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = checkpoint(lambda s: F.linear(torch.tanh(s), weight), h, use_reentrant=False)
    return ce(logits.float(), labels)


@case("checkpointed/teacher-and-student", no_grad=None, heads=2)
def checkpointed_pair(h: Tensor, weight: Tensor, teacher_h: Tensor, teacher_weight: Tensor) -> Tensor:
    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        wanted = F.linear(teacher, teacher_weight).softmax(-1)
        return F.kl_div(F.linear(student, weight).log_softmax(-1), wanted, reduction="batchmean")

    return checkpoint(loss, h, teacher_h, use_reentrant=False)
