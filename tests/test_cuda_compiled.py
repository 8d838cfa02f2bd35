"""torch.compile with generated code on a GPU: CUDA graphs, autotuning, the same bits, sizes beyond 2^31 elements.

The ops by themselves are in test_cuda.py; the edges of the numbers in test_numbers.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
import torch.nn.functional as F
from harness import assert_as_accurate, assert_same_bits
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import cudagraph_trees

import lce_inductor
from lce_inductor.lower.device_policy import POLICIES, Anchored
from lce_inductor.lower.plan import using

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

DEVICE = "cuda"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# N, H, V: one that takes the row kernel, odd V included, and one large enough for the anchored softmax.
SMALL, LARGE = (600, 64, 1003), (2048, 256, 8192)
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda z, y: F.cross_entropy(z, y),
    "tokens": lambda z, y: F.cross_entropy(z, y, reduction="none"),
    "smoothed": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
    "z-loss": lambda z, y: F.cross_entropy(z, y) + 1e-3 * z.float().logsumexp(-1).square().mean(),
    "entropy": lambda z, y: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean(),
}


@pytest.fixture(autouse=True)
def without_caches() -> Iterator[None]:
    """A graph from a cache runs no pass and counts nothing. Small sizes stand for those worth an anchored softmax."""
    small = dataclasses.replace(POLICIES["cuda"], anchored=Anchored(least_work=0))
    with using("cuda", small), inductor_config.patch(force_disable_caches=True):
        yield


class Model(nn.Module):
    """A body, a head and a loss."""

    def __init__(self, h: int, v: int, loss: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.loss = nn.Linear(h, h), nn.Linear(h, v), loss

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return LOSSES[self.loss](self.head(torch.tanh(self.body(x))), y).sum()


def batch(n: int, h: int, v: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x [n, h], y [n] with ignored rows."""
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, h, generator=g, dtype=torch.float64), torch.randint(0, v, (n,), generator=g)
    y[::7] = -100
    return x.to(DEVICE, dtype), y.to(DEVICE)


