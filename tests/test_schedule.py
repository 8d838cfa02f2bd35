"""The schedule stage: where gradients are computed, what that costs, and that they are right."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from harness import Compiled, N, V, check_against_eager, check_results, error, fresh, head, products, results
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from turns import crossed, one_of

import lce_inductor

Fn = Callable[..., object]


def cross_entropy(x: Tensor, w: Tensor, y: Tensor, **options: object) -> Tensor:
    return F.cross_entropy(F.linear(x, w), y, **options)


def scalars() -> dict[str, Tensor]:
    return {"scale": torch.tensor(3.0, requires_grad=True), "mask": (torch.arange(N) % 3 > 0).float()}


# Functions of x, weight, target, a trainable scale and a mask of rows.
FORWARD: dict[str, Fn] = {
    "mean": lambda x, w, y, s, m: cross_entropy(x, w, y),
    "sum": lambda x, w, y, s, m: cross_entropy(x, w, y, reduction="sum"),
    "mask": lambda x, w, y, s, m: (cross_entropy(x, w, y, reduction="none") * m).sum() / m.sum(),
    "mask by where": lambda x, w, y, s, m: torch.where(m > 0, cross_entropy(x, w, y, reduction="none"), 0).mean(),
    "mask by index": lambda x, w, y, s, m: cross_entropy(x, w, y, reduction="none")[3:20].sum(),
    "mean of rows": lambda x, w, y, s, m: cross_entropy(x, w, y, reduction="none").mean(),
    "mean of sequences": lambda x, w, y, s, m: cross_entropy(x, w, y, reduction="none").view(4, 6).sum(1).mean(),
    "weighted rows": lambda x, w, y, s, m: (cross_entropy(x, w, y, reduction="none") * torch.linspace(0, 1, N)).sum(),
    "class weights": lambda x, w, y, s, m: cross_entropy(x, w, y, weight=torch.linspace(0.1, 1, V, dtype=w.dtype)),
    "label smoothing": lambda x, w, y, s, m: cross_entropy(x, w, y, label_smoothing=0.1),
    "both": lambda x, w, y, s, m: cross_entropy(
        x, w, y, weight=torch.linspace(0.1, 1, V, dtype=w.dtype), label_smoothing=0.1
    ),
    "scaled inside": lambda x, w, y, s, m: cross_entropy(x, w, y) * 128.0,
    "divided inside": lambda x, w, y, s, m: cross_entropy(x, w, y) / 8,
    "negative": lambda x, w, y, s, m: -cross_entropy(x, w, y),
    "added to another loss": lambda x, w, y, s, m: cross_entropy(x, w, y) + x.square().mean() * 0.1,
    "weighted by a parameter": lambda x, w, y, s, m: s * cross_entropy(x, w, y),
    "uncertainty weighting": lambda x, w, y, s, m: (-s).exp() * cross_entropy(x, w, y) + s,
    "two heads, one tangent": lambda x, w, y, s, m: cross_entropy(x, w, y) + 2 * cross_entropy(x.roll(1, 0), w, y),
    "two losses, one head": lambda x, w, y, s, m: (lambda z: F.cross_entropy(z, y) + F.cross_entropy(z, y.roll(1)))(
        F.linear(x, w)
    ),
    "unused output": lambda x, w, y, s, m: (cross_entropy(x, w, y), y.sum()),
    "loss and a detached copy": lambda x, w, y, s, m: (lambda loss: (loss, loss.detach() * 2))(cross_entropy(x, w, y)),
    "log_softmax": lambda x, w, y, s, m: F.nll_loss(F.linear(x, w).log_softmax(-1), y),
    "z-loss": lambda x, w, y, s, m: (lambda z: F.cross_entropy(z, y) + 1e-2 * z.logsumexp(-1).square().mean())(
        F.linear(x, w)
    ),
    "z-loss alone": lambda x, w, y, s, m: F.linear(x, w).logsumexp(-1).pow(2).mean(),
    "masked z-loss": lambda x, w, y, s, m: (F.linear(x, w).logsumexp(-1).square() * m).sum() / m.sum(),
}

# The row gradients need what the head computes, or there is more than one tangent.
RECOMPUTE: dict[str, Fn] = {
    "per row": lambda x, w, y, s, m: cross_entropy(x, w, y, reduction="none"),
    "loss and loss of it": lambda x, w, y, s, m: (lambda loss: (loss, loss * 2))(cross_entropy(x, w, y)),
    "squared loss": lambda x, w, y, s, m: cross_entropy(x, w, y) ** 2,
    "perplexity": lambda x, w, y, s, m: cross_entropy(x, w, y).exp(),
    "focal": lambda x, w, y, s, m: (lambda r: ((1 - (-r).exp()) ** 2 * r).mean())(
        cross_entropy(x, w, y, reduction="none")
    ),
    "hardest rows": lambda x, w, y, s, m: cross_entropy(x, w, y, reduction="none").topk(5).values.sum(),
    "two tangents": lambda x, w, y, s, m: (lambda r: ((r * m).sum(), (r * (1 - m)).sum()))(
        cross_entropy(x, w, y, reduction="none")
    ),
    "divided by its own value": lambda x, w, y, s, m: (lambda loss: loss / loss.detach() * s)(cross_entropy(x, w, y)),
    "clipped": lambda x, w, y, s, m: cross_entropy(x, w, y).clamp(max=100.0),
}


def arguments(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    x, w, y = head(dtype=dtype)
    return [x, w, y, *scalars().values()]


@pytest.mark.parametrize("name", FORWARD)
def test_gradients_in_the_forward(name, installed):
    """Three products a head: the logits, dX and dW; none of them in the backward."""
    args = arguments()
    compiled = check_against_eager(FORWARD[name], args)
    heads = compiled.counts["rewritten"]
    assert "recompute" not in compiled.gradients and heads >= 1
    assert compiled.largest < N * V
    args, outputs = fresh(args), []
    assert products(lambda: outputs.append(compiled(*args))) == 3 * heads
    loss = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    assert products(lambda: loss.backward()) == 0


@pytest.mark.parametrize("name", RECOMPUTE)
def test_gradients_by_recomputing(name, installed):
    """Four products a head: the logits twice."""
    args = arguments()
    compiled = check_against_eager(RECOMPUTE[name], args)
    heads = compiled.counts["rewritten"]
    assert set(compiled.gradients) == {"recompute"} and compiled.largest < N * V
    args = fresh(args)
    assert products(lambda: results(compiled, args)) == 4 * heads


SOME = ["mean", "mask", "weighted by a parameter", "z-loss", "label smoothing", "both"]


@pytest.mark.parametrize("name, dtype", crossed(SOME, [torch.float64, torch.bfloat16, torch.float16]), ids=str)
def test_dtypes(name, dtype, installed):
    check_against_eager(FORWARD[name], arguments(dtype))


@pytest.mark.parametrize("name", [*one_of(2, [*FORWARD]), *one_of(4, [*RECOMPUTE])])
def test_recompute_setting(name):
    with lce_inductor.installed(min_logits_bytes=0, gradients="recompute"):
        compiled = check_against_eager({**FORWARD, **RECOMPUTE}[name], arguments())
        args = fresh(arguments())
        assert products(lambda: results(compiled, args)) == 4 * compiled.counts["rewritten"]
    assert "forward" not in compiled.gradients


def test_forward_setting_warns_where_it_can_not(caplog):
    with lce_inductor.installed(min_logits_bytes=0, gradients="forward"):
        Compiled(RECOMPUTE["squared loss"])(*arguments())
        assert "4 products" in caplog.text and "WARNING" in caplog.text
        caplog.clear()
        Compiled(FORWARD["mean"])(*arguments())
        assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


# -- tangents


@pytest.mark.parametrize("name", ["mean", "mask", "weighted by a parameter", "z-loss", "two heads, one tangent"])
def test_any_tangent(name, installed):
    """The loss is scaled outside of the compiled function: gradient accumulation, loss scaling, a schedule."""
    args = arguments()
    compiled = Compiled(FORWARD[name])
    for factor in (1.0, -3.0, 1e-6, 65536.0, 0.0):
        fused, eager, exact = fresh(args), fresh(args), [_double(t) for t in fresh(args)]
        for fn, inputs in ((compiled, fused), (FORWARD[name], eager), (FORWARD[name], exact)):
            (fn(*inputs) * factor).backward()
        for f, e, r in zip(fused, eager, exact):
            if f.requires_grad and r.grad is not None:
                floor = 16 * torch.finfo(torch.float32).eps * r.grad.norm().item()
                assert error(f.grad, r.grad) <= 1.25 * error(e.grad, r.grad) + floor, factor
    assert set(compiled.gradients) == {"forward"}


def _double(t: Tensor) -> Tensor:
    return t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t


def test_gradients_accumulate_over_micro_batches(installed):
    """Two calls before two backwards: each call's gradients are its own."""
    x, w, y = head()
    compiled = Compiled(lambda x, w, y: cross_entropy(x, w, y))

    def step(fn: Fn, w: Tensor) -> Tensor:
        losses = [fn(xs, w, ys) / 2 for xs, ys in zip(x.detach().split(12), y.split(12))]
        for loss in losses:
            loss.backward()
        return w.grad

    (mine,), (theirs,) = fresh([w]), fresh([w])
    torch.testing.assert_close(step(compiled, mine), step(cross_entropy, theirs))
    assert compiled.gradients == ["forward"]


