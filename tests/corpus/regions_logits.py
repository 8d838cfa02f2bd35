"""What is done to logits before a loss: temperatures, caps, masks and bans; regularisers, and changes of their gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import case

BF16 = torch.bfloat16


def ce(logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
    return F.cross_entropy(logits.reshape(-1, logits.size(-1)), labels.reshape(-1), **kwargs)


def picked(logp: Tensor, targets: Tensor) -> Tensor:
    return logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


# A temperature for each row.


@case("row-temperature/divided", low=(BF16,))
def divided(h: Tensor, weight: Tensor, row_temperatures: Tensor, labels: Tensor) -> Tensor:
    return ce(F.linear(h, weight) / row_temperatures.unsqueeze(-1), labels)


@case("row-temperature/flat-column")
def flat_column(h: Tensor, weight: Tensor, row_temperatures: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight).view(-1, weight.size(0))
    return F.cross_entropy(logits * row_temperatures.view(-1, 1), labels.view(-1), ignore_index=-100)


@case("row-temperature/per-sequence")
def per_sequence(h: Tensor, weight: Tensor, row_temperature: Tensor, targets: Tensor) -> Tensor:
    return -picked((F.linear(h, weight) / row_temperature).log_softmax(-1), targets).mean()


@case("row-temperature/trained", low=(BF16,))
def trained(h: Tensor, weight: Tensor, weight_body: Tensor, labels: Tensor) -> Tensor:
    temperature = 0.5 + F.softplus(F.linear(h, weight_body)[..., :1])
    return ce(F.linear(h, weight) / temperature, labels)


@case("row-temperature/trained-by-a-router")
def router(h: Tensor, weight: Tensor, lora_a: Tensor, targets: Tensor) -> Tensor:
    sharpness = F.linear(h, lora_a).softmax(-1).amax(-1, keepdim=True)
    return -picked((F.linear(h, weight) * sharpness).log_softmax(-1), targets).sum()


# Caps and clamps.


@case("caps/clamp-both-ways", low=(BF16,))
def clamp(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return ce(F.linear(h, weight).clamp(-2, 2), labels)


@case("caps/clamp-maximum-in-place")
def clamp_max(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    logits.clamp_(max=2.0)
    return ce(logits, labels)


@case("caps/hardtanh")
def hardtanh(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return ce(F.hardtanh(F.linear(h, weight), -2.5, 2.5), labels)


@case("caps/leaky-where")
def leaky_where(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    return ce(torch.where(logits > 2.0, 2.0 + 0.01 * (logits - 2.0), logits), labels)


@case("caps/leaky-clamp-and-rest")
def leaky_clamp(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    inside = logits.clamp(-2.0, 2.0)
    return ce(inside + 0.1 * (logits - inside), labels)


@case("caps/leaky-softcap")
def leaky_softcap(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    return ce(3.0 * torch.tanh(logits / 3.0) + 0.05 * logits, labels)


@case("caps/softsign")
def softsign(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return ce(4.0 * F.softsign(F.linear(h, weight)), labels)


@case("caps/gelu-of-standardised")
def gelu(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    centred = logits - logits.mean(-1, keepdim=True)
    return ce(F.gelu(centred / logits.std(-1, keepdim=True)), labels)


# Masks by class, by row and by both; bans of single classes.


@case("where-mask/by-class")
def by_class(h: Tensor, weight: Tensor, class_mask: Tensor, targets: Tensor) -> Tensor:
    logits = torch.where(class_mask, -1e4, F.linear(h, weight))
    return ce(logits, targets)


@case("where-mask/by-row")
def by_row(h: Tensor, weight: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
    logits = torch.where(mask.unsqueeze(-1), F.linear(h, weight), 0.0)
    return ce(logits, targets)


@case("where-mask/by-row-and-class", low=(BF16,))
def by_both(h: Tensor, weight: Tensor, mask: Tensor, class_mask: Tensor, targets: Tensor) -> Tensor:
    banned = mask.unsqueeze(-1) & class_mask
    return ce(F.linear(h, weight).masked_fill(banned, -1e4), targets)


@case("where-mask/stored-for-each-logit")
def stored(h: Tensor, weight: Tensor, allowed: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(h, weight).masked_fill(~allowed, torch.finfo(h.dtype).min)
    return -picked(logits.log_softmax(-1), targets).clamp(min=-50).mean()


@case("where-mask/made-from-labels")
def from_labels(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    # Only classes up to the label compete.
    logits = F.linear(h, weight)
    later = torch.arange(weight.size(0)) > targets.unsqueeze(-1)
    return ce(torch.where(later, -1e4, logits), targets)


@case("where-mask/added")
def added(h: Tensor, weight: Tensor, class_mask: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
    penalty = class_mask.to(h.dtype) * -30.0
    return ce(F.linear(h, weight) + penalty * mask.unsqueeze(-1), targets)


@case("ban/one-class")
def one_class(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    banned = torch.arange(weight.size(0)) == 7
    return ce(F.linear(h, weight).masked_fill(banned, -1e4), targets)


@case("ban/one-class-in-place")
def one_class_in_place(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    logits[..., 7] = -1e4
    return ce(logits, targets)


@case("ban/list-of-classes-in-place")
def list_in_place(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    logits[..., [7, 9, 30]] = -1e4
    return ce(logits, targets)


@case("ban/index-fill")
def index_fill(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return ce(F.linear(h, weight).index_fill(-1, torch.tensor([7, 9]), -1e4), targets)


@case("ban/previous-token-scattered")
def previous_token(h: Tensor, weight: Tensor, input_ids: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(h, weight).scatter(-1, input_ids.unsqueeze(-1), -10.0)
    return ce(logits, targets)


@case("ban/repetition-penalty")
def repetition(h: Tensor, weight: Tensor, input_ids: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    index = input_ids.unsqueeze(-1)
    score = logits.gather(-1, index)
    return ce(logits.scatter(-1, index, torch.where(score < 0, score * 1.2, score / 1.2)), targets)


# Regularisers of the logits, and functions that change their gradient.


@case("regularised/mean-of-squares")
def squares(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    return ce(logits, labels) + 1e-3 * logits.square().mean()


@case("regularised/square-of-mean")
def square_of_mean(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    return ce(logits, labels) + 1e-2 * logits.mean(-1).pow(2).mean()


@case("regularised/norm-of-each-row")
def norms(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    return ce(logits, labels) + 1e-3 * logits.norm(dim=-1).mean()


@case("regularised/confidence-penalty")
def confidence(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logp = F.linear(h, weight).log_softmax(-1)
    return F.nll_loss(logp.flatten(0, 1), targets.flatten()) + 0.1 * (logp.exp() * logp).sum(-1).mean()


class PullLargest(torch.autograd.Function):
    """RWKV's: the loss as it is; the gradient of the logits pulls their largest towards zero, besides."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (logits,) = ctx.saved_tensors
        largest, at = logits.max(-1, keepdim=True)
        pull = torch.zeros_like(logits).scatter_(-1, at, largest * (1e-4 / (logits.shape[0] * logits.shape[1])))
        return grad, pull


@case("regularised/function-that-pulls-the-largest")
def pull_largest(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    return PullLargest.apply(ce(logits, labels), logits)


class Scaled(torch.autograd.Function):
    """The identity, with a gradient clipped for each row."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / grad.norm(dim=-1, keepdim=True).clamp(min=1e-2)


@case("regularised/gradient-clipped-by-row")
def clipped(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return ce(Scaled.apply(F.linear(h, weight)), labels, reduction="sum")
