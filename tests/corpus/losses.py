"""Losses built on cross-entropy or on log-probabilities: masks, smoothing, z-loss, focal terms, several losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import codes
from .registry import TINY, Refuse, case

BF16 = torch.bfloat16
EPS = 2.0**-10  # exact in fp32: Inductor keeps the constants of a scatter in fp32, whatever the dtype
SHIFTED = 22


# Masks and weights over tokens.


@case("mask/none-times-mask", low=(BF16,))
def none_times_mask(h: Tensor, weight: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), reduction="none")
    flat = mask.view(-1).float()
    return (loss * flat).sum() / flat.sum()


@case("mask/boolean-index-of-losses", unbacked=True, dynamic=False)
def boolean_index(h: Tensor, weight: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    loss = F.cross_entropy(F.linear(h, weight).transpose(1, 2), targets, reduction="none")
    return loss[mask].mean()


@case("mask/masked-fill-in-place")
def masked_fill_losses(h: Tensor, weight: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    logp = F.linear(h, weight).log_softmax(-1)
    nll = -logp.gather(-1, targets.unsqueeze(-1))
    nll.masked_fill_(~mask.unsqueeze(-1), 0.0)
    return nll.sum() / mask.sum()


@case("mask/where-per-sequence")
def where_per_sequence(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    loss = F.cross_entropy(F.linear(h, weight).permute(0, 2, 1), labels, reduction="none")
    loss = torch.where(labels == -100, 0.0, loss)
    return (loss.sum(1) / (labels != -100).sum(1)).mean()


@case("mask/labels-masked-before", note="the labels are made after the linear in program order")
def labels_masked(h: Tensor, weight: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    labels = targets.masked_fill(~mask, -100)
    return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1))


@case("mask/labels-masked-in-place-clone")
def labels_masked_in_place(h: Tensor, weight: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    labels = targets.clone()
    labels[~mask] = -100
    return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1))


@case("mask/token-weights")
def token_weights(h: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor) -> Tensor:
    loss = F.cross_entropy(F.linear(h, weight).flatten(0, 1), labels.flatten(), reduction="none")
    return (loss.view(labels.shape) * token_weight).sum() / token_weight.sum()


@case("mask/shift-weights-square-root", rows=SHIFTED)
def shift_weights(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight)[..., :-1, :].contiguous()
    wanted = labels[..., 1:].contiguous()
    loss = F.cross_entropy(logits.view(-1, logits.size(-1)), wanted.view(-1), reduction="none")
    lengths = (wanted != -100).sum(-1, keepdim=True).clamp(min=1)
    return (loss.view(wanted.shape) / lengths.sqrt()).sum() / lengths.float().sqrt().sum()


# Label smoothing.


@case("smoothing/fairseq", low=(BF16,))
def smoothing_fairseq(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    eps, pad = 0.1, -100
    lprobs = F.log_softmax(F.linear(h, weight), dim=-1, dtype=torch.float32)
    lprobs = lprobs.view(-1, lprobs.size(-1))
    target = labels.view(-1, 1)
    pad_mask = target.eq(pad)
    nll = -lprobs.gather(dim=-1, index=target.clamp(min=0))
    smooth = -lprobs.sum(dim=-1, keepdim=True)
    nll.masked_fill_(pad_mask, 0.0)
    smooth.masked_fill_(pad_mask, 0.0)
    eps_i = eps / (lprobs.size(-1) - 1)
    return (1.0 - eps - eps_i) * nll.sum() + eps_i * smooth.sum()


@case("smoothing/trainer", rows=SHIFTED, low=(BF16,))
def smoothing_trainer(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight)[..., :-1, :].contiguous()
    labels = labels[..., 1:].contiguous()
    log_probs = -F.log_softmax(logits, dim=-1)
    if labels.dim() == log_probs.dim() - 1:
        labels = labels.unsqueeze(-1)
    padding = labels.eq(-100)
    labels = torch.clamp(labels, min=0)
    nll = log_probs.gather(dim=-1, index=labels)
    smoothed = log_probs.sum(dim=-1, keepdim=True, dtype=torch.float32)
    nll.masked_fill_(padding, 0.0)
    smoothed.masked_fill_(padding, 0.0)
    active = padding.numel() - padding.long().sum()
    return 0.9 * nll.sum() / active + 0.1 * smoothed.sum() / (active * log_probs.shape[-1])


@case("smoothing/mean-of-logprobs")
def smoothing_mean(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    logprobs = F.log_softmax(F.linear(x, weight, bias), dim=-1)
    nll = -logprobs.gather(dim=-1, index=targets.view(-1).unsqueeze(1)).squeeze(1)
    return (0.9 * nll + 0.1 * -logprobs.mean(dim=-1)).mean()


@case("smoothing/one-hot-scatter")
def smoothing_one_hot(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    logits = logits.view(-1, logits.size(-1))
    hot = torch.zeros_like(logits).scatter(1, targets.view(-1, 1), 1)
    soft = hot * (1 - 0.2) + 0.2 / logits.size(-1)
    return -(soft * logits.log_softmax(-1)).sum(-1).mean()


@case(
    "smoothing/one-hot-scatter-in-place",
    dynamic=False,
    note="under dynamic shapes nothing says that the index has as many rows as the logits",
)
def smoothing_full(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logp = F.linear(x, weight).log_softmax(-1)
    with torch.no_grad():
        true = torch.full_like(logp, EPS)
        true.scatter_(1, targets.view(-1, 1), 0.875)
    return torch.mean(torch.sum(-true * logp, dim=-1))


@case(
    "smoothing/kl-div-with-smoothed-labels",
    dynamic=False,
    note="under dynamic shapes nothing says that the index has as many rows as the logits",
)
def smoothing_kl(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logp = F.linear(x, weight).log_softmax(-1)
    true = torch.full_like(logp, EPS).scatter(1, targets.view(-1, 1), 0.875)
    return F.kl_div(logp, true, reduction="sum")


@case("smoothing/softcap-shift-class-weights", rows=SHIFTED, low=(BF16,))
def smoothing_all(h: Tensor, weight: Tensor, bias: Tensor, class_weight: Tensor, labels: Tensor) -> Tensor:
    logits = 3.0 * torch.tanh(F.linear(h, weight, bias).float() / 3.0)
    logits = logits[:, :-1].transpose(1, 2)
    return F.cross_entropy(logits, labels[:, 1:], weight=class_weight.float(), label_smoothing=0.1)


# z-loss.


@case("z-loss/lse-squared", low=(BF16,))
def z_loss(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(h, weight).reshape(-1, weight.size(0))
    return F.cross_entropy(logits, targets.reshape(-1)) + 1e-2 * torch.logsumexp(logits, dim=-1).square().mean()


@case("z-loss/pow-masked-sum-shifted", rows=SHIFTED)
def z_loss_masked(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight)[..., :-1, :].contiguous().view(-1, weight.size(0))
    wanted = labels[..., 1:].contiguous().view(-1)
    ce = F.cross_entropy(logits, wanted, ignore_index=-100, reduction="sum")
    z = 1e-2 * (logits.logsumexp(-1).pow(2) * (wanted != -100)).sum()
    return ce + z


@case("z-loss/scaled-in-place", rows=SHIFTED)
def z_loss_in_place(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    logits.mul_(0.125)
    logits = logits[..., :-1, :].contiguous().view(-1, weight.size(0))
    wanted = labels[..., 1:].contiguous().view(-1)
    z_squared = logits.logsumexp(-1).pow(2)
    z = 1e-2 * (z_squared * (wanted != -100)).sum()
    return F.cross_entropy(logits, wanted, reduction="sum") + z


@case("z-loss/returned-apart")
def z_loss_apart(x: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(x, weight)
    lse = logits.logsumexp(dim=1)
    return F.cross_entropy(logits, labels.view(-1)), 1e-2 * (lse * lse).mean()


@case("z-loss/max-logit")
def max_z_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    # The maximum itself is trained here, so it needs a gradient.
    logits = F.linear(x, weight)
    return F.cross_entropy(logits, targets.view(-1)) + 2e-2 * logits.max(-1).values.square().mean()


# Functions of the loss per token.


@case("focal/from-cross-entropy")
def focal(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    ce = F.cross_entropy(F.linear(x, weight, bias), labels.view(-1), reduction="none")
    return ((1 - torch.exp(-ce)) ** 2 * ce).mean()


@case(
    "focal/from-log-softmax-alpha",
    dynamic=False,
    note="under dynamic shapes nothing says that the index has as many rows as the logits",
)
def focal_log_softmax(x: Tensor, weight: Tensor, class_weight: Tensor, targets: Tensor) -> Tensor:
    target = targets.view(-1, 1)
    logpt = F.log_softmax(F.linear(x, weight), dim=1).gather(1, target).view(-1)
    pt = logpt.detach().exp()
    return (-1 * (1 - pt) ** 1.5 * logpt * class_weight.gather(0, target.view(-1))).sum()


@case("focal/poly1")
def poly1(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(x, weight)
    ce = F.cross_entropy(logits, targets.view(-1), reduction="none")
    pt = logits.softmax(-1).gather(1, targets.view(-1, 1)).squeeze(1)
    return (ce + 1.0 * (1 - pt)).mean()


@case(
    "focal/generalised-cross-entropy",
    dynamic=False,
    note="under dynamic shapes nothing says that the index has as many rows as the logits",
)
def generalised_ce(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    p = F.softmax(F.linear(x, weight), dim=1).gather(1, targets.view(-1, 1))
    return ((1 - p**0.7) / 0.7).mean()


@case("focal/dynamic-fine-tuning", low=(BF16,))
def dft(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight).float()
    loss = F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1), reduction="none")
    return (loss * torch.exp(-loss.detach())).mean()


@case("focal/truncated-loss")
def truncated(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    loss = F.cross_entropy(F.linear(x, weight), targets.view(-1), reduction="none")
    return loss.clamp(max=6.0).mean()


@case("focal/hardest-tokens")
def hardest(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    loss = F.cross_entropy(F.linear(x, weight), targets.view(-1), reduction="none")
    return loss.topk(7).values.mean()


# Several losses.


@case("several/twice-from-one-head")
def twice(h: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(h, weight).view(-1, weight.size(0))
    loss = F.cross_entropy(logits, labels.view(-1))
    per_token = F.cross_entropy(logits.detach(), labels.view(-1), reduction="none")
    return loss, per_token


@case("several/twice-with-gradient")
def twice_gradient(h: Tensor, weight: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(h, weight).view(-1, weight.size(0))
    hard = F.cross_entropy(logits, labels.view(-1))
    return hard + 0.3 * F.cross_entropy(logits, targets.view(-1), reduction="none", label_smoothing=0.05).mean()


@case("several/mixup")
def mixup(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, targets2: Tensor, lam: Tensor) -> Tensor:
    logits = F.linear(x, weight, bias)
    first, second = F.cross_entropy(logits, targets.view(-1)), F.cross_entropy(logits, targets2.view(-1))
    return lam * first + (1 - lam) * second


@case("several/auxiliary-loss")
def auxiliary(h: Tensor, weight: Tensor, labels: Tensor, aux: Tensor) -> Tensor:
    loss = F.cross_entropy(F.linear(h, weight).float().view(-1, weight.size(0)), labels.view(-1))
    return loss + 0.001 * aux.square()


@case("several/auxiliary-loss-in-place")
def auxiliary_in_place(h: Tensor, weight: Tensor, labels: Tensor, aux: Tensor) -> Tensor:
    loss = F.cross_entropy(F.linear(h, weight).float().view(-1, weight.size(0)), labels.view(-1))
    loss += 0.001 * aux.square().to(loss.device)
    return loss


@case("several/trained-loss-weight")
def trained_loss_weight(h: Tensor, weight: Tensor, labels: Tensor, log_scale: Tensor) -> Tensor:
    # Uncertainty weighting: the factor on the loss is a parameter.
    loss = F.cross_entropy(F.linear(h, weight).view(-1, weight.size(0)), labels.view(-1))
    return torch.exp(-log_scale) * loss + log_scale


@case("several/loss-squared")
def loss_squared(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    loss = F.cross_entropy(F.linear(x, weight), targets.view(-1))
    return loss + 0.1 * loss**2


@case("several/loss-used-twice")
def loss_used_twice(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    loss = F.cross_entropy(F.linear(x, weight), targets.view(-1))
    return loss * 1024.0, (loss - 2.0).abs()


@case("several/flooding")
def flooding(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    loss = F.cross_entropy(F.linear(x, weight), targets.view(-1))
    return (loss - 5.0).abs() + 5.0


@case("several/r-drop-without-kl", heads=2)
def two_passes(h: Tensor, h2: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    def ce(state: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(state, weight).flatten(0, 1), targets.flatten())

    return 0.5 * (ce(h) + ce(h2))


# Soft targets, two heads, margins.


@case("soft/probabilities-as-target")
def probabilities(h: Tensor, weight: Tensor, soft: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    return F.cross_entropy(logits.view(-1, logits.size(-1)), soft.view(-1, soft.size(-1)))


@case("soft/timm-soft-target")
def soft_target(h: Tensor, weight: Tensor, soft: Tensor) -> Tensor:
    return torch.sum(-soft * F.log_softmax(F.linear(h, weight), dim=-1), dim=-1).mean()


@case("soft/distillation-from-stored-probabilities")
def stored_teacher(h: Tensor, weight: Tensor, soft: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(F.linear(h, weight) / 2.0, dim=-1), soft, reduction="batchmean")


@case("soft/kl-of-two-heads")
def kl_two_heads(h: Tensor, weight: Tensor, teacher_h: Tensor, teacher_weight: Tensor, targets: Tensor) -> Tensor:
    t = 2
    with torch.no_grad():
        teacher = F.linear(teacher_h, teacher_weight) / t
    student = F.linear(h, weight) / t
    kl = F.kl_div(F.log_softmax(student, -1), F.softmax(teacher, -1), reduction="batchmean") * t * t
    return kl + F.cross_entropy(student.view(-1, student.size(-1)), targets.view(-1))


@case("soft/forward-kl-product")
def forward_kl(h: Tensor, weight: Tensor, teacher_h: Tensor, teacher_weight: Tensor, labels: Tensor) -> Tensor:
    teacher = F.softmax(F.linear(teacher_h, teacher_weight), dim=-1, dtype=torch.float32)
    logits = F.linear(h, weight)
    infinite = torch.isinf(logits)
    product = torch.masked_fill(teacher * F.log_softmax(logits, dim=-1, dtype=torch.float32), infinite, 0)
    valid = (labels != -100).int()
    return -torch.sum(product.sum(-1) * valid) / valid.sum()


@case("margin/cosface")
def cosface(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    cosine = F.linear(F.normalize(x), F.normalize(weight)).clamp(-1, 1)
    hot = torch.zeros_like(cosine).scatter_(1, targets.view(-1, 1), 1.0)
    return F.cross_entropy((cosine - hot * 0.35) * 16.0, targets.view(-1))


@case("margin/cosface-without-clamp")
def cosface_plain(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    cosine = F.linear(F.normalize(x), F.normalize(weight))
    margin = 0.35 * F.one_hot(targets.view(-1), weight.size(0)).to(cosine.dtype)
    return F.cross_entropy(16.0 * (cosine - margin), targets.view(-1))


@case("margin/arcface-in-place")
def arcface(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    target = targets.view(-1)
    cosine = F.linear(F.normalize(x), F.normalize(weight)).clamp(-1, 1)
    rows = torch.arange(x.size(0))
    with torch.no_grad():
        own = torch.cos(torch.acos(cosine[rows, target]) + 0.5)
    logits = cosine.clone()
    logits[rows, target] = own
    return F.cross_entropy(logits * 16.0, target)


# Other uses of a large linear.


@case("other/binary-cross-entropy")
def multi_label(x: Tensor, weight: Tensor, class_mask: Tensor) -> Tensor:
    wanted = class_mask.to(x.dtype).expand(x.size(0), -1)
    return F.binary_cross_entropy_with_logits(F.linear(x, weight), wanted)


@case("other/regression")
def regression(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.mse_loss(F.linear(x, weight), bias.detach().expand(x.size(0), -1))


@case("other/multi-margin")
def multi_margin(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.multi_margin_loss(F.linear(x, weight), targets.view(-1))


@case("other/ctc", Refuse(codes.RETURNED), fullgraph=False)
def ctc(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logp = F.log_softmax(F.linear(h, weight), dim=-1, dtype=torch.float32).transpose(0, 1)
    b, t = targets.shape
    lengths = torch.full((b,), t, dtype=torch.long)
    return F.ctc_loss(logp, targets[:, :4] % 100 + 1, lengths, torch.full((b,), 4, dtype=torch.long))


@case("other/gumbel-free-soft-embedding", Refuse(codes.PRODUCT), config=TINY)
def soft_embedding(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    mixed = logits.softmax(-1) @ weight
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten()) + mixed.square().mean()


@case("other/scores-and-loss", Refuse(codes.RETURNED), backward="first")
def softmax_returned(h: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(h, weight)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), logits.softmax(-1)


@case("other/log-probs-returned", Refuse(codes.RETURNED), backward="first")
def log_probs_returned(h: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logp = F.linear(h, weight).log_softmax(-1)
    return F.nll_loss(logp.flatten(0, 1), targets.flatten()), logp


@case("other/own-predictions-as-targets")
def pseudo_labels(x: Tensor, weight: Tensor) -> Tensor:
    logits = F.linear(x, weight)
    return F.cross_entropy(logits, logits.argmax(-1))


@case("other/pseudo-labels-above-confidence", heads=2)
def fixmatch(h: Tensor, h2: Tensor, weight: Tensor) -> Tensor:
    with torch.no_grad():
        top, guess = F.linear(h, weight).flatten(0, 1).softmax(-1).max(-1)
    loss = F.cross_entropy(F.linear(h2, weight).flatten(0, 1), guess, reduction="none")
    return (loss * (top > 0.05)).mean()


@case("other/attention-like", Refuse(codes.UNSEEN), config=TINY)
def attention_like(h: Tensor, keys: Tensor) -> Tensor:
    return (F.softmax(h @ keys.T, dim=-1) @ keys).square().mean()
