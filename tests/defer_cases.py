"""Functions of x [N, H], weight [V, H] and target [N] that return logits beside a loss, for tests/test_defer.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import N, V
from torch.utils.checkpoint import checkpoint

Fn = Callable[..., Any]
DEFERRED: dict[str, tuple[Fn, int]] = {}
KEPT: dict[str, tuple[Fn, str]] = {}

ce = F.cross_entropy


def deferred(count: int = 1) -> Callable[[Fn], Fn]:
    """This many of its outputs are deferred."""

    def register(fn: Fn) -> Fn:
        DEFERRED[fn.__name__] = (fn, count)
        return fn

    return register


def kept(why: str) -> Callable[[Fn], Fn]:
    """Nothing is deferred; the log says why."""

    def register(fn: Fn) -> Fn:
        KEPT[fn.__name__] = (fn, why)
        return fn

    return register


@deferred()
def plain(x, w, y):
    z = F.linear(x, w)
    return ce(z, y), z


@deferred()
def logits_first(x, w, y):
    z = x @ w.T
    return {"logits": z, "extra": (x.tanh(), [ce(z, y)])}


@deferred()
def bias_from_the_head(x, w, y):
    z = F.linear(x, w, w.sum(1))
    return ce(z, y), z


@deferred()
def bias_added(x, w, y):
    z = F.linear(x, w) - w.sum(1, keepdim=True).T
    return ce(z, y), z


@deferred()
def two_biases(x, w, y):
    z = torch.addmm(w[:, 0], x, w.T) + w[:, 1]
    return ce(z, y), z


@deferred()
def softcapped(x, w, y):
    z = 3.0 * torch.tanh(F.linear(x, w) / 3.0)
    return ce(z, y), z


@deferred()
def one_minus(x, w, y):
    z = 1.0 - 2 * torch.sigmoid(F.linear(x, w))
    return ce(z, y), z


@deferred()
def learnt_scale(x, w, y):
    z = F.linear(x, w, w[:, 0]) * w[0, 0].exp() / (1 + w[:1, :1] ** 2)
    return ce(z, y), z


@deferred()
def some_classes(x, w, y):
    z = F.linear(x, w, w[:, 2])[:, 3:]
    return ce(z, y % (V - 3)), z


@deferred()
def low_precision(x, w, y):
    z = F.linear(x.bfloat16(), w.bfloat16())
    return ce(z.float(), y), z


@deferred()
def softcapped_after_the_cast(x, w, y):
    z = 3.0 * torch.tanh(F.linear(x.bfloat16(), w.bfloat16()).float() / 3.0)
    return ce(z, y), z


@deferred()
def scaled_before_the_cast(x, w, y):
    z = (F.linear(x.bfloat16(), w.bfloat16()) * 0.5).float()
    return ce(z, y), z


@deferred()
def autocast(x, w, y):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = F.linear(x, w)
        with torch.autocast("cpu", enabled=False):
            loss = ce(z.float(), y)
    return loss, z.float()


@deferred()
def autocast_around_the_body(x, w, y):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = F.linear(x, w[:8])
    z = F.linear(h.float(), w)
    return ce(z, y), z


@deferred(2)
def two_heads(x, w, y):
    a, b = F.linear(x, w), F.linear(x.tanh(), w)
    return ce(a, y) + ce(b, y), a, b


@deferred()
def one_of_two_heads(x, w, y):
    """The second head's logits are no output: they are gone all the same."""
    a, b = F.linear(x, w), F.linear(x.tanh(), w)
    return ce(a, y) + ce(b, y), a


@deferred()
def one_head_can_not(x, w, y):
    a, b = F.linear(x, w), F.linear(x.tanh(), w)
    return ce(a, y) + ce(b, y), a, b.exp()


@deferred(2)
def also_as_a_view(x, w, y):
    z = F.linear(x, w)
    return ce(z, y), z, z.view(4, 6, V)


@deferred()
def the_same_twice(x, w, y):
    z = F.linear(x, w)
    return ce(z, y), z, z


@deferred(2)
def also_detached(x, w, y):
    z = F.linear(x, w)
    return ce(z, y), z, z.detach()


@deferred()
def last_rows(x, w, y):
    z = F.linear(x, w)
    return ce(z, y), z.view(4, 6, V)[:, -1]


