"""Heads of one weight keep one dW for the backward, and never more than torch.compile alone; all else is as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from harness import Compiled, check_against_eager, check_graph, fresh, joint_graph, peak_bytes, results
from test_rows_that_count import logits_rows
from test_second_derivatives import REFUSED
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils.checkpoint import checkpoint
from turns import crossed

import lce_inductor
from lce_inductor.graph.values import dependents, equal_values

# Chunks of fewer rows than H, so that a dW takes more than a chunk's logits; V is no other size.
N, H, V, CHUNKS = 32, 16, 257, 4
Fn = Callable[..., object]
CE, L = F.cross_entropy, F.linear


def arguments(dtype: torch.dtype = torch.float64, n: int = N, h: int = H) -> list[Tensor]:
    """x, weight, labels of which some are ignored, bias, soft labels, advantages."""
    g = torch.Generator().manual_seed(0)

    def real(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    x, w, b = (t.requires_grad_() for t in (real(n, h), real(V, h), real(V)))
    y = torch.randint(0, V, (n,), generator=g)
    y[[3, n // 2, -3]] = -100
    return [x, w, y, b, real(n, V).softmax(-1), real(n)]


def cut(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(t.chunk(CHUNKS) for t in tensors)))


def z_loss(z: Tensor, y: Tensor) -> Tensor:
    return CE(z, y) + 1e-2 * z.logsumexp(-1).square().mean()


def soft(z: Tensor, t: Tensor) -> Tensor:
    return -(t * z.log_softmax(-1)).sum(-1)


def log_probs(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return L(x, w).log_softmax(-1).gather(-1, y.clamp(min=0)[:, None])[:, 0]


def two(x: Tensor, w: Tensor, y: Tensor, first: Fn, second: Fn) -> Tensor:
    """Two losses, of 10 rows and of the others."""
    return first(L(x[:10], w), y[:10]) + second(L(x[10:], w), y[10:])


class Probe(torch.autograd.Function):
    """Reads the gradient of the weight on its way."""

    @staticmethod
    def forward(ctx, w, b):
        return w.clone()

    @staticmethod
    def backward(ctx, g):
        return g, g.square().sum(1)


# x, weight, labels, bias, soft labels, advantages -> a loss. All of its heads become one.
JOINED: dict[str, Fn] = {
    "chunks": lambda x, w, y, *_: torch.cat([CE(L(a, w), t, reduction="none") for a, t in cut(x, y)]).sum() / N,
    "means": lambda x, w, y, *_: sum(CE(L(a, w), t) for a, t in cut(x, y)) / CHUNKS,
    "from the last to the first": lambda x, w, y, *_: sum(CE(L(a, w), t) for a, t in reversed(cut(x, y))),
    "of H rows": lambda x, w, y, *_: sum(CE(L(x[i : i + H], w), y[i : i + H]) for i in range(0, N, H)),
    "of other lengths": lambda x, w, y, *_: two(x, w, y, CE, CE),
    "of other weights": lambda x, w, y, *_: two(x, w, y, CE, lambda z, t: 0.3 * CE(z, t) / 7),
    "slices": lambda x, w, y, *_: sum(CE(L(x[i : i + 8], w), y[i : i + 8]) for i in range(0, N, 8)),
    "columns of a batch": lambda x, w, y, *_: sum(
        CE(L(a, w).flatten(0, 1), t.flatten(), reduction="sum")
        for a, t in zip(x.view(4, 8, H).chunk(4, 1), y.view(4, 8).chunk(4, 1))
    ),
    "sequences of a batch": lambda x, w, y, *_: sum(
        CE(L(a, w).flatten(0, 1), t.flatten(), reduction="sum")
        for a, t in zip(x.view(8, 4, H).chunk(4), y.view(8, 4).chunk(4))
    ),
    "hidden states of their own": lambda x, w, y, *_: CE(L(x[:-1], w), y[1:]) + 0.3 * CE(L(x.tanh()[:-2], w), y[2:]),
    "bias": lambda x, w, y, b, *_: sum(CE(L(a, w, b), t) for a, t in cut(x, y)),
    "class weights": lambda x, w, y, b, *_: sum(CE(L(a, w), t, b.detach().abs()) for a, t in cut(x, y)),
    "label smoothing": lambda x, w, y, *_: sum(CE(L(a, w), t, label_smoothing=0.1) for a, t in cut(x, y)),
    "z-loss": lambda x, w, y, *_: sum(z_loss(L(a, w), t) for a, t in cut(x, y)),
    "accuracy": lambda x, w, y, *_: two(x, w, y, *[lambda z, t: CE(z, t) + (z.argmax(-1) == t).double().mean()] * 2),
    "one mask": lambda x, w, y, b, s, a: sum(
        (CE(L(p, w), t, reduction="none") * (m > 0)).sum() if i else CE(L(p, w), t, reduction="sum")
        for i, (p, t, m) in enumerate(cut(x, y, a))
    ),
    "tied to an embedding": lambda x, w, y, *_: sum(
        CE(L(a + F.embedding(t.clamp(min=0), w), w), t) for a, t in cut(x, y)
    ),
    "regularised": lambda x, w, y, *_: sum(CE(L(a, w), t) for a, t in cut(x, y)) + 1e-3 * w.square().sum(),
    "transposed": lambda x, w, y, *_: CE(x[:10] @ w.t(), y[:10]) + CE(torch.matmul(x[10:], w.T), y[10:]),
    "of a product": lambda x, w, y, *_: sum(CE(L(a, w * 2), t) for a, t in cut(x, y)),
    "one without dW": lambda x, w, y, *_: two(x, w, y, CE, CE) + CE(L(x, w.detach()), y.roll(1)),
    "checkpoints": lambda x, w, y, *_: sum(
        checkpoint(lambda a, t: CE(L(a, w), t), *p, use_reentrant=False) for p in cut(x, y)
    ),
    "programs of their own": lambda x, w, y, b, s, a: sum(soft(L(p, w), t).sum() for p, t in cut(x, s)) / N,
    "programs, bias": lambda x, w, y, b, s, a: sum(soft(L(p, w, b), t).sum() for p, t in cut(x, s)) / N,
}  # fmt: skip

# The same, but only some of them do: the gradients of the others are computed in the backward.
POSTPONED: dict[str, Fn] = {
    "two tangents": lambda x, w, y, *_: (CE(L(x[:10], w), y[:10]), CE(L(x[10:20], w), y[10:20])),
    "z-loss in one": lambda x, w, y, *_: two(x[:20], w, y[:20], z_loss, CE),
    "label smoothing in one": lambda x, w, y, *_: two(
        x[:20], w, y[:20], CE, lambda z, t: CE(z, t, label_smoothing=0.1)
    ),
    "one without dX": lambda x, w, y, *_: sum(CE(L(a, w), t) for a, t in cut(x, y)[1:]) + CE(L(x[:8].detach(), w), y[:8]),
    "weighted by the first": lambda x, w, y, *_: (lambda l: l + l.detach() * CE(L(x[8:20], w), y[8:20]))(
        CE(L(x[:8], w), y[:8])
    ),
    "weights of each other": lambda x, w, y, *_: (lambda p, q: p * q.detach() + q * p.detach())(
        CE(L(x[:8], w), y[:8]), CE(L(x[8:16], w), y[8:16])
    ),
    "a product and the weight": lambda x, w, y, *_: CE(L(x[:8], w), y[:8]) + CE(L(x[8:20], -w), y[8:20]),
    "some classes": lambda x, w, y, *_: CE(L(x[:8], w), y[:8]) + CE(L(x[8:20], w[:200]), y[8:20] % 200),
    "read on the way": lambda x, w, y, b, *_: CE(L(x[:8], w), y[:8]) + CE(L(x[8:20], Probe.apply(w, b)), y[8:20]),
    "kernels and a program": lambda x, w, y, b, s, a: soft(L(x[:8], w), s[:8]).mean() + CE(L(x[8:20], w), y[8:20]),
    "two in one program": lambda x, w, y, b, s, a: (lambda p, q: soft(p, q.softmax(-1)).mean())(
        L(x[:6], w), L(x[6:12], w)
    ),
}  # fmt: skip


def waiting(graph: Graph) -> int:
    """How many values of the weight's size the forward leaves for the backward, inputs and views of them left out."""
    tangents = {n for n in graph.find_nodes(op="placeholder") if "tangents" in str(n.target)}
    late = dependents(graph, tangents)

    def is_dw(n: Node) -> bool:
        value = n.meta.get("val")
        return isinstance(value, Tensor) and bool(value.numel() >= 200 * H) and list(value.shape[1:]) == [H]

    ready = (n for n in graph.nodes if n.target is torch._ops.OpOverload or "lce_inductor" in str(n.target))
    made = {r for n in ready if n not in late for r in n.users}
    return sum(is_dw(r) and any(u in late for u in r.users) for r in made)


