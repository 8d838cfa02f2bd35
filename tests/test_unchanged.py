"""Returned logits are the logits of the call, or an error: whoever wrote to the head, and however."""

from __future__ import annotations

import functools
import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deferred_cases import real
from torch import Tensor, nn

import lce_inductor
from lce_inductor.deferred_logits import optimizer_steps as steps
from lce_inductor.deferred_logits import seals
from lce_inductor.deferred_logits.seals import same, seal
from lce_inductor.deferred_logits.tensor import DeferredLogits, defer_logits

N, H, V = 6, 16, 9000  # so many rows that a sample of the weight misses some
STALE = r'changed since.*before optimizer\.step\(\).*returned_logits="keep"'


def head(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    return nn.Linear(H, V, bias, dtype=dtype)


def call(module: nn.Linear) -> tuple[DeferredLogits, Tensor]:
    """Deferred logits and eager's, kept."""
    x, dtype = torch.randn(N, H).to(module.weight.dtype), module.weight.dtype
    z = defer_logits(x, module.weight, module.bias, "", dtype, dtype)
    return z, F.linear(x, module.weight, module.bias).detach()


def one_row_of_gradients(module: nn.Linear) -> None:
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
        p.grad[-1] = 1.0


def stale(z: Tensor) -> None:
    for read in (torch.sum, lambda t: t[0].argmax(-1), lambda t: t.detach().clone(), lambda t: t.float()[1:] + 0):
        with pytest.raises(RuntimeError, match=STALE):
            read(z)


# -- optimizers


class Own(torch.optim.Optimizer):
    """Writes past the version counters, as kernels that get a pointer do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data[-1] += 1.0


class Fails(Own):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        raise ValueError("half-way")


def optimizers() -> dict[str, Callable[..., torch.optim.Optimizer]]:
    made: dict[str, Callable[..., torch.optim.Optimizer]] = {"own": Own}
    names = ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "Adadelta", "Adamax", "NAdam", "RAdam", "ASGD", "Rprop"]
    for name in [*names, "Adafactor", "Muon"]:
        if not hasattr(torch.optim, name):
            continue
        for options in ({}, {"foreach": True}, {"foreach": False}, {"fused": True}, {"capturable": True}):
            fused_ones = {"SGD", "Adam", "AdamW", "Adagrad"}
            if ("fused" in options and name not in fused_ones) or (options and name == "Muon"):
                continue
            label = " ".join([name, *(f"{key}={value}" for key, value in options.items())])
            made[label] = functools.partial(getattr(torch.optim, name), lr=0.1, **options)
    return made


def make(name: str, params: Any) -> torch.optim.Optimizer:
    try:
        return optimizers()[name](params)
    except TypeError:
        pytest.skip("this optimizer has no such option")


def step(optimizer: torch.optim.Optimizer) -> None:
    try:
        optimizer.step()
    except (AssertionError, RuntimeError) as error:
        if "capturable" not in str(error):
            raise
        pytest.skip(f"not on a CPU: {error}")


@pytest.mark.parametrize("name", optimizers())
def test_a_step_is_noticed(name: str) -> None:
    module = head(bias=False)
    optimizer = make(name, module.parameters())
    before = module.weight.detach().clone()
    one_row_of_gradients(module)
    z, expected = call(module)
    row, flat, wide = z[0], z.view(2, -1, V), z.double()
    assert torch.equal(real(z), expected)
    step(optimizer)
    assert not torch.equal(before, module.weight)
    for t in (z, row, flat, wide):
        with pytest.raises(RuntimeError, match=STALE):
            t.sum()
    z, expected = call(module)  # that of the next call
    assert torch.equal(real(z), expected)


@pytest.mark.parametrize("name", [n for n in optimizers() if "=" not in n or "fused" in n])
def test_a_step_is_noticed_without_its_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the hooks and versions alone."""
    monkeypatch.setattr("lce_inductor.deferred_logits.tensor.same", lambda *_: True)
    module = head(bias=False)
    optimizer = make(name, module.parameters())
    one_row_of_gradients(module)
    z, _ = call(module)
    step(optimizer)
    stale(z)


@pytest.mark.parametrize("name", [n for n in optimizers() if "=" not in n or "fused" in n])
def test_another_ones_step_is_none(name: str) -> None:
    module, other = head(bias=False), head(bias=False)
    one_row_of_gradients(other)
    optimizer = make(name, other.parameters())
    z, expected = call(module)
    step(optimizer)
    optimizer.zero_grad()
    assert torch.equal(real(z), expected)


def test_a_frozen_head_in_the_optimizer_stays_readable() -> None:
    module, other = head().requires_grad_(False), nn.Linear(2, 2)
    other.weight.grad = torch.ones(2, 2)
    optimizer = torch.optim.AdamW([*module.parameters(), *other.parameters()], lr=0.1, fused=True)
    z, expected = call(module)
    optimizer.step()
    assert torch.equal(real(z), expected)


def test_only_the_bias_steps() -> None:
    module = head()
    one_row_of_gradients(module)
    optimizer = torch.optim.SGD([module.bias], lr=0.1, fused=True)
    z, _ = call(module)
    optimizer.step()
    with pytest.raises(RuntimeError, match="the bias of their head changed since"):
        z.sum()


@pytest.mark.parametrize("alias", ["view", "data", "flat"])
def test_an_optimizer_that_holds_the_memory(alias: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lce_inductor.deferred_logits.tensor.same", lambda *_: True)
    module = head(bias=False)
    if alias == "flat":  # one buffer of many parameters, of which they are views
        flat = nn.Parameter(torch.randn(V * H + 7))
        module.weight.data = flat.data[7:].view(V, H)
        held = flat
    else:
        held = nn.Parameter(module.weight.data if alias == "data" else module.weight.detach()[:5])
    held.grad = torch.ones_like(held)
    z, _ = call(module)
    torch.optim.Adam([held], lr=0.1, fused=True).step()
    stale(z)


def test_tied_weights() -> None:
    embedding, module = nn.Embedding(V, H), head(bias=False)
    module.weight = embedding.weight
    embedding(torch.tensor([V - 1])).sum().backward()
    optimizer = torch.optim.AdamW(embedding.parameters(), lr=0.1, weight_decay=0.0, fused=True)
    z, _ = call(module)
    optimizer.step()
    stale(z)


@pytest.mark.parametrize("fused", [False, True])
def test_closures(fused: bool) -> None:
    """Logits of a closure are made within the step."""
    module, made = head(bias=False), []

    def closure() -> Tensor:
        z, expected = call(module)
        assert torch.equal(real(z), expected)
        made.append(z)
        one_row_of_gradients(module)
        return torch.tensor(1.0)

    adam = torch.optim.Adam(module.parameters(), lr=0.1, fused=True)
    (adam if fused else torch.optim.LBFGS(module.parameters(), max_iter=2)).step(closure)
    for z in made[:1]:
        stale(z)


def test_a_step_that_raises() -> None:
    module = head(bias=False)
    z, _ = call(module)
    with pytest.raises(ValueError, match="half-way"):
        Fails(module.parameters()).step()
    stale(z)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips(fused: bool) -> None:
    module = head(bias=False)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.tensor(1.0))
    z, expected = call(module)
    one_row_of_gradients(module)
    module.weight.grad[0] = float("inf")
    before = module.weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(before, module.weight)
    if fused:  # the step ran, and only the device knows that it did nothing
        stale(z)
    else:
        assert torch.equal(real(z), expected)


def test_a_compiled_step() -> None:
    torch._dynamo.reset()
    module = head(bias=False)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, foreach=True)
    compiled = torch.compile(lambda: optimizer.step(), backend="aot_eager")
    one_row_of_gradients(module)
    for _ in range(2):
        z, expected = call(module)
        assert torch.equal(real(z), expected)
        compiled()
        stale(z)