def test_a_backward_without_the_loss_costs_nothing_wrong(installed):
    """Only the other output is differentiated: the head's tangent is zero or missing."""
    x, w, y = head()
    compiled = Compiled(lambda x, w, y: (cross_entropy(x, w, y), x.square().sum()))
    (x1, w1, y1), (x2,) = fresh([x, w, y]), fresh([x])
    compiled(x1, w1, y1)[1].backward()
    x2.square().sum().backward()
    torch.testing.assert_close(x1.grad, x2.grad)
    assert w1.grad is None or not w1.grad.any()


def test_a_tangent_that_is_no_number(installed):
    """inf and NaN reach every gradient, as in eager."""
    x, w, y = head()
    for bad in (float("inf"), float("nan")):
        xs, ws, ys = fresh([x, w, y])
        Compiled(lambda x, w, y: cross_entropy(x, w, y))(xs, ws, ys).mul(bad).backward()
        assert not torch.isfinite(xs.grad).any() and not torch.isfinite(ws.grad).any()


def test_product_of_two_heads_losses(installed):
    """The tangent of one head is the other's loss: at most one of the two can have its gradients in the forward."""
    args = arguments()
    compiled = check_against_eager(lambda x, w, y, s, m: cross_entropy(x, w, y) * cross_entropy(x * 2, w, y), args)
    args = fresh(args)
    assert products(lambda: results(compiled, args)) == 8 - compiled.counts["gradients:forward"]