@deferred()
def shifted(x, w, y):
    z = F.linear(x.view(4, 6, -1), w)
    return ce(z[:, :-1].reshape(-1, V), y.view(4, 6)[:, 1:].reshape(-1)), z[:, :-1]


@deferred()
def rows_of_the_loss(x, w, y):
    """Selected by an index that is an input of the tail."""
    rows = torch.nonzero(y >= 0, as_tuple=False).numel() * 0 + torch.arange(0, N, 2)
    z = F.linear(x, w)
    return ce(z[rows], y[rows]), z


@deferred()
def body_before(x, w, y):
    h = torch.tanh(x @ w[:8])
    z = F.linear(h, w)
    return ce(z, y), z, h


@deferred()
def metrics_without_grad(x, w, y):
    z = F.linear(x, w)
    with torch.no_grad():
        hits = (z.argmax(-1) == y).float().mean()
        entropy = torch.distributions.Categorical(logits=z, validate_args=False).entropy().mean()
    return ce(z, y), z, hits, entropy


@deferred()
def divided_in_place(x, w, y):
    z = F.linear(x, w)
    z.div_(2.0)
    return ce(z, y), z


@deferred()
def divided_through_a_view(x, w, y):
    z = F.linear(x, w)
    z.view(4, 6, V).mul_(0.5)
    return ce(z, y), z


@deferred()
def divided_after_the_loss(x, w, y):
    z = F.linear(x, w)
    loss = ce(z, y)
    z.div_(2.0)
    return loss, z


@deferred()
def through_a_buffer(x, w, y):
    z = torch.empty(N, V)
    z.copy_(F.linear(x, w))
    return ce(z, y), z


@deferred()
def labels_changed(x, w, y):
    labels = y.clone()
    z = F.linear(x, w)
    hits = (z.argmax(-1) == labels).sum()
    labels.masked_fill_(labels > 30, -100)
    return ce(z, labels), z, hits


@deferred()
def weight_changed_before(x, w, y):
    v = w * 1
    v.mul_(2.0)
    z = F.linear(x, v)
    return ce(z, y), z


@deferred()
def checkpointed_head(x, w, y):
    z = checkpoint(F.linear, x, w, use_reentrant=False)
    return ce(z, y), z


@deferred()
def checkpointed_with_loss(x, w, y):
    def both(x, w):
        z = F.linear(x, w)
        return ce(z, y), z

    return checkpoint(both, x, w, use_reentrant=False)


@deferred()
def vmap_before(x, w, y):
    h = torch.vmap(torch.sin)(x)
    z = F.linear(h, w)
    return ce(z, y), z


@deferred()
def logged_detached(x, w, y):
    """Nobody can differentiate what is detached."""
    z = F.linear(x, w).detach()
    return ce(z, y), z, x.sum()


@deferred()
def classes_hidden(x, w, y):
    z = F.linear(x, w)
    z[:, -3:] = float("-inf")
    return ce(z, y % 30), z


@deferred()
def classes_hidden_by_a_mask(x, w, y):
    z = F.linear(x, w, w[:, 0])
    z = z.masked_fill(torch.arange(V) % 7 == 6, torch.finfo(z.dtype).min)
    return ce(z, y * 0), z


@deferred()
def classes_hidden_after_the_cast(x, w, y):
    z = F.linear(x.bfloat16(), w.bfloat16()).float()
    z = torch.where((torch.arange(V) < 30)[None], z, float("-inf"))
    return ce(z, y % 30), z


@deferred()
def one_batch(x, w, y):
    z = torch.bmm(x[None], w.T[None])
    return ce(z[0], y), z


@deferred()
def selected_rows(x, w, y):
    z = F.linear(x, w)
    return ce(z, y), z[y.clamp(0, N - 1)]


@deferred()
def rows_in_another_order(x, w, y):
    z = F.linear(x.view(4, 6, -1), w)
    return ce(z.reshape(-1, V), y), z.transpose(0, 1).contiguous()


@deferred(2)
def in_two_parts(x, w, y):
    z = F.linear(x, w)
    return ce(z, y), z[:12], [{"rest": z[12:]}]


@deferred()
def rows_of_the_weight(x, w, y):
    z = F.linear(w[y.clamp(0)], w)
    return ce(z, y), z


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w, g.T @ x


@deferred()
def function_of_the_user(x, w, y):
    z = Product.apply(x, w)
    return ce(z, y), z


