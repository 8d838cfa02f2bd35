"""The compiled function also returns the logits: as nearly every Hugging Face model does."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import codes
from .inputs import Dims
from .registry import Refuse, Rewrite, case

BF16 = torch.bfloat16
SHIFTED = 22
KEEP = {"returned_logits": "keep"}


def ce(logits: Tensor, labels: Tensor, **kwargs: object) -> Tensor:
    return F.cross_entropy(logits.reshape(-1, logits.size(-1)), labels.reshape(-1), **kwargs)  # type: ignore[arg-type]


@dataclasses.dataclass
class Output:
    loss: Tensor
    logits: Tensor


pytree.register_dataclass(Output)


@case("returned/nano-gpt", deferred=True, backward="first")
class NanoGPT(nn.Module):
    def __init__(self, d: Dims) -> None:
        super().__init__()
        self.wte = nn.Embedding(d.V, d.H)
        self.ln_f = nn.LayerNorm(d.H)
        self.lm_head = nn.Linear(d.H, d.V, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, input_ids: Tensor, labels_minus1: Tensor) -> tuple[Tensor, Tensor]:
        x = self.ln_f(self.wte(input_ids))
        logits = self.lm_head(x)
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), labels_minus1.view(-1), ignore_index=-1)
        return loss, logits


@case("returned/keep", Refuse(codes.RETURNED), backward="first", config=KEEP)
def keep(h: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(h, weight)
    return ce(logits.float(), labels), logits


@case("returned/keep-gradient-through-both", Refuse(codes.RETURNED), config=KEEP)
def keep_both(h: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(h, weight)
    return ce(logits.float(), labels), logits


@case("returned/dictionary", deferred=True, backward="first", low=(BF16,))
def dictionary(h: Tensor, weight: Tensor, labels: Tensor) -> dict[str, Tensor]:
    logits = F.linear(h, weight)
    return {"loss": ce(logits.float(), labels), "logits": logits}


@case("returned/dataclass", deferred=True, backward="first")
def dataclass(h: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Output:
    logits = F.linear(h, weight, bias)
    return Output(loss=ce(logits, labels), logits=logits)


@case("returned/loss-only-logged", Refuse(codes.RETURNED), no_grad=Rewrite(), backward="second")
def loss_only_logged(h: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    # The caller trains on the returned logits; the loss in here is a number for the log.
    logits = F.linear(h, weight)
    return ce(logits.detach(), labels), logits


@case("returned/in-float32", deferred=True, backward="first", low=(BF16,))
def in_float32(h: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(h, weight).float()
    return ce(logits, labels), logits


@case("returned/second-float", deferred=True, backward="first", low=(BF16,))
def second_float(h: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    # Mixed-precision wrappers convert the returned logits once more.
    logits = F.linear(h, weight)
    return ce(logits.float(), labels), logits.float()


@case("returned/detached", deferred=True, backward="first")
def detached(h: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(h, weight)
    return ce(logits, labels), logits.detach()


@case("returned/softcapped", deferred=True, backward="first", low=(BF16,))
def softcapped(h: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = 3.0 * torch.tanh(F.linear(h, weight) / 3.0)
    return ce(logits.float(), labels), logits


@case("returned/scaled", deferred=True, backward="first")
def scaled(h: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(h, weight) * 0.0625
    return ce(logits.float(), labels), logits


@case("returned/with-buffer-bias", deferred=True, backward="first")
def with_buffer(h: Tensor, weight: Tensor, logits_bias: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(h, weight) + logits_bias
    return ce(logits, labels), logits


@case("returned/shifted-inside", deferred=True, backward="first", rows=SHIFTED)
def shifted_inside(h: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(h, weight)
    return ce(logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous()), logits


@case("returned/flattened", deferred=True, backward="first")
def flattened(h: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(h, weight)
    logits = logits.view(-1, logits.size(-1))
    return F.cross_entropy(logits, labels.view(-1)), logits


@case("returned/last-position", deferred=True, backward="first")
def last_position(h: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(h, weight)
    return ce(logits, labels), logits[:, -1:].detach()


@case("returned/predictions", backward="first")
def predictions(h: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(h, weight)
    return ce(logits, labels), logits.argmax(-1)


@case("returned/twice", deferred=True, backward="first")
def returned_twice(h: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = F.linear(h, weight)
    return ce(logits, labels), logits, logits.float()


@case("returned/transposed", Refuse(codes.RETURNED), backward="first", note="the class dimension is not last")
def transposed(h: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(h, weight).transpose(1, 2)
    return F.cross_entropy(logits, labels), logits


@case("returned/with-hidden-state", deferred=True, backward="first")
def with_hidden(h: Tensor, weight: Tensor, weight_body: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    state = torch.tanh(h @ weight_body)
    logits = F.linear(state, weight)
    return ce(logits, labels), logits, state


@case("returned/hidden-state-differentiated-too", deferred=True)
def hidden_differentiated(h: Tensor, weight: Tensor, weight_body: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    state = torch.tanh(h @ weight_body)
    logits = F.linear(state, weight)
    return ce(logits, labels), state, logits.detach()


@case("returned/trainer-num-items", deferred=True, backward="first", low=(BF16,))
def trainer(h: Tensor, weight: Tensor, labels: Tensor, num_items: Tensor) -> dict[str, Tensor]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = F.linear(h, weight)
        flat = logits.float().view(-1, logits.size(-1))
        shifted = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous().view(-1)
        loss = F.cross_entropy(flat, shifted, reduction="sum") / num_items
    return {"loss": loss, "logits": logits.float()}


@case("returned/two-heads", deferred=True, backward="first", heads=2)
def two_heads(h: Tensor, weight: Tensor, weight2: Tensor, targets: Tensor, targets2: Tensor) -> tuple[Tensor, ...]:
    first, second = F.linear(h, weight), F.linear(h, weight2)
    return ce(first, targets) + ce(second, targets2), first, second


@case("returned/no-loss-last-position", Refuse(codes.RETURNED_UNREAD))
def generation(h: Tensor, weight: Tensor) -> Tensor:
    return F.linear(h[:, [-1], :], weight)


@case("returned/no-loss-in-dictionary", Refuse(codes.RETURNED_UNREAD))
def inference(h: Tensor, weight: Tensor) -> dict[str, Tensor]:
    return {"logits": F.linear(h, weight).float()}


@case("returned/mean-of-logits-and-loss", backward="first")
def statistics_of_logits(h: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(h, weight)
    return ce(logits, labels), logits.detach().mean(-1)