@pytest.mark.parametrize("name", [*JOINED, *POSTPONED])
def test_one_dw_waits(name):
    fn = {**JOINED, **POSTPONED}[name]
    traced = joint_graph(fn, *arguments())
    assert {"kernels", "region"} >= set(check_graph(traced))
    assert waiting(traced.graph) == (name != "two in one program")
    calls = [n for n in traced.graph.nodes if "lce_inductor.row" in str(n.target)]
    assert (len(calls) == 1 + (name == "one without dW")) == (name in JOINED)


@pytest.mark.parametrize("name", ["two tangents", "z-loss in one", "read on the way"])
def test_logits_would_take_as_much(name):
    """Of chunks of more rows than H torch.compile alone keeps more than a dW: both may wait, three products a head."""
    x, w, *others = arguments()
    narrow = [x.detach()[:, :6].requires_grad_(), w.detach()[:, :6].requires_grad_(), *others]
    fn = POSTPONED[name] if name != "read on the way" else POSTPONED["a product and the weight"]
    traced = joint_graph(fn, *narrow)
    check_graph(traced)
    calls = [n for n in traced.graph.nodes if "lce_inductor.row" in str(n.target)]
    assert [n.target for n in calls] == [torch.ops.lce_inductor.row_stats_with_grad.default] * 2