# -- what needs a gradient


@pytest.mark.parametrize("name, extra", [("mean", 3), ("per row", 4)])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_products_only_for_what_needs_a_gradient(name, extra, needs, installed):
    args = arguments()
    fn = {**FORWARD, **RECOMPUTE}[name]
    for tensor, needed in zip(args, needs):
        tensor.requires_grad_(needed)
    compiled = check_against_eager(fn, args)
    expected = extra - 2 + sum(needs) if any(needs) else 1
    args = fresh(args)
    assert products(lambda: results(compiled, args)) == expected


def test_no_grad_costs_one_product(installed):
    args = arguments()
    compiled = Compiled(FORWARD["mean"])
    with torch.no_grad():
        compiled(*args)
        assert products(lambda: compiled(*args)) == 1
    assert compiled.gradients == []


def test_a_bias_gradient_costs_no_product(installed):
    x, w, y = head()
    bias = torch.randn(V, requires_grad=True)
    fn = lambda x, w, b, y: F.cross_entropy(F.linear(x, w, b), y)
    compiled = check_against_eager(fn, [x.detach(), w.detach(), bias, y])
    args = fresh([x.detach(), w.detach(), bias, y])
    assert products(lambda: results(compiled, args)) == 1


@pytest.mark.parametrize("chunk_tokens", [1, 7, N, None])
def test_products_grow_with_the_chunks(chunk_tokens):
    counting = N - 1  # one label is ignored
    chunks = -(-counting // (chunk_tokens or N))
    with lce_inductor.installed(min_logits_bytes=0, chunk_tokens=chunk_tokens):
        compiled = check_against_eager(FORWARD["mean"], arguments())
        args = fresh(arguments())
        assert products(lambda: results(compiled, args)) == 3 * chunks


# -- rows and values at the edge


@pytest.mark.parametrize(
    "name, dtype",
    crossed(
        ["mean", "sum", "mask", "class weights", "label smoothing", "per row", "z-loss"], [torch.float32, torch.float16]
    ),
    ids=str,
)
def test_all_rows_ignored(name, dtype, installed):
    """A mean over nothing is NaN, in the gradients as eager has it; a sum over nothing is zero."""
    x, w, y, s, m = arguments(dtype)
    check_against_eager({**FORWARD, **RECOMPUTE}[name], [x, w, torch.full_like(y, -100), s, m])


@pytest.mark.parametrize("name", ["mean", "sum", "per row"])
@pytest.mark.parametrize("n", [0, 1])
def test_few_rows(name, n, installed):
    x, w, y = head()
    fn = {"mean": lambda x, w, y: cross_entropy(x, w, y), "sum": lambda x, w, y: cross_entropy(x, w, y, reduction="sum"),
          "per row": lambda x, w, y: cross_entropy(x, w, y, reduction="none")}[name]  # fmt: skip
    args = [x.detach()[:n].requires_grad_(), w, y[:n]]
    check_against_eager(fn, args)


FP16: dict[str, Fn] = {
    "mean": lambda z, y, m: F.cross_entropy(z, y),
    "mask": lambda z, y, m: (F.cross_entropy(z, y, reduction="none") * m).sum() / m.sum(),
    "label smoothing": lambda z, y, m: F.cross_entropy(z, y, label_smoothing=0.1),
    "class weights": lambda z, y, m: F.cross_entropy(z, y, torch.linspace(0.1, 1, z.shape[-1], dtype=z.dtype)),
    "z-loss": lambda z, y, m: z.logsumexp(-1).square().mean(),
}


@pytest.mark.parametrize("name", FP16)
def test_fp16_row_gradients_do_not_underflow(name, installed):
    """Tiny row gradients inside, as of a mean over many rows, and the loss scale outside, in the tangent.

    With the tangent at one a row gradient is 2 ** -24 / N and less, and fp16's smallest number is 2 ** -24.
    """
    n, v, h, small = 64, 257, 16, 2.0**-24
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, h, generator=g).half().requires_grad_()
    w = (torch.randn(v, h, generator=g) * 0.3).half().requires_grad_()
    y = torch.randint(0, v, (n,), generator=g)
    mask = (torch.arange(n) % 3 > 0).float()
    assert not torch.tensor(small / n).half().any()

    def loss(x: Tensor, w: Tensor, y: Tensor, m: Tensor) -> Tensor:
        z = F.linear(x, w)
        return FP16[name](z if z.dtype == torch.float64 else z.float(), y, m) * small

    compiled = Compiled(loss)
    gradients = []
    for fn, dtype in ((compiled, torch.float16), (loss, torch.float16), (loss, torch.float64)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, w)]
        (fn(*leaves, y, mask.to(dtype)) * (1024 / small)).backward()
        gradients.append([t.grad for t in leaves])
    assert "recompute" not in compiled.gradients and compiled.counts["rewritten"] == 1
    for found, eager, exact in zip(*gradients):
        # Half a unit of fp16 for the rounding of a result that eager may have hit by luck.
        assert error(found, exact) <= 1.25 * error(eager, exact) + 2.0**-11 * exact.norm().item()


