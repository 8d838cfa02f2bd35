"""Invariant 3: nothing of the logits' size outside one chunk, in forward, backward or between them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from harness import Compiled, fresh, peak_bytes, results
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import lce_inductor

# N * V is far above N * H, V * H and a chunk.
N, H, V = 512, 8, 4096
LOGITS = N * V * 4
CHUNK = 32

Fn = Callable[..., Tensor]

STEPS: dict[str, Fn] = {
    "mean": lambda x, w, b, y: F.cross_entropy(F.linear(x, w, b), y),
    "float view": lambda x, w, b, y: F.cross_entropy((x @ w.T).float().view(-1, V), y.view(-1)),
    "label smoothing": lambda x, w, b, y: F.cross_entropy(F.linear(x, w), y, label_smoothing=0.1),
    "class weights": lambda x, w, b, y: F.cross_entropy(F.linear(x, w), y, b.detach().abs() + 0.1),
    "per row": lambda x, w, b, y: F.cross_entropy(F.linear(x, w), y, reduction="none").square().mean(),
    "log_softmax": lambda x, w, b, y: F.nll_loss(F.log_softmax(F.linear(x, w), -1), y),
    "two losses": lambda x, w, b, y: (lambda z: F.cross_entropy(z, y) + F.cross_entropy(z, y.roll(1)))(F.linear(x, w)),
    "two heads": lambda x, w, b, y: F.cross_entropy(F.linear(x, w), y) + F.cross_entropy(F.linear(x, w * 2, b), y),
    "checkpointed": lambda x, w, b, y: checkpoint(
        lambda x: F.cross_entropy(F.linear(x, w, b), y), x, use_reentrant=False
    ),
    "autocast": lambda x, w, b, y: _autocast(x, w, b, y),
    "squared": lambda x, w, b, y: F.cross_entropy(F.linear(x, w), y) ** 2,
    "permuted": lambda x, w, b, y: F.cross_entropy(F.linear(x, w).view(8, 64, V).permute(0, 2, 1), y.view(8, 64)),
}


def _autocast(x: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.cross_entropy(F.linear(x, w, b), y)


def arguments(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    x, w, b = (torch.randn(size, dtype=dtype).requires_grad_() for size in ((N, H), (V, H), (V,)))
    return [x, w, b, torch.randint(0, V, (N,))]


@pytest.fixture
def small_chunks():
    with lce_inductor.installed(min_logits_bytes=0, chunk_tokens=CHUNK):
        yield


@pytest.mark.parametrize("name", STEPS)
def test_post_grad_graphs_hold_no_logits(name, small_chunks):
    """Of everything that both halves make, at its real size, the largest is dW (or a copy of the weight)."""
    compiled = Compiled(STEPS[name])
    results(compiled, fresh(arguments()))
    assert [g.kind for g in compiled.graphs] == ["forward", "backward"]
    assert compiled.counts["rewritten"] == (2 if name == "two heads" else 1)
    for graph in compiled.graphs:
        assert graph.largest <= V * H, graph.largest_node


@pytest.mark.parametrize("name", STEPS)
def test_peak_of_a_step(name, small_chunks):
    """At most 30% of one fp32 copy of the logits: chunks, gradients and copies of the weight."""
    compiled, args = Compiled(STEPS[name]), arguments()
    results(compiled, fresh(args))
    args = fresh(args)
    assert peak_bytes(lambda: results(compiled, args)) < 0.3 * LOGITS


def test_peak_without_the_passes():
    """Evidence that the tests above can fail: logits, log-probabilities and their gradient."""
    args = arguments()
    assert peak_bytes(lambda: results(STEPS["mean"], fresh(args))) > 1.9 * LOGITS
    compiled = Compiled(STEPS["mean"])
    results(compiled, fresh(args))
    assert compiled.graphs[0].largest == N * V
    assert peak_bytes(lambda: results(compiled, fresh(args))) > 1.9 * LOGITS


def test_peak_of_code_that_inductor_generates(small_chunks):
    """The same through code generation, which must not undo it."""
    args = arguments()
    compiled = torch.compile(STEPS["mean"])
    results(compiled, fresh(args))
    assert peak_bytes(lambda: results(compiled, fresh(args))) < 0.3 * LOGITS


def test_between_the_halves(small_chunks):
    """What the forward leaves for the backward is dX, dW and db, less than 10% of the logits."""
    args = fresh(arguments())
    compiled = Compiled(STEPS["mean"])
    results(compiled, fresh(args))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        compiled(*args)
    assert 0 < sum(t.untyped_storage().nbytes() for t in saved) < 0.1 * LOGITS


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("budget", [1 << 16, 1 << 19])
def test_workspace_bytes_bounds_the_peak(budget, dtype):
    """Chunks within the budget: on the CPU a chunk exists a few times in fp32 while it becomes its gradient."""
    args = arguments(dtype)
    with lce_inductor.installed(min_logits_bytes=0, workspace_bytes=budget):
        compiled = Compiled(STEPS["mean"])
        results(compiled, fresh(args))
        args = fresh(args)
        rest = 6 * V * H * max(dtype.itemsize, 4) + 4 * N * H * 8
        assert peak_bytes(lambda: results(compiled, args)) < 6 * max(budget, V * 8) + rest


def test_evaluation_holds_one_chunk(small_chunks):
    args = [t.detach() for t in arguments()]
    compiled = Compiled(STEPS["mean"])
    with torch.no_grad():
        compiled(*args)
        assert peak_bytes(lambda: compiled(*args)) < 4 * CHUNK * V * 4


def test_a_frozen_weight_gets_no_gradient_buffer(small_chunks):
    x, w, b, y = arguments()
    w.requires_grad_(False)
    compiled = Compiled(STEPS["per row"])
    results(compiled, fresh([x, w, b, y]))
    assert max(g.largest for g in compiled.graphs) < V * H
