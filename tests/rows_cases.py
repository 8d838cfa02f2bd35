"""Cases for lower/head_cuda.py, checked against fp64: by the interpreter on the CPU, compiled on a GPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F

from lce_inductor.lower import head as heads
from lce_inductor.lower.chunk_plan import ClassPlan
from lce_inductor.lower.device_policy import POLICIES, ROWS, Policy, Products
from lce_inductor.lower.plan import Device, Mask, Plan, decide
from lce_inductor.spec.epilogue import apply, parse
from lce_inductor.spec.statistics import (
    ARGMAX,
    LSE,
    MAX,
    NEG_ENTROPY,
    NO_TARGET,
    SUM,
    TARGET,
    HeadArgs,
    RowGrads,
    Stats,
    computed,
    empty_stats,
)

ALL = LSE | TARGET | SUM | NEG_ENTROPY | MAX | ARGMAX
GRADS = ("lse", "lse_slope", "target", "sum", "neg_entropy")
SOFTCAP = "div 3.0;tanh;mul 3.0"


@dataclasses.dataclass(frozen=True)
class Case:
    """One head: N tokens, H hidden, V vocabulary, K target columns."""

    N: int = 7
    H: int = 16
    V: int = 65
    K: int = 1
    dtype: torch.dtype = torch.float32
    bias: bool = False
    class_weight: bool = False
    epilogue: str = ""
    grads: tuple[str, ...] = ("lse", "target")
    chunk_tokens: int = 0
    strided: bool = False  # x, weight, target and gradients that are not contiguous
    scale: float = 3.0  # of the logits

    def __str__(self) -> str:
        default = Case()
        parts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return "-".join(f"{k}={v}" for k, v in parts.items() if v != getattr(default, k)) or "default"


# Our products on sm_90 for any size.
ALWAYS_OURS = dataclasses.replace(
    POLICIES["cuda"], products=Products(0, 0, dx_least_H=0, dx_library_full=2.0, dx_full=0.0)
)


TRITON = Device("cuda", triton=True)  # as the interpreter is one
SM_90 = TRITON._replace(hopper=True, clusters=3)  # as hopper_emulated.py is one


class Planned:
    """lower/head.py on a device, by one algorithm whatever speaks against it, so that small sizes do.

    classes: of a block, for backwards; 0 for chunks of rows. counts: are rows that don't count left out of all calls?
    """

    def __init__(
        self, algorithm: str = ROWS, device: Device = TRITON, policy: Policy = POLICIES["cuda"], classes: int = 0,
        counts: bool = False,
    ) -> None:  # fmt: skip
        self.algorithm, self.device, self.policy, self.classes = algorithm, device, policy, classes
        self.counts = counts

    def plan(
        self, a: HeadArgs, stats: int, grads: RowGrads | None = None, mask: Mask = (False,) * 3, counts: bool = False
    ) -> Plan:
        if grads is not None:
            stats = computed(stats, grads.bits()) if stats else 0
        r = heads.request(a, stats, grads, mask, counts=counts or self.counts)
        return decide(r, self.device, self.policy, self.algorithm)

    def forward(self, a: HeadArgs, stats: int, needed: torch.Tensor | None = None) -> Stats:
        return heads.forward(a, stats, needed, self.plan(a, stats, counts=needed is not None))

    def backward(self, a: HeadArgs, lse, neg_entropy, grads: RowGrads, mask: Mask):
        plan, V = self.plan(a, 0, grads, mask, counts=True), len(a.weight)
        if self.classes:
            blocks = ClassPlan(self.classes, -(-V // self.classes), self.policy.chunks.align)
            plan = dataclasses.replace(plan, classes=blocks)
        return heads.backward(a, lse, neg_entropy, grads, mask, plan)

    def with_grad(self, a: HeadArgs, stats: int, grads: RowGrads, mask: Mask, wide: bool = False, needed=None):
        plan = self.plan(a, stats, grads, mask, counts=needed is not None)
        return heads.with_grad(a, stats, grads, mask, wide, needed, plan)


def on(device: str) -> Any:
    """What computes heads on a GPU is for it to choose; on the CPU, by the interpreter, it is the row kernel."""
    return heads if device == "cuda" else Planned()


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CASES = [
    *(Case(dtype=d) for d in DTYPES),
    *(Case(dtype=d, N=10, V=257, K=3, bias=True, class_weight=True, grads=GRADS, chunk_tokens=4) for d in DTYPES),
    *(Case(dtype=d, epilogue=SOFTCAP, bias=True, grads=GRADS) for d in DTYPES),
    *(Case(dtype=torch.bfloat16, grads=(g,), chunk_tokens=3) for g in GRADS),
    *(Case(dtype=torch.float64, grads=(g,), epilogue=SOFTCAP) for g in GRADS),
    Case(N=0),
    Case(N=0, K=0, bias=True),
    Case(N=1, H=1, V=1),
    Case(N=1, H=3, V=2, bias=True),
    Case(N=5, K=0, grads=("lse",)),
    Case(N=5, K=0, grads=("sum", "neg_entropy"), class_weight=True),
    Case(N=13, H=33, V=1025, K=2, strided=True, bias=True, grads=GRADS),
    Case(N=13, H=33, V=1025, strided=True, dtype=torch.bfloat16, grads=("lse", "target", "sum"), chunk_tokens=5),
    Case(epilogue="mul 2.0;rsqrt_cap 15.0 225.0;add 0.25;sigmoid", dtype=torch.float64, grads=GRADS),
    Case(epilogue="mul 2.0;rsqrt_cap 15.0 225.0;add 0.25;sigmoid;mul 4.0", dtype=torch.bfloat16, grads=GRADS),
    Case(scale=200.0),
    Case(scale=30.0, dtype=torch.bfloat16),
]
# For backwards in blocks of 64 classes, of which the last one has fewer.
IN_BLOCKS = [
    *(Case(dtype=d, N=10, V=257, K=3, bias=True, class_weight=True, grads=GRADS) for d in DTYPES),
    *(Case(dtype=d, N=10, V=130, epilogue=SOFTCAP, grads=GRADS) for d in (torch.float64, torch.bfloat16)),
    *(Case(dtype=torch.bfloat16, V=200, grads=(g,)) for g in GRADS if g != "lse_slope"),
    Case(N=0, bias=True, V=130),
    Case(N=1, H=1, V=65),
    Case(N=5, K=0, V=200, grads=("sum", "neg_entropy"), class_weight=True),
    Case(N=13, H=33, V=1025, K=2, strided=True, bias=True, grads=GRADS),
]


def make(case: Case, device: str) -> tuple[HeadArgs, RowGrads]:
    """Random inputs of a case; every third row has no target."""
    g = torch.Generator().manual_seed(7)
    dtype, wide = case.dtype, torch.float64 if case.dtype == torch.float64 else torch.float32

    def rand(*shape: int, dtype: torch.dtype = wide) -> torch.Tensor:
        t = torch.randn(shape, generator=g, dtype=torch.float64).to(device, dtype)
        return spread(t) if case.strided else t

    def spread(t: torch.Tensor) -> torch.Tensor:
        return torch.stack([t, t + 1], -1)[..., 0] if t.dim() == 1 else t.t().contiguous().t()

    x = rand(case.N, case.H, dtype=dtype)
    weight = rand(case.V, case.H, dtype=dtype) * (case.scale * case.H**-0.5)
    target = torch.randint(0, case.V, (case.N, case.K), generator=g)
    target[::3] = NO_TARGET
    args = HeadArgs(
        x=x,
        weight=weight,
        bias=rand(case.V, dtype=dtype) if case.bias else None,
        target=spread(target.to(device)) if case.K else None,
        class_weight=rand(case.V).abs() if case.class_weight else None,
        epilogue=parse(case.epilogue),
        chunk_tokens=case.chunk_tokens,
        workspace_bytes=1 << 30,
    )
    grads = {name: rand(case.N) for name in case.grads if name != "target"}
    if "target" in case.grads and case.K:
        grads["target"] = rand(case.N, case.K)
    if case.strided and "lse" in grads:
        grads["lse"] = rand(1).expand(case.N)
    return args, RowGrads(**grads)


def stats_of(y: torch.Tensor, a: HeadArgs) -> Stats:
    """Statistics of whole rows, by torch's own functions, in the dtype of y."""
    n = y.shape[0]
    if a.target is None:
        picked = y.new_zeros(n, 0)
    else:
        picked = torch.where(a.target >= 0, y.gather(1, a.target.clamp(min=0)), 0)
    weighted = y if a.class_weight is None else y * a.class_weight.to(y.dtype)
    return Stats(
        y.logsumexp(1),
        picked,
        weighted.sum(1),
        (y.softmax(1) * y.log_softmax(1)).sum(1),
        y.amax(1) if n else y.sum(1),
        y.argmax(1),
    )


