"""Heads under defer(): their logits wait for a loss that is compiled elsewhere, and gradients are eager's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import peak_bytes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lce_inductor
from lce_inductor.deferred_heads.gradient import LogitsGradient
from lce_inductor.deferred_heads.logits import PendingLogits
from lce_inductor.reporting import history

B, T, H, V = 2, 9, 16, 211


class Model(nn.Module):
    """Its head is called as all heads are; `between` is what a framework does before the loss sees the logits."""

    def __init__(self, bias: bool = False, v: int = V, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, H, dtype=dtype)
        self.body = nn.Sequential(nn.Linear(H, H, dtype=dtype), nn.Tanh())
        self.head = nn.Linear(H, v, bias=bias, dtype=dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embed(ids)))


def ce(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1).float() if z.dtype != torch.float64 else z.flatten(0, 1), y.flatten())


def log_probs(z: Tensor, y: Tensor) -> Tensor:
    return -z.log_softmax(-1).gather(-1, y[..., None])[..., 0].mean()


def entropy(z: Tensor, y: Tensor) -> Tensor:
    p = z.softmax(-1)
    return -(p * z.log_softmax(-1)).sum(-1).mean() + 0.1 * z.logsumexp(-1).square().mean()


def shifted(z: Tensor, y: Tensor) -> Tensor:
    z = z[..., :-1, :].contiguous()
    return F.cross_entropy(z.view(-1, z.size(-1)), y[..., 1:].reshape(-1), ignore_index=3)


class Double(torch.autograd.Function):
    """Sees the logits below __torch_function__, and hands a gradient of their size back."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return (z * 2).sum(-1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return (2 * g)[..., None].expand(*g.shape, V)


# Of logits, labels and how a function is to be called (compiled, or as it is); and does something read the logits?
Step = Callable[[Tensor, Tensor, Callable], Tensor]
STEPS: dict[str, Step] = {
    "compiled loss": lambda z, y, c: c(ce)(z, y),
    "eager cross_entropy": lambda z, y, c: ce(z, y),
    "CrossEntropyLoss": lambda z, y, c: nn.CrossEntropyLoss(label_smoothing=0.1)(z.view(-1, V), y.view(-1)),
    "sum over classes in the middle": lambda z, y, c: nn.CrossEntropyLoss(reduction="sum")(z.transpose(1, 2), y),
    "shifted": lambda z, y, c: shifted(z, y),
    "compiled and shifted": lambda z, y, c: c(shifted)(z, y),
    "helper": lambda z, y, c: c(log_probs)(z[:, :-1] / 0.7, y[:, 1:]),
    "temperature in place": lambda z, y, c: c(log_probs)(z.div_(0.7), y),
    "class weights": lambda z, y, c: F.cross_entropy(z.flatten(0, 1), y.flatten(), torch.linspace(0.1, 2, V).to(z)),
    "entropy": lambda z, y, c: c(entropy)(z, y),
    "two losses": lambda z, y, c: c(ce)(z, y) + c(entropy)(z, y),
    "range of classes": lambda z, y, c: c(ce)(z[..., : V - 11], y % 200),
    "softcap": lambda z, y, c: c(ce)(30 * torch.tanh(z / 30), y),
    "rows by mask": lambda z, y, c: c(F.cross_entropy)(z[y > 20], y[y > 20]),
    "rows by index": lambda z, y, c: c(F.cross_entropy)(z.view(-1, V)[y.flatten() % 5], y.flatten()),
    "chunks": lambda z, y, c: sum(F.cross_entropy(a, b) for a, b in zip(z[0].split(3), y[0].split(3))),
    "permuted rows": lambda z, y, c: c(ce)(z.transpose(0, 1).contiguous(), y.T.contiguous()),
    "one dimension more": lambda z, y, c: c(log_probs)(z.unsqueeze(0), y.unsqueeze(0)),
    "metric beside": lambda z, y, c: c(ce)(z, y) * z.detach().argmax(-1).eq(y).double().mean().add(1),
    "mixed with a read": lambda z, y, c: c(ce)(z, y) + z.square().mean(),
    "read": lambda z, y, c: z.log_softmax(-1)[..., 3].mean(),
    "custom function": lambda z, y, c: Double.apply(z).square().mean(),
    "mixed with a custom function": lambda z, y, c: Double.apply(z).square().mean() + c(ce)(z, y) - c(entropy)(z, y),
    "checkpointed loss": lambda z, y, c: checkpoint(c(ce), z, y, use_reentrant=False),
    "clone": lambda z, y, c: ce(z.clone().mul_(0.5), y),
}


