"""Rows that count, in the ops on a CPU: what is computed of them, and what the others get."""

from __future__ import annotations

import pytest
import rows_cases
import torch
from harness import products
from rows_cases import ALL, GRADS, SOFTCAP, Case
from test_ops import flat
from torch import Tensor

from lce_inductor.lower import head as heads
from lce_inductor.lower import head_cpu as cpu
from lce_inductor.lower import rows_that_count as counting
from lce_inductor.lower.plan import planned
from lce_inductor.spec.epilogue import unparse
from lce_inductor.spec.statistics import LSE, TARGET, HeadArgs, RowGrads, computed

ops = torch.ops.lce_inductor
MASK = (True, True, True)
CASES = [
    *(Case(N=11, V=257, K=2, bias=True, class_weight=True, grads=GRADS, dtype=d) for d in rows_cases.DTYPES),
    Case(N=11, epilogue=SOFTCAP, bias=True, grads=GRADS, chunk_tokens=2, dtype=torch.float64),
    Case(N=11, strided=True, bias=True, grads=GRADS, chunk_tokens=3, dtype=torch.float64),
    Case(N=11, K=0, bias=True, grads=("sum", "neg_entropy")),
]
ROWS = {"none": [], "one": [4], "some": [0, 3, 4, 9], "all": list(range(11))}


def masked(g: RowGrads, needed: Tensor) -> RowGrads:
    return RowGrads(*(None if t is None else (t.T * needed).T for t in g))


def close(found: Tensor, expected: Tensor, computed_in: torch.dtype | None = None) -> None:
    """One rounding of results, and some of sums; and of logits, whose product may be another for fewer rows."""
    eps = torch.finfo(expected.dtype).eps if expected.is_floating_point() else 0
    eps = max(eps, torch.finfo(computed_in).eps) if eps and computed_in else eps
    scale = expected.abs().max().item() if expected.numel() else 0
    torch.testing.assert_close(found, expected, rtol=4 * eps, atol=64 * min(eps, 1e-6) * scale + eps * scale)


def plan_of(a, stats, grads, mask):
    """Of all rows."""
    return planned(heads.request(a, computed(stats, grads.bits()), grads, mask), a.x.device)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_that_count_are_as_ever_and_others_zero(case, rows):
    a, g = rows_cases.make(case, "cpu")
    dtype = torch.float32 if a.x.dtype.itemsize < 4 else a.x.dtype
    needed = torch.zeros(11, dtype=torch.bool)
    needed[ROWS[rows]] = True
    g = masked(g, needed)
    whole = cpu.with_grad(a, ALL, g, MASK, False, plan_of(a, ALL, g, MASK))
    tensors, plan = flat(a)
    end = (unparse(a.epilogue), ALL, *plan)
    found = ops.row_stats_with_grad(*tensors, *g, *end, MASK, needed=needed)
    for f, alone, e in zip(found, ops.row_stats(*tensors, *end, needed=needed), whole[0]):
        assert torch.equal(f, alone)
        close(f[needed], e[needed], dtype)
        assert not f[~needed].any()
    assert not found[6][~needed].any()
    for f, e in zip(found[6:], whole[1:]):
        close(f, e.to(f.dtype), dtype)

    lse, neg_entropy = whole[0].lse, whole[0].neg_entropy
    slope = 0 if g.lse_slope is None else g.lse_slope * lse
    g = g._replace(lse=slope + (0 if g.lse is None else g.lse), lse_slope=None)
    if not isinstance(g.lse, Tensor):
        g = g._replace(lse=None)
    every = cpu.backward(a, lse, neg_entropy, g, MASK, plan_of(a, 0, g, MASK))
    for f, e in zip(heads.backward(a, lse, neg_entropy, g, MASK), every):
        close(f, e, dtype)


def test_a_row_with_a_gradient_counts_whatever_is_needed():
    a, g = rows_cases.make(Case(grads=GRADS), "cpu")
    nothing = torch.zeros(7, dtype=torch.bool)
    assert counting.counting(a, nothing, g) is None
    for field in GRADS:
        only = torch.arange(7) == 3
        g = RowGrads(**{field: torch.where(only[:, None] if field == "target" else only, 1.0, 0.0)})
        assert counting.counting(a, nothing, g).tolist() == [3]
    assert counting.counting(a, nothing, RowGrads(lse=torch.where(only, torch.nan, 0))).tolist() == [3]


def test_products_are_of_the_rows_that_count():
    """Chunks of two rows."""
    a, g = rows_cases.make(Case(N=20, chunk_tokens=2), "cpu")
    tensors, plan = flat(a)
    needed = torch.arange(20) % 4 == 0
    g = masked(g, needed)
    assert products(lambda: ops.row_stats(*tensors, "", LSE, *plan, needed=needed)) == 3
    assert products(lambda: ops.row_stats(*tensors, "", LSE, *plan)) == 10
    assert products(lambda: ops.row_stats_with_grad(*tensors, *g, "", LSE, *plan, MASK, needed=needed)) == 9
    assert products(lambda: ops.row_stats_with_grad(*tensors, *g, "", LSE, *plan, MASK)) == 30
    given = (torch.zeros(20), None, g.lse, g.target, None, None)
    assert products(lambda: ops.row_stats_backward(*tensors, *given, "", *plan, MASK)) == 9


INFINITE = {
    "x": lambda a: a.x[3].fill_(torch.inf),
    "x is NaN": lambda a: a.x[3, 2].fill_(torch.nan),
    "overflow": lambda a: a.x[3].fill_(1e38),
    "in fp16": lambda a: a.x[3].fill_(1e4),
}
EVERYWHERE = {
    "weight": lambda a: a.weight[5, 2].fill_(torch.inf),
    "bias": lambda a: a.bias[5].fill_(-torch.inf),
    "class weight": lambda a: a.class_weight[5].fill_(torch.inf),
    "epilogue": lambda a: None,
}


@pytest.mark.parametrize("what", [*INFINITE, *EVERYWHERE])
def test_rows_whose_logits_may_be_infinite_count(what):
    """Zero times infinity is NaN in eager; so these are computed, whatever is needed."""
    dtype = torch.float16 if what == "in fp16" else torch.float32
    epilogue = "div 0.0;tanh" if what == "epilogue" else ""
    a, _ = rows_cases.make(Case(bias=True, class_weight=True, epilogue=epilogue, dtype=dtype), "cpu")
    {**INFINITE, **EVERYWHERE}[what](a)
    rows = counting.counting(a, torch.arange(7) == 1)
    assert rows is None if what in EVERYWHERE else rows.tolist() == [1, 3]


def test_a_bad_target_is_an_error_in_any_row():
    a, g = rows_cases.make(Case(), "cpu")
    a.target[2] = 1000
    tensors, plan = flat(a)
    nothing = torch.zeros(7, dtype=torch.bool)
    for call in (
        lambda: ops.row_stats(*tensors, "", LSE | TARGET, *plan, needed=nothing),
        lambda: ops.row_stats_with_grad(*tensors, *masked(g, nothing), "", TARGET, *plan, MASK, needed=nothing),
    ):
        with pytest.raises(IndexError, match="Target 1000 is out of bounds"):
            call()


@pytest.mark.parametrize("N, V", [(0, 65), (3, 0)])
def test_nothing_to_count(N, V):
    a = HeadArgs(torch.zeros(N, 4), torch.zeros(V, 4), None, None, None, (), 0, 1 << 30)
    assert counting.counting(a, torch.zeros(N, dtype=torch.bool)) is None
