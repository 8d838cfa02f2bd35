"""Numbers at the edges: extreme logits, infinities, nothing to learn from, one class, a large offset; the same bits.

All of it runs on the CPU, and on an NVIDIA GPU where there is one. Three sizes beyond 2^31 elements are for the GPU
alone; on the CPU the same tests run scaled down, which checks the tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from corpus.harness import no_codegen_backend
from harness import assert_as_accurate, assert_same_bits
from torch import Tensor
from torch._dynamo.utils import counters

GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"))
pytestmark = pytest.mark.parametrize("device", ["cpu", GPU])

N, H, V = 96, 16, 131
Loss = Callable[[Tensor, Tensor], Tensor]

LOSSES: dict[str, Loss] = {
    "mean": lambda z, y: F.cross_entropy(z, y),
    "tokens": lambda z, y: F.cross_entropy(z, y, reduction="none"),
    "smoothed": lambda z, y: F.cross_entropy(z, y, reduction="sum", label_smoothing=0.1),
    "z-loss": lambda z, y: F.cross_entropy(z, y) + 1e-4 * z.float().logsumexp(-1).square().mean(),
    "picked": lambda z, y: z.log_softmax(-1, dtype=torch.float32).gather(-1, y.clamp(min=0)[:, None]).exp(),
}
FINITE = ["mean", "tokens", "z-loss", "picked"]


def head(device: str, dtype: torch.dtype, scale: float = 1.0, v: int = V) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [N, H] and weight [v, H] whose logits are of this scale, bias [v], target [N] with ignored rows."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, H, generator=g, dtype=torch.float64)
    weight = torch.randn(v, H, generator=g, dtype=torch.float64) * scale / math.sqrt(H)
    bias = torch.randn(v, generator=g, dtype=torch.float64)
    target = torch.randint(0, v, (N,), generator=g)
    target[::7] = -100
    return (*(t.to(device, dtype) for t in (x, weight, bias)), target.to(device))


def step(fn: Callable[..., Tensor], args: tuple[Tensor, ...], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Loss and gradients of the floating-point arguments, on the CPU; in another dtype if one is given."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() if t.is_floating_point() else t for t in args]
    loss = fn(*leaves)
    g = torch.Generator().manual_seed(1)
    cotangent = torch.rand(loss.shape, generator=g, dtype=torch.float64).to(loss.device, loss.dtype)
    loss.backward(cotangent)
    return [loss.detach().cpu(), *(t.grad.cpu() for t in leaves if t.requires_grad)]


def compiled(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(fn, backend=no_codegen_backend([]))


def with_bias(loss: Loss) -> Callable[..., Tensor]:
    return lambda x, w, b, y: loss(F.linear(x, w, b), y)


def check(loss: Loss, args: tuple[Tensor, ...]) -> list[Tensor]:
    """Rewritten; finite and as accurate as eager where eager is finite, and not finite where it has to be.

    A logit of +inf makes eager's loss NaN and ours inf: both show. What only overflows in eager's dtype need not here.
    """
    fn, half = with_bias(loss), args[0].dtype == torch.float16
    found = step(compiled(fn), args)
    assert counters["lce_inductor"]["rewritten"] == 1
    eager, exact = step(fn, args), step(fn, args, torch.float64)
    # The graph is run node by node here: its sum of fp16 losses overflows where eager's op and generated code don't.
    by_node = step(torch.compile(fn, backend="aot_eager_decomp_partition"), args) if half else eager
    for i, (f, e, r, b) in enumerate(zip(found, eager, exact, by_node)):
        good = torch.isfinite(e) & torch.isfinite(b)
        if not torch.isfinite(r).all() and not good.all():
            assert not torch.isfinite(f).all(), f"result {i} hides what is not finite"
        assert torch.isfinite(f[good]).all(), f"result {i} is finite in eager"
        if i == 0:
            good &= torch.isfinite(r)
            assert_as_accurate([f[good]], [e[good]], [r[good]], [args[0].dtype])
    if all(torch.isfinite(e).all() for e in (*eager, *by_node)):
        assert_as_accurate(found, eager, exact, [args[0].dtype])
    return found


@pytest.fixture(autouse=True)
def rewriting(installed: None) -> None:
    """For heads of every size."""


# -- values


@pytest.mark.parametrize("loss", FINITE)
@pytest.mark.parametrize(
    "dtype, scale",
    [(torch.float32, 1e2), (torch.float32, 1e4), (torch.float32, 1e-4), (torch.bfloat16, 1e2), (torch.float16, 1e3)],
    ids=str,
)
def test_extreme_logits(dtype, scale, loss, device):
    """Rows where one class has all the mass, and rows that are flat."""
    check(LOSSES[loss], head(device, dtype, scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logits_that_overflow(dtype, device):
    """Some rows overflow and show it, the others stay right."""
    x, w, b, y = head(device, dtype)
    big = torch.finfo(dtype).max / 4
    w[3] = 0.0
    w[3, 0] = big
    x[:, 0] = torch.where(torch.arange(N, device=device) % 3 == 0, 9.0, 0.5).to(dtype)
    found = check(LOSSES["tokens"], (x, w, b, y))
    assert found[0].isfinite().any() and not found[0].isfinite().all()


@pytest.mark.parametrize("loss", FINITE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masked_vocabulary(dtype, loss, device):
    """A bias of -inf on classes that are no row's target, as padded vocabularies have it."""
    x, w, b, y = head(device, dtype)
    b[100:] = -torch.inf
    loss_, *grads = check(LOSSES[loss], (x, w, b, y.clamp(max=99)))
    assert loss_.isfinite().all() and all(g.isfinite().all() for g in grads)
    assert not grads[1][100:].any() and not grads[2][100:].any()