def pair(**options: Any) -> tuple[Model, Model]:
    model = Model(**options)
    plain = copy.deepcopy(model)
    lce_inductor.defer(model.head)
    return model, plain


def batch(b: int = B, t: int = T) -> tuple[Tensor, Tensor]:
    return torch.randint(0, V, (b, t)), torch.randint(0, V, (b, t))


@pytest.fixture(autouse=True)
def no_history() -> None:
    history.forget()


def heads() -> list[bool]:
    """Of each head that was compiled: was it rewritten?"""
    return [r.rewritten for r in lce_inductor.report().records]


def check(step: Step, model: Model, plain: Model, ids: Tensor, y: Tensor, rtol: float = 1e-9) -> None:
    losses = []
    for m, compiled in ((model, torch.compile), (plain, lambda fn: fn)):
        m.zero_grad()
        losses.append(step(m(ids), y, compiled))
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=rtol, atol=1e-9)
    for (name, p), q in zip(model.named_parameters(), plain.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=rtol, atol=rtol * q.grad.abs().max().item(), msg=name)


@pytest.mark.parametrize("name", STEPS)
def test_gradients_are_those_of_eager(name, installed):
    model, plain = pair(bias=len(name) % 2 == 0)
    check(STEPS[name], model, plain, *batch())
    held = name in ("read", "custom function", "clone")
    assert heads() == [] if held else all(heads())


@pytest.mark.parametrize("name", ["compiled loss", "helper", "eager cross_entropy", "rows by mask"])
def test_every_length(name, installed):
    model, plain = pair()
    for t in (9, 5, 14, 9):
        check(STEPS[name], model, plain, *batch(t=t))
    assert 1 <= len(heads()) <= 2 and all(heads())


def test_symbols_for_all_sizes(installed, caplog):
    model, plain = pair()
    summed = torch.compile(
        lambda z, y: F.cross_entropy(z[:, :-1].reshape(-1, V), y[:, 1:].flatten(), reduction="sum"), dynamic=True
    )
    for t in (4, 6, 3):
        check(
            lambda z, y, c: summed(z, y) if c is torch.compile else summed._torchdynamo_orig_callable(z, y),
            model,
            plain,
            *batch(t=t),
        )
    assert all(heads()) and "internal-error" not in caplog.text


def test_nothing_of_their_size(installed):
    """Forward and backward of a loop that compiles nothing itself: the largest peak is far below the logits."""
    n, v = 512, 8192
    head, plain = nn.Linear(8, v, bias=False), nn.Linear(8, v, bias=False)
    x, y = torch.randn(n, 8, requires_grad=True), torch.randint(0, v, (n,))
    lce_inductor.install(min_logits_bytes=0, chunk_tokens=32)
    lce_inductor.defer(head)

    def step(head: nn.Module) -> None:
        F.cross_entropy(head(x), y).backward()

    step(head)
    assert peak_bytes(lambda: step(head)) < n * v * 4 / 4
    assert peak_bytes(lambda: step(plain)) > n * v * 4


def test_what_they_are(installed):
    model, plain = pair()
    ids, _ = batch()
    z, real = model(ids), plain(ids)
    assert isinstance(z, PendingLogits) and isinstance(z, Tensor) and z.is_leaf == real.is_leaf
    for ask in ("shape", "dtype", "device", "requires_grad", "layout", "ndim", "is_sparse"):
        assert getattr(z, ask) == getattr(real, ask)
    assert z.size(-1) == V and z.stride() == real.stride() and z.numel() == real.numel() and len(z) == B
    assert "PendingLogits" in repr(z) and z.is_contiguous() and hash(z) == hash(z)
    for out in (z[0], z[:, 1:], z.float(), z.view(-1, V), z.squeeze(0), z[None], z[..., :5], z.to(torch.float32) / 2):
        assert isinstance(out, PendingLogits) and out.requires_grad
    expected = real[0], real[:, 1:], real[..., :5], real[..., 1, 2:7], real.unbind(1)[2], real.permute(1, 0, 2)
    found = z[0], z[:, 1:], z[..., :5], z[..., 1, 2:7], z.unbind(1)[2], z.permute(1, 0, 2)
    for a, b in zip(found, expected):
        assert isinstance(a, PendingLogits)
        torch.testing.assert_close(a.clone(), b)
    assert torch.equal(real.view_as(z), real) and isinstance(z.view_as(real), PendingLogits)
    torch.testing.assert_close(z.inner(z.new_ones(2, V)), real.inner(real.new_ones(2, V)))
    assert lce_inductor.report().reads


