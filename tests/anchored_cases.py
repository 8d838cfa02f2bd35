"""Cases for the anchored softmax, checked against fp64: by the interpreter on the CPU, compiled on a GPU."""

from __future__ import annotations

import dataclasses
import gc
import os

import torch
from rows_cases import SOFTCAP, Case, Planned, compare, error, make, whole
from turns import EVERYTHING

from lce_inductor.lower import head_anchored as anchored
from lce_inductor.spec.statistics import LSE, NO_TARGET, SUM, TARGET, HeadArgs, RowGrads, Stats

# The interpreter's tiles are of 16 rows, 32 classes and 16 terms: some are full and some are not.
FEW = os.environ.get("TRITON_INTERPRET") == "1" and not EVERYTHING
BF16 = Case(N=37, H=24 if FEW else 40, V=70 if FEW else 131, dtype=torch.bfloat16, chunk_tokens=20)
SMALLER = dataclasses.replace(BF16, N=24, V=40)  # two chunks; for what needs no more rows and classes
CE = ("lse", "target")
CASES = [
    BF16,
    dataclasses.replace(BF16, V=128, H=32, chunk_tokens=0),
    dataclasses.replace(BF16, V=5, N=20),
    dataclasses.replace(BF16, K=0, grads=("lse",)),
    dataclasses.replace(BF16, grads=("lse", "lse_slope", "target", "sum"), class_weight=True, bias=True),
    dataclasses.replace(BF16, grads=("lse", "target", "sum"), epilogue="mul 0.5;add 0.25;div 0.7", bias=True),
    dataclasses.replace(BF16, grads=("sum",)),
    dataclasses.replace(BF16, grads=("target",), bias=True),
    dataclasses.replace(BF16, epilogue=SOFTCAP, bias=True),
    dataclasses.replace(BF16, epilogue="mul 2.0;rsqrt_cap 15.0 225.0;add 0.25;sigmoid;mul 4.0"),
    dataclasses.replace(BF16, scale=30.0),
    dataclasses.replace(BF16, scale=200.0),
]
BIG = [
    Case(N=1000, H=256, V=50257, dtype=torch.bfloat16, chunk_tokens=chunk, scale=scale, grads=grads)
    for chunk, scale, grads in ((0, 1.0, CE), (384, 3.0, CE), (384, 20.0, (*CE, "sum")), (0, 200.0, CE))
] + [
    # dX by our product, then the library's
    Case(N=1500, H=1152, V=20011, dtype=torch.bfloat16, chunk_tokens=768, grads=grads)
    for grads in (CE, (*CE, "sum"))
]


def is_affine(case: Case) -> bool:
    return all(step.split()[0] in ("mul", "div", "add") for step in case.epilogue.split(";") if step)


def check(run: Planned, case: Case, device: str, factor: float) -> None:
    """Forward, with_grad and backward: error <= factor * eager's, both against fp64."""
    a, grads = make(case, device)
    if case.K and set(case.grads) == set(CE):  # cross-entropy: nothing may cancel
        grads = RowGrads(lse=grads.lse, target=-grads.lse[:, None])
    stats = LSE | TARGET | (SUM if is_affine(case) else 0)
    exact_stats, exact = whole(a, grads, torch.float64)
    eager_stats, eager = whole(a, grads, case.dtype)
    picked = [0, 1, 2] if stats & SUM else [0, 1]

    def compare_stats(found: Stats) -> None:
        chosen = [[s[i] for i in picked] for s in (found, eager_stats, exact_stats)]
        compare(case, [Stats._fields[i] for i in picked], *chosen, factor)

    mask = (True, True, case.bias)
    compare_stats(run.forward(a, stats))
    found, *gradients = run.with_grad(a, stats, grads, mask)
    compare_stats(found)
    compare(case, ("dx", "dw", "db"), gradients, eager, exact, factor)
    assert all(g.dtype == torch.bfloat16 and g.is_contiguous() for g in gradients)

    slope = 0 if grads.lse_slope is None else grads.lse_slope * found.lse
    g_lse = slope if grads.lse is None else grads.lse + slope
    plain = grads._replace(lse=None if isinstance(g_lse, int) else g_lse, lse_slope=None)
    gradients = run.backward(a, found.lse, None, plain, mask)
    compare(case, ("dx", "dw", "db"), gradients, eager, exact, factor)


