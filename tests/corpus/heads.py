"""Several heads, several losses, shared and stacked weights, low-rank heads, frozen parts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import codes
from .inputs import Dims
from .registry import TINY, Refuse, case

BF16 = torch.bfloat16
SHIFTED = 22


def ce(logits: Tensor, labels: Tensor, **kwargs: object) -> Tensor:
    return F.cross_entropy(logits.reshape(-1, logits.size(-1)), labels.reshape(-1), **kwargs)  # type: ignore[arg-type]


# One weight, several depths; several weights.


@case("heads/mtp-shared-head", heads=2, low=(BF16,))
def mtp_shared(h: Tensor, h2: Tensor, weight: Tensor, targets: Tensor, targets2: Tensor) -> Tensor:
    total = h.new_zeros(())
    for state, wanted in ((h, targets), (h2, targets2)):
        logits = F.linear(state, weight)
        total = total + F.cross_entropy(logits.view(-1, logits.size(-1)).float(), wanted.view(-1))
    return total


@case("heads/mtp-capped-logsumexp-gather", heads=1, low=(BF16,))
def mtp_capped(h: Tensor, weight: Tensor, targets: Tensor, targets2: Tensor) -> Tensor:
    # One head, several future tokens per position, their losses weighted; the last ones lie beyond the end.
    logits = 23 * torch.sigmoid((F.linear(h, weight) + 5) / 7.5)
    flat = logits.flatten(0, 1)
    lse = torch.logsumexp(flat, dim=-1)
    wanted = torch.stack([targets.flatten(), targets2.flatten()], dim=1)
    losses = lse.unsqueeze(1) - flat.gather(1, wanted)
    losses[-1:, 1] = 0
    return (losses * losses.new_tensor([1.0, 0.3])).sum()


@case("heads/shifted-targets-per-depth", rows=20, heads=2)
def shifted_depths(h: Tensor, weight: Tensor, weight2: Tensor, targets: Tensor) -> Tensor:
    # Medusa: head k predicts token t + 1 + k.
    losses = []
    for k, w in enumerate((weight, weight2)):
        logits = F.linear(h[:, : -(1 + k)], w)
        losses.append(0.8**k * ce(logits, targets[:, 1 + k :]))
    return torch.stack(losses).sum()


@case("heads/two-weights-two-losses", heads=2)
def two_weights(h: Tensor, weight: Tensor, weight2: Tensor, targets: Tensor, targets2: Tensor) -> Tensor:
    return ce(F.linear(h, weight), targets) + 0.5 * ce(F.linear(h, weight2), targets2)


@case("heads/early-exits-list", heads=3)
class EarlyExits(nn.Module):
    def __init__(self, d: Dims) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(d.H, d.H) for _ in range(3))
        self.head = nn.Linear(d.H, d.V, bias=False)

    def forward(self, h: Tensor, targets: Tensor) -> Tensor:
        losses = []
        for layer in self.layers:
            h = h + torch.relu(layer(h))
            losses.append(ce(self.head(h), targets))
        return torch.stack(losses).mean()


@case("heads/codebooks-stacked-selected", heads=2)
def codebooks_stacked(h: Tensor, weight: Tensor, weight2: Tensor, codes: Tensor) -> Tensor:
    logits = torch.stack([F.linear(h, w) for w in (weight, weight2)], dim=1)
    loss = h.new_zeros(())
    for k in range(2):
        part = logits[:, k, ...].contiguous().view(-1, logits.size(-1))
        loss = loss + F.cross_entropy(part, codes[..., k].contiguous().view(-1))
    return loss / 2


@case("heads/codebooks-stacked-sliced", heads=2, rows=16, low=(BF16,))
def codebooks_sliced(h: Tensor, weight: Tensor, weight2: Tensor, codes: Tensor, mask: Tensor) -> Tensor:
    logits = torch.stack([F.linear(h, w) for w in (weight, weight2)], dim=1)[:, :, -8:]
    labels = codes[:, -8:].masked_fill(~mask[:, -8:, None], -100)
    loss = torch.zeros([])
    for k in range(2):
        loss += F.cross_entropy(logits[:, k].contiguous().view(-1, logits.size(-1)), labels[..., k].reshape(-1))
    return loss / 2


@case("heads/codebooks-stack-last-one-loss", Refuse(codes.CROSSING))
def codebooks_one_loss(h: Tensor, weight: Tensor, weight2: Tensor, codes: Tensor) -> Tensor:
    logits = torch.stack([F.linear(h, weight), F.linear(h, weight2)], dim=2)
    return ce(logits, codes[..., :2])


@case("heads/codebooks-one-wide-head", Refuse(codes.CROSSING), note="rows of several heads interleaved")
def codebooks_wide(h: Tensor, weight: Tensor, weight2: Tensor, codes: Tensor) -> Tensor:
    b, t, _ = h.shape
    logits = F.linear(h, torch.cat([weight, weight2])).view(b, t, 2, -1)
    return F.cross_entropy(logits.reshape(-1, logits.size(-1)), codes[..., :2].reshape(-1))


@case("heads/masked-lm-and-next-sentence")
class PreTraining(nn.Module):
    def __init__(self, d: Dims) -> None:
        super().__init__()
        self.transform = nn.Linear(d.H, d.H)
        self.decoder = nn.Linear(d.H, d.V)
        self.seq_relationship = nn.Linear(d.H, 2)

    def forward(self, h: Tensor, labels: Tensor) -> Tensor:
        scores = self.decoder(F.gelu(self.transform(h)))
        loss = nn.CrossEntropyLoss()
        sentence = loss(self.seq_relationship(h[:, 0]).view(-1, 2), (labels[:, 0] % 2).view(-1))
        return loss(scores.view(-1, scores.size(-1)), labels.view(-1)) + sentence


# Contrastive heads: the weight is an activation.


@case("contrastive/in-batch-negatives", dims=Dims(B=12, T=12, V=101), rows=101)
def in_batch(x: Tensor, keys: Tensor) -> Tensor:
    scores = F.normalize(x[: keys.size(0)], dim=-1) @ F.normalize(keys, dim=-1).T / 0.05
    return F.cross_entropy(scores, torch.arange(scores.size(0)))


@case("contrastive/clip-both-directions", Refuse(codes.CROSSING), dims=Dims(B=12, T=12, V=101), rows=101)
def clip(x: Tensor, keys: Tensor, log_scale: Tensor) -> Tensor:
    images, texts = F.normalize(x[: keys.size(0)], dim=-1), F.normalize(keys, dim=-1)
    logits = log_scale.exp() * images @ texts.t()
    labels = torch.arange(logits.shape[0], device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2


@case("contrastive/clip-two-products", dims=Dims(B=12, T=12, V=101), rows=101, heads=2)
def clip_two_products(x: Tensor, keys: Tensor, log_scale: Tensor) -> Tensor:
    images, texts = F.normalize(x[: keys.size(0)], dim=-1), F.normalize(keys, dim=-1)
    per_image = log_scale.exp() * images @ texts.T
    per_text = log_scale.exp() * texts @ images.T
    labels = torch.arange(len(images))
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


@case("contrastive/queue-concatenated")
def moco(x: Tensor, keys: Tensor, weight_body: Tensor) -> Tensor:
    query = F.normalize(x @ weight_body, dim=1)
    positive = torch.einsum("nc,nc->n", query, F.normalize(x.detach(), dim=1)).unsqueeze(-1)
    negative = torch.einsum("nc,kc->nk", query, keys.detach())
    logits = torch.cat([positive, negative], dim=1) / 0.2
    return F.cross_entropy(logits, torch.zeros(logits.shape[0], dtype=torch.long))


# Low-rank heads.


@case("lora/on-head", frozen=("weight",))
def lora(h: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight) + F.linear(F.linear(h, lora_a), lora_b) * 2.0
    return ce(logits.float(), labels)


@case("lora/on-head-mul-first-cast", low=(BF16,))
def lora_cast(h: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, labels: Tensor) -> Tensor:
    result = F.linear(h, weight)
    result = result + (h.float() @ lora_a.float().T @ lora_b.float().T) * 0.5
    return ce(result.to(h.dtype).float(), labels)


@case("lora/merged-weight", frozen=("weight",))
def lora_merged(h: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, labels: Tensor) -> Tensor:
    return ce(F.linear(h, weight + 0.5 * lora_b @ lora_a), labels)


@case("lora/below-frozen-head", frozen=("weight",), low=(BF16,))
def lora_below(h: Tensor, weight: Tensor, weight_body: Tensor, labels: Tensor) -> Tensor:
    return ce(F.linear(h + F.linear(h, weight_body), weight).float(), labels)


# Which gradients are wanted.


@case("frozen/head", frozen=("weight",))
def frozen_head(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return ce(F.linear(h, weight), labels)


@case("frozen/body", frozen=("h",))
def frozen_body(h: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    return ce(F.linear(h, weight, bias), labels)


@case("frozen/detached-hidden")
def detached_hidden(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return ce(F.linear(h.detach(), weight), labels)


@case("frozen/only-the-bias", frozen=("h", "weight"))
def only_bias(h: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    return ce(F.linear(h, weight, bias), labels)


@case("frozen/only-the-scale", frozen=("h", "weight"))
def only_scale(h: Tensor, weight: Tensor, scale: Tensor, labels: Tensor) -> Tensor:
    return ce(F.linear(h, weight) * scale, labels)


@case("frozen/detached-weight-of-tied")
def detached_weight(input_ids: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return ce(F.linear(F.embedding(input_ids, weight), weight.detach()), targets)


# Structure of the graph around the head.


@case("structure/no-grad-loss-beside-loss", heads=2)
def no_grad_beside(
    h: Tensor, weight: Tensor, teacher_h: Tensor, teacher_weight: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        reference = ce(F.linear(teacher_h, teacher_weight), targets)
    return ce(F.linear(h, weight), targets), reference


@case("structure/evaluation-of-trained-head", backward="none", frozen=("h", "weight"))
def evaluation(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return ce(F.linear(h, weight), labels, reduction="sum")


@case("structure/checkpointed-head-and-loss", no_grad=None)
def checkpointed(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    def head(state: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return ce(F.linear(state, w), y)

    return checkpoint(head, torch.tanh(h), weight, labels, use_reentrant=False)


@case("structure/checkpointed-body", no_grad=None)
def checkpointed_body(h: Tensor, weight: Tensor, weight_body: Tensor, labels: Tensor) -> Tensor:
    state = checkpoint(lambda s: torch.tanh(F.linear(s, weight_body)), h, use_reentrant=False)
    return ce(F.linear(state, weight), labels)


@case("structure/checkpointed-chunks-of-loss", rows=12, heads=2, no_grad=None, recompiles=True)
def checkpointed_chunks(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    # The chunked loss that users write to save the same memory by hand.
    def chunk_loss(state: Tensor, y: Tensor) -> Tensor:
        return ce(F.linear(state, weight), y, reduction="sum")

    parts = zip(h.split(6, dim=1), labels.split(6, dim=1), strict=True)
    total = sum(checkpoint(chunk_loss, s, y, use_reentrant=False) for s, y in parts)
    return total / (labels != -100).sum()


@case("structure/hidden-used-elsewhere")
def hidden_used_elsewhere(h: Tensor, weight: Tensor, weight_body: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    state = torch.tanh(h @ weight_body)
    value = state.square().mean(-1)
    return ce(F.linear(state, weight), labels), value


@case("structure/weight-decay-in-loss")
def weight_decay(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return ce(F.linear(h, weight), labels) + 1e-2 * weight.square().sum()


@case("structure/loss-fed-back", heads=2)
def loss_fed_back(h: Tensor, h2: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    # The second loss is weighted by the first.
    first = ce(F.linear(h, weight), targets)
    return first + first.detach() * ce(F.linear(h2, weight), targets)


@case("structure/targets-from-another-head", heads=1)
def targets_from_head(h: Tensor, h2: Tensor, weight: Tensor, weight_body: Tensor) -> Tensor:
    with torch.no_grad():
        guess = F.linear(h2, weight_body).argmax(-1)
    return ce(F.linear(h, weight), guess)


@case("structure/accumulated-in-a-loop", heads=2, rows=12)
def accumulated(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    total = 0.0
    for i in range(2):
        total = total + ce(F.linear(h[i], weight), labels[i]) / 2
    return total


@case("structure/python-branch-on-labels")
class BranchOnLabels(nn.Module):
    def __init__(self, d: Dims) -> None:
        super().__init__()
        self.lm_head = nn.Linear(d.H, d.V, bias=False)

    def forward(self, h: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.lm_head(h)
        if labels is not None:
            return {"loss": ce(logits, labels)}
        return {"logits": logits}


@case("structure/hidden-stack-of-streams")
def streams(h: Tensor, h2: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    both = torch.stack([h, h2], dim=0)
    logits = F.linear(both.mean(0), weight)
    return ce(logits, targets)


@case("structure/rank-3-with-one-loss-per-stream")
def streams_kept(h: Tensor, h2: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(torch.stack([h, h2]), weight)
    return sum(ce(z, targets) for z in logits) / 2


@case("structure/large-linear-in-body", Refuse(codes.UNSEEN), config=TINY)
def mlp_body(h: Tensor, weight: Tensor, weight2: Tensor) -> Tensor:
    # Nothing here is a head: an MLP with V hidden units.
    return (F.relu(F.linear(h, weight)) @ weight2).square().mean()