def whole(a: HeadArgs, grads: RowGrads, dtype: torch.dtype) -> tuple[Stats, list[torch.Tensor]]:
    """Statistics and gradients (dx, dw, db) by autograd through all the logits, the linear layer in `dtype`."""
    leaves = [t if t is None else t.detach().to(dtype).requires_grad_() for t in (a.x, a.weight, a.bias)]
    z = F.linear(*leaves)
    found = stats_of(apply(a.epilogue, z if dtype == torch.float64 else z.float()), a)
    terms = [z.sum() * 0]
    for g, value in (
        (grads.lse, found.lse),
        (grads.lse_slope, found.lse**2 / 2),
        (grads.target, found.target_logit),
        (grads.sum, found.sum_logits),
        (grads.neg_entropy, found.neg_entropy),
    ):
        if g is not None:
            terms.append((g.to(value.dtype) * value).sum())
    sum(t.double() for t in terms).backward()
    return Stats(*(f.detach() for f in found)), [a.x.new_zeros(0) if t is None else t.grad for t in leaves]


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30)).item()


def compare(case: Case, names, found, eager, exact, factor: float) -> None:
    # Where eager and the reference are the same computation, eager's error is no measure. In fp64 the reference has one of
    # its own, of sums over up to 50,000 classes.
    floor = 16 * torch.finfo(torch.float32 if case.dtype.itemsize == 2 else case.dtype).eps
    floor *= 4 if case.dtype == torch.float64 else 1
    for name, f, e, r in zip(names, found, eager, exact):
        assert f.shape == r.shape, name
        if name == "argmax":
            # The linear layer's rounding may decide between near equals: what matters is the value found there.
            continue
        if r.numel():
            mine, theirs = error(f, r), error(e, r)
            assert mine <= factor * theirs + floor, f"{case} {name}: error {mine:.2e}, eager's {theirs:.2e}"


