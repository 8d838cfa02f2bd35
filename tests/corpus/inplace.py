"""In-place changes: those with a certain meaning, and those that a careless rewrite would get wrong."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import codes
from .registry import Refuse, case

BF16 = torch.bfloat16


def ce(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1))


# Certain: the logits themselves change, everything that reads them comes later.


@case("in-place/div", low=(BF16,))
def div_(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    logits.div_(0.7)
    return ce(logits, labels)


@case("in-place/augmented-division")
def augmented(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    logits /= 2
    return ce(logits.float(), labels)


@case("in-place/mul-tensor")
def mul_tensor(h: Tensor, weight: Tensor, temperature: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    logits.mul_(temperature)
    return ce(logits, labels)


@case("in-place/mul-parameter")
def mul_parameter(h: Tensor, weight: Tensor, scale: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    logits *= scale
    return ce(logits, labels)


@case("in-place/chained-result")
def chained(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return ce(F.linear(h, weight).mul_(0.5).float(), labels)


@case("in-place/bias")
def bias_(h: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    logits = h @ weight.T
    logits += bias
    return ce(logits, labels)


@case("in-place/softcap", low=(BF16,))
def softcap_(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    logits.div_(3.0).tanh_()
    return ce(logits * 3.0, labels)


@case("in-place/padded-classes-minus-infinity", low=(BF16,))
def padded_infinity(h: Tensor, weight_padded: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight_padded)
    logits[..., weight_padded.size(0) - 3 :] = -float("inf")
    return ce(logits.float(), labels)


@case("in-place/padded-classes-finfo-min")
def padded_finfo(x: Tensor, weight_padded: Tensor, bias_padded: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(x, weight_padded, bias_padded)
    logits[:, -3:] = torch.finfo(logits.dtype).min
    return F.cross_entropy(logits, labels.view(-1))


@case("in-place/one-class-minus-infinity")
def one_class(x: Tensor, weight_padded: Tensor, targets: Tensor) -> Tensor:
    # Class 0 is the mask token: never predicted.
    logits = F.linear(x, weight_padded)
    logits[:, 0] = float("-inf")
    return F.cross_entropy(logits, targets.view(-1) + 1)


@case("in-place/losses-changed")
def losses_changed(x: Tensor, weight: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    loss = F.cross_entropy(F.linear(x, weight), targets.view(-1), reduction="none")
    loss *= mask.view(-1)
    return loss.sum().div_(mask.sum())


@case("in-place/losses-view-changed")
def losses_view_changed(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    loss = F.cross_entropy(F.linear(h, weight).flatten(0, 1), targets.flatten(), reduction="none")
    loss.view(targets.shape)[:, 0] = 0
    return loss.mean()


@case("in-place/residual-before-head")
def residual_before(h: Tensor, weight: Tensor, weight_body: Tensor, labels: Tensor) -> Tensor:
    state = h + 0.5
    state += F.linear(h, weight_body)
    return ce(F.linear(state, weight), labels)


@case("in-place/unrelated-buffer", note="writes elsewhere must not frighten recognition")
def unrelated_buffer(h: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    token_weight.mul_(0.9).add_(0.1)
    return ce(logits, labels) * token_weight.mean()


# A mask over the classes that only the run knows.


@case("in-place/class-mask-filled")
def class_mask_filled(x: Tensor, weight: Tensor, targets: Tensor, class_mask: Tensor) -> Tensor:
    logits = F.linear(x, weight).masked_fill(class_mask, float("-inf"))
    loss = F.cross_entropy(logits, targets.view(-1), reduction="none")
    return torch.where(torch.isinf(loss), 0.0, loss).sum()


@case("in-place/class-mask-assigned")
def class_mask_assigned(x: Tensor, weight: Tensor, targets: Tensor, class_mask: Tensor) -> Tensor:
    logits = F.linear(x, weight)
    logits[:, class_mask] = -1e4
    return F.cross_entropy(logits, targets.view(-1))


# Aliases, and what changes between the head and the loss: AOTAutograd writes it out of place.


@case("in-place/first-row-overwritten", Refuse(codes.CROSSING))
def first_row(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(x, weight)
    logits[0] = 0.0
    return F.cross_entropy(logits, targets.view(-1))


@case("in-place/through-a-view", Refuse(codes.CROSSING))
def through_view(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    logits.view(-1, logits.size(-1))[3:7].zero_()
    return ce(logits, targets)


@case("in-place/through-a-detached-alias")
def through_detached(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    logits.detach().mul_(0.5)
    return ce(logits, targets)


@case("in-place/noise-row-by-row")
def noise(x: Tensor, weight: Tensor, targets: Tensor, token_weight: Tensor) -> Tensor:
    logits = F.linear(x, weight)
    logits += token_weight.flatten()[:, None] * torch.arange(logits.size(1)).to(x.dtype)
    return F.cross_entropy(logits, targets.view(-1))


@case("in-place/scatter-margin")
def scatter_margin(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(x, weight)
    logits.scatter_add_(1, targets.view(-1, 1), logits.new_full((x.size(0), 1), -0.35))
    return F.cross_entropy(logits, targets.view(-1))


@case("in-place/target-logit-overwritten")
def target_overwritten(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(x, weight)
    logits[torch.arange(x.size(0)), targets.view(-1)] -= 0.5
    return F.cross_entropy(logits, targets.view(-1))


@case("in-place/between-two-reads")
def between_reads(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    # The first read is of the unscaled logits, the second of the scaled ones.
    logits = F.linear(x, weight)
    greedy = logits.argmax(-1)
    before = logits.detach().logsumexp(-1)
    logits.div_(0.5)
    return F.cross_entropy(logits, targets.view(-1)), before + greedy


@case("in-place/after-the-loss", backward="first")
def after_loss(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(x, weight)
    loss = F.cross_entropy(logits, targets.view(-1))
    with torch.no_grad():
        scaled = logits.detach().clone().div_(2.0).logsumexp(-1)
    return loss, scaled


@case("in-place/float-is-an-alias-in-fp32", low=(BF16,))
def float_alias(h: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    # In fp32 .float() returns the logits themselves, in bf16 a copy: only there do both losses differ.
    logits = F.linear(h, weight)
    scaled = logits.float()
    scaled.mul_(0.5)
    return ce(scaled, labels), ce(logits, labels)


@case("in-place/contiguous-is-an-alias")
def contiguous_alias(h: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(h, weight)
    kept = logits.contiguous()
    logits.mul_(0.5)
    return ce(kept, labels), ce(logits, labels)


@case("in-place/reshape-is-an-alias")
def reshape_alias(h: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(h, weight)
    flat = logits.reshape(-1, logits.size(-1))
    logits += 1.0
    logits[..., -1] = -float("inf")
    return F.cross_entropy(flat, targets.view(-1) % 97), flat.logsumexp(-1)


@case("in-place/shifted-copy-scaled-original-read", rows=22)
def copy_scaled(h: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    # contiguous() of a slice copies: scaling it leaves the logits as they were.
    logits = F.linear(h, weight)
    shifted = logits[:, :-1].contiguous()
    shifted.mul_(0.5)
    return ce(shifted, labels[:, 1:].contiguous()), logits.logsumexp(-1)


@case("in-place/hidden-changed-after-head", frozen=("weight",))
def hidden_changed(h: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    # Computing the logits later than the linear stood would read the changed hidden state.
    state = h * 2
    logits = F.linear(state, weight)
    state.detach().add_(1.0)
    return ce(logits.float(), labels), state.sum()


@case("in-place/hidden-input-changed-after-head", frozen=("h",))
def hidden_input_changed(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        logits = F.linear(h, weight)
        h.zero_()
        loss = ce(logits, labels)
    return loss


@case("in-place/weight-renormalised-after-head", frozen=("h", "weight"))
def weight_renormalised(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        logits = F.linear(h, weight)
        weight.div_(weight.norm(dim=-1, keepdim=True))
        return ce(logits, labels)


@case("in-place/weight-stepped-after-loss", frozen=("x",), backward="first")
def weight_stepped(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    # Eager needs x alone for the gradient of the weight; an op that recomputes needs the weight as it was.
    loss = F.cross_entropy(F.linear(x, weight), targets.view(-1))
    with torch.no_grad():
        weight.mul_(0.5)
    return loss


@case("in-place/labels-changed-after-loss", frozen=("x", "weight"))
def labels_changed(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    loss = F.cross_entropy(F.linear(x, weight), targets.view(-1))
    targets.fill_(0)
    return loss, targets.sum()


@case("in-place/labels-changed-before-loss")
def labels_changed_before(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(x, weight)
    targets.add_(1).remainder_(weight.size(0))
    return F.cross_entropy(logits, targets.view(-1))


@case("in-place/written-into-a-buffer")
def written_into_buffer(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    store = torch.zeros(*h.shape[:-1], weight.size(0), dtype=h.dtype)
    store[:] = F.linear(h, weight)
    return ce(store, targets)


@case("in-place/out-argument", frozen=("x", "weight"))
def out_argument(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    with torch.no_grad():
        store = x.new_empty(x.size(0), weight.size(0))
        torch.mm(x, weight.t(), out=store)
        return F.cross_entropy(store, targets.view(-1))
