"""Functions of x, weight and target of which parts run without gradients or under autocast."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from effect_cases import case

# -- grad mode


@case(rewritten=True)
def loss_without_grad(x, w, y):
    z = F.linear(x, w)
    with torch.no_grad():
        loss = F.cross_entropy(z, y)
    return loss + x.sum()


@case(rewritten=True)
def one_loss_without_grad(x, w, y):
    z = F.linear(x, w)
    with torch.no_grad():
        metric = F.cross_entropy(z, y)
    return metric + F.cross_entropy(z, y, reduction="sum")


@case(rewritten=True)
def one_loss_detached(x, w, y):
    z = F.linear(x, w)
    return F.cross_entropy(z.detach(), y) + F.cross_entropy(z, y, reduction="sum")


@case(rewritten=True)
def linear_without_grad(x, w, y):
    with torch.no_grad():
        z = F.linear(x, w)
    return F.cross_entropy(z, y) + x.sum()


@case()
def labels_without_grad_between(x, w, y):
    z = F.linear(x, w)
    with torch.no_grad():
        labels = y.clone()
        scale = x.mean().abs() * 0 + 1
    return F.cross_entropy(z * scale, labels)


@case(rewritten=True)
def grad_enabled_inside_no_grad(x, w, y):
    with torch.no_grad():
        aux = F.cross_entropy(F.linear(x, w), y)
        with torch.enable_grad():
            loss = F.cross_entropy(F.linear(x, w), y, reduction="sum")
    return loss + aux


@case(rewritten=True)
def weight_detached(x, w, y):
    return F.cross_entropy(F.linear(x, w.detach()), y) + w.sum()


@case(rewritten=True)
def x_detached(x, w, y):
    return F.cross_entropy(F.linear(x.detach(), w), y) + x.sum()


@case(rewritten=True)
def log_probabilities_detached(x, w, y):
    p = F.linear(x, w).log_softmax(-1)
    return F.nll_loss(p.detach(), y) + F.nll_loss(p, y, reduction="sum")


# -- autocast


@case(rewritten=True)
def autocast_over_both(x, w, y):
    with torch.autocast("cpu", torch.bfloat16):
        return F.cross_entropy(F.linear(x, w), y)


@case(rewritten=True)
def autocast_over_the_linear(x, w, y):
    with torch.autocast("cpu", torch.bfloat16):
        z = F.linear(x, w)
    return F.cross_entropy(z.float(), y)


@case(rewritten=True)
def autocast_over_the_linear_loss_in_bf16(x, w, y):
    with torch.autocast("cpu", torch.bfloat16):
        z = F.linear(x, w)
    return F.cross_entropy(z, y, reduction="none")


@case(rewritten=True)
def autocast_over_the_loss(x, w, y):
    z = F.linear(x, w)
    with torch.autocast("cpu", torch.bfloat16):
        return F.cross_entropy(z, y)


@case(rewritten=True)
def autocast_switched_off_inside(x, w, y):
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        return F.cross_entropy(F.linear(x, w), y)


@case(rewritten=True)
def autocast_log_softmax(x, w, y):
    with torch.autocast("cpu", torch.bfloat16):
        return F.nll_loss(F.log_softmax(F.linear(x, w), -1), y, reduction="none")


@case()
def autocast_matmul_and_bias(x, w, y):
    with torch.autocast("cpu", torch.bfloat16):
        return F.cross_entropy(x @ w.T + w.sum(1), y)


@case(rewritten=True)
def autocast_fp16(x, w, y):
    with torch.autocast("cpu", torch.float16):
        return F.cross_entropy(F.linear(x, w), y)


@case(rewritten=True)
def autocast_labels_after_the_block(x, w, y):
    """The target is computed outside: it may move into the block, the arithmetic of the loss may not."""
    with torch.autocast("cpu", torch.bfloat16):
        z = F.linear(x, w)
    labels = torch.where(y > 5, y, -100)
    return F.cross_entropy(z.float(), labels, reduction="none")


@case()
def autocast_class_weights(x, w, y):
    with torch.autocast("cpu", torch.bfloat16):
        z = F.linear(x, w)
        c = (w @ w.T).diagonal().detach().abs()
    return F.cross_entropy(z.float(), y, c.float(), label_smoothing=0.1)