def saturating(device: str, N: int, rows: list[int], spread: float = 200.0, H: int = 16, V: int = 70) -> HeadArgs:
    """Logits of a few nats; in `rows` they spread over `spread` nats, the target at the bottom."""
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(V, H, generator=g) * 0.5
    weight[:, 0] = torch.linspace(0, 1, V)
    x = torch.randn(N, H, generator=g)
    x[:, 0] = 0
    target = torch.randint(0, V, (N, 1), generator=g)
    x[rows] = 0
    x[rows, 0] = spread
    target[rows] = 0
    dtype = torch.bfloat16
    return HeadArgs(x.to(device, dtype), weight.to(device, dtype), None, target.to(device), None, (), 0, 1 << 30)


def check_saturation(
    run: Planned, device: str, N: int, rows: list[int], factor: float, chunk_tokens: int = 0, **more: int
) -> None:
    """Rows beyond the room of bf16 come out as in fp64, and the rows beside them too."""
    a = saturating(device, N, rows, **more)._replace(chunk_tokens=chunk_tokens)
    one = torch.full((N,), 1 / N, device=device)
    grads = RowGrads(lse=one, target=-one[:, None])
    exact_stats, exact = whole(a, grads, torch.float64)
    found, *gradients = run.with_grad(a, LSE | TARGET, grads, (True, True, False))
    for got in (found, run.forward(a, LSE | TARGET)):
        losses = [s.lse - s.target_logit[:, 0] for s in (got, exact_stats)]
        assert error(*losses) < 1e-5, error(*losses)
    for got, want in zip(gradients, exact[:2]):
        assert error(got, want) < 5e-3 * factor, error(got, want)
    if rows:
        assert error(gradients[0][rows], exact[0][rows]) < 5e-3 * factor, error(gradients[0][rows], exact[0][rows])
    # Without a target the anchor is a guess, and every one of these rows may miss.
    a = a._replace(target=torch.full_like(a.target, NO_TARGET))
    exact_stats, exact = whole(a, RowGrads(lse=one), torch.float64)
    found, *gradients = run.with_grad(a, LSE, RowGrads(lse=one), (True, True, False))
    assert error(found.lse, exact_stats.lse) < 1e-5, error(found.lse, exact_stats.lse)
    for got, want in zip(gradients, exact[:2]):
        assert error(got, want) < 5e-3 * factor, error(got, want)


def check_classes(run: Planned, device: str, runs: list[int], H: int) -> None:
    """Classes with as many rows as `runs` says, in any order, get all of them: dW and db of each against fp64."""
    g = torch.Generator().manual_seed(5)
    V = len(runs) + 60
    target = torch.cat([torch.full((n,), v) for v, n in enumerate(runs)] + [torch.full((9,), NO_TARGET)])
    N = len(target)
    target = target[torch.randperm(N, generator=g)][:, None]
    x, weight = torch.randn(N, H, generator=g), torch.randn(V, H, generator=g) * H**-0.5
    x, weight = (t.to(device, torch.bfloat16) for t in (x, weight))
    bias = torch.randn(V, generator=g).to(device, torch.bfloat16)
    a = HeadArgs(x, weight, bias, target.to(device), None, (), 0, 1 << 30)
    one = torch.ones(N, device=device)
    grads = RowGrads(lse=one, target=-one[:, None])
    _, (_, exact, exact_db) = whole(a, grads, torch.float64)
    (dw, db), again = (run.with_grad(a, LSE, grads, (True, True, True), wide=True)[2:] for _ in range(2))
    for v in range(len(runs)):
        assert error(dw[v], exact[v]) < 1e-2, (runs[v], error(dw[v], exact[v]))
    assert (db - exact_db).abs().max() < 0.1  # a row that is missing is nearly one
    assert dw.equal(again[0]) and db.equal(again[1])


