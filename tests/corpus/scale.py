"""Logits that are scaled, shifted or capped before the loss."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .inputs import Dims
from .registry import case

BF16 = torch.bfloat16


def mean_ce(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1))


# Numbers, tensors and parameters as factors.


@case("scale/mul-number", low=(BF16,))
def mul_number(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return mean_ce((F.linear(h, weight) * 0.0625).float(), labels)


@case("scale/number-on-the-left")
def number_on_the_left(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return mean_ce(2.5 * F.linear(h, weight), labels)


@case("scale/mul-one")
def mul_one(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return mean_ce(F.linear(h, weight) * 1.0, labels)


@case("scale/negative")
def negative(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    # Scores are distances here: the nearest class wins.
    return mean_ce(-F.linear(h, weight), labels)


@case("scale/div-number", low=(BF16,))
def div_number(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    logits = logits / 8.0
    return mean_ce(logits.float(), labels)


@case("scale/div-function-int")
def div_function(h: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    return mean_ce(torch.div(F.linear(h, weight, bias), 2), labels)


@case("scale/scale-then-bias")
def scale_then_bias(h: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    return mean_ce(F.linear(h, weight) * 0.5 + bias, labels)


@case("scale/bias-then-scale")
def bias_then_scale(h: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    return mean_ce((F.linear(h, weight) + bias) * 0.5, labels)


@case("scale/add-number")
def add_number(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return mean_ce(F.linear(h, weight) + 0.5, labels)


@case("scale/tensor-0-dim")
def tensor_0_dim(h: Tensor, weight: Tensor, temperature: Tensor, labels: Tensor) -> Tensor:
    return mean_ce(F.linear(h, weight) / temperature, labels)


@case("scale/parameter")
def parameter(h: Tensor, weight: Tensor, scale: Tensor, labels: Tensor) -> Tensor:
    return mean_ce(F.linear(h, weight) * scale, labels)


@case("scale/parameter-divides")
def parameter_divides(h: Tensor, weight: Tensor, scale: Tensor, labels: Tensor) -> Tensor:
    return mean_ce(F.linear(h, weight) / scale.abs().clamp(min=0.1), labels)


@case("scale/log-parameter-exp")
def log_parameter(x: Tensor, keys: Tensor, log_scale: Tensor, targets: Tensor) -> Tensor:
    logits = log_scale.exp() * F.normalize(x, dim=-1) @ F.normalize(keys, dim=-1).t()
    return F.cross_entropy(logits, targets.view(-1))


@case("scale/module-parameter-of-one-element")
class OneElementScale(nn.Module):
    def __init__(self, d: Dims) -> None:
        super().__init__()
        self.head = nn.Linear(d.H, d.V, bias=False)
        self.logit_scale = nn.Parameter(torch.ones(1))

    def forward(self, h: Tensor, labels: Tensor) -> Tensor:
        return mean_ce(self.head(h) * self.logit_scale, labels)


@case("scale/cosine-head")
def cosine_head(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    cosine = F.linear(F.normalize(x), F.normalize(weight))
    return F.cross_entropy(cosine * 16.0, targets.view(-1))


@case("scale/hidden-scaled-first")
def hidden_scaled(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return mean_ce(F.linear(h * h.size(-1) ** -0.5, weight), labels)


@case("scale/weight-scaled-first")
def weight_scaled(h: Tensor, weight: Tensor, gain: Tensor, labels: Tensor) -> Tensor:
    return mean_ce(F.linear(h, weight * gain[:, None]), labels)


# Vectors over the classes.


@case("scale/bias-buffer-1xV")
def bias_buffer(h: Tensor, weight: Tensor, logits_bias: Tensor, labels: Tensor) -> Tensor:
    return mean_ce(F.linear(h, weight) + logits_bias, labels)


@case("scale/bias-parameter-1xV")
def bias_parameter(h: Tensor, weight: Tensor, bias_row: Tensor, labels: Tensor) -> Tensor:
    return mean_ce(F.linear(h, weight) + bias_row.to(h.device), labels)


@case("scale/log-prior", low=(BF16,))
def log_prior(h: Tensor, weight: Tensor, class_weight: Tensor, labels: Tensor) -> Tensor:
    # Logit adjustment for long-tailed classes.
    prior = class_weight / class_weight.sum()
    return mean_ce(F.linear(h, weight) + 0.7 * prior.log(), labels)


@case("scale/subtract-vector")
def subtract_vector(h: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    # Sampled softmax corrects by the log of the proposal's probability.
    return mean_ce(F.linear(h, weight) - bias.log_softmax(0), labels)


@case("scale/vector-factor")
def vector_factor(h: Tensor, weight: Tensor, gain: Tensor, labels: Tensor) -> Tensor:
    return mean_ce(F.linear(h, weight) * gain, labels)


@case("scale/vector-factor-with-bias")
def vector_factor_bias(h: Tensor, weight: Tensor, bias: Tensor, gain: Tensor, labels: Tensor) -> Tensor:
    return mean_ce(F.linear(h, weight, bias) * gain[None, None, :], labels)


# Caps.


@case("scale/softcap", low=(BF16,))
def softcap(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    logits = logits / 3.0
    logits = torch.tanh(logits)
    logits = logits * 3.0
    return mean_ce(logits.float(), labels)


@case("scale/softcap-after-upcast", low=(BF16,))
def softcap_upcast(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight).float()
    return mean_ce(4.0 * torch.tanh(logits / 4.0), labels)


@case("scale/softcap-method-int")
def softcap_method(h: Tensor, weight: Tensor, labels_minus1: Tensor) -> Tensor:
    cap = 15
    logits = F.linear(h, weight)[..., :101].float()
    logits = cap * (logits / cap).tanh()
    return F.cross_entropy(logits.view(-1, logits.size(-1)), labels_minus1.view(-1), ignore_index=-1)


@case("scale/softcap-reciprocal")
def softcap_reciprocal(h: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    return mean_ce(torch.tanh(F.linear(h, weight, bias) * (1 / 5.0)).mul(5.0), labels)


@case("scale/softcap-of-scaled")
def softcap_of_scaled(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight) * 0.7
    return mean_ce(3.0 * torch.tanh(logits / 3.0) / 0.9, labels)


@case("scale/softcap-trained-temperature")
def softcap_trained(h: Tensor, weight: Tensor, scale: Tensor, labels: Tensor) -> Tensor:
    logits = 3.0 * torch.tanh(F.linear(h, weight) / 3.0)
    return mean_ce(logits * scale, labels)


@case("scale/softcap-trained-inside")
def softcap_trained_inside(h: Tensor, weight: Tensor, scale: Tensor, labels: Tensor) -> Tensor:
    return mean_ce(3.0 * torch.tanh(F.linear(h, weight) * scale / 3.0), labels)


@case("scale/sigmoid-cap", low=(BF16,))
def sigmoid_cap(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = 23 * torch.sigmoid((F.linear(h, weight) + 5) / 7.5)
    return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), reduction="sum")


@case("scale/sigmoid-cap-folded", low=(BF16,))
def sigmoid_cap_folded(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(h, weight).float()
    logits = 30 * torch.sigmoid(logits / (7.5 * h.size(-1) ** 0.5))
    return mean_ce(logits, targets)


@case("scale/rsqrt-cap", low=(BF16,))
def rsqrt_cap(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight).float()
    logits = 15 * logits * torch.rsqrt(logits.square() + 225)
    return mean_ce(logits, labels)


@case("scale/rsqrt-cap-method-pow")
def rsqrt_cap_method(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(h, weight)
    return mean_ce(z * 4 * (z.pow(2) + 16).rsqrt(), labels)


@case("scale/rsqrt-cap-as-division")
def rsqrt_cap_division(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(h, weight)
    return mean_ce(z / torch.sqrt(1 + (z / 4) ** 2), labels)


@case("scale/cap-then-vector")
def cap_then_vector(h: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    return mean_ce(3.0 * torch.tanh(F.linear(h, weight) / 3.0) + bias, labels)


@case("scale/everything-before-the-loss", low=(BF16,), rows=22)
def everything(h: Tensor, weight_padded: Tensor, bias_padded: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight_padded, bias_padded)[..., : weight_padded.size(0) - 3]
    logits = (3.0 * torch.tanh(logits.float() / 3.0))[:, :-1].contiguous()
    return F.cross_entropy(
        logits.view(-1, logits.size(-1)), labels[:, 1:].reshape(-1), label_smoothing=0.1, reduction="sum"
    ) / math.sqrt(2)


# Not one epilogue.


@case("scale/temperature-per-row")
def temperature_per_row(h: Tensor, weight: Tensor, row_temperature: Tensor, labels: Tensor) -> Tensor:
    return mean_ce(F.linear(h, weight) / row_temperature, labels)


@case("scale/offset-per-row")
def offset_per_row(h: Tensor, weight: Tensor, token_weight: Tensor, labels: Tensor) -> Tensor:
    return mean_ce(F.linear(h, weight) + token_weight.unsqueeze(-1), labels)


@case("scale/rows-masked-by-product")
def rows_masked(h: Tensor, weight: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    return mean_ce(F.linear(h, weight) * mask.unsqueeze(-1), labels)


@case("scale/clamp")
def clamp(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return mean_ce(F.linear(h, weight).clamp(-2.0, 2.0), labels)


@case("scale/gelu-on-logits")
def gelu_on_logits(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return mean_ce(F.gelu(F.linear(h, weight)), labels)


@case("scale/standardised-over-classes")
def standardised(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    return mean_ce((logits - logits.mean(-1, keepdim=True)) / logits.std(-1, keepdim=True), labels)


@case("scale/dropout-on-logits-p0")
def dropout_p0(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return mean_ce(F.dropout(F.linear(h, weight), p=0.0), labels)