def test_nothing_is_kept_of_them() -> None:
    gc.collect()
    count = len(steps._watched)
    gc.disable()
    try:
        z, _ = call(head())
        row = z[0]
        assert len(steps._watched) == count + 3
        del z, row
        assert len(steps._watched) == count  # and no reference cycle held it
    finally:
        gc.enable()


def test_threads() -> None:
    module = head(bias=False)
    found: list[bool] = []

    def run() -> None:
        for _ in range(50):
            seen = steps.Steps(module.weight)
            steps._note_step(optimizer, (), {})
            found.append(seen.none())

    optimizer = torch.optim.SGD(module.parameters())
    threads = [threading.Thread(target=run) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == [False] * 200


# -- values


def swap(h: nn.Linear) -> None:
    h.weight.data[[3, V - 2]] = h.weight.data[[V - 2, 3]]


def numpy_write(h: nn.Linear) -> None:
    h.weight.detach().numpy()[V - 1, 3] += 1e-3


def next_bit(h: nn.Linear) -> None:
    h.weight.data.view(torch.int32)[V - 1, H - 1] ^= 1


WRITES: dict[str, Callable[[nn.Linear], Any]] = {
    "row": lambda h: h.weight.data[V - 1].fill_(5.0),
    "value": lambda h: h.weight.data[V - 1, H - 1].add_(1e-3),
    "last bit": next_bit,
    "sign of a row": lambda h: h.weight.data[V - 1].neg_(),
    "sign of all": lambda h: h.weight.data.neg_(),
    "swapped rows": swap,
    "reversed rows": lambda h: h.weight.data.copy_(h.weight.data.flip(0)),
    "reversed columns": lambda h: h.weight.data.copy_(h.weight.data.flip(1)),
    "rolled row": lambda h: h.weight.data[V - 1].copy_(h.weight.data[V - 1].roll(1)),
    "shared sum": lambda h: h.weight.data[V - 1, :2].copy_(h.weight.data[V - 1, :2].mean().expand(2)),
    "numpy": numpy_write,
    "bias": lambda h: h.bias.data[V - 1].add_(1.0),
    "bias by numpy": lambda h: h.bias.detach().numpy().__setitem__(V - 2, 3.0),
    "swapped biases": lambda h: h.bias.data[:2].copy_(h.bias.data[:2].flip(0)),
    "load_state_dict": lambda h: h.load_state_dict(head().state_dict()),
    "copy_": lambda h: h.weight.copy_(h.weight + 1),
    "init": lambda h: nn.init.zeros_(h.bias),
    "set_": lambda h: torch.utils.swap_tensors(h.weight, nn.Parameter(torch.zeros(V, H))),
}


@pytest.mark.parametrize("name", [n for n in WRITES if n != "set_"])
def test_a_write_is_noticed(name: str) -> None:
    module = head()
    z, expected = call(module)
    assert torch.equal(real(z), expected)
    with torch.no_grad():
        WRITES[name](module)
    stale(z)


def test_the_same_values_written_again_are_no_change() -> None:
    module = head()
    z, expected = call(module)
    module.weight.data.copy_(module.weight.data.clone())
    module.zero_grad()
    assert torch.equal(real(z), expected)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda t: t.clone(),
    "odd rows": lambda t: t[:, :-1].contiguous(),
    "odd start": lambda t: torch.cat([t.flatten(), t.flatten()])[1 : t.numel() + 1].view(t.shape),
    "columns": lambda t: t.t().contiguous().t(),
    "odd columns": lambda t: t[:-1].t().contiguous().t(),
    "strided": lambda t: t.repeat(1, 2)[:, ::2],
    "one column": lambda t: t[:, :1].contiguous(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_seal(dtype: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seals, "PIECE_BYTES", 8 * 16 * 7)  # several pieces
    t = LAYOUTS[layout](torch.randn(50, 16).to(dtype))
    before = seal(t)
    assert before.numel() <= 50 and same(t, before)
    for i, j in [(0, 0), (49 if layout != "odd columns" else 48, t.shape[1] - 1), (20, t.shape[1] // 2)]:
        kept = t[i, j].clone()
        t[i, j] = -kept
        assert not same(t, before)
        t[i, j] = torch.nextafter(kept, kept + 1) if dtype in (torch.float64, torch.float32) else kept * 1.01
        assert not same(t, before)
        t[i, j] = kept
        assert same(t, before)
    for change in (Tensor.neg_, lambda s: s[3:5].neg_(), lambda s: s.copy_(s.flip(0)), lambda s: s.mul_(1.01)):
        kept = t.clone()
        change(t)
        assert not same(t, before)
        t.copy_(kept)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_the_sums_of_other_devices(dtype: torch.dtype, layout: str) -> None:
    """What Inductor makes of them is what eager computes."""
    t = LAYOUTS[layout](torch.randn(70, 48).to(dtype))
    torch._dynamo.reset()
    assert torch.equal(torch.compile(seals._sums)(t), seals._sums(t))


# -- compiled


@pytest.fixture
def deferring() -> Iterator[None]:
    torch._dynamo.reset()
    with lce_inductor.installed(min_logits_bytes=0), warnings.catch_warnings():
        yield


@pytest.mark.parametrize("change", ["fused step of a few rows", "value", "swapped rows", "bias", "numpy"])
def test_compiled(change: str, deferring: None) -> None:
    module = head()
    module.weight.register_hook(lambda g: g * (torch.arange(V) > V - 5).unsqueeze(1))
    optimizer = torch.optim.AdamW([module.weight], lr=0.1, weight_decay=0.0, fused=True)

    def train(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = module(torch.tanh(x))
        return F.cross_entropy(z, y), z

    args = torch.randn(N, H), torch.randint(0, V, (N,))
    loss, z = torch.compile(train)(*args)
    assert isinstance(z, DeferredLogits)
    loss.backward()
    torch.testing.assert_close(real(z), train(*args)[1].detach())
    if change in WRITES:
        WRITES[change](module)
    else:
        optimizer.step()
    stale(z)
