"""Functions of x, weight and target that change something in place between the linear and the loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import N, V
from torch import Tensor

Fn = Callable[..., Tensor]
CASES: dict[str, tuple[Fn, bool | None]] = {}


def case(rewritten: bool | None = None) -> Callable[[Fn], Fn]:
    """A function of x, weight, target; is it rewritten (None: either is right)?"""

    def register(fn: Fn) -> Fn:
        CASES[fn.__name__] = (fn, rewritten)
        return fn

    return register


# -- the logits or an alias of them change


@case()
def divided_in_place(x, w, y):
    z = F.linear(x, w)
    z.div_(2.0)
    return F.cross_entropy(z, y)


@case()
def divided_after_the_view(x, w, y):
    z = F.linear(x, w)
    flat = z.view(-1, V)
    z.div_(2.0)
    return F.cross_entropy(flat, y)


@case()
def divided_through_the_view(x, w, y):
    z = F.linear(x, w)
    z.view(-1, V).div_(2.0)
    return F.cross_entropy(z, y)


@case()
def divided_between_two_losses(x, w, y):
    z = F.linear(x, w)
    first = F.cross_entropy(z.clone(), y)
    z /= 2.0
    return first + F.cross_entropy(z, y)


@case()
def divided_after_a_copy(x, w, y):
    z = F.linear(x, w)
    copy = z.clone()
    z *= 3.0
    return F.cross_entropy(copy, y) + F.cross_entropy(z, y)


@case()
def copy_divided(x, w, y):
    z = F.linear(x, w)
    copy = z.clone()
    copy *= 3.0
    return F.cross_entropy(copy, y) + F.cross_entropy(z, y)


@case()
def float_of_float_divided(x, w, y):
    """`.float()` of fp32 is the tensor itself."""
    z = F.linear(x, w)
    z.float().mul_(2.0)
    return F.cross_entropy(z, y)


@case()
def contiguous_divided(x, w, y):
    """`.contiguous()` of contiguous logits is the tensor itself."""
    z = F.linear(x, w)
    z.contiguous().mul_(2.0)
    return F.cross_entropy(z, y)


@case()
def to_the_same_dtype_divided(x, w, y):
    z = F.linear(x, w)
    z.to(torch.float32).mul_(2.0)
    return F.cross_entropy(z, y)


@case()
def reshape_divided(x, w, y):
    z = F.linear(x, w)
    z.reshape(4, 6, V).mul_(2.0)
    return F.cross_entropy(z, y)


@case()
def added_operator(x, w, y):
    z = F.linear(x, w)
    z += 1.0
    z -= x.sum(1, keepdim=True)
    return F.cross_entropy(z, y)


@case()
def added_bias(x, w, y):
    z = F.linear(x, w)
    z += w.sum(1)
    return F.cross_entropy(z, y)


@case()
def class_columns_set(x, w, y):
    z = F.linear(x, w)
    z[:, 30:] = -1e4
    return F.cross_entropy(z, y.clamp(max=29))


@case()
def class_columns_filled_through_a_slice(x, w, y):
    z = F.linear(x, w)
    z[:, 30:].fill_(-1e4)
    return F.cross_entropy(z, y.clamp(max=29))


@case()
def row_set(x, w, y):
    z = F.linear(x, w)
    z[0] = 0.0
    return F.cross_entropy(z, y)


@case()
def row_zeroed_through_select(x, w, y):
    z = F.linear(x, w)
    z[0].zero_()
    return F.cross_entropy(z, y)


@case()
def part_of_the_flat_view(x, w, y):
    z = F.linear(x, w)
    z.view(-1)[:50].mul_(3.0)
    return F.cross_entropy(z, y)


@case()
def masked_fill(x, w, y):
    z = F.linear(x, w)
    z.masked_fill_(z > 2, 2.0)
    return F.cross_entropy(z, y)


@case()
def index_fill(x, w, y):
    z = F.linear(x, w)
    z.index_fill_(1, torch.tensor([3, 4]), -100.0)
    return F.cross_entropy(z, y)


@case()
def scattered(x, w, y):
    z = F.linear(x, w)
    z.scatter_(1, y.clamp(min=0).unsqueeze(1), 0.5)
    return F.cross_entropy(z, y)


@case()
def margin_at_the_target(x, w, y):
    z = F.linear(x, w)
    z[torch.arange(N), y.clamp(min=0)] -= 0.35
    return F.cross_entropy(z, y)


@case()
def relu_keyword(x, w, y):
    z = F.linear(x, w)
    F.relu(z, inplace=True)
    return F.cross_entropy(z, y)


@case()
def relu_positional(x, w, y):
    z = F.linear(x, w)
    F.relu(z, True)
    return F.cross_entropy(z, y)


@case()
def dropout_in_place(x, w, y):
    z = F.linear(x, w)
    F.dropout(z, 0.0, True, True)
    return F.cross_entropy(z, y)


@case()
def clamped(x, w, y):
    z = F.linear(x, w)
    torch.clamp_(z, -1, 1)
    return F.cross_entropy(z, y)


@case()
def detached_alias(x, w, y):
    z = F.linear(x, w)
    z.detach().mul_(2.0)
    return F.cross_entropy(z, y)


@case()
def data_alias(x, w, y):
    z = F.linear(x, w)
    z.data.mul_(2.0)
    return F.cross_entropy(z, y)


@case()
def transposed_alias(x, w, y):
    z = F.linear(x, w)
    z.t().mul_(2.0)
    return F.cross_entropy(z, y)


@case()
def transposed_alias_part(x, w, y):
    z = F.linear(x, w)
    z.transpose(0, 1)[3].zero_()
    return F.cross_entropy(z, y)


@case()
def diagonal_alias(x, w, y):
    z = F.linear(x, w)
    z.diagonal().zero_()
    return F.cross_entropy(z, y)


@case()
def out_of_another_operation(x, w, y):
    z = F.linear(x, w).detach()
    torch.mul(z, 2.0, out=z)
    return F.cross_entropy(z, y) + x.sum()


@case()
def log_softmax_changed(x, w, y):
    p = F.linear(x, w).detach().log_softmax(-1)
    p.mul_(0.5)
    return F.nll_loss(p, y) + x.sum()


@case()
def log_softmax_changed_by_class(x, w, y):
    p = F.linear(x, w).detach().log_softmax(-1)
    p[:, 3] = -1.0
    return F.nll_loss(p, y) + x.sum()


@case()
def logits_changed_after_log_softmax(x, w, y):
    z = F.linear(x, w)
    p = z.log_softmax(-1)
    z.mul_(0.5)
    return F.nll_loss(p, y) + F.cross_entropy(z, y)


@case()
def changed_after_the_loss(x, w, y):
    z = F.linear(x, w)
    loss = F.cross_entropy(z, y)
    z.detach().mul_(0.0)
    return loss


@case()
def changed_twice(x, w, y):
    z = F.linear(x, w)
    z.mul_(0.5)
    first = F.cross_entropy(z.clone(), y)
    z.add_(w.sum(1))
    return first + F.cross_entropy(z, y, reduction="sum")


@case()
def swapped_buffers(x, w, y):
    """Another tensor is filled with the logits, and the logits with zeros."""
    z = F.linear(x, w)
    kept = torch.empty_like(z).copy_(z)
    z.zero_()
    return F.cross_entropy(kept, y) + F.cross_entropy(z, y)


def _padded(x, w, change):
    """Padded classes are set to -inf, then the logits go on."""
    return change(F.linear(x, w).masked_fill(torch.arange(V) >= 30, float("-inf")))


@case()
def padded_classes(x, w, y):
    return F.cross_entropy(_padded(x, w, lambda z: z / 0.7 + 1), y.clamp(max=29))


@case()
def padded_classes_turned_round(x, w, y):
    """A negative factor makes them +inf, and the loss NaN."""
    return F.cross_entropy(_padded(x, w, torch.neg), y.clamp(max=29))


@case()
def padded_classes_capped(x, w, y):
    """A cap makes them finite."""
    return F.cross_entropy(_padded(x, w, lambda z: 3 * torch.tanh(z / 3)), y.clamp(max=29))


@case()
def padded_classes_smoothed(x, w, y):
    """The loss is inf, its gradient is not."""
    return F.cross_entropy(_padded(x, w, lambda z: z), y.clamp(max=29), label_smoothing=0.1)


# -- inputs of the head or of the loss change


@case()
def labels_changed_before_the_loss(x, w, y):
    z = F.linear(x, w)
    y.fill_(3)
    return F.cross_entropy(z, y)


@case()
def labels_changed_twice(x, w, y):
    z = F.linear(x, w)
    y.fill_(3)
    first = F.cross_entropy(z, y.clone())
    y[::2] = 5
    return first + F.cross_entropy(z, y)


@case()
def labels_clone_changed(x, w, y):
    z = F.linear(x, w)
    labels = y.clone()
    labels[0] = -100
    return F.cross_entropy(z, labels)


@case()
def labels_rolled_and_changed(x, w, y):
    z = F.linear(x, w)
    labels = y.roll(1)
    labels[-1] = -100
    return F.cross_entropy(z, labels)


@case(rewritten=True)
def labels_computed_after_the_linear(x, w, y):
    z = F.linear(x, w)
    labels = torch.where(y > 5, y, -100)
    return F.cross_entropy(z, labels)


@case()
def pseudo_labels(x, w, y):
    z = F.linear(x, w)
    return F.cross_entropy(z, z.argmax(-1))


@case()
def pseudo_labels_without_grad(x, w, y):
    z = F.linear(x, w)
    with torch.no_grad():
        labels = z.softmax(-1).argmax(-1)
    return F.cross_entropy(z, labels)


@case()
def labels_masked_by_confidence(x, w, y):
    z = F.linear(x, w)
    with torch.no_grad():
        unsure = z.max(-1).values < 2
    return F.cross_entropy(z, torch.where(unsure, -100, y))


@case()
def class_weights_from_the_logits(x, w, y):
    z = F.linear(x, w)
    return F.cross_entropy(z, y, z.detach().mean(0).exp())


@case(rewritten=True)
def class_weights_after_the_linear(x, w, y):
    z = F.linear(x, w)
    return F.cross_entropy(z, y, torch.ones(V, dtype=x.dtype) * 2, label_smoothing=0.1)


@case()
def class_weights_changed(x, w, y):
    c = torch.ones(V, dtype=x.dtype)
    z = F.linear(x, w)
    first = F.cross_entropy(z, y, c.clone())
    c[3] = 5.0
    return first + F.cross_entropy(z, y, c)


# -- the loss changes


@case(rewritten=True)
def loss_added_to(x, w, y):
    loss = F.cross_entropy(F.linear(x, w), y)
    loss += x.sum()
    return loss


@case(rewritten=True)
def loss_multiplied(x, w, y):
    loss = F.cross_entropy(F.linear(x, w), y)
    loss.mul_(3.0)
    return loss * 2


@case(rewritten=True)
def total_added_to(x, w, y):
    total = x.square().sum()
    total += F.cross_entropy(F.linear(x, w), y)
    return total


@case(rewritten=True)
def loss_rows_set(x, w, y):
    loss = F.cross_entropy(F.linear(x, w), y, reduction="none")
    loss[y == 3] = 0.0
    loss[0] = 1.0
    return loss.sum()


@case(rewritten=True)
def loss_rows_masked(x, w, y):
    loss = F.cross_entropy(F.linear(x, w), y, reduction="none")
    loss.masked_fill_(loss > 5, 0.0)
    return loss.mean()