def test_gradients_in_the_forward_if_the_user_says_so():
    traced = joint_graph(POSTPONED["two tangents"], *arguments())
    check_graph(traced, gradients="forward")
    assert waiting(traced.graph) == 2


def test_x_is_copied_only_for_less():
    """Two heads of few classes: x side by side would take more than the dW that is saved."""
    x, w, y, *_ = arguments()
    fn = lambda x, w, y: CE(L(x, w), y) + CE(L(x.sin(), w), y)
    few = [x, w.detach()[:20].requires_grad_(), y.clamp(max=19)]
    for args, count in (([x, w, y], 1), (few, 2)):
        traced = joint_graph(fn, *args)
        check_graph(traced)
        assert str(traced.graph).count("target=torch.ops.lce_inductor.row_stats_with_grad") == count


@pytest.mark.parametrize("name", ["chunks", "slices", "sequences of a batch", "programs of their own"])
def test_rows_that_were_cut_from_one_tensor_are_not_copied(name):
    traced = joint_graph(JOINED[name], *arguments())
    check_graph(traced)
    tangents = set(traced.graph.find_nodes(op="placeholder")[-1:])
    forward = (n for n in traced.graph.nodes if n not in dependents(traced.graph, tangents))
    copies = [n.meta["val"] for n in forward if n.target is torch.ops.aten.cat.default]
    assert all(c.dim() == 1 or c.shape[1] == 1 for c in copies)


# -- shapes that are not known, and dtypes


def lengths(x1, x2, w, y1, y2, first=CE, second=CE):
    return first(L(x1, w), y1) + second(L(x2, w), y2)


@pytest.mark.parametrize("second", [CE, z_loss], ids=["joined", "postponed"])
def test_dynamic_shapes(second):
    """No guard, no choice by a size."""

    def args(m, n):
        (x1, w, y1, *_), (x2, _, y2, *_) = arguments(n=m), arguments(n=n)
        return [x1, x2, w, y1, y2]

    traced = joint_graph(lambda *a: lengths(*a, second=second), *args(10, 12), dynamic=True)
    check_graph(traced, others=[args(12, 10), args(90, 9), args(9, 300)])
    assert waiting(traced.graph) == 1


@pytest.mark.parametrize(
    "name, dtype, autocast",
    crossed(
        ["of other weights", "programs of their own", "one without dX"], [torch.bfloat16, torch.float16], [False, True]
    ),
    ids=str,
)
def test_rounding(name, dtype, autocast, installed):
    fn = {**JOINED, **POSTPONED}[name]

    def run(*args):
        with torch.autocast("cpu", dtype, enabled=autocast):
            return fn(*args)

    check_against_eager(run, arguments(torch.float32 if autocast else dtype))


def test_of_the_rows_that_count(installed):
    """Each head's own, as many products of each as ever; in one head no label counts, in another all do."""
    x, w, y, *_ = arguments(torch.float32)
    y = y.where(torch.arange(N) >= 8, -100).where(torch.arange(N) < 24, y.clamp(min=0))

    def fn(x, w, y):
        return sum(CE(L(a, w), t, reduction="sum") for a, t in cut(x, y))

    compiled = check_against_eager(fn, [x, w, y])
    args = fresh([x, w, y])
    assert logits_rows(lambda: results(compiled, args), H, V) == (y >= 0).sum() < N


# -- what it is for