def test_fp16_loss_scale_of_autocast(installed):
    """fp32 parameters, fp16 products, a loss scale of 65,536 in an fp32 tangent."""

    def loss(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            return cross_entropy(x, w, y)

    compiled = Compiled(loss)
    gradients = []
    for fn, dtype in ((compiled, torch.float32), (loss, torch.float32), (loss, torch.float64)):
        x, w, y = head(dtype=dtype)
        (fn(x, w, y) * 65536.0).backward()
        gradients.append([x.grad, w.grad])
    for found, eager, exact in zip(*gradients):
        assert error(found, exact) <= 1.25 * error(eager, exact) + 2.0**-11 * exact.norm().item()
    assert compiled.gradients == ["forward"]


def test_fp16_dw_does_not_overflow(installed):
    """Normalised row gradients sum to more than 65,504 over the rows before the real scale is applied."""
    n, v = 2**15, 64  # nll_loss, taken apart, divides by the number of rows in the logits' dtype: exact for this one
    x = torch.full((n, 1), 4, dtype=torch.float16)
    w = torch.zeros(v, 1, dtype=torch.float16, requires_grad=True)
    y = torch.zeros(n, dtype=torch.int64)
    compiled = Compiled(lambda x, w, y: cross_entropy(x, w, y))
    compiled(x, w, y).backward()
    assert compiled.counts["rewritten"] == 1
    assert w.grad.flatten().tolist() == pytest.approx([4 / v - 4, *[4 / v] * (v - 1)], rel=2.0**-9)


# -- activation checkpointing


def checkpointed(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return checkpoint(lambda x, w: cross_entropy(torch.tanh(x), w, y), x, w, use_reentrant=False)


def checkpointed_rows(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return checkpoint(lambda x, w: cross_entropy(x, w, y, reduction="none"), x, w, use_reentrant=False).square().sum()


def checkpointed_hidden(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """Only the layers before the head."""
    hidden = checkpoint(lambda x: torch.tanh(x * 2).sin(), x, use_reentrant=False)
    return cross_entropy(hidden, w, y)


def checkpointed_twice(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return checkpointed(x, w, y) + checkpointed(x * 2, w, y)


def checkpointed_linear(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """The logits leave the region."""
    return F.cross_entropy(checkpoint(F.linear, x, w, use_reentrant=False), y)


@pytest.mark.parametrize(
    "fn, most",
    [
        (checkpointed, 3),
        (checkpointed_rows, 5),
        (checkpointed_hidden, 3),
        (checkpointed_twice, 6),
        (checkpointed_linear, 5),
    ],
)
def test_activation_checkpointing(fn, most, installed):
    """The merged op is saved, not run a second time; where nothing is merged, eager recomputes too."""
    args = head()
    compiled = check_against_eager(fn, args)
    assert "internal-error" not in compiled.refusals
    args = fresh(args)
    assert products(lambda: results(compiled, args)) <= most
    if fn is not checkpointed_linear:
        assert compiled.largest < N * V


def test_selective_checkpointing(installed):
    """A policy that recomputes everything it is asked about."""
    from functools import partial

    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    context = partial(create_selective_checkpoint_contexts, lambda ctx, op, *a, **k: CheckpointPolicy.PREFER_RECOMPUTE)

    def fn(x, w, y):
        body = lambda x, w: cross_entropy(torch.tanh(x), w, y)
        return checkpoint(body, x, w, use_reentrant=False, context_fn=context)

    compiled = check_against_eager(fn, head())
    args = fresh(head())
    assert products(lambda: results(compiled, args)) == 3
    assert compiled.gradients == ["forward"]


# -- dynamic shapes


@pytest.mark.parametrize("name", ["mean", "mask", "class weights", "label smoothing", "z-loss", "mean of sequences"])
def test_dynamic_rows(name, installed):
    x, w, y, s, m = arguments()
    fn = FORWARD[name]
    if name == "mean of sequences":
        fn = lambda x, w, y, s, m: cross_entropy(x, w, y, reduction="none").view(4, -1).sum(1).mean()
    compiled = Compiled(fn, dynamic=True)
    for times in (1, 2, 3):
        args = [torch.cat([x.detach()] * times).requires_grad_(), w, y.repeat(times), s, m.repeat(times)]
        check_results(fn, args, results(compiled, fresh(args)))
    assert name == "mean of sequences" or "recompute" not in compiled.gradients
    assert compiled.counts["rewritten"] == 1


# -- the graphs


def test_joint_graph_after_the_merge(installed):
    """The backward of a mean is two multiplications, that of dW first: dX, the smaller, is the one that waits."""
    x, w, y = head()
    compiled = Compiled(lambda x, w, y: cross_entropy(x, w, y))
    compiled(x, w, y).backward()
    forward, backward = compiled.graphs
    assert forward.text.count("row_stats_with_grad") >= 1 and "row_stats_backward" not in forward.text
    lines = [line.strip() for line in backward.text.splitlines() if "call_function" in line or "return" in line]
    # The tangent names the inputs, against second derivatives.
    assert "lce_inductor.once.default](args = (%tangents_1, [%primals_1, %primals_2])" in lines.pop(0)
    body = "\n".join(lines).replace("%once_default", "%tangents_1")
    assert_expected_inline(
        body,
        """\
%mul_tensor : [num_users=1] = call_function[target=torch.ops.aten.mul.Tensor](args = (%getitem_4, %tangents_1), kwargs = {})
%mul_tensor_1 : [num_users=1] = call_function[target=torch.ops.aten.mul.Tensor](args = (%getitem_5, %tangents_1), kwargs = {})
return (mul_tensor_1, mul_tensor, None)""",
    )


def test_the_forward_does_not_keep_the_inputs(installed):
    """dX and dW are what the backward needs; what x and the weight of the head were computed to may be freed."""
    x, w, y = head()
    compiled = Compiled(lambda x, w, y: cross_entropy(x * 1.5, w * 1.5, y))
    compiled(x, w, y).backward()
    lines = [line.strip() for line in compiled.graphs[-1].text.splitlines() if "placeholder" in line]
    leaves = [line for line in lines if line.startswith("%primals")]
    assert len(lines) - len(leaves) == 3  # dX, dW, the tangent
    assert len(leaves) == 2  # the caller's own x and w: named against second derivatives