def check(case: Case, device: str, factor: float, run: Planned | None = None) -> None:
    """All three entry points of a case: error <= factor * eager's, both against fp64, with a floor of 16 ulp."""
    run = run or on(device)
    a, grads = make(case, device)
    exact_stats, exact_grads = whole(a, grads, torch.float64)
    eager_stats, eager_grads = whole(a, grads, case.dtype)
    mask = (True, True, case.bias)
    names = ("dx", "dw", "db")
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32

    stats = run.forward(a, ALL)
    compare(case, Stats._fields, stats, eager_stats, exact_stats, factor)
    assert [s.dtype for s in stats] == [torch.float64, *[wide] * 4, torch.int64]

    again, *found = run.with_grad(a, ALL, grads, mask)
    for first, second in zip(stats, again):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    compare(case, names, found, eager_grads, exact_grads, factor)
    sums = torch.float32 if case.dtype == torch.float16 else case.dtype
    # db comes as it was summed: the bias may be wider than x, and the op casts to its dtype.
    assert [t.dtype for t in found] == [case.dtype, sums, wide]
    assert all(t.is_contiguous() for t in found)

    slope = 0 if grads.lse_slope is None else grads.lse_slope * stats.lse
    g_lse = slope if grads.lse is None else grads.lse + slope
    plain = grads._replace(lse=None if isinstance(g_lse, int) else g_lse, lse_slope=None)
    found = run.backward(a, stats.lse, stats.neg_entropy, plain, mask)
    compare(case, names, found, eager_grads, exact_grads, factor)
    assert [t.dtype for t in found] == [case.dtype, case.dtype, wide]


def check_only_what_was_asked(device: str) -> None:
    """Each statistic and each gradient alone equals the same one among all, and the rest is empty."""
    run = on(device)
    a, grads = make(Case(bias=True, K=2, class_weight=True, grads=GRADS, chunk_tokens=3), device)
    all_stats, *all_grads = run.with_grad(a, ALL, grads, (True, True, True))
    for i in range(len(all_stats)):
        for got in (run.forward(a, 1 << i), run.with_grad(a, 1 << i, grads, (True, False, False))[0]):
            for j, (one, full) in enumerate(zip(got, all_stats)):
                torch.testing.assert_close(one, full if i == j else full.new_empty(0), rtol=0, atol=0)
    for i in range(3):
        mask = tuple(i == j for j in range(3))
        for got in (
            run.with_grad(a, LSE, grads, mask)[1:],
            run.backward(a, all_stats.lse, all_stats.neg_entropy, RowGrads(sum=grads.sum), mask),
        ):
            assert [t.numel() > 0 for t in got] == list(mask)
        torch.testing.assert_close(run.with_grad(a, LSE, grads, mask)[1 + i], all_grads[i], rtol=0, atol=0)
    nothing = run.backward(a, all_stats.lse, None, RowGrads(), (True, True, True))
    assert [t.shape for t in nothing] == [a.x.shape, a.weight.shape, a.bias.shape]
    assert not any(t.any() for t in nothing)


