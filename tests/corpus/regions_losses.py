"""Losses of one head beyond cross-entropy: Brier, margins, one against all, two-hot values; metrics on the side."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import codes
from .inputs import Dims
from .registry import Refuse, case

BF16 = torch.bfloat16
ATOMS = Dims(V=102)  # 3 actions of 34 atoms


def ce(logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
    return F.cross_entropy(logits.reshape(-1, logits.size(-1)), labels.reshape(-1), **kwargs)


def picked(logp: Tensor, targets: Tensor) -> Tensor:
    return logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


# Proper scores, normalised logits, one against all.


@case("scores/brier-one-hot", low=(BF16,))
def brier(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    p = F.linear(h, weight).softmax(-1)
    return (p - F.one_hot(targets, weight.size(0))).square().sum(-1).mean()


@case("scores/brier-expanded")
def brier_expanded(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    p = F.linear(h, weight).softmax(-1)
    return (p.square().sum(-1) - 2 * picked(p, targets) + 1).mean()


@case("scores/spherical")
def spherical(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    p = F.linear(h, weight).softmax(-1)
    return -(picked(p, targets) / p.norm(dim=-1)).mean()


@case("scores/poly-1")
def poly(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(h, weight).flatten(0, 1)
    loss = F.cross_entropy(logits, targets.flatten(), reduction="none")
    return (loss + 2.0 * (1 - picked(logits.softmax(-1), targets.flatten()))).mean()


@case("scores/logit-norm")
def logit_norm(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    return ce(logits / (logits.norm(p=2, dim=-1, keepdim=True) + 1e-7) / 0.04, labels)


@case("scores/logit-norm-by-normalize", low=(BF16,))
def logit_normalize(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return ce(F.normalize(F.linear(h, weight), dim=-1) * 20.0, labels)


@case("scores/one-against-all-softplus")
def one_against_all(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    return (F.softplus(logits).sum(-1) - picked(logits, targets)).mean()


@case("scores/one-against-all-bce")
def one_against_all_bce(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    return F.binary_cross_entropy_with_logits(logits, F.one_hot(targets, weight.size(0)).to(logits.dtype))


@case("scores/sigmoid-focal")
def sigmoid_focal(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    hot = F.one_hot(targets, weight.size(0)).to(logits.dtype)
    p = torch.sigmoid(logits)
    loss = F.binary_cross_entropy_with_logits(logits, hot, reduction="none")
    return (loss * (1 - (p * hot + (1 - p) * (1 - hot))) ** 2).sum() / targets.numel()


@case("scores/stable-by-differences")
def differences(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    return (logits - logits.gather(-1, targets.unsqueeze(-1))).exp().sum(-1).log().mean()


@case("scores/stable-by-differences-softplus")
def differences_softplus(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    own = logits.gather(-1, targets.unsqueeze(-1))
    others = logits.scatter(-1, targets.unsqueeze(-1), -1e4).logsumexp(-1)
    return F.softplus(others - own.squeeze(-1)).mean()


@case("scores/hinge-of-largest-other")
def hinge(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    others = logits.scatter(-1, targets.unsqueeze(-1), -1e4).amax(-1)
    return F.relu(1 + others - picked(logits, targets)).mean()


@case("scores/smoothing-by-scatter")
def smoothing(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logp = F.linear(h, weight).log_softmax(-1)
    with torch.no_grad():
        wanted = torch.full_like(logp, 0.1 / (logp.size(-1) - 1))
        wanted.scatter_(-1, targets.unsqueeze(-1), 0.9)
    return -(wanted * logp).sum(-1).mean()


@case("scores/rows-by-boolean-mask-of-losses", unbacked=True, dynamic=False)
def boolean_losses(h: Tensor, weight: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    return (logits.logsumexp(-1) - picked(logits, targets))[mask].mean()


@case("scores/rows-by-boolean-mask-of-logits", unbacked=True, dynamic=False, rows=16)
def boolean_logits(h: Tensor, weight: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    logits = F.linear(h, weight)[mask]
    return -picked(logits.clamp(-3, 3).log_softmax(-1), targets[mask]).mean()


# Margins.


@case("margins/cosface-gather-scatter", low=(BF16,))
def cosface(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    index = targets.view(-1, 1)
    cosine = F.linear(F.normalize(x), F.normalize(weight))
    return ce(16.0 * cosine.scatter(1, index, cosine.gather(1, index) - 0.35), targets)


@case("margins/cosface-where")
def cosface_where(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    cosine = F.linear(F.normalize(h, dim=-1), F.normalize(weight))
    own = torch.arange(weight.size(0)) == targets.unsqueeze(-1)
    return ce(16.0 * torch.where(own, cosine - 0.35, cosine), targets)


@case("margins/arcface-gather-scatter")
def arcface(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    index = targets.unsqueeze(-1)
    cosine = F.linear(F.normalize(h, dim=-1), F.normalize(weight)).clamp(-0.99, 0.99)
    own = torch.cos(torch.acos(cosine.gather(-1, index)) + 0.5)
    return ce(16.0 * cosine.scatter(-1, index, own), targets)


@case("margins/arcface-where")
def arcface_where(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    cosine = F.linear(F.normalize(h, dim=-1), F.normalize(weight)).clamp(-0.99, 0.99)
    sine = (1 - cosine.square()).sqrt()
    turned = cosine * math.cos(0.5) - sine * math.sin(0.5)
    hot = F.one_hot(targets, weight.size(0)).bool()
    return ce(16.0 * torch.where(hot & (cosine > math.cos(math.pi - 0.5)), turned, cosine), targets)


@case("margins/logit-adjusted-by-class")
def adjusted(h: Tensor, weight: Tensor, class_weight: Tensor, labels: Tensor) -> Tensor:
    return ce(F.linear(h, weight) + class_weight.log(), labels)


# Metrics on the side.


@case("side/top-5-accuracy", backward="first")
def top5(h: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(h, weight)
    with torch.no_grad():
        hit = (logits.topk(5, dim=-1).indices == targets.unsqueeze(-1)).any(-1)
    return ce(logits, targets), hit.float().mean()


@case("side/margin-of-two-largest", backward="first")
def margin(h: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(h, weight)
    two = logits.detach().topk(2, dim=-1).values
    return ce(logits, targets), (two[..., 0] - two[..., 1]).mean()


@case("side/entropy", backward="first")
def entropy(h: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(h, weight)
    with torch.no_grad():
        logp = logits.log_softmax(-1)
        spread = -(logp.exp() * logp).sum(-1)
    return ce(logits, targets), spread


@case("side/rank-and-size", backward="first")
def rank(h: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    logits = F.linear(h, weight)
    seen = logits.detach()
    above = (seen > seen.gather(-1, targets.unsqueeze(-1))).sum(-1)
    return ce(logits, targets), above, seen.abs().mean()


@case("side/largest-of-each-row", backward="first")
def largest(h: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(h, weight)
    return ce(logits, targets), logits.detach().amax(-1).amax()


@case("side/largest-of-all", Refuse(codes.CROSSING), backward="first")
def largest_of_all(h: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(h, weight)
    return ce(logits, targets), logits.detach().max()


# Distributions over values: classes are atoms.


@case("values/two-hot", low=(BF16,))
def two_hot(h: Tensor, weight: Tensor, token_weight: Tensor) -> Tensor:
    logp = F.linear(h, weight).log_softmax(-1)
    place = token_weight.clamp(0, 1) * (weight.size(0) - 1)
    below = place.floor()
    share = (place - below).unsqueeze(-1)
    low = below.long().unsqueeze(-1)
    high = (low + 1).clamp(max=weight.size(0) - 1)
    return -((1 - share) * logp.gather(-1, low) + share * logp.gather(-1, high)).mean()


@case("values/hl-gauss")
def hl_gauss(h: Tensor, weight: Tensor, token_weight: Tensor) -> Tensor:
    edges = torch.linspace(-0.2, 1.3, weight.size(0) + 1, dtype=h.dtype)
    cumulated = torch.special.erf((edges - token_weight.unsqueeze(-1)) / 0.05)
    mass = cumulated[..., 1:] - cumulated[..., :-1]
    mass = mass / (cumulated[..., -1:] - cumulated[..., :1])
    return -(mass * F.linear(h, weight).log_softmax(-1)).sum(-1).mean()


@case("values/expected-value")
def expected(h: Tensor, weight: Tensor, token_weight: Tensor) -> Tensor:
    atoms = torch.linspace(-1, 1, weight.size(0), dtype=h.dtype)
    return ((F.linear(h, weight).softmax(-1) * atoms).sum(-1) - token_weight).square().mean()


@case("values/c51-chosen-action", dims=ATOMS)
def c51(h: Tensor, weight: Tensor, targets: Tensor, token_weight: Tensor) -> Tensor:
    logits = F.linear(h, weight).view(*h.shape[:-1], 3, 34)
    action = (targets % 3)[..., None, None].expand(-1, -1, 1, 34)
    logp = logits.log_softmax(-1).gather(-2, action).squeeze(-2)
    atom = (token_weight.clamp(0, 1) * 33).long().unsqueeze(-1)
    return -logp.gather(-1, atom).mean()


@case("values/c51-all-actions", dims=ATOMS)
def c51_all(h: Tensor, weight: Tensor, soft: Tensor) -> Tensor:
    logits = F.linear(h, weight).unflatten(-1, (3, 34))
    wanted = soft.unflatten(-1, (3, 34))
    return -(wanted * logits.log_softmax(-1)).sum(-1).mean()


@case("values/quantile-huber", dims=ATOMS)
def quantile(h: Tensor, weight: Tensor, token_weight: Tensor) -> Tensor:
    quantiles = F.linear(h, weight)
    tau = (torch.arange(weight.size(0)) + 0.5).to(h.dtype) / weight.size(0)
    error = token_weight.unsqueeze(-1) - quantiles
    return ((tau - (error.detach() < 0).to(h.dtype)).abs() * F.huber_loss(
        quantiles, token_weight.unsqueeze(-1).expand_as(quantiles), reduction="none")).sum(-1).mean()  # fmt: skip