@kept("what no bias can do")
def classes_set_to_a_number(x, w, y):
    z = F.linear(x, w)
    z[:, -3:] = -100.0
    return ce(z, y), z


@kept("what no bias can do")
def rows_hidden(x, w, y):
    z = F.linear(x, w).masked_fill(y[:, None] < 20, float("-inf"))
    return ce(z.clamp(-5), y), z


@kept("transposed in memory")
def rows_in_another_order_of_strides(x, w, y):
    z = F.linear(x.view(4, 6, -1), w)
    return ce(z.reshape(-1, V), y), z.transpose(0, 1)


@kept("a level of functorch, or of inference mode")
def inference_mode_inside(x, w, y):
    z = F.linear(x, w)
    with torch.inference_mode():
        hits = z.argmax(-1)
    return ce(z, y), z, hits


@kept("not logits of its own row")
def expanded(x, w, y):
    z = F.linear(x, w)
    return ce(z, y), z.expand(3, -1, -1)


@kept("the losses of this graph have no gradient")
def only_logged(x, w, y):
    z = F.linear(x, w)
    return ce(z.detach(), y), z


@kept("the losses of this graph have no gradient")
def loss_without_grad(x, w, y):
    z = F.linear(x, w)
    with torch.no_grad():
        loss = ce(z, y)
    return loss, z


@kept("no-loss")
def no_loss(x, w, y):
    return F.linear(x, w)


@kept("the classes are not the last dimension")
def transposed(x, w, y):
    z = F.linear(x, w)
    return ce(z, y), z.T


@kept("no part of an epilogue")
def exponentials(x, w, y):
    z = F.linear(x, w).exp()
    return ce(z, y), z


@kept("made of several values")
def probabilities(x, w, y):
    z = F.linear(x, w)
    return ce(z, y), z.softmax(-1)


@kept("made of several values")
def sum_of_heads(x, w, y):
    z = F.linear(x, w) + F.linear(x.tanh(), w)
    return ce(z, y), z


@kept("a tensor in the middle")
def bias_after_the_cap(x, w, y):
    z = torch.tanh(F.linear(x, w)) + w[:, 0]
    return ce(z, y), z


@kept("several casts")
def rounded(x, w, y):
    z = F.linear(x, w).bfloat16().float()
    return ce(z, y), z


@kept("a cast in the middle")
def cast_in_the_middle(x, w, y):
    z = torch.tanh((F.linear(x.bfloat16(), w.bfloat16()) * 0.5).float())
    return ce(z, y), z


@kept("changed in place later")
def weight_changed_later(x, w, y):
    v = w * 1
    z = F.linear(x, v)
    loss = ce(z.detach(), y) + x.sum()
    with torch.no_grad():
        v.mul_(2.0)
    return loss, z.detach()


@kept("changed in place later")
def rows_changed_later(x, w, y):
    h = x * 1
    z = F.linear(h, w.detach())
    loss = ce(z, y)
    h.view(-1)[0].zero_()
    return loss, z


@kept("no large output depends on a matrix product that no other product reads")
def product_reads_the_logits(x, w, y):
    z = F.linear(x, w)
    return ce(z, y) + (z.softmax(-1) @ w).square().sum(), z


@kept("the head stays: escape")
def unknown_operation(x, w, y):
    z = F.linear(x, w)
    return ce(z, y) + torch.ops.lce_test.mystery(z), z


@kept("not known row by row")
def changed_over_rows_and_classes(x, w, y):
    z = F.linear(x, w)
    z.view(-1).mul_(0.5)
    return ce(z, y), z


@kept("the head stays")
def sorted_over_rows(x, w, y):
    z = F.linear(x, w)
    return ce(z, y) + z.sort(0).values[0].sum(), z


@kept("a level of functorch")
def head_in_vmap(x, w, y):
    z = torch.vmap(lambda row: w @ row)(x)
    return ce(z, y), z


@kept("a level of functorch")
def gradient_of_the_loss_inside(x, w, y):
    z = F.linear(x, w)
    return ce(z, y) + torch.func.grad(lambda t: ce(t, y))(z).square().sum(), z


@kept("no logits")
def narrow(x, w, y):
    z = F.linear(x, w)
    return ce(z, y), z.detach().amax(-1, keepdim=True).expand(N, 2)