@pytest.mark.parametrize("loss", ["tokens", "mean", "smoothed"])
@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan])
def test_special_bias_of_a_target(value, loss, device):
    """A class that is a target of some rows."""
    x, w, b, y = head(device, torch.float32)
    b[5] = value
    y[1:9:2] = 5
    check(LOSSES[loss], (x, w, b, y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_classes_masked(dtype, device):
    """Every logit is -inf: eager's NaN."""
    x, w, b, y = head(device, dtype)
    found = check(LOSSES["tokens"], (x, w, torch.full_like(b, -torch.inf), y))
    assert found[0][y.cpu() != -100].isnan().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_all_rows_ignored(loss, device):
    """A mean over nothing is NaN, a sum is zero, as eager's; gradients alike."""
    x, w, b, y = head(device, torch.float32)
    found = check(LOSSES[loss], (x, w, b, torch.full_like(y, -100)))
    assert found[0].isnan().all() == (loss in ("mean", "z-loss"))


@pytest.mark.parametrize("loss", LOSSES)
def test_one_class(loss, device):
    x, w, b, y = head(device, torch.float32, v=1)
    fn = with_bias(LOSSES[loss])
    args = (x, w, b, y.clamp(max=0))
    found = step(compiled(fn), args)
    assert not counters["lce_inductor"]  # a column of numbers is no logits
    torch.testing.assert_close(found, step(fn, args), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("label", [0, V - 1])
def test_first_and_last_class(label, dtype, device):
    x, w, b, y = head(device, dtype)
    found = check(LOSSES["tokens"], (x, w, b, torch.full_like(y, label)))
    picked = F.linear(x.double(), w.double(), b.double())[:, label].cpu()
    lse = F.linear(x.double(), w.double(), b.double()).logsumexp(-1).cpu()
    rounding = 3e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found[0].double(), lse - picked, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("loss", FINITE)
@pytest.mark.parametrize("where", ["bias", "weight"])
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_large_common_offset(offset, where, loss, device):
    """Z + 1e4 in fp32: the softmax does not change, and the error is no larger than eager's."""
    x, w, b, y = head(device, torch.float32)
    if where == "bias":
        b += offset
    else:
        x[:, 0], w[:, 0] = 1.0, offset
    if loss == "z-loss":  # its own value is 1e4 squared
        return check(lambda z, y: z.logsumexp(-1).square().mean(), (x, w, b, y))
    return check(LOSSES[loss], (x, w, b, y))


# -- the same bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", ["mean", "tokens", "smoothed"])
def test_the_same_bits_twenty_times(loss, dtype, device):
    args = head(device, dtype)
    run = compiled(with_bias(LOSSES[loss]))
    first = step(run, args)
    for _ in range(19):
        assert_same_bits(step(run, args), first)


# -- beyond 2^31 elements (CPU: 2^13, with chunks to match)

BEYOND = {
    # tokens, hidden, vocabulary
    "logits": (70_016, 64, 32_768),
    "hidden states": (1_048_640, 2_056, 24),
    "weight": (1_024, 8_208, 262_144),
}


@pytest.mark.parametrize("bits", [torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", BEYOND)
def test_more_elements_than_an_int32_counts(which, bits, device):
    """Rows at both ends, and a sample of the gradients, against fp64 from the same numbers."""
    n, h, v = BEYOND[which]
    if device == "cpu":
        n, h, v = max(n // 512, 16), max(h // 32, 8), max(v // 512, 8)
    else:
        assert max(n * v, n * h, v * h) > 2**31
    x = torch.randn(n, h, device=device, dtype=bits)
    w = torch.randn(v, h, device=device, dtype=bits) / math.sqrt(h)
    y = torch.randint(0, v, (n,), device=device)
    y[:3], y[-3:] = v - 1, 0
    x.requires_grad_()
    w.requires_grad_()
    counters.clear()
    run = torch.compile(lambda x, w, y: F.cross_entropy(F.linear(x, w), y, reduction="sum"))
    loss = run(x, w, y)
    loss.backward()
    assert counters["lce_inductor"]["rewritten"] == 1

    total = torch.zeros((), dtype=torch.float64, device=device)
    rows = torch.cat([torch.arange(4), torch.arange(n - 4, n)]).to(device)
    classes = torch.cat([torch.arange(2), torch.arange(v - 2, v)]).to(device)
    grad = torch.zeros(len(classes), h, dtype=torch.float64, device=device)
    with torch.no_grad():
        block = max(2**27 // v, 1)
        for start in range(0, n, block):
            part = slice(start, start + block)
            z = (x[part] @ w.t()).double()
            total += F.cross_entropy(z, y[part], reduction="sum")
            p = z.softmax(-1)[:, classes] - (y[part, None] == classes).double()
            grad += p.t() @ x[part].double()
            del z
        z = (x[rows] @ w.t()).double()
        dz = z.softmax(-1) - F.one_hot(y[rows], v)
        dx = torch.cat([(d[None] @ w.double()) for d in dz]) if v * h < 2**28 else dz.to(bits).float() @ w.float()
    torch.testing.assert_close(loss.detach().double(), total, rtol=1e-2, atol=0.0)
    assert_close_in_norm(x.grad[rows], dx)
    assert_close_in_norm(w.grad[classes], grad)
    assert x.grad.isfinite().all() and w.grad.isfinite().all()


def assert_close_in_norm(found: Tensor, expected: Tensor) -> None:
    """Within what bf16 rounds: 1% of the norm of each row."""
    distance = (found.double() - expected.double()).norm(dim=1) / expected.double().norm(dim=1)
    assert distance.max().item() < 1e-2, distance
