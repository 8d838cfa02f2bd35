"""Rows that count, packed on the device: against fp64 of these rows alone, by emulation on the CPU, on a GPU as they are."""

from __future__ import annotations

import dataclasses

import torch
from rows_cases import Case, Planned, compare, make, whole
from torch import Tensor
from turns import EVERYTHING

from lce_inductor.lower.rows_that_count import packed, packed_grads
from lce_inductor.spec.statistics import LSE, SUM, TARGET, HeadArgs, RowGrads

CE = ("lse", "target")
# Rows of tiles share marks by 256 and the product for dW takes 64 at a time: counts around both, and around chunks.
SMALL = Case(N=290, H=24, V=70, dtype=torch.bfloat16, chunk_tokens=270, grads=CE)
COUNTS = [0, 1, 63, 64, 65, 256, 257, 269, 270, 271, 289, 290]
# The interpreter takes a second for a hundred rows.
FEW = dataclasses.replace(SMALL, N=100, V=70 if EVERYTHING else 40, chunk_tokens=80)
FEW_COUNTS = [0, 81]


def some(N: int, count: int, device: str) -> Tensor:
    """bool [N], so many of them true."""
    rows = torch.randperm(N, generator=torch.Generator().manual_seed(N + count))[:count]
    return torch.zeros(N, dtype=torch.bool).index_fill_(0, rows, True).to(device)


def masked(a: HeadArgs, grads: RowGrads, needed: Tensor) -> RowGrads:
    """Gradients of cross-entropy's kind, zero in rows that are not needed."""
    target = grads.target if grads.lse is None or a.target is None or grads.target is None else -grads.lse[:, None]
    of = grads._replace(target=target)
    return RowGrads(*(None if g is None else g * (needed if g.dim() == 1 else needed[:, None]) for g in of))


def check(run: Planned, case: Case, count: int, device: str, factor: float) -> None:
    """Forward, with_grad and backward: as the rows that count alone, and zeros elsewhere."""
    a, grads = make(case, device)
    needed = some(case.N, count, device)
    grads = masked(a, grads, needed)
    rows = needed.nonzero()[:, 0]
    few, of_few = packed(a, rows), packed_grads(grads, rows)
    stats, mask = LSE | TARGET | (SUM if not case.epilogue else 0), (True, True, False)
    picked = [0, 1, 2] if stats & SUM else [0, 1]
    exact_stats, exact = whole(few, of_few, torch.float64)
    eager_stats, eager = whole(few, of_few, case.dtype)

    def compare_stats(found) -> None:
        for i in picked:
            values = found[i][rows], eager_stats[i], exact_stats[i]
            if count:
                compare(case, [type(found)._fields[i]], *([v] for v in values), factor)
            assert not found[i][~needed].any()

    def compare_gradients(dx: Tensor, dw: Tensor) -> None:
        assert not dx[~needed].any() and dx.dtype == dw.dtype == case.dtype
        if count:
            compare(case, ("dx", "dw"), [dx[rows], dw], eager[:2], exact[:2], factor)
        assert count or not dw.any()

    compare_stats(run.forward(a, stats, needed))
    found, dx, dw, _ = run.with_grad(a, stats, grads, mask, needed=needed)
    compare_stats(found)
    compare_gradients(dx, dw)
    dx, dw, _ = run.backward(a, found.lse, None, grads, mask)
    compare_gradients(dx, dw)


def check_what_else_counts(run: Planned, case: Case, device: str) -> None:
    """A gradient that comes in; x that is infinite, NaN, or so large that logits may overflow."""
    a, grads = make(case, device)
    grads = RowGrads(lse=torch.zeros_like(grads.lse), target=torch.zeros_like(grads.target))
    needed, last = torch.zeros(case.N, dtype=torch.bool, device=device), case.N - 1
    grads.lse[7], grads.target[91] = 1.0, -2.0
    for row, value in ((11, torch.inf), (20, torch.nan), (last, -(2.0**41))):
        a.x[row, 3] = value
    found, dx, dw, _ = run.with_grad(a, LSE | TARGET, grads, (True, True, False), needed=needed)
    computed = found.lse != 0
    assert computed.nonzero()[:, 0].tolist() == [7, 11, 20, 91, last]
    assert not dx[~computed].any() and dx[7].any() and dx[91].any()
    # 0 times a softmax that is not a number
    assert dx[20].isnan().all() and dw.isnan().any()


def check_stale_memory(run: Planned, case: Case, device: str) -> None:
    """What was in memory before does not show: behind the last row that counts there is anything at all."""
    a, grads = make(case, device)
    needed = some(case.N, 70, device)
    grads = masked(a, grads, needed)

    def step() -> list[Tensor]:
        found, dx, dw, _ = run.with_grad(a, LSE | TARGET, grads, (True, True, False), needed=needed)
        return [found.lse, found.target_logit, dx, dw]

    first = step()
    for _ in range(1 if device == "cpu" else 3):  # the interpreter has no threads that might come in another order
        trash = [torch.full((1 << 18,), torch.nan, dtype=d, device=device) for d in (torch.bfloat16, torch.float32)]
        del trash
        for one, two in zip(first, step()):
            assert one.equal(two)