@pytest.mark.parametrize("index", [
    0, (0, 1), (0, 1, 2), (..., 3), (slice(None), [0, 1]), (..., slice(None, None, 2)), (0, slice(1, 3), slice(2, 9)),
    (None, 0), (Ellipsis, None), (slice(None), slice(None), slice(-3, None)), (slice(None), torch.tensor([0, 2])),
    (torch.tensor([0, 1]), torch.tensor([1, 2]), torch.tensor([3, 4])), torch.zeros(B, T, dtype=torch.bool),
    (slice(None), slice(None), torch.zeros(V, dtype=torch.bool)), (slice(None), -1), True,
], ids=str)  # fmt: skip
def test_indices(index, installed):
    model, plain = pair()
    ids, _ = batch()
    found, expected = model(ids)[index], plain(ids)[index]
    assert found.shape == expected.shape and found.dtype == expected.dtype
    torch.testing.assert_close(found.clone(), expected.clone())


@pytest.mark.parametrize("call", [
    lambda z: z.view(7, V), lambda z: z[5], lambda z: z[0, 0, 0, 0], lambda z: z.transpose(0, 4), lambda z: z.select(0, 9),
    lambda z: z[..., V], lambda z: z.flatten(0, 3), lambda z: F.cross_entropy(z, torch.zeros(3, dtype=torch.long)),
    lambda z: z.split([1, 2], 1), lambda z: z.to("nowhere"), lambda z: z.numpy(),
])  # fmt: skip
def test_bad_input_is_eagers_error(call, installed):
    model, plain = pair()
    ids, _ = batch()
    with pytest.raises(Exception) as expected:
        call(plain(ids))
    with pytest.raises(type(expected.value)):
        call(model(ids))


def test_without_gradients(installed):
    model, plain = pair()
    ids, y = batch()
    with torch.no_grad():
        z = model(ids)
        assert isinstance(z, PendingLogits) and not z.requires_grad
        torch.testing.assert_close(ce(z, y), ce(plain(ids), y))
        torch.testing.assert_close(torch.compile(log_probs)(z, y), log_probs(plain(ids), y))
        assert torch.equal(z.argmax(-1), plain(ids).argmax(-1))
    with torch.inference_mode():
        torch.testing.assert_close(ce(model(ids), y), ce(plain(ids), y))


@pytest.mark.parametrize("frozen", ["head", "body"])
def test_what_is_frozen_gets_none(frozen, installed):
    model, plain = pair()
    ids, y = batch()
    for m in (model, plain):
        getattr(m, frozen).requires_grad_(False)
        if frozen == "body":
            m.embed.requires_grad_(False)
    for m, loss in ((model, torch.compile(ce)), (plain, ce)):
        loss(m(ids), y).backward()
    for p, q in zip(model.parameters(), plain.parameters()):
        assert (p.grad is None) == (q.grad is None)
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad)


def test_autocast_is_that_of_the_head(installed):
    model, plain = pair(dtype=torch.float32)
    ids, y = batch()
    losses = []
    for m, loss in ((model, torch.compile(ce)), (plain, ce)):
        with torch.autocast("cpu", torch.bfloat16):
            z = m(ids)
        assert z.dtype == torch.bfloat16
        losses.append(loss(z, y))
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(model.head.weight.grad, plain.head.weight.grad, rtol=2e-2, atol=1e-3)


