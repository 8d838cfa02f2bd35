"""Two heads that one loss reads: distillation in all its divergences, frozen and trained teachers, stored top classes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import case

BF16 = torch.bfloat16


def ce(logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
    return F.cross_entropy(logits.reshape(-1, logits.size(-1)), labels.reshape(-1), **kwargs)


# Kullback-Leibler, either way.


@case("teacher/forward-kl", heads=2, low=(BF16,))
def forward_kl(h: Tensor, weight: Tensor, teacher_h: Tensor, teacher_weight: Tensor) -> Tensor:
    with torch.no_grad():
        wanted = F.softmax(F.linear(teacher_h, teacher_weight) / 2.0, dim=-1)
    return F.kl_div(F.log_softmax(F.linear(h, weight) / 2.0, dim=-1), wanted, reduction="batchmean") * 4.0


@case("teacher/forward-kl-log-target", heads=2)
def forward_kl_log(h: Tensor, weight: Tensor, teacher_h: Tensor, teacher_weight: Tensor) -> Tensor:
    wanted = F.linear(teacher_h, teacher_weight).log_softmax(-1)
    found = F.linear(h, weight).log_softmax(-1)
    return F.kl_div(found, wanted.detach(), log_target=True, reduction="none").sum(-1).mean()


@case("teacher/reverse-kl", heads=2, low=(BF16,))
def reverse_kl(h: Tensor, weight: Tensor, teacher_h: Tensor, teacher_weight: Tensor, mask: Tensor) -> Tensor:
    found = F.linear(h, weight).log_softmax(-1)
    wanted = F.linear(teacher_h, teacher_weight).log_softmax(-1)
    loss = (found.exp() * (found - wanted)).sum(-1)
    return (loss * mask).sum() / mask.sum()


@case("teacher/jensen-shannon", heads=2)
def jensen_shannon(h: Tensor, weight: Tensor, teacher_h: Tensor, teacher_weight: Tensor) -> Tensor:
    found = F.linear(h, weight).log_softmax(-1)
    wanted = F.linear(teacher_h, teacher_weight).log_softmax(-1)
    middle = torch.logsumexp(torch.stack([found, wanted]), dim=0) - 0.6931471805599453
    kl = F.kl_div(middle, found, log_target=True, reduction="none") + F.kl_div(
        middle, wanted, log_target=True, reduction="none"
    )
    return 0.5 * kl.sum(-1).mean()


@case("teacher/generalised-jensen-shannon-stacked", heads=2)
def gkd_stacked(h: Tensor, weight: Tensor, teacher_h: Tensor, teacher_weight: Tensor, labels: Tensor) -> Tensor:
    """As trainers of generalised knowledge distillation write it."""
    beta = torch.tensor(0.3, dtype=h.dtype)
    student = F.log_softmax(F.linear(h, weight) / 0.9, dim=-1)
    with torch.no_grad():
        teacher = F.log_softmax(F.linear(teacher_h, teacher_weight) / 0.9, dim=-1)
    mixture = torch.logsumexp(torch.stack([student + torch.log(1 - beta), teacher + torch.log(beta)]), dim=0)
    to_teacher = F.kl_div(mixture, teacher, reduction="none", log_target=True)
    to_student = F.kl_div(mixture, student, reduction="none", log_target=True)
    loss = beta * to_teacher + (1 - beta) * to_student
    return (loss.sum(-1) * (labels != -100)).sum() / (labels != -100).sum()


@case("teacher/jensen-shannon-of-probabilities", heads=2)
def jensen_shannon_p(h: Tensor, weight: Tensor, teacher_h: Tensor, teacher_weight: Tensor) -> Tensor:
    found, wanted = F.linear(h, weight).softmax(-1), F.linear(teacher_h, teacher_weight).softmax(-1)
    middle = (0.5 * (found + wanted)).log()
    return 0.5 * ((found * (found.log() - middle)).sum(-1) + (wanted * (wanted.log() - middle)).sum(-1)).mean()


@case("teacher/generalised-jensen-shannon", heads=2)
def gkd(h: Tensor, weight: Tensor, teacher_h: Tensor, teacher_weight: Tensor, labels: Tensor) -> Tensor:
    beta = 0.3
    student = (F.linear(h, weight) / 0.9).log_softmax(-1)
    teacher = (F.linear(teacher_h, teacher_weight) / 0.9).log_softmax(-1)
    mixture = torch.logaddexp(student + torch.log(torch.tensor(1 - beta)), teacher + torch.log(torch.tensor(beta)))
    loss = beta * F.kl_div(mixture, teacher, reduction="none", log_target=True) + (1 - beta) * F.kl_div(
        mixture, student, reduction="none", log_target=True
    )
    valid = labels != -100
    return (loss.sum(-1) * valid).sum() / valid.sum()


# Other distances.


@case("teacher/total-variation", heads=2)
def total_variation(h: Tensor, weight: Tensor, teacher_h: Tensor, teacher_weight: Tensor) -> Tensor:
    found, wanted = F.linear(h, weight).softmax(-1), F.linear(teacher_h, teacher_weight).softmax(-1)
    return 0.5 * (found - wanted).abs().sum(-1).mean()


@case("teacher/mse-of-logits", heads=2, low=(BF16,))
def mse(h: Tensor, weight: Tensor, teacher_h: Tensor, teacher_weight: Tensor) -> Tensor:
    return F.mse_loss(F.linear(h, weight), F.linear(teacher_h, teacher_weight))


@case("teacher/mse-of-centred-logits", heads=2)
def mse_centred(h: Tensor, weight: Tensor, teacher_h: Tensor, teacher_weight: Tensor) -> Tensor:
    found, wanted = F.linear(h, weight) / 2.0, F.linear(teacher_h, teacher_weight) / 3.0
    difference = (found - found.mean(-1, keepdim=True)) - (wanted - wanted.mean(-1, keepdim=True))
    return difference.square().sum(-1).mean()


@case("teacher/cosine", heads=2)
def cosine(h: Tensor, weight: Tensor, teacher_h: Tensor, teacher_weight: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(F.linear(h, weight), F.linear(teacher_h, teacher_weight), dim=-1).mean()


# Which teacher: trained, the student itself, of another width; a part of the loss only.


@case("teacher/trained-too", heads=2)
def trained_too(h: Tensor, h2: Tensor, weight: Tensor, weight2: Tensor, targets: Tensor) -> Tensor:
    first, second = F.linear(h, weight).log_softmax(-1), F.linear(h2, weight2).log_softmax(-1)
    mutual = F.kl_div(first, second.detach(), log_target=True, reduction="batchmean")
    mutual = mutual + F.kl_div(second, first.detach(), log_target=True, reduction="batchmean")
    return (
        mutual
        + F.nll_loss(first.flatten(0, 1), targets.flatten())
        + F.nll_loss(second.flatten(0, 1), targets.flatten())
    )


@case("teacher/trained-through-the-divergence", heads=2)
def trained_through(h: Tensor, h2: Tensor, weight: Tensor, weight2: Tensor) -> Tensor:
    first, second = F.linear(h, weight).log_softmax(-1), F.linear(h2, weight2).log_softmax(-1)
    return (second.exp() * (second - first)).sum(-1).mean()


@case("teacher/r-drop", heads=2, low=(BF16,))
def r_drop(h: Tensor, h2: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    one, two = F.linear(h, weight), F.linear(h2, weight)
    p, q = one.log_softmax(-1), two.log_softmax(-1)
    kl = F.kl_div(p, q.exp(), reduction="none").sum() + F.kl_div(q, p.exp(), reduction="none").sum()
    return 0.5 * (ce(one, targets) + ce(two, targets)) + 0.25 * kl / targets.numel()


@case("teacher/of-another-width", heads=2)
def another_width(h: Tensor, weight: Tensor, wide_h: Tensor, wide_weight: Tensor, targets: Tensor) -> Tensor:
    student = F.linear(h, weight)
    with torch.no_grad():
        teacher = F.linear(wide_h, wide_weight).softmax(-1)
    soft = F.kl_div(student.log_softmax(-1), teacher, reduction="batchmean")
    return 0.5 * ce(student, targets) + 0.5 * soft


@case("teacher/of-another-width-trained", heads=2)
def another_width_trained(h: Tensor, weight: Tensor, wide_h: Tensor, wide_weight: Tensor) -> Tensor:
    student, teacher = F.linear(h, weight).log_softmax(-1), F.linear(wide_h, wide_weight).log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum(-1).mean()


@case("teacher/hard-and-soft-with-temperature", heads=2, low=(BF16,))
def hard_and_soft(
    h: Tensor, weight: Tensor, teacher_h: Tensor, teacher_weight: Tensor, labels: Tensor, temperature: Tensor
) -> Tensor:
    student = F.linear(h, weight)
    with torch.no_grad():
        wanted = (F.linear(teacher_h, teacher_weight) / temperature).softmax(-1)
    logp = (student / temperature).log_softmax(-1)
    soft = -(wanted * logp).sum(-1)
    keep = labels != -100
    return 0.3 * ce(student, labels) + 0.7 * temperature**2 * (soft * keep).sum() / keep.sum()


@case("teacher/contrastive-difference", heads=2)
def contrastive(h: Tensor, weight: Tensor, teacher_h: Tensor, teacher_weight: Tensor, labels: Tensor) -> Tensor:
    # The other model's logits are taken off: an ensemble, a proxy-tuned or a contrastively decoded model.
    with torch.no_grad():
        amateur = F.linear(teacher_h, teacher_weight)
    return ce(F.linear(h, weight) - 0.5 * amateur, labels)


@case("teacher/mixture-of-two-softmaxes", heads=2)
def mixture(h: Tensor, h2: Tensor, weight: Tensor, weight2: Tensor, token_weight: Tensor, targets: Tensor) -> Tensor:
    share = torch.sigmoid(token_weight).unsqueeze(-1)
    p = share * F.linear(h, weight).softmax(-1) + (1 - share) * F.linear(h2, weight2).softmax(-1)
    return -p.gather(-1, targets.unsqueeze(-1)).log().mean()


# Stored: the teacher's largest classes only.


def top_k(k: int, logits: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    wanted = values[..., :k].softmax(-1)
    return -(wanted * logits.log_softmax(-1).gather(-1, ids[..., :k])).sum(-1).mean()


@case("teacher/top-1")
def top_1(h: Tensor, weight: Tensor, top_ids: Tensor, top_logits: Tensor) -> Tensor:
    return top_k(1, F.linear(h, weight), top_ids, top_logits)


@case("teacher/top-5", low=(BF16,))
def top_5(h: Tensor, weight: Tensor, top_ids: Tensor, top_logits: Tensor) -> Tensor:
    return top_k(5, F.linear(h, weight), top_ids, top_logits)


@case("teacher/top-20")
def top_20(h: Tensor, weight: Tensor, top_ids: Tensor, top_logits: Tensor) -> Tensor:
    return top_k(20, F.linear(h, weight), top_ids, top_logits)


@case("teacher/top-20-renormalised")
def top_20_renormalised(h: Tensor, weight: Tensor, top_ids: Tensor, top_logits: Tensor) -> Tensor:
    found = F.linear(h, weight).gather(-1, top_ids).log_softmax(-1)
    return F.kl_div(found, top_logits.softmax(-1), reduction="batchmean")


@case("teacher/top-5-and-rest")
def top_5_and_rest(h: Tensor, weight: Tensor, top_ids: Tensor, top_logits: Tensor) -> Tensor:
    wanted = top_logits.softmax(-1)[..., :5] * 0.8
    logp = F.linear(h, weight).log_softmax(-1).gather(-1, top_ids[..., :5])
    rest, rest_wanted = 1 - logp.exp().sum(-1), 1 - wanted.sum(-1)
    return -((wanted * logp).sum(-1) + rest_wanted * rest.clamp(min=1e-6).log()).mean()


@case("teacher/top-5-and-labels")
def top_5_and_labels(h: Tensor, weight: Tensor, top_ids: Tensor, top_logits: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    return 0.5 * ce(logits, targets) + 0.5 * top_k(5, logits / 2.0, top_ids, top_logits / 2.0)


@case("teacher/top-5-scattered-to-all-classes")
def top_5_scattered(h: Tensor, weight: Tensor, top_ids: Tensor, top_logits: Tensor) -> Tensor:
    logp = F.linear(h, weight).log_softmax(-1)
    wanted = torch.zeros_like(logp).scatter(-1, top_ids[..., :5], top_logits[..., :5].softmax(-1))
    return -(wanted * logp).sum(-1).mean()


@case("teacher/top-of-a-teacher-in-the-graph", heads=2)
def top_in_graph(h: Tensor, weight: Tensor, teacher_h: Tensor, teacher_weight: Tensor) -> Tensor:
    with torch.no_grad():
        values, ids = F.linear(teacher_h, teacher_weight).topk(5, dim=-1)
    return top_k(5, F.linear(h, weight), ids, values)
