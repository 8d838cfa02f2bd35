"""Heads that stay, losses without a head, and breaks: each with its code and a hint that, applied, has the head rewritten.

Hints that need no function of their own: test_explain.py; those of settings and devices: test_refusals.py,
test_other_gpus.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_explain import WIDE, codes, told
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

N, H = 48, 16

lin, conv = nn.Linear(H, WIDE), nn.Conv1d(H, WIDE, 1)
weights, noise = torch.randn(3, WIDE, H), torch.rand(N, WIDE)
full = nn.Linear(H, WIDE)
full.register_full_backward_hook(lambda module, gi, go: None)
light = nn.Linear(H, WIDE)
light.weight.register_hook(lambda g: None)


@torch.library.custom_op("lce_inductor_tests::project", mutates_args=())
def project(x: Tensor, w: Tensor) -> Tensor:
    return x @ w.t()


@project.register_fake
def _(x: Tensor, w: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[0])


project.register_autograd(
    lambda ctx, g: (g @ ctx.saved_tensors[1], g.t() @ ctx.saved_tensors[0]),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w, g.t() @ x


def ce(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y)


def lse(z: Tensor, y: Tensor) -> Tensor:
    return (z.logsumexp(-1) - z.gather(-1, y.unsqueeze(-1)).squeeze(-1)).mean()


disabled = torch.compiler.disable(lambda z, y: F.cross_entropy(z, y))
disabled_head = torch.compiler.disable(lambda x: lin(x))
printing, quiet = nn.Linear(H, WIDE), nn.Linear(H, WIDE)
printing.register_forward_pre_hook(lambda module, given: print(end=""))
quiet.register_forward_pre_hook(lambda module, given: None if torch.compiler.is_compiling() else print(end=""))


def in_try(z: Tensor, y: Tensor) -> Tensor:
    try:
        import no_such_package_1234  # noqa: F401
    except ImportError:
        return F.cross_entropy(z, y)
    raise AssertionError


def broken(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def step(x: Tensor, y: Tensor) -> Tensor:
        z = lin(x)
        torch._dynamo.graph_break()
        return loss(z, y)

    return step


def masked(x: Tensor, y: Tensor) -> Tensor:
    z, some = lin(x), y > 3
    return F.cross_entropy(z[some], y[some])


def masked_classes(x: Tensor, y: Tensor) -> Tensor:
    z = lin(x).log_softmax(-1)
    return -(z.exp() * z)[y > 3].sum()


def masked_sums(x: Tensor, y: Tensor) -> Tensor:
    z = lin(x).log_softmax(-1)
    return -(z.exp() * z).sum(-1)[y > 3].sum()


def by_item(x: Tensor, y: Tensor) -> Tensor:
    z = lin(x)
    return F.cross_entropy(z / x.detach().abs().max().item(), y)


def masked_before(x: Tensor, y: Tensor) -> Tensor:
    some = y > -1
    return F.cross_entropy(lin(x[some]), y[some])


def checked(how: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def step(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = lin(x)
        return F.cross_entropy(z, y), how(z.isfinite())

    return step


def convolved(x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(conv(x.view(4, 12, H).transpose(1, 2)), y.view(4, 12))


def linear_of_conv(x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, conv.weight.flatten(1), conv.bias), y)


def looped(x: Tensor, y: Tensor) -> Tensor:
    return sum(F.cross_entropy(F.linear(x, w), y) for w in weights)  # type: ignore[return-value]


def plain(x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(lin(x), y)


def half(x: Tensor) -> tuple[Tensor, ...]:
    return lin.bias.bfloat16(), x.bfloat16(), lin.weight.t().bfloat16()


def vmapped(x: Tensor, y: Tensor) -> Tensor:
    return torch.func.vmap(lambda w: F.cross_entropy(F.linear(x, w), y))(weights).sum()


def setting(name: str) -> Any:
    return torch._dynamo.config.patch({name: True})


ALONE = contextlib.nullcontext
# name: what is told, code, words of the hint, what the hint makes of it, what the hint sets
CASES: dict[str, tuple[Callable[..., Any], str, str, Callable[..., Any], Callable[[], Any]]] = {
    "break, cross_entropy": (broken(ce), "graph-break", "take what breaks the graph out", plain, ALONE),
    "break, logsumexp": (broken(lse), "graph-break", "take what breaks the graph out", lambda x, y: lse(lin(x), y), ALONE),
    "break in a try block": (lambda x, y: in_try(lin(x), y), "graph-break", "take what breaks the graph out", plain, ALONE),
    "disabled loss": (lambda x, y: disabled(lin(x), y), "graph-break", "torch.compiler.disable off", plain, ALONE),
    "disabled head": (
        lambda x, y: F.cross_entropy(disabled_head(x), y), "graph-break", "torch.compiler.disable off the head", plain, ALONE,
    ),
    "a hook that prints": (
        lambda x, y: F.cross_entropy(printing(x), y), "graph-break", "behind `if not torch.compiler.is_compiling()`",
        lambda x, y: F.cross_entropy(quiet(x), y), ALONE,
    ),
    "a mask before the head": (
        masked_before, "graph-break", "capture_dynamic_output_shape_ops = True", masked_before,
        lambda: setting("capture_dynamic_output_shape_ops"),
    ),
    "a check of everything": (
        checked(lambda fine: fine.all()), "crossing", "logits.isfinite().all(-1).all()",
        checked(lambda fine: fine.all(-1).all()), ALONE,
    ),
    "a product by hand": (
        lambda x, y: F.cross_entropy((x[:, None] * lin.weight).sum(-1), y), "no-head", "F.linear", plain, ALONE,
    ),
    "noise": (
        lambda x, y: F.cross_entropy(lin(x) + torch.rand(N, WIDE), y), "random", "noise can be an argument",
        lambda x, y: F.cross_entropy(lin(x) + noise, y), ALONE,
    ),
    "dropout": (
        lambda x, y: F.cross_entropy(F.dropout(lin(x)), y), "random", "leave dropout out of the logits",
        lambda x, y: F.cross_entropy(lin(F.dropout(x)), y), ALONE,
    ),
    "probabilities are returned": (
        lambda x, y: (lambda z: (F.cross_entropy(z, y), z.softmax(-1)))(lin(x)), "returned", "or the logits alone",
        lambda x, y: (lambda z: (F.cross_entropy(z, y), z))(lin(x)), ALONE,
    ),
    "labels of fewer rows": (
        lambda x, y: -lin(x).log_softmax(-1).gather(1, y[:7, None]).sum(), "rows-differ", "the same first dimensions",
        lambda x, y: -lin(x[:7]).log_softmax(-1).gather(1, y[:7, None]).sum(), ALONE,
    ),
    "rows by a mask": (
        masked, "graph-break", "capture_dynamic_output_shape_ops = True", masked,
        lambda: setting("capture_dynamic_output_shape_ops"),
    ),
    "values of classes by a mask": (masked_classes, "returned", "values.sum(-1)[mask]", masked_sums, ALONE),
    "a number read": (
        by_item, "graph-break", "capture_scalar_outputs = True", by_item, lambda: setting("capture_scalar_outputs")
    ),
    "hook on the head": (
        lambda x, y: F.cross_entropy(full(x), y), "graph-break", "weight.register_hook",
        lambda x, y: F.cross_entropy(light(x), y), ALONE,
    ),
    "convolution": (convolved, "foreign-product", "kernel size 1 is one", linear_of_conv, ALONE),
    "vmap over weights": (vmapped, "foreign-product", "for each weight in a loop", looped, ALONE),
    "custom op": (lambda x, y: F.cross_entropy(project(x, lin.weight), y), "foreign-product", "F.linear", plain, ALONE),
    "scaled product": (
        lambda x, y: F.cross_entropy(torch.addmm(*half(x), alpha=2), y), "foreign-product", "F.linear",
        lambda x, y: F.cross_entropy(F.linear(x.bfloat16(), lin.weight.bfloat16(), lin.bias.bfloat16() / 2) * 2, y), ALONE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CASES)
def test_code_and_a_hint_that_works(what):
    fn, code, words, mended, settings = CASES[what]
    x, y = torch.randn(N, H), torch.randint(0, WIDE, (N,))
    found = told(fn, x, y)
    assert found.records and set(codes(found)) == {code}, codes(found)
    assert all(words in r.hint for r in found.records) and found.saved_bytes == 0
    one = N * WIDE * (2 if what == "scaled product" else 4)
    assert found.held_bytes in (one, 3 * one), "the same logits count once"
    with settings():
        found = told(mended, x, y)
    assert set(codes(found)) == {None} and found.held_bytes == 0


@pytest.mark.parametrize("what", ["checkpoint", "reentrant", "autograd.Function", "forward hook", "vmap over rows"])
def test_forms_that_are_rewritten(what):
    """No break, no foreign product: nothing is said against them."""
    hooked = nn.Linear(H, WIDE)
    hooked.register_forward_hook(lambda m, i, o: None)
    fn = {
        "checkpoint": lambda x, y: F.cross_entropy(checkpoint(lin, x, use_reentrant=False), y),
        "reentrant": lambda x, y: F.cross_entropy(checkpoint(lin, x, use_reentrant=True), y),
        "autograd.Function": lambda x, y: F.cross_entropy(Product.apply(x, lin.weight), y),
        "forward hook": lambda x, y: F.cross_entropy(hooked(x), y),
        "vmap over rows": lambda x, y: torch.func.vmap(lambda x, y: F.cross_entropy(lin(x[None]), y[None]))(
            x, y
        ).mean(),
    }[what]
    assert codes(told(fn, torch.randn(N, H, requires_grad=True), torch.randint(0, WIDE, (N,)))) == [None]


def test_a_product_that_reads_the_logits():
    """The head is told, though it is another layer's input, too: a loss reads it."""

    def fn(x, y):
        z = lin(x)
        return F.cross_entropy(z, y) + (z.softmax(-1) @ lin.weight).square().mean()

    (record,) = [r for r in told(fn, torch.randn(N, H), torch.randint(0, WIDE, (N,))).records if not r.rewritten]
    assert record.code == "product" and record.kind == "linear" and record.classes == str(WIDE) and record.losses


def test_what_is_read_behind_a_break():
    """Values for each class leave the graph, and the caller has not asked for them."""

    def fn(x, y):
        logp = lin(x).log_softmax(-1)
        torch._dynamo.graph_break()
        return F.nll_loss(logp, y)

    (record,) = told(fn, torch.randn(N, H), torch.randint(0, WIDE, (N,))).records
    assert record.code == "returned" and "torch._dynamo.graph_break()" in record.stop
    assert record.hint.startswith("take what breaks the graph out")


def test_no_break_is_told_where_there_is_none():
    """The logits of the small softmax are a slice of what the caller gave."""

    def fn(x, y):
        mixed = lin(x) * x[:, :3].softmax(-1).sum(-1, keepdim=True).log().exp()
        return F.cross_entropy(mixed, y) - x[:, :3].log_softmax(-1).mean()

    found = told(fn, torch.randn(N, H), torch.randint(0, WIDE, (N,)))
    assert "graph-break" not in codes(found) and codes(found)[0] is None