def step(run: Callable[..., Tensor], model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """Loss and gradients of one step, as copies: CUDA graphs write the next step's over them."""
    torch.compiler.cudagraph_mark_step_begin()
    loss = run(x, y)
    loss.backward()
    found = [loss.detach().clone(), *(p.grad.clone() for p in model.parameters())]
    for p in model.parameters():
        p.grad = None
    return found


def fresh_compile(fn: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    cudagraph_trees.reset_cudagraph_trees()
    counters.clear()
    return torch.compile(fn, **options)


def recorded() -> int:
    """How many CUDA graphs Inductor has recorded and holds."""
    manager = cudagraph_trees.get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    return 0 if manager is None else sum(map(len, manager.roots.values()))


# -- modes


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("gradients", ["auto", "recompute"])
def test_cuda_graphs(gradients, size, loss):
    """mode="reduce-overhead": as accurate as eager in every step, and recorded without being skipped."""
    check_mode("reduce-overhead", gradients, size, loss)
    assert recorded() > 0 and not counters["inductor"]["cudagraph_skips"]


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("mode", ["max-autotune", "max-autotune-no-cudagraphs"])
def test_autotuning(mode, size):
    with inductor_config.patch({"test_configs.max_mm_configs": 4}):  # of some twenty for each product of the body
        check_mode(mode, "auto", size, "mean")
    assert (recorded() > 0) == (mode == "max-autotune")


def check_mode(mode: str, gradients: str, size: tuple[int, int, int], loss: str) -> None:
    n, h, v = size
    model = Model(h, v, loss).to(DEVICE, BF16)
    exact = Model(h, v, loss).to(DEVICE, torch.float64)
    exact.load_state_dict({k: t.double() for k, t in model.state_dict().items()})
    with lce_inductor.installed(min_logits_bytes=0, gradients=gradients):
        run = fresh_compile(model, mode=mode)
        found = [step(run, model, *batch(n, h, v, BF16, seed=i)) for i in range(4)]
        assert counters["lce_inductor"]["rewritten"] == 1
    for i, ours in enumerate(found):
        x, y = batch(n, h, v, BF16, seed=i)
        assert_as_accurate(ours, step(model, model, x, y), step(exact, exact, x.double(), y), [BF16])


def test_cuda_graphs_see_new_weights():
    """An optimizer step between replays: the recorded graph reads the weight where it lies."""
    n, h, v = LARGE
    with lce_inductor.installed(min_logits_bytes=0):
        model = Model(h, v, "mean").to(DEVICE, BF16)
        run = fresh_compile(model, mode="reduce-overhead")
        for i in range(6):
            x, y = batch(n, h, v, BF16, seed=i)
            loss, *grads = step(run, model, x, y)
            torch.testing.assert_close(loss, model(x, y).detach(), rtol=1e-2, atol=1e-2)
            with torch.no_grad():
                for p, g in zip(model.parameters(), grads):
                    p -= 0.5 * g
        assert counters["lce_inductor"]["rewritten"] == 1 and recorded() > 0


# -- the same bits


@pytest.mark.parametrize("loss", ["mean", "tokens", "z-loss", "entropy"])
@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_the_same_bits_twenty_times(dtype, size, loss):
    """Several chunks of rows, so that the order of their sums counts."""
    n, h, v = size
    with lce_inductor.installed(min_logits_bytes=0, chunk_tokens=n // 4):
        model = Model(h, v, loss).to(DEVICE, dtype)
        run = fresh_compile(model)
        args = batch(n, h, v, dtype)
        first = step(run, model, *args)
        assert counters["lce_inductor"]["rewritten"] == 1
        for _ in range(19):
            assert_same_bits(step(run, model, *args), first)


# -- beyond 2^31 elements

BEYOND = {
    # tokens, hidden, vocabulary, tokens in a chunk
    "logits": (70_016, 64, 32_768, None),
    "logits of one chunk": (9_216, 64, 262_144, 9_216),
    "hidden states": (1_048_640, 2_056, 4_096, None),
}


@pytest.mark.parametrize("gradients", ["auto", "recompute"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("which", BEYOND)
def test_more_elements_than_an_int32_counts(which, reduction, gradients):
    """Losses of all rows, dX of the first and last, dW of the first and last classes, against blocks in fp32."""
    n, h, v, chunk = BEYOND[which]
    x, w, y = _beyond(n, h, v)
    x.requires_grad_()
    w.requires_grad_()
    weights = torch.linspace(0.5, 1.5, n, device=DEVICE) if reduction == "none" else torch.ones(n, device=DEVICE)

    def loss(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        found = F.cross_entropy(F.linear(x, w), y, reduction=reduction)
        return (found * weights).sum() if reduction == "none" else found

    workspace = 1 << 30 if chunk is None else 1 << 34
    settings = {"min_logits_bytes": 0, "chunk_tokens": chunk, "workspace_bytes": workspace}
    with lce_inductor.installed(gradients=gradients, **settings):
        found = fresh_compile(loss)(x, w, y)
        found.backward()
        assert counters["lce_inductor"]["rewritten"] == 1
    losses, dx, dw, rows, classes = _reference(x.detach(), w.detach(), y, weights)
    torch.testing.assert_close(found.detach().double(), (losses * weights.double()).sum(), rtol=1e-2, atol=0.0)
    _assert_close_in_norm(x.grad[rows], dx)
    _assert_close_in_norm(w.grad[classes], dw)
    assert x.grad.isfinite().all() and w.grad.isfinite().all()


@pytest.mark.parametrize("which", BEYOND)
def test_statistics_of_more_elements_than_an_int32_counts(which):
    """Without gradients: the loss of every token."""
    n, h, v, chunk = BEYOND[which]
    x, w, y = _beyond(n, h, v)
    workspace = 1 << 30 if chunk is None else 1 << 34
    with torch.no_grad(), lce_inductor.installed(chunk_tokens=chunk, workspace_bytes=workspace):
        found = fresh_compile(lambda x, w, y: F.cross_entropy(F.linear(x, w), y, reduction="none"))(x, w, y)
        assert counters["lce_inductor"]["rewritten"] == 1
    losses = _reference(x, w, y, torch.ones(n, device=DEVICE))[0]
    torch.testing.assert_close(found.double(), losses, rtol=2e-2, atol=2e-2)


def _beyond(n: int, h: int, v: int) -> tuple[Tensor, Tensor, Tensor]:
    assert max(n * v, n * h) > 2**31
    torch.manual_seed(0)
    x = torch.randn(n, h, device=DEVICE, dtype=BF16)
    w = torch.randn(v, h, device=DEVICE, dtype=BF16) / math.sqrt(h)
    y = torch.randint(0, v, (n,), device=DEVICE)
    y[:3], y[-3:] = v - 1, 0
    return x, w, y


def _reference(x: Tensor, w: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses [N], dX of eight rows, dW of four classes; which rows, which classes."""
    n, v = x.shape[0], w.shape[0]
    rows = torch.cat([torch.arange(4), torch.arange(n - 4, n)]).to(x.device)
    classes = torch.cat([torch.arange(2), torch.arange(v - 2, v)]).to(x.device)
    losses = torch.empty(n, dtype=torch.float64, device=x.device)
    dw = torch.zeros(len(classes), x.shape[1], dtype=torch.float64, device=x.device)
    block = max(2**27 // v, 1)
    for start in range(0, n, block):
        part = slice(start, start + block)
        z = (x[part] @ w.t()).float()
        losses[part] = F.cross_entropy(z, y[part], reduction="none")
        p = z.softmax(-1)[:, classes].double() - (y[part, None] == classes).double()
        dw += (p * weights[part, None].double()).t() @ x[part].double()
    z = (x[rows] @ w.t()).float()
    dz = (z.softmax(-1) - F.one_hot(y[rows], v)) * weights[rows, None].float()
    dx = torch.cat([d[None] @ w.float() for d in dz])
    return losses, dx, dw, rows, classes


def _assert_close_in_norm(found: Tensor, expected: Tensor) -> None:
    """Within what bf16 rounds: 1% of the norm of each row."""
    distance = (found.double() - expected.double()).norm(dim=1) / expected.double().norm(dim=1)
    assert distance.max().item() < 1e-2, distance


# -- rows that count


def _masked_grpo(z: Tensor, y: Tensor) -> Tensor:
    logp = z.log_softmax(-1).gather(-1, y.clamp(min=0)[:, None])[:, 0]
    ratio, mask = (logp - logp.detach() - 0.1).exp(), (y >= 0).to(z.dtype)
    return (torch.min(ratio, ratio.clamp(0.8, 1.2)) * mask).sum() / mask.sum()


def _tokens_squared(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="none").square().sum()


def _mean_and_lse(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y) + z.logsumexp(-1).mean()


@pytest.mark.parametrize(
    "loss, counted",
    [(LOSSES["mean"], True), (_masked_grpo, True), (_tokens_squared, True), (_mean_and_lse, False)],
    ids=["mean", "grpo", "tokens squared", "all rows"],
)
def test_ignored_rows_are_left_out(
    loss: Callable[[Tensor, Tensor], Tensor], counted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their number changes from call to call; what every row is needed for computes every row."""
    n, h, v = LARGE
    x, w = (torch.randn(s, h, device=DEVICE, dtype=BF16).requires_grad_() for s in (n, v))
    with torch.no_grad():
        w *= h**-0.5
    taken: list[bool] = []
    real = lce_inductor.lower.head._plan
    monkeypatch.setattr(lce_inductor.lower.head, "_plan", lambda r, a: taken.append((p := real(r, a)).packs) or p)

    def step(fn: Callable[..., Tensor], y: Tensor, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, w)]
        value = fn(*leaves, y)
        value.backward()
        return [value.detach(), *(t.grad for t in leaves)]  # type: ignore[misc]

    def fn(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return loss(F.linear(x, w), y)

    with lce_inductor.installed(min_logits_bytes=0, chunk_tokens=512):
        compiled = torch.compile(fn)
        for kept in (n // 4, 1, n, n // 2):
            y = torch.randint(v, (n,), device=DEVICE)
            y[torch.randperm(n, device=DEVICE)[kept:]] = -100
            found = step(compiled, y, BF16)
            exact, eager = step(fn, y, torch.float64), step(fn, y, BF16)
            assert_as_accurate(found, eager, exact, [BF16, BF16, BF16])
            if loss is LOSSES["mean"]:
                assert not found[1][y < 0].any() and found[1][y >= 0].any()
    assert taken and any(taken) == counted