def test_gradients_accumulate_and_hooks_run(installed):
    """FSDP's hooks hang on the module's output: they run, and get one object for the gradients of x and weight."""
    model, plain = pair()
    ids, y = batch()
    seen: list[Any] = []
    model.head.register_forward_hook(lambda module, args, out: out.register_hook(seen.append) and None)
    for _ in range(3):
        ce(model(ids)[:, :4], y[:, :4]).backward()
        ce(plain(ids)[:, :4], y[:, :4]).backward()
    assert len(seen) == 3 and all(isinstance(g, LogitsGradient) and g.shape == (B, T, V) for g in seen)
    torch.testing.assert_close(model.embed.weight.grad, plain.embed.weight.grad)
    with pytest.raises(RuntimeError, match="asks for values of the gradient"):
        seen[0].sum()


@pytest.mark.parametrize("hook", [lambda g: g * 3, lambda g: torch.ones(*g.shape).to(g) + g, lambda g: g.add_(g * 2)])
def test_a_hook_that_scales_or_adds(hook, installed):
    model, plain = pair()
    ids, y = batch()
    for m in (model, plain):
        z = m(ids)
        z.register_hook(hook)
        ce(z, y).backward()
    torch.testing.assert_close(model.head.weight.grad, plain.head.weight.grad)


@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "module hook"])
def test_functions_around_the_head(how, installed):
    model, plain = pair()
    ids, y = batch()
    seen: list[Any] = []
    for m, loss in ((model, torch.compile(ce)), (plain, ce)):
        if how == "module hook":
            m.head.register_full_backward_hook(lambda module, into, out: seen.append(out[0].shape))
        h = m.body(m.embed(ids))
        z = m.head(h) if how == "module hook" else checkpoint(m.head, h, use_reentrant=how == "reentrant")
        assert isinstance(z, PendingLogits) == (m is model)
        loss(z, y).backward()
    for p, q in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(p.grad, q.grad)
    assert seen == ([z.shape] * 2 if how == "module hook" else [])
    assert all(heads())


def test_in_a_compiled_model(installed):
    """The head runs between two graphs, and its loss in whatever compiled function has it."""
    model, plain = pair()
    ids, y = batch()
    compiled = torch.compile(model)
    torch.compile(ce)(compiled(ids), y).backward()
    ce(plain(ids), y).backward()
    torch.testing.assert_close(model.head.weight.grad, plain.head.weight.grad)
    assert heads() == [True]


# -- never others


def test_what_changed_since(installed):
    model, _ = pair()
    ids, y = batch()
    z = model(ids)
    with torch.no_grad():
        model.head.weight.mul_(2)
    for read in (lambda: ce(z, y), lambda: torch.compile(ce)(z, y), lambda: z.sum(), lambda: z[0], lambda: z.detach()):
        with pytest.raises(RuntimeError, match="weight of their head changed since"):
            read()


def test_an_optimizer_step_is_a_change(installed):
    model, _ = pair()
    ids, y = batch()
    loss = torch.compile(ce)
    loss(model(ids), y).backward()
    z = model(ids)
    torch.optim.AdamW(model.parameters(), fused=True).step()
    with pytest.raises(RuntimeError, match="changed since"):
        loss(z, y)


def test_freed_weights(installed):
    model, _ = pair()
    z = model(batch()[0])
    model.head.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"weight was freed since.*reshard_after_forward=False"):
        z.sum()


def test_writes(installed):
    model, plain = pair()
    ids, _ = batch()
    z, real = model(ids), plain(ids)
    view = z[:, 1:]
    z *= 0.5
    real *= 0.5
    torch.testing.assert_close(z.clone(), real)
    with pytest.raises(RuntimeError, match="scaled in place through another view"):
        view.sum()
    for write in (
        lambda: z.add_(1),
        lambda: z.__setitem__(0, 1.0),
        lambda: torch.neg(real.detach(), out=z),
        lambda: z.zero_(),
    ):
        with pytest.raises(RuntimeError, match="cannot write to them"):
            write()
    with pytest.raises(Exception, match="cannot write to them"):
        torch.compile(lambda z: z.div_(2).sum())(z)


def test_writes_that_autograd_does_not_see(installed):
    model, _ = pair()
    z = model(batch()[0])
    for write in (lambda: z.data.mul_(2), lambda: z.data.clamp_(-1, 1), lambda: z.data.__setitem__(0, 1.0)):
        with pytest.raises(RuntimeError, match="cannot write to them"):
            write()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), pytest.raises(RuntimeError, match="under no_grad they can't be scaled in place"):
            z.mul_(2)