def check_not_finite(device: str) -> None:
    """Infinite and NaN logits: what torch's own functions give, NaN where they give NaN."""
    run = on(device)
    V, inf, nan = 70, float("inf"), float("nan")
    y = torch.linspace(-2, 2, V).repeat(7, 1)
    y[1, 3] = -inf
    y[2, :] = -inf
    y[3, 5] = inf
    y[4, 66] = nan
    y[5, :] = -300.0
    y[6, 2:4] = 300.0
    # x picks a row of logits out of the weight, so that every one of them is exact.
    one_hot = torch.zeros(7, 7)
    a = HeadArgs(one_hot.to(device), torch.zeros(V, 7, device=device), None, None, None, (), 0, 1 << 30)
    exact = stats_of(y.double(), a)
    for n in range(7):
        a = a._replace(
            x=torch.zeros(1, 7, device=device),
            bias=y[n].to(device),
            target=torch.tensor([[3, 5, NO_TARGET]], device=device),
        )
        grads = RowGrads(lse=torch.ones(1, device=device))
        found, _, _, db = run.with_grad(a, ALL, grads, (True, True, True))
        for name in ("lse", "sum_logits", "neg_entropy", "max_logit", "argmax"):
            got, want = getattr(found, name).double().cpu()[0], getattr(exact, name)[n].double()
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5, equal_nan=True, msg=f"row {n} {name}")
        picked = torch.stack([y[n, 3], y[n, 5], torch.tensor(0.0)])
        torch.testing.assert_close(found.target_logit.cpu()[0], picked, equal_nan=True)
        p = (y[n].double() - exact.lse[n]).exp()
        torch.testing.assert_close(db.double().cpu(), p, rtol=1e-5, atol=1e-7, equal_nan=True, msg=f"row {n} db")


def check_masked_classes(device: str, run: Planned | None = None) -> None:
    """A class of bias -inf gets no gradient from the softmax, not even beside a row gradient that is not finite."""
    run = run or on(device)
    a, _ = make(Case(bias=True), device)
    hidden = torch.arange(a.weight.shape[0], device=device) % 5 == 4
    a.bias[hidden] = -torch.inf
    found = run.forward(a, LSE | NEG_ENTROPY)
    grads = RowGrads(lse=torch.full((len(a.x),), torch.inf, device=device))
    for _, dw, db in (
        run.with_grad(a, LSE, grads, (True,) * 3)[1:],
        run.backward(a, found.lse, None, grads, (True,) * 3),
    ):
        assert not db[hidden].any() and not db[~hidden].isfinite().any()
        assert not dw[hidden].any() and not dw[~hidden].isfinite().any()


def check_padding(device: str) -> None:
    """What lies between V and the row stride is never taken in, and statistics alone write no logit."""
    from lce_inductor.kernels import rows

    n, V, row_stride = 3, 50, 64
    z = torch.randn(n, row_stride, generator=torch.Generator().manual_seed(1)).to(device)
    z[:, V:] = float("nan")
    before = z.clone()
    a = HeadArgs(z[:, :V], z[:, :V], None, None, None, (), 0, 0)
    found = empty_stats(a.x, None, ALL)
    rows.launch(z, V, 0, None, None, None, (), ALL, found, None)
    exact = stats_of(before[:, :V].double(), a)
    for got, want in zip(found, exact):
        torch.testing.assert_close(got.double(), want.double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(z, before, rtol=0, atol=0, equal_nan=True)
    rows.launch(z, V, 0, None, None, None, (), 0, found, RowGrads(lse=torch.ones(n, device=device)))
    torch.testing.assert_close(z[:, :V], before[:, :V].softmax(1), rtol=1e-5, atol=1e-7)


def check_ties(device: str) -> None:
    """argmax is the lowest index, across blocks too."""
    run = on(device)
    V = 20_000
    bias = torch.zeros(V)
    bias[[777, 778, 15_000]] = 1.0
    zeros = torch.zeros(2, 4, device=device)
    a = HeadArgs(zeros, torch.zeros(V, 4, device=device), bias.to(device), None, None, (), 0, 1 << 30)
    assert run.forward(a, ARGMAX).argmax.tolist() == [777, 777]
    assert run.forward(a._replace(bias=None), ARGMAX).argmax.tolist() == [0, 0]