def check_label_out_of_range(run: Planned, device: str) -> None:
    """A label that int32 cannot hold is none to the kernels (the op reports it): dW is that of the other rows."""
    a, _ = make(SMALLER, device)
    assert a.target is not None
    one = torch.ones(SMALLER.N, device=device)
    grads = RowGrads(lse=one, target=-one[:, None])
    found = []
    for label in (NO_TARGET, 2**31, 2**32 + 3):
        target = a.target.clone()
        target[::3] = label
        changed = a._replace(target=target)
        mask = (True, True, False)
        found.append(anchored.with_grad(changed, LSE, grads, mask, True, run.plan(changed, LSE, grads, mask))[2])
    assert found[0].isfinite().all()
    assert all(f.equal(found[0]) for f in found[1:])


def check_not_finite(run: Planned, device: str) -> None:
    """Infinite and NaN logits give the lse that logsumexp gives, and leave other rows' dX alone."""
    V, H, inf, nan = 70, 8, float("inf"), float("nan")
    weight = torch.zeros(V, H)
    weight[:, 0] = torch.linspace(-2, 2, V)
    for column, v, value in ((1, 3, -inf), (3, 5, inf), (4, 66, nan), (5, slice(None), -300.0)):
        weight[v, column] = value
    for column in (0, 1, 3, 4, 5):
        z = weight[:, column]
        for target in (3, 5, 66, NO_TARGET):
            # One column is one row's logits: zeros times infinity would make NaN of the others.
            a = HeadArgs(
                torch.ones(1, 8).to(device, torch.bfloat16) * torch.eye(8)[0].to(device, torch.bfloat16),
                torch.stack([z, *[torch.zeros(V)] * 7], 1).to(device, torch.bfloat16),
                None, torch.tensor([[target]], device=device), None, (), 0, 1 << 30,
            )  # fmt: skip
            want = z.bfloat16().double().logsumexp(0)
            got = run.forward(a, LSE | TARGET)
            torch.testing.assert_close(got.lse.cpu()[0].double(), want, rtol=1e-6, atol=1e-5, equal_nan=True)
            if target != NO_TARGET:
                picked = z.bfloat16()[target].float()
                torch.testing.assert_close(got.target_logit.cpu()[0, 0], picked, equal_nan=True)


def check_confident(run: Planned, device: str) -> None:
    """Rows with a target probability near one: their gradient is what is left, and it does not cancel."""
    a, grads = make(dataclasses.replace(BF16, N=64, scale=0.5), device)
    one = torch.ones(64, device=device)
    target = a.target.clamp(min=0)
    x = (a.weight[target[:, 0]].float() * 200).to(a.x.dtype)
    a = a._replace(x=x, target=target)
    grads = RowGrads(lse=one, target=-one[:, None])
    exact_stats, exact = whole(a, grads, torch.float64)
    _, eager = whole(a, grads, torch.bfloat16)
    _, *found = run.with_grad(a, LSE | TARGET, grads, (True, True, False))
    assert (exact_stats.lse - exact_stats.target_logit[:, 0]).median() < 1e-3
    compare(BF16, ("dx", "dw"), found, eager, exact, 1.25)


def check_nothing_stays_behind(run: Planned, device: str) -> None:
    """No cycle of references: what a call had is free when it returns, and not when the garbage collector comes."""
    a, grads = make(SMALLER, device)
    gc.collect()
    gc.disable()
    try:
        run.forward(a, LSE | TARGET)
        found, *_ = run.with_grad(a, LSE | TARGET, grads, (True, True, False), wide=True)
        run.backward(a, found.lse, None, grads, (True, True, False))
        assert not [o for o in gc.get_objects() if isinstance(o, anchored.Head)]
    finally:
        gc.enable()
