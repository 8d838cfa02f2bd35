"""Rows and classes of the logits that are selected, shifted, permuted, split or stacked."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import codes
from .inputs import Dims
from .registry import Refuse, Rewrite, case

BF16 = torch.bfloat16
SHIFTED = 22  # rows that a shift leaves of 2 x 12


# Shifts along the sequence.


@case("rows/shift-contiguous-view", rows=SHIFTED, low=(BF16,))
def shift_contiguous(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight).float()
    shift_logits = logits[..., :-1, :].contiguous()
    shift_labels = labels[..., 1:].contiguous()
    return F.cross_entropy(shift_logits.view(-1, weight.size(0)), shift_labels.view(-1))


@case("rows/shift-reshape", rows=SHIFTED)
def shift_reshape(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight)[:, :-1]
    return F.cross_entropy(logits.reshape(-1, logits.size(-1)), labels[:, 1:].reshape(-1))


@case("rows/shift-flatten-module", rows=SHIFTED)
class ShiftModule(nn.Module):
    def __init__(self, d: Dims) -> None:
        super().__init__()
        self.lm_head = nn.Linear(d.H, d.V)
        self.loss = nn.CrossEntropyLoss()

    def forward(self, h: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self.lm_head(h)[:, :-1, :].flatten(0, 1), labels[:, 1:].flatten())


@case("rows/shift-narrow", rows=SHIFTED)
def shift_narrow(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    t = logits.size(1) - 1
    return F.cross_entropy(logits.narrow(1, 0, t).flatten(0, 1), labels.narrow(1, 1, t).flatten())


@case("rows/shift-hidden", rows=SHIFTED)
def shift_hidden(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h[:, :-1], weight)
    return F.cross_entropy(logits.reshape(-1, logits.size(-1)), labels[:, 1:].reshape(-1))


@case("rows/shift-labels-roll", low=(BF16,))
def shift_roll(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    shifted = labels.roll(-1, dims=-1)
    shifted[:, -1] = -100
    return F.cross_entropy(F.linear(h, weight).float().view(-1, weight.size(0)), shifted.view(-1))


@case("rows/shift-by-two-strided", rows=10)
def shift_strided(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight)[:, :-2:2]
    return F.cross_entropy(logits.reshape(-1, logits.size(-1)), labels[:, 2::2].reshape(-1))


@case("rows/logits-to-keep", dims=Dims(B=3), rows=15)
def logits_to_keep(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    keep = 5
    logits = F.linear(h[:, slice(-keep, None), :], weight)
    return F.cross_entropy(logits.float().view(-1, weight.size(0)), labels[:, -keep:].reshape(-1))


@case("rows/prefix-dropped-after-head", rows=16)
def prefix_dropped(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    return F.cross_entropy(logits[:, 4:, :].reshape(-1, logits.shape[-1]), labels[:, 4:].reshape(-1))


# Rows picked one by one.


@case("rows/last-position-hidden", dims=Dims(B=17, T=3), rows=17)
def last_position_hidden(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(torch.matmul(h[:, -1], weight.transpose(0, 1)), targets[:, -1])


@case("rows/last-position-logits", dims=Dims(B=17, T=3), rows=17)
def last_position_logits(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, weight)[:, -1, :], targets[:, -1])


@case("rows/select", dims=Dims(B=17, T=3), rows=17)
def select(h: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, weight, bias).select(1, 0), targets.select(1, 0))


@case("rows/index-tensor", rows=18)
def index_tensor(h: Tensor, weight: Tensor, labels: Tensor, picks: Tensor) -> Tensor:
    logits = F.linear(h, weight).view(-1, weight.size(0))
    return F.cross_entropy(logits[picks], labels.view(-1)[picks])


@case("rows/index-select", rows=18)
def index_select(x: Tensor, weight: Tensor, labels: Tensor, picks: Tensor) -> Tensor:
    logits = F.linear(x, weight).index_select(0, picks)
    return F.cross_entropy(logits, labels.flatten().index_select(0, picks))


@case("rows/gather-positions-hidden", rows=20)
def gather_positions(h: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, positions: Tensor) -> Tensor:
    picked = torch.gather(h, 1, positions.unsqueeze(-1).expand(-1, -1, h.size(-1)))
    logits = F.linear(picked, weight, bias)
    return F.cross_entropy(logits.transpose(1, 2), targets.gather(1, positions))


@case("rows/two-index-tensors", rows=20)
def two_index_tensors(h: Tensor, weight: Tensor, targets: Tensor, positions: Tensor) -> Tensor:
    batch = torch.arange(h.size(0)).unsqueeze(1)
    logits = F.linear(h, weight)[batch, positions]
    return F.cross_entropy(logits.flatten(0, 1), targets[batch, positions].flatten())


@case("rows/mask-on-hidden", unbacked=True, rows=16, dynamic=False)
def mask_on_hidden(h: Tensor, weight: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h[mask], weight), targets[mask])


@case("rows/mask-on-logits", unbacked=True, rows=16, dynamic=False)
def mask_on_logits(h: Tensor, weight: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, weight)[mask], targets[mask])


@case("rows/mask-on-logits-graph-break", Refuse(codes.RETURNED_UNREAD), fullgraph=False)
def mask_graph_break(h: Tensor, weight: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, weight)[mask], targets[mask])


@case("rows/mask-on-hidden-graph-break", fullgraph=False, rows=16, recompiles=True)
def mask_hidden_break(h: Tensor, weight: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    # The break comes before the head: head and loss share the second graph.
    picked, wanted = h[mask], targets[mask]
    return F.cross_entropy(F.linear(picked, weight), wanted)


@case("rows/flip")
def flip(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(h, weight).flip(1)
    return F.cross_entropy(logits.flatten(0, 1), targets.flip(1).flatten())


# The class dimension elsewhere than last.


@case("rows/permute-bcn", rows=SHIFTED)
def permute_bcn(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(h, weight)[:, :-1]
    return F.cross_entropy(logits.permute(0, 2, 1), targets[:, 1:], ignore_index=-100)


@case("rows/transpose-bcn", low=(BF16,))
def transpose_bcn(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, weight).transpose(1, 2), labels, reduction="none")


@case("rows/transpose-bcn-smoothing")
def transpose_bcn_smoothing(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, weight).mT, labels, label_smoothing=0.1)


@case("rows/movedim-4d")
def movedim(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    b, t, _ = h.shape
    logits = F.linear(h.view(b, 2, t // 2, -1), weight)
    return F.cross_entropy(logits.movedim(-1, 1), labels.view(b, 2, t // 2))


@case(
    "rows/permute-there-and-back",
    Refuse(codes.CROSSING),
    no_grad=Rewrite(),
    note="rows put in an order and back in two steps",
)
def permute_twice(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight).permute(1, 0, 2).contiguous().transpose(0, 1)
    return F.cross_entropy(logits.reshape(-1, logits.size(-1)), labels.reshape(-1))


@case("rows/log-softmax-dim1")
def log_softmax_dim1(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(F.linear(h, weight).transpose(1, 2), dim=1), labels)


@case("rows/softmax-over-time", Refuse(codes.CROSSING))
def softmax_over_time(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logp = F.log_softmax(F.linear(h, weight), dim=1)
    return -logp.gather(-1, targets.unsqueeze(-1)).mean()


@case("rows/cross-entropy-over-batch", rows=97)
def ce_over_batch(x: Tensor, weight: Tensor, class_mask: Tensor) -> Tensor:
    # Every class picks a row: the classes are the head's rows.
    return F.cross_entropy(F.linear(x, weight).t(), class_mask.long())


@case("rows/view-mixes-classes-with-time", Refuse(codes.CROSSING))
def view_mixes(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    scrambled = logits.transpose(1, 2).reshape(logits.shape)
    return F.cross_entropy(scrambled.flatten(0, 1), targets.flatten())


# Splits and stacks of rows.


@case("rows/split-list-of-losses", rows=12, recompiles=True)
def split_losses(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight).reshape(-1, weight.size(0))
    losses = [
        F.cross_entropy(z, y, ignore_index=-100, reduction="none")
        for z, y in zip(logits.split(12, dim=0), labels.reshape(-1).split(12, dim=0), strict=True)
    ]
    n = (labels != -100).sum()
    return torch.cat(losses).sum() / n.maximum(torch.ones_like(n))


@case("rows/split-hidden-list-of-heads", rows=12, heads=2, recompiles=True)
def split_heads(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = [F.linear(part, weight) for part in h.split(6, dim=1)]
    losses = [
        F.cross_entropy(z.reshape(-1, z.size(-1)), y.reshape(-1), reduction="none")
        for z, y in zip(logits, labels.split(6, dim=1), strict=False)
    ]
    return torch.cat(losses).sum() / (labels != -100).sum()


@case(
    "rows/chunk-and-sum",
    rows=8,
    dims=Dims(H=5),
    dynamic=False,
    note="a chunk of a symbolic number of rows is left alone",
)
def chunk_and_sum(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    total = x.new_zeros(())
    for z, y in zip(F.linear(x, weight).chunk(3), labels.view(-1).chunk(3), strict=True):
        total = total + F.cross_entropy(z.float(), y, reduction="sum")
    return total / (labels != -100).sum()


@case("rows/one-loss-per-sequence")
def loss_per_sequence(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    losses = [F.cross_entropy(logits[i], labels[i], reduction="sum") for i in range(logits.size(0))]
    return torch.stack(losses).mean()


@case("rows/unbind-sequences", rows=12)
def unbind_sequences(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    pairs = zip(F.linear(h, weight).unbind(0), labels.unbind(0), strict=True)
    return sum(F.cross_entropy(z, y) for z, y in pairs) / h.size(0)


@case("rows/cat-of-two-batches", Refuse(codes.CROSSING))
def cat_two_batches(h: Tensor, h2: Tensor, weight: Tensor, targets: Tensor, targets2: Tensor) -> Tensor:
    logits = torch.cat([F.linear(h, weight), F.linear(h2, weight)])
    return F.cross_entropy(logits.flatten(0, 1), torch.cat([targets, targets2]).flatten())


@case("rows/repeat-interleave", Refuse(codes.CROSSING))
def repeat_rows(x: Tensor, weight: Tensor, targets: Tensor, targets2: Tensor) -> Tensor:
    logits = F.linear(x, weight).repeat_interleave(2, dim=0)
    return F.cross_entropy(logits, torch.stack([targets.view(-1), targets2.view(-1)], 1).flatten())


# Classes.


@case("rows/padded-vocabulary-slice", low=(BF16,))
def padded_slice(h: Tensor, weight_padded: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(h, weight_padded)[..., : weight_padded.size(0) - 3]
    return F.cross_entropy(logits.reshape(-1, logits.size(-1)), labels.view(-1))


@case("rows/padded-vocabulary-narrow-bias")
def padded_narrow(x: Tensor, weight_padded: Tensor, bias_padded: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(x, weight_padded, bias_padded).narrow(-1, 0, 101)
    return F.cross_entropy(logits.float(), labels.view(-1))


@case("rows/class-slice-in-the-middle")
def class_slice_middle(x: Tensor, weight_padded: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight_padded)[:, 2:-1], labels.view(-1))


@case("rows/class-step")
def class_step(x: Tensor, weight_wide: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight_wide)[:, ::2], labels.view(-1))


@case("rows/class-index", rows=20)
def class_index(x: Tensor, weight: Tensor, targets: Tensor, keep_classes: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight)[:, keep_classes], targets.view(-1) % 97)


@case("rows/class-index-of-weight", rows=23)
def class_index_of_weight(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, keep_classes: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight[keep_classes], bias[keep_classes]), targets.view(-1) % 97)


@case("rows/class-split-two-tasks", heads=1)
def class_split(x: Tensor, weight_wide: Tensor, targets: Tensor, targets2: Tensor) -> Tensor:
    first, second = F.linear(x, weight_wide).chunk(2, dim=-1)
    return F.cross_entropy(first, targets.view(-1)) + 0.5 * F.cross_entropy(second, targets2.view(-1))