def test_backward_twice(installed):
    model, plain = pair()
    for ids, y in (batch(), batch(t=T - 2), batch(t=T - 3)):  # from the second length on sizes are symbols
        for m in (model, plain):
            z = m(ids)
            a, b = ce(z, y), nn.CrossEntropyLoss(reduction="sum")(z.flatten(0, 1), y.flatten())
            a.backward(retain_graph=True)
            a.backward(retain_graph=True)
            with torch.autograd.detect_anomaly():
                b.backward()
    torch.testing.assert_close(model.head.weight.grad, plain.head.weight.grad)


def test_logits_without_a_gradient_are_made_no_leaf(installed):
    model, _ = pair()
    with torch.no_grad():
        z = model(batch()[0])
    with pytest.raises(RuntimeError, match=r"logits\.clone\(\)\.requires_grad_\(\) can"):
        z.requires_grad_()
    real = z.requires_grad_(False).clone().requires_grad_()
    ce(real, batch()[1]).backward()
    assert type(real.grad) is Tensor and real.grad.any()


def test_many_kinds_of_loss(installed):
    """None of them is the one at which Dynamo gives up."""
    model, _ = pair()
    ids, y = batch()
    for n in range(10):
        F.cross_entropy(model(ids).flatten(0, 1), y.flatten(), ignore_index=n)
    assert len(heads()) == 10 and not lce_inductor.report().reads


def test_a_parametrized_head(installed):
    model, _ = pair()
    weight_norm = nn.utils.parametrizations.weight_norm
    plain = copy.deepcopy(model)
    del plain.head.forward
    ids, y = batch()
    for m in (model, plain):
        weight_norm(m.head)
    lce_inductor.defer(model.head).remove()
    lce_inductor.defer(model.head)
    check(STEPS["compiled loss"], model, plain, ids, y)


def test_a_second_derivative_is_an_error(installed):
    model, _ = pair()
    z = model(batch()[0])
    (g,) = torch.autograd.grad(z.square().mean(), model.head.weight, create_graph=True)
    assert g.requires_grad
    with pytest.raises(RuntimeError, match="differentiated once"):
        g.square().sum().backward()
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(g.sum(), model.embed.weight, allow_unused=True)
    h = torch.ones(1, H, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.functional.hessian(lambda h: model.head(h).square().sum(), h)


# -- the module


def test_remove_and_copies(installed):
    model = Model()
    with lce_inductor.defer(model.head) as deferred:
        assert lce_inductor.defer(model.head).module is deferred.module
        other = copy.deepcopy(model)
        other.head.weight.data.zero_()
        assert isinstance(other(batch()[0]), PendingLogits)
        assert not other(batch()[0]).clone().any()
        loaded = pickle.loads(pickle.dumps(model.head))
        assert isinstance(loaded(torch.randn(3, H, dtype=torch.float64)), PendingLogits)
    assert type(model(batch()[0])) is Tensor and "forward" not in vars(model.head)


def test_heads_of_other_classes(installed):
    class Casting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight.to(x.dtype)) * 2

    head = Casting(H, V, bias=False)
    lce_inductor.defer(head)
    x = torch.randn(5, H, dtype=torch.float64, requires_grad=True)
    z, y = head(x), torch.randint(0, V, (5,))
    assert isinstance(z, PendingLogits)
    torch.compile(F.cross_entropy)(z, y).backward()
    (expected,) = torch.autograd.grad(F.cross_entropy(F.linear(x, head.weight.double()) * 2, y), head.weight)
    torch.testing.assert_close(head.weight.grad, expected)


def test_bad_modules(installed):
    with pytest.raises(TypeError, match=r"takes a head, such as model\.lm_head.*Sequential"):
        lce_inductor.defer(nn.Sequential(nn.Linear(2, 3)))
    with pytest.raises(TypeError, match="takes a module, got function"):
        lce_inductor.defer(ce)  # type: ignore[arg-type]
    lce_inductor.uninstall()
    with pytest.raises(RuntimeError, match=r"needs lce_inductor\.install"):
        lce_inductor.defer(nn.Linear(2, 3))


def test_small_heads_are_computed(installed):
    lce_inductor.install()
    model, _ = pair()
    assert type(model(batch()[0])) is Tensor
    lce_inductor.install(min_logits_bytes=0)
    assert type(model.head(torch.randn(H, dtype=torch.float64))) is Tensor