@pytest.mark.parametrize("name", ["chunks", "of other lengths", "programs of their own"])
def test_peak_of_a_step(name):
    """At most that of torch.compile alone. H is larger here: a program needs more than logits."""
    peaks = []
    for package in (False, True):
        if package:
            lce_inductor.install(min_logits_bytes=0)
        compiled, args = Compiled(JOINED[name]), arguments(torch.float32, h=8 * H)
        results(compiled, fresh(args))
        args = fresh(args)
        peaks.append(peak_bytes(lambda: results(compiled, args)))
    assert peaks[1] <= peaks[0]


def test_code_that_inductor_generates(installed):
    """One dW waits, and another one is made in the backward, by a call that is tied to the tangent by what has no kernel.
    Of five there are two at a time."""

    def fn(x, w, y):
        return sum(CE(L(a, w), t) for a, t in cut(x, y)) + CE(L(x[:8].detach(), w), y[:8].clamp(min=0))

    args = arguments(torch.float32, h=8 * H)[:3]
    (ours, theirs), compiled = (fresh(args), fresh(args)), torch.compile(fn)
    for f, inputs in ((compiled, ours), (fn, theirs)):
        for _ in range(2):  # gradients accumulate
            f(*inputs).backward()
    torch.testing.assert_close([t.grad for t in ours], [t.grad for t in theirs])
    args = fresh(args)
    assert peak_bytes(lambda: results(compiled, args)) < 2.8 * 8 * H * V * 4


def test_an_error_for_second_derivatives(installed):
    x, w, y, *_ = arguments(torch.float32)
    compiled = Compiled(lengths)
    x1, x2 = (t.detach().requires_grad_() for t in (x[:10], x[10:]))
    for of in (x1, x2, w):
        for by in (x1, x2, w):
            loss = compiled(x1, x2, w, y[:10], y[10:])
            (first,) = torch.autograd.grad(loss, of, create_graph=True)
            with pytest.raises(RuntimeError, match=REFUSED):
                torch.autograd.grad(first.square().sum(), by, allow_unused=True)


def test_what_is_told(installed):
    """Products are those of all heads together, and the plan is that of all rows."""
    Compiled(JOINED["chunks"])(*arguments(torch.float32))
    found = lce_inductor.report().records[-CHUNKS:]
    assert {(r.products, r.together, r.gradients) for r in found} == {(3, CHUNKS, "forward")}
    assert all(f"1 chunks of {N} tokens" in r.plan for r in found)
    Compiled(JOINED["checkpoints"])(*arguments(torch.float32))  # where the user's code holds a chunk's logits at a time
    found = lce_inductor.report().records[-CHUNKS:]
    assert all(r.products == 3 and f"{CHUNKS} chunks of {N // CHUNKS} tokens" in r.plan for r in found)
    Compiled(POSTPONED["one without dX"])(*arguments(torch.float32))
    assert sorted((r.products, r.together, r.gradients) for r in lce_inductor.report().records[-CHUNKS:]) == [
        (3, 1, "recompute"), *[(3, CHUNKS - 1, "forward")] * (CHUNKS - 1)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "least, grad, refused", [(N * V * 4, True, 0), (N * V * 4 + 1, True, CHUNKS), (9 * V * 4, False, CHUNKS)]
)
def test_small_heads_of_one_weight_count_together(least, grad, refused):
    """Where torch.compile alone would hold all their logits at once: until the backward."""
    with lce_inductor.installed(min_logits_bytes=least, chunk_tokens=N), torch.set_grad_enabled(grad):
        compiled = Compiled(JOINED["chunks"])
        compiled(*arguments(torch.float32))
    assert compiled.refusals == ({"too-small": refused} if refused else {})


# -- equal values


def test_equal_values():
    graph = Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    call, aten = graph.call_function, torch.ops.aten
    assert equal_values(call(aten.t.default, (a,)), call(aten.t.default, (a,)))
    assert equal_values([call(aten.mul.Tensor, (a, 2)), 1.5], (call(aten.mul.Tensor, (a, 2)), 1.5))
    assert not equal_values(call(aten.t.default, (a,)), call(aten.t.default, (b,)))
    assert not equal_values(call(aten.mul.Tensor, (a, 2)), call(aten.mul.Tensor, (a, 2.0)))
    assert not equal_values(call(aten.add.Tensor, (a, b)), call(aten.add.Tensor, (a, b), {"alpha": 2}))
    assert not equal_values(call(aten.rand_like.default, (a,)), call(aten.rand_like.default, (a,)))
    assert not equal_values(call(aten.mul_.Tensor, (a, 2)), call(aten.mul_.Tensor, (a, 2)))
    assert not equal_values([a, b], [a])
