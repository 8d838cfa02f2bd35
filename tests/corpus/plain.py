"""Linear and cross-entropy with nothing special between: how the product, the reshape and the loss are written."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import codes
from .inputs import Dims
from .registry import TINY, Refuse, case

BF16, FP16 = torch.bfloat16, torch.float16


# The product.


@case("plain/linear-view", low=(BF16, FP16))
def linear_view(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1))


@case("plain/linear-bias", low=(BF16,))
def linear_bias(h: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight, bias)
    return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1))


@case("plain/module")
class PlainModule(nn.Module):
    def __init__(self, d: Dims) -> None:
        super().__init__()
        self.lm_head = nn.Linear(d.H, d.V, bias=False)
        self.vocab = d.V

    def forward(self, h: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.lm_head(h).view(-1, self.vocab), labels.view(-1))


@case("plain/module-criterion")
class ModuleCriterion(nn.Module):
    def __init__(self, d: Dims) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d.H)
        self.decoder = nn.Linear(d.H, d.V)
        self.criterion = nn.CrossEntropyLoss(ignore_index=-100)

    def forward(self, h: Tensor, labels: Tensor) -> Tensor:
        scores = self.decoder(self.norm(h))
        return self.criterion(scores.flatten(0, 1), labels.flatten())


@case("plain/tied-embedding")
class Tied(nn.Module):
    def __init__(self, d: Dims) -> None:
        super().__init__()
        self.wte = nn.Embedding(d.V, d.H)
        self.body = nn.Linear(d.H, d.H)
        self.lm_head = nn.Linear(d.H, d.V, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(input_ids)
        x = x + torch.tanh(self.body(x))
        logits = self.lm_head(x)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


@case("plain/embedding-weight-matmul")
class EmbeddingScores(nn.Module):
    def __init__(self, d: Dims) -> None:
        super().__init__()
        self.items = nn.Embedding(d.V, d.H)

    def forward(self, h: Tensor, input_ids: Tensor, labels: Tensor) -> Tensor:
        state = h + self.items(input_ids)
        scores = torch.matmul(state, self.items.weight.transpose(0, 1))
        return F.cross_entropy(scores.view(-1, scores.shape[-1]), labels.view(-1))


@case("plain/matmul-operator")
def matmul_operator(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = h @ weight.T
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))


@case("plain/matmul-method")
def matmul_method(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = h.matmul(weight.t())
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


@case("plain/matmul-mT-bias")
def matmul_m_t(h: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    logits = torch.matmul(h, weight.mT) + bias
    return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1))


@case("plain/matmul-weight-hv")
def matmul_weight_hv(h: Tensor, weight_t: Tensor, labels: Tensor) -> Tensor:
    logits = h @ weight_t
    return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1))


@case("plain/mm")
def mm(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(x.mm(weight.t()), labels.view(-1))


@case("plain/mm-function-permute")
def mm_function(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(torch.mm(x, weight.permute(1, 0)), labels.reshape(-1))


@case("plain/addmm")
def addmm(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(torch.addmm(bias, x, weight.t()), labels.view(-1))


@case("plain/einsum-vd")
def einsum_vd(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = torch.einsum("bsd,vd->bsv", h, weight)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


@case("plain/einsum-dv")
def einsum_dv(x: Tensor, weight_t: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(torch.einsum("nd,dv->nv", x, weight_t), labels.flatten())


@case("plain/einsum-ellipsis")
def einsum_ellipsis(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = torch.einsum("...d,vd->...v", h, weight)
    return F.cross_entropy(logits.reshape(-1, logits.size(-1)), labels.reshape(-1))


@case("plain/einsum-class-first")
def einsum_class_first(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    # The class dimension comes out second, as the loss wants it.
    return F.cross_entropy(torch.einsum("btd,vd->bvt", h, weight), labels)


@case("plain/weights-without-static-sizes", plain=True)
def symbolic_sizes(h: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight, bias)
    return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1))


# The way from the product to the loss.


@case("plain/float-view", low=(BF16, FP16))
def float_view(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight).float()
    return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1))


@case("plain/causal-lm-padded-labels", low=(BF16,))
def causal_lm(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight).float()
    labels = F.pad(labels, (0, 1), value=-100)
    shift_labels = labels[..., 1:].contiguous().view(-1)
    logits = logits.view(-1, logits.size(-1))
    return F.cross_entropy(logits, shift_labels.to(logits.device), ignore_index=-100, reduction="mean")


@case("plain/causal-lm-num-items", low=(BF16,))
def causal_lm_num_items(h: Tensor, weight: Tensor, labels: Tensor, num_items: Tensor) -> Tensor:
    logits = F.linear(h, weight).float().view(-1, weight.size(0))
    shift_labels = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous().view(-1)
    return F.cross_entropy(logits, shift_labels, reduction="sum") / num_items


@case("plain/to-float32-keyword", low=(BF16,))
def to_float32(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((x @ weight.T).to(dtype=torch.float32), labels.view(-1))


@case("plain/type-float32", low=(BF16,))
def type_float32(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).type(torch.float32), labels.view(-1))


@case("plain/float-twice", low=(BF16,))
def float_twice(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h.to(weight.dtype), weight).float()
    return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), labels.view(-1))


@case("plain/head-in-fp32", low=(BF16,))
def head_in_fp32(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h.float(), weight.float())
    return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1))


@case("plain/loss-back-in-bf16", low=(BF16,))
def loss_back(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
    return loss.to(logits.dtype)


@case("plain/bf16-head-of-fp32-model", low=())
def bf16_head(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h.bfloat16(), weight.bfloat16())
    return F.cross_entropy(logits.float().view(-1, logits.size(-1)), labels.view(-1))


@case("plain/autocast-inside")
def autocast_inside(h: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    with torch.autocast(h.device.type, dtype=torch.bfloat16):
        logits = F.linear(h, weight, bias)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1))


@case("plain/autocast-head-loss-outside")
def autocast_head(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    with torch.autocast(h.device.type, dtype=torch.bfloat16):
        logits = F.linear(h, weight)
    return F.cross_entropy(logits.float().view(-1, logits.size(-1)), labels.view(-1))


@case("plain/reshape-sizes")
def reshape_sizes(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    b, t, c = logits.shape
    return F.cross_entropy(logits.view(b * t, c), labels.view(b * t))


@case("plain/reshape-function-contiguous")
def reshape_function(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = torch.reshape(F.linear(h, weight).contiguous(), (-1, weight.shape[0]))
    return F.cross_entropy(logits, torch.flatten(labels))


@case("plain/unsqueeze-squeeze")
def unsqueeze_squeeze(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(x.unsqueeze(0), weight).squeeze(0)
    return F.cross_entropy(logits, labels.view(-1))


@case("plain/unflatten-and-back")
def unflatten_and_back(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(x, weight).unflatten(0, labels.shape)
    return F.cross_entropy(logits.flatten(end_dim=1), labels.flatten())


@case("plain/hidden-flattened-first")
def hidden_flattened(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h.reshape(-1, h.shape[-1]), weight)
    return F.cross_entropy(logits, labels.reshape(-1))


@case("plain/time-first")
def time_first(h_tbh: Tensor, weight: Tensor, targets_tb: Tensor) -> Tensor:
    logits = F.linear(h_tbh, weight).transpose(0, 1).contiguous()
    return F.cross_entropy(logits.view(-1, logits.size(-1)), targets_tb.t().reshape(-1))


@case("plain/hidden-transposed")
def hidden_transposed(h_tbh: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    # x is not contiguous when it reaches the product.
    logits = F.linear(h_tbh.transpose(0, 1), weight)
    return F.cross_entropy(logits.reshape(-1, logits.size(-1)), labels.reshape(-1))


@case("plain/bias-added-later")
def bias_added_later(h: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight) + bias
    return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1))


# The loss call.


@case("plain/sum", low=(BF16,))
def reduction_sum(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), labels.view(-1), reduction="sum")


@case("plain/none")
def reduction_none(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), labels.view(-1), reduction="none")


@case("plain/keywords")
def keywords(x: Tensor, weight: Tensor, labels_minus1: Tensor) -> Tensor:
    return F.cross_entropy(target=labels_minus1.view(-1), input=F.linear(input=x, weight=weight), ignore_index=-1)


@case("plain/ignore-index-zero")
def ignore_zero(x: Tensor, weight: Tensor, labels_pad0: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), labels_pad0.view(-1), ignore_index=0)


@case("plain/class-weights", low=(BF16,))
def class_weights(x: Tensor, weight: Tensor, bias: Tensor, class_weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight, bias), labels.view(-1), weight=class_weight)


@case("plain/class-weights-sum")
def class_weights_sum(x: Tensor, weight: Tensor, class_weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), labels.view(-1), class_weight, reduction="sum")


@case("plain/label-smoothing", low=(BF16,))
def label_smoothing(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), labels.view(-1), label_smoothing=0.1)


@case("plain/label-smoothing-none")
def label_smoothing_none(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), labels.view(-1), label_smoothing=0.1, reduction="none")


@case("plain/label-smoothing-class-weights")
def label_smoothing_class_weights(x: Tensor, weight: Tensor, class_weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), labels.view(-1), weight=class_weight, label_smoothing=0.2)


@case("plain/labels-int32")
def labels_int32(x: Tensor, weight: Tensor, labels_int32: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), labels_int32.view(-1).long())


@case("plain/log-softmax-nll")
def log_softmax_nll(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(F.linear(x, weight), dim=-1), labels.view(-1))


@case("plain/nll-module")
class NLLModule(nn.Module):
    def __init__(self, d: Dims) -> None:
        super().__init__()
        self.project = nn.Linear(d.H, d.V)
        self.log_softmax = nn.LogSoftmax(dim=1)
        self.criterion = nn.NLLLoss(ignore_index=-100, reduction="sum")

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.criterion(self.log_softmax(self.project(x)), labels.view(-1))


@case("plain/all-rows-ignored", note="the mean over no rows is NaN")
def all_rows_ignored(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), torch.full_like(labels, -100).view(-1))


@case("plain/single-row", dims=Dims(B=1, T=12), rows=12)
def one_sequence(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h[0], weight), labels[0])


@case("plain/one-dimensional-logits", Refuse(codes.ONE_ROW), note="one row of logits is no larger than what holds it")
def one_dimensional(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    # A single token: the logits have no batch dimension at all.
    return F.cross_entropy(F.linear(x[3], weight), targets.view(-1)[3])


# What stays as it is.


@case("plain/below-threshold", Refuse(codes.TOO_SMALL), config={"min_logits_bytes": 1 << 20})
def below_threshold(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), labels.view(-1))


@case("plain/no-loss-in-graph", Refuse(codes.RETURNED_UNREAD))
def no_loss(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


@case("plain/graph-break-before-loss", Refuse(codes.RETURNED_UNREAD), fullgraph=False)
def graph_break(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(x, weight)
    torch._dynamo.graph_break()
    return F.cross_entropy(logits, labels.view(-1))


@case(
    "plain/loss-before-any-linear",
    Refuse(codes.UNSEEN),
    config=TINY,
    note="the loss reads an input, a linear comes after it",
)
def loss_without_head(keys: Tensor, targets: Tensor, weight_body: Tensor, x: Tensor) -> Tensor:
    loss = F.cross_entropy(keys[: targets.size(1)], targets[0] % 8)
    return loss + F.linear(x, weight_body).square().mean()
