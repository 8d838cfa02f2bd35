"""Log-probabilities of tokens: evaluation, preference and reinforcement learning; entropy; side metrics."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import Dims
from .registry import Refuse, Rewrite, case

BF16 = torch.bfloat16
SHIFTED = 22


# One log-probability per token, spelled in every way.


@case("logprobs/log-softmax-gather", low=(BF16,))
def log_softmax_gather(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logp = F.log_softmax(F.linear(h, weight), dim=-1)
    return torch.gather(logp, 2, targets.unsqueeze(2)).squeeze(2)


@case("logprobs/log-softmax-float32-gather", low=(BF16,))
def log_softmax_float32(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logp = torch.log_softmax(F.linear(h, weight), dim=-1, dtype=torch.float32)
    return -logp.gather(dim=-1, index=targets[..., None])[..., 0]


@case("logprobs/shift-temperature-mask", rows=SHIFTED)
def shift_temperature_mask(h: Tensor, weight: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    logits = F.linear(h, weight)[:, :-1] / 0.9
    logp = torch.gather(logits.log_softmax(-1), dim=2, index=targets[:, 1:].unsqueeze(2)).squeeze(2)
    return (logp * mask[:, 1:]).sum(-1)


@case("logprobs/index-arange", low=(BF16,))
def index_arange(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logp = torch.log_softmax(x @ weight.T, dim=1)
    return -logp[torch.arange(x.size(0)), targets.view(-1)].mean()


@case("logprobs/index-range-list")
def index_of_logits(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    z = F.linear(x, weight)
    rows = torch.arange(z.shape[0], device=z.device)
    return (z.logsumexp(dim=-1) - z[rows, targets.flatten()]).mean()


@case("logprobs/take-along-dim", recompiles=True)
def take_along_dim(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logp = F.linear(h, weight).log_softmax(dim=-1)
    return torch.take_along_dim(logp, targets.unsqueeze(-1), dim=-1).squeeze(-1)


@case("logprobs/nll-loss-none")
def nll_none(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logp = F.log_softmax(F.linear(h, weight).float(), dim=-1)
    return F.nll_loss(logp.view(-1, logp.size(-1)), labels.view(-1), reduction="none", ignore_index=-100)


@case("logprobs/one-hot-product")
def one_hot_product(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logp = F.linear(h, weight).log_softmax(-1)
    return -(F.one_hot(targets, logp.size(-1)) * logp).sum(-1).mean()


# torch 2.11 makes a batched product of it, of [1, V] and [V, 1].
@case("logprobs/one-hot-einsum", expect=Refuse("escape") if torch.__version__.startswith("2.11.") else Rewrite())
def one_hot_einsum(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logp = F.linear(h, weight).log_softmax(-1)
    return -torch.einsum("btv,btv->bt", F.one_hot(targets, logp.size(-1)).to(logp.dtype), logp).mean()


@case("logprobs/gather-minus-logsumexp", low=(BF16,))
def gather_minus_lse(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(h, weight).float()
    picked = torch.gather(logits, -1, targets.unsqueeze(-1)).squeeze(-1)
    return picked - torch.logsumexp(logits, dim=-1)


@case("logprobs/logsumexp-keepdim")
def logsumexp_keepdim(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    return (logits.gather(-1, targets[..., None]) - logits.logsumexp(-1, keepdim=True)).squeeze(-1).sum(1)


@case("logprobs/subtract-then-gather")
def subtract_then_gather(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    logp = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
    return -logp.gather(-1, targets.unsqueeze(-1)).mean()


@case("logprobs/softmax-gather-log")
def softmax_gather_log(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    probs = F.softmax(F.linear(h, weight), dim=-1)
    return -probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1).log().mean()


@case("logprobs/softmax-log-nll")
def softmax_log_nll(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.nll_loss(torch.log(F.softmax(F.linear(x, weight), dim=-1)), targets.view(-1))


@case("logprobs/softmax-plus-epsilon-log-nll")
def softmax_epsilon(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    probs = torch.softmax(F.linear(x, weight), dim=-1)
    return F.nll_loss(torch.log(probs + 1e-9), targets.view(-1))


@case("logprobs/open-coded", low=(BF16,))
def open_coded(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    z = F.linear(h, weight).float()
    z = z - z.max(dim=-1, keepdim=True).values
    log_sum = z.exp().sum(dim=-1).log()
    return (log_sum - z.gather(-1, targets.unsqueeze(-1)).squeeze(-1)).mean()


@case("logprobs/open-coded-amax-detached")
def open_coded_amax(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    z = x @ weight.T
    peak = z.amax(dim=1, keepdim=True).detach()
    lse = torch.log(torch.exp(z - peak).sum(1, keepdim=True)) + peak
    return (lse - z.gather(1, targets.view(-1, 1))).squeeze(1)


@case("logprobs/open-coded-no-maximum")
def open_coded_plain(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    z = F.linear(x, weight)
    return z.exp().sum(-1).log().sum() - z[torch.arange(len(z)), targets.view(-1)].sum()


@case("logprobs/open-coded-probabilities")
def open_coded_probabilities(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    counts = F.linear(x, weight).exp()
    probs = counts / counts.sum(1, keepdim=True)
    return -probs[torch.arange(x.shape[0]), targets.view(-1)].log().mean()


@case("logprobs/parallel-vocabulary-style", low=(BF16,))
def parallel_style(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    # As vocabulary-parallel losses do it on one rank: clamp the label, mask what was clamped.
    logits = F.linear(h, weight).float()
    valid = labels >= 0
    index = labels.clamp(min=0)
    logits = logits - logits.max(dim=-1)[0].unsqueeze(-1)
    predicted = logits.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    loss = logits.exp().sum(-1).log() - predicted
    return torch.where(valid, loss, torch.zeros_like(loss)).sum() / valid.sum()


@case("logprobs/negated-cross-entropy", low=(BF16,))
def negated_ce(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    flat = -F.cross_entropy(logits.view(-1, logits.size(-1)).float(), targets.view(-1), reduction="none")
    return flat.view(targets.shape)


@case("logprobs/selective-per-row-logsumexp", rows=11)
def selective_lse(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(h, weight)[:, :-1, :] / 0.9
    picked = torch.gather(logits, dim=-1, index=targets[:, 1:].unsqueeze(-1)).squeeze(-1)
    return picked - torch.stack([torch.logsumexp(row, dim=-1) for row in logits])


@case("logprobs/selective-per-row-log-softmax", rows=11, low=(BF16,))
def selective_log_softmax(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(h, weight)[:, :-1, :]
    rows = []
    for row_logits, row_labels in zip(logits, targets[:, 1:], strict=True):
        row_logp = F.log_softmax(row_logits, dim=-1)
        rows.append(row_logp.gather(dim=-1, index=row_labels.unsqueeze(-1)).squeeze(-1))
    return torch.stack(rows)


@case(
    "logprobs/several-candidates",
    dynamic=False,
    note="under dynamic shapes the number of candidates is a symbol, and the gather is left alone",
)
def several_candidates(h: Tensor, weight: Tensor, codes: Tensor) -> Tensor:
    # K candidate tokens per position, one gather.
    return F.linear(h, weight).log_softmax(-1).gather(-1, codes).mean(-1)


@case(
    "logprobs/candidate-scores-of-last-position",
    dims=Dims(B=17, T=3),
    rows=17,
    dynamic=False,
    note="under dynamic shapes the number of candidates is a symbol, and the gather is left alone",
)
def candidate_scores(h: Tensor, weight: Tensor, codes: Tensor) -> Tensor:
    return F.linear(h[:, -1], weight).gather(1, codes[:, 0]).softmax(-1)


@case("logprobs/yes-no-columns", dims=Dims(B=17, T=3), rows=17)
def yes_no_columns(h: Tensor, weight: Tensor) -> Tensor:
    # Rerankers compare two fixed classes.
    logits = F.linear(h[:, -1, :], weight)
    return torch.stack([logits[:, 17], logits[:, 4]], dim=1).log_softmax(dim=1)[:, 1].exp()


@case("logprobs/sequence-mean", rows=SHIFTED)
def sequence_mean(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    labels = labels[:, 1:].clone()
    loss_mask = labels != -100
    labels[labels == -100] = 0
    logits = F.linear(h, weight)[:, :-1, :]
    per_token = torch.gather(logits.log_softmax(-1), dim=2, index=labels.unsqueeze(2)).squeeze(2)
    return (per_token * loss_mask).sum(-1) / loss_mask.sum(-1)


@case("logprobs/perplexity", rows=SHIFTED)
def perplexity(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(h, weight)[:, :-1]
    nll = F.cross_entropy(logits.transpose(1, 2), targets[:, 1:], reduction="none")
    return nll.sum(1).div(nll.size(1)).exp()


@case("logprobs/loglikelihood-and-greedy", backward="first", low=(BF16,))
def loglikelihood(h: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logp = F.log_softmax(F.linear(h, weight), dim=-1, dtype=torch.float32)
    greedy = logp.argmax(dim=-1)
    return logp.gather(2, targets.unsqueeze(-1)).squeeze(-1).sum(1), (greedy == targets).all(-1)


# Preference and reinforcement learning.


@case("rl/dpo", dims=Dims(B=4), rows=44)
def dpo(h: Tensor, weight: Tensor, targets: Tensor, mask: Tensor, ref_logp: Tensor) -> Tensor:
    logits = F.linear(h, weight)[:, :-1]
    logp = logits.log_softmax(-1).gather(-1, targets[:, 1:, None]).squeeze(-1)
    margin = ((logp - ref_logp) * mask[:, 1:]).sum(-1)
    chosen, rejected = margin.chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


@case("rl/dpo-reference-in-graph", dims=Dims(B=4), rows=44, heads=2)
def dpo_reference(h: Tensor, weight: Tensor, teacher_h: Tensor, teacher_weight: Tensor, targets: Tensor) -> Tensor:
    def sequence_logp(z: Tensor) -> Tensor:
        return -F.cross_entropy(z[:, :-1].transpose(1, 2), targets[:, 1:], reduction="none").sum(-1)

    with torch.no_grad():
        ref = sequence_logp(F.linear(teacher_h, teacher_weight))
    chosen, rejected = (sequence_logp(F.linear(h, weight)) - ref).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


@case("rl/orpo", dims=Dims(B=4), rows=44)
def orpo(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(h, weight)[:, :-1]
    logp = logits.log_softmax(-1).gather(-1, targets[:, 1:, None]).squeeze(-1).mean(-1)
    chosen, rejected = logp.chunk(2)
    odds = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
    return -chosen.mean() - 0.1 * F.logsigmoid(odds).mean()


@case("rl/grpo-clipped-kl", rows=SHIFTED)
def grpo(
    h: Tensor, weight: Tensor, targets: Tensor, mask: Tensor, old_logp: Tensor, ref_logp: Tensor, advantage: Tensor
) -> Tensor:
    logits = F.linear(h, weight)[:, :-1] / 1.1
    logp = logits.log_softmax(-1).gather(-1, targets[:, 1:].unsqueeze(-1)).squeeze(-1)
    ratio = torch.exp(logp - old_logp)
    gain = torch.min(ratio * advantage[:, None], ratio.clamp(0.8, 1.2) * advantage[:, None])
    kl = torch.exp(ref_logp - logp) - (ref_logp - logp) - 1
    keep = mask[:, 1:]
    return (((-gain + 0.04 * kl) * keep).sum(-1) / keep.sum(-1).clamp(min=1)).mean()


@case("rl/grpo-entropy-in-chunks", recompiles=True, rows=6, dims=Dims(H=5), backward="first")
def grpo_entropy(h: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(h, weight)[:, :-1, :] / 1.1
    logp = logits.log_softmax(-1).gather(-1, targets[:, 1:].unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        parts = []
        for part in logits.reshape(-1, logits.shape[-1]).split(8, dim=0):
            lp = F.log_softmax(part, dim=-1)
            parts.append(-(torch.exp(lp) * lp).sum(-1))
        entropy = torch.cat(parts)
    return logp.mean(), entropy


@case("rl/policy-gradient-entropy-bonus", low=(BF16,))
def entropy_bonus(h: Tensor, weight: Tensor, targets: Tensor, advantage: Tensor) -> Tensor:
    logits = F.linear(h, weight).float()
    logp = F.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0]
    probs = torch.softmax(logits, dim=-1)
    entropy = torch.logsumexp(logits, dim=-1) - torch.sum(probs * logits, dim=-1)
    return -(logp * advantage[:, None]).mean() - 0.01 * entropy.mean()


@case("rl/temperature-in-place-entropy-bonus")
def verl_like(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    logits.div_(0.7)
    logp = F.log_softmax(logits, dim=-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    p = torch.softmax(logits, dim=-1)
    entropy = torch.logsumexp(logits, dim=-1) - torch.sum(p * logits, dim=-1)
    return -(logp.mean() + 0.01 * entropy.mean())


@case("rl/entropy-no-grad-beside-loss", backward="first", low=(BF16,))
def entropy_no_grad(h: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(h, weight)
    logits = logits.view(-1, logits.size(-1)).float()
    logp = -F.cross_entropy(logits, targets.view(-1), reduction="none")
    with torch.no_grad():
        p = torch.softmax(logits, dim=-1)
        entropy = torch.logsumexp(logits, dim=-1) - (p * logits).sum(-1)
    return -logp.mean(), entropy


@case("rl/reinforce")
def reinforce(h: Tensor, weight: Tensor, targets: Tensor, advantage: Tensor) -> Tensor:
    logp = F.linear(h, weight).log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return -(logp.sum(-1) * (advantage - advantage.mean())).mean()


@case("rl/unlikelihood")
def unlikelihood(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logp = F.linear(h, weight).log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return -torch.log(torch.clamp(1.0 - logp.exp(), min=1e-5)).mean()


@case("rl/categorical-log-prob")
def categorical(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    policy = torch.distributions.Categorical(logits=F.linear(h, weight), validate_args=False)
    return -policy.log_prob(targets).mean()


@case("rl/categorical-entropy")
def categorical_entropy(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    policy = torch.distributions.Categorical(logits=F.linear(h, weight), validate_args=False)
    return -policy.log_prob(targets).mean() - 0.01 * policy.entropy().mean()


# Entropy alone.


@case("entropy/p-log-p", low=(BF16,))
def p_log_p(h: Tensor, weight: Tensor) -> Tensor:
    logp = F.log_softmax(F.linear(h, weight).float(), dim=-1)
    return -(logp.exp() * logp).sum(dim=-1)


@case("entropy/softmax-times-log-softmax")
def softmax_log_softmax(h: Tensor, weight: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()


@case("entropy/lse-minus-mean-softcapped")
def entropy_softcapped(h: Tensor, weight: Tensor) -> Tensor:
    logits = 3.0 * torch.tanh(F.linear(h, weight) / 3.0)
    return (logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)).mean()


@case("entropy/minimum-entropy-adaptation")
def entropy_only_loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # Test-time adaptation: no labels at all.
    z = F.linear(x, weight, bias)
    return -(z.softmax(1) * z.log_softmax(1)).sum(1).mean(0)


# Metrics that sit beside a loss.


@case("metrics/argmax-accuracy", backward="first")
def argmax_accuracy(h: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(h, weight)
    loss = F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1))
    with torch.no_grad():
        valid = labels != -100
        correct = (logits.argmax(dim=-1) == labels) & valid
    return loss, correct.sum() / valid.sum()


@case("metrics/max-indices", backward="first", low=(BF16,))
def max_indices(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(x, weight)
    _, predicted = torch.max(logits.data, 1)
    return F.cross_entropy(logits, targets.view(-1)), (predicted == targets.view(-1)).sum()


@case("metrics/argmax-of-shifted", backward="first", rows=SHIFTED)
def argmax_of_shifted(h: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(h, weight)[:, :-1].contiguous()
    loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets[:, 1:].reshape(-1))
    return loss, logits.argmax(-1).eq(targets[:, 1:]).float().mean()


@case("metrics/confidence", backward="first")
def confidence(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(x, weight)
    loss = F.cross_entropy(logits, targets.view(-1))
    return loss, logits.detach().softmax(-1).max(dim=-1).values


@case("metrics/mean-logit", backward="first")
def mean_logit(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(x, weight)
    return F.cross_entropy(logits, targets.view(-1)), logits.detach().mean()


@case("metrics/greedy-only")
def greedy_only(h: Tensor, weight: Tensor) -> Tensor:
    return F.linear(h, weight)[:, -1].argmax(-1)


@case("metrics/top5", backward="first")
def top5(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(x, weight)
    hit = (logits.topk(5, dim=-1).indices == targets.view(-1, 1)).any(-1)
    return F.cross_entropy(logits, targets.view(-1)), hit.float().mean()


@case("metrics/rank-of-target", backward="first")
def rank_of_target(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(x, weight)
    own = logits.gather(1, targets.view(-1, 1))
    return F.cross_entropy(logits, targets.view(-1)), (logits > own).sum(1)


@case("metrics/norm-of-logits", backward="first")
def norm_of_logits(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(x, weight)
    return F.cross_entropy(logits, targets.view(-1)), logits.detach().norm()


@case("logprobs/poly-loss")
def poly_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    z = F.linear(x, weight)
    labels = targets.view(-1)
    at_label = (F.one_hot(labels, z.shape[-1]) * z.softmax(-1)).sum(-1)
    return (F.cross_entropy(z, labels, reduction="none") + 1 - at_label).mean()
