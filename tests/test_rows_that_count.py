"""Rows that the loss does not depend on are not computed; and everything comes out as in eager."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from harness import Compiled, H, N, V, check_against_eager, check_results, fresh, head, joint_graph, listing, results
from harness import rewrite as rewritten
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from turns import crossed

from lce_inductor.lower import plan
from lce_inductor.schedule.request import leaves_rows_out
from lce_inductor.spec.statistics import LSE, TARGET

Fn = Callable[..., object]
KEPT = [2, 3, 9, 20, 21]  # of 24 rows: in the first, the second and the last of four sequences
K = len(KEPT)


def arguments(dtype: torch.dtype = torch.float32, kept: list[int] = KEPT) -> list[Tensor]:
    """x, weight, all labels, labels of which only those of the rows kept are not ignored, a mask of these rows, what
    log-probabilities were before, advantages of sequences (that of the last is zero), a trained number."""
    x, w, _ = head(dtype=dtype)
    g = torch.Generator().manual_seed(3)
    y = torch.randint(0, V, (N,), generator=g)
    mask = torch.zeros(N, dtype=torch.bool)
    mask[kept] = True
    old = -3 + torch.randn(N, generator=g, dtype=torch.float64).to(dtype)
    advantages = torch.tensor([[1.0], [-0.5], [0.25], [0.0]], dtype=dtype)
    s = torch.tensor(3.0, dtype=dtype, requires_grad=True)
    return [x, w, y, torch.where(mask, y, -100), mask.to(dtype), old, advantages, s]


def ce(x: Tensor, w: Tensor, y: Tensor, **options: object) -> Tensor:
    return F.cross_entropy(F.linear(x, w), y, **options)


def rows(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return ce(x, w, y, reduction="none")


def log_probs(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.linear(x, w).log_softmax(-1).gather(-1, y[:, None])[:, 0]


def lse(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w).logsumexp(-1)


def masked_mean(r: Tensor, m: Tensor) -> Tensor:
    return (r * m).sum() / m.sum()


def entropies(x: Tensor, w: Tensor) -> Tensor:
    p = F.linear(x, w).log_softmax(-1)
    return -(p.exp() * p).sum(-1)


def grpo(x: Tensor, w: Tensor, y: Tensor, m: Tensor, old: Tensor, a: Tensor) -> Tensor:
    ratio, m = (log_probs(x, w, y) - old).exp().view(4, 6), m.view(4, 6)
    return -masked_mean(torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a), m)


def dpo(x: Tensor, w: Tensor, y: Tensor, m: Tensor) -> Tensor:
    chosen, rejected = (log_probs(x, w, y) * m).view(2, 2, 6).sum(-1)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


class MaskedForwardOnly(torch.autograd.Function):
    """The gradient ignores the mask, as a straight-through estimator does."""

    @staticmethod
    def forward(ctx, r, m):
        return r * m

    @staticmethod
    def backward(ctx, g):
        return g, None


class MaskedBackwardOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, r, m):
        ctx.save_for_backward(m)
        return r.clone()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0], None


# x, w, y, labels with those to be ignored, mask, old, advantages, trained number -> and how many rows of logits are
# computed, a recomputing backward's included.
SKIPPED: dict[str, tuple[Fn, int]] = {
    "mean": (lambda x, w, y, i, m, old, a, s: ce(x, w, i), K),
    "sum": (lambda x, w, y, i, m, old, a, s: ce(x, w, i, reduction="sum"), K),
    "rows that are ignored returned": (lambda x, w, y, i, m, old, a, s: rows(x, w, i), 2 * K),
    "label smoothing": (lambda x, w, y, i, m, old, a, s: ce(x, w, i, label_smoothing=0.1), K),
    "class weights": (lambda x, w, y, i, m, old, a, s: ce(x, w, i, weight=torch.linspace(0.1, 1, V).to(x)), K),
    "mask": (lambda x, w, y, i, m, old, a, s: masked_mean(rows(x, w, y), m), K),
    "mask of sequences": (
        lambda x, w, y, i, m, old, a, s: masked_mean(rows(x, w, y).view(4, 6), m.view(4, 6) * torch.tensor(0.5)), K,
    ),
    "mask by where": (lambda x, w, y, i, m, old, a, s: torch.where(m > 0, rows(x, w, y), 0).mean(), K),
    "mask by masked_fill": (lambda x, w, y, i, m, old, a, s: rows(x, w, y).masked_fill(m == 0, 7.0).mean(), K),
    "ignored and masked": (lambda x, w, y, i, m, old, a, s: masked_mean(rows(x, w, i), torch.arange(N) > 5), K - 2),
    "advantages of zero": (
        lambda x, w, y, i, m, old, a, s: (rows(x, w, y).view(4, 6) * a * m.view(4, 6)).sum(), K - 2,
    ),
    "divided inside": (lambda x, w, y, i, m, old, a, s: masked_mean(rows(x, w, y) / 8, m) * 128, K),
    "z-loss": (lambda x, w, y, i, m, old, a, s: masked_mean(lse(x, w).square(), m), K),
    "loss and z-loss": (
        lambda x, w, y, i, m, old, a, s: ce(x, w, i) + 1e-2 * masked_mean(lse(x, w).square(), m), 2 * K,
    ),
    "weighted by a parameter": (lambda x, w, y, i, m, old, a, s: s * ce(x, w, i) + s, K),
    "a detached copy": (lambda x, w, y, i, m, old, a, s: (lambda r: (r, r.detach() * 2))(ce(x, w, i)), K),
    "accuracy of the rows that count": (
        lambda x, w, y, i, m, old, a, s: (lambda z: (F.cross_entropy(z, i), ((z.argmax(-1) == y) * m).sum()))(
            F.linear(x, w)
        ), K,
    ),
    "two losses of a head": (
        lambda x, w, y, i, m, old, a, s: (lambda z: F.cross_entropy(z, i) + masked_mean(z.logsumexp(-1), m))(
            F.linear(x, w)
        ), K,
    ),
    "two heads": (lambda x, w, y, i, m, old, a, s: ce(x, w, i) + 2 * masked_mean(rows(x.roll(1, 0), w, y), m), 2 * K),
    "entropy": (lambda x, w, y, i, m, old, a, s: masked_mean(entropies(x, w), m), K),
    "log-probabilities": (lambda x, w, y, i, m, old, a, s: log_probs(x, w, y) * m, 2 * K),
    "ratios": (lambda x, w, y, i, m, old, a, s: grpo(x, w, y, m, old, a + 1), 2 * K),
    # One of these ratios is clipped and has no gradient.
    "ratios, an advantage of zero": (lambda x, w, y, i, m, old, a, s: grpo(x, w, y, m, old, a), 3 + 2),
    "preferences": (lambda x, w, y, i, m, old, a, s: dpo(x, w, y, m), 2 * K),
    "perplexity": (lambda x, w, y, i, m, old, a, s: ce(x, w, i).exp(), 2 * K),
    "focal": (
        lambda x, w, y, i, m, old, a, s: (lambda r: masked_mean((1 - (-r).exp()) ** 2 * r, m))(rows(x, w, y)), 2 * K,
    ),
    "a gradient of zero": (lambda x, w, y, i, m, old, a, s: ce(x, w, y).clamp(max=0.1), N),
}  # fmt: skip

# The same masks, but all rows reach what is returned.
ALL: dict[str, tuple[Fn, int]] = {
    # The gradient divides by the values, and zero by zero is NaN.
    "logarithms": (lambda x, w, y, i, m, old, a, s: masked_mean(rows(x, w, y).log(), m), N + K),
    "rows returned": (lambda x, w, y, i, m, old, a, s: (lambda r: (masked_mean(r, m), r.detach()))(rows(x, w, y)), N),
    "their mean returned": (
        lambda x, w, y, i, m, old, a, s: (lambda r: (masked_mean(r, m), r.detach().mean()))(rows(x, w, y)), N,
    ),
    "rows returned with their gradient": (
        lambda x, w, y, i, m, old, a, s: (lambda r: (masked_mean(r, m), r))(rows(x, w, y)), 2 * N,
    ),
    "lse returned": (
        lambda x, w, y, i, m, old, a, s: (lambda z: (F.cross_entropy(z, i), z.logsumexp(-1).detach()))(F.linear(x, w)),
        N,
    ),
    "accuracy of all rows": (
        lambda x, w, y, i, m, old, a, s: (lambda z: (F.cross_entropy(z, i), (z.argmax(-1) == y).sum()))(F.linear(x, w)),
        N,
    ),
    "the largest logit of all": (
        lambda x, w, y, i, m, old, a, s: (lambda z: (F.cross_entropy(z, i), z.detach().amax(-1).amax()))(F.linear(x, w)),
        N,
    ),
    "z-loss of all rows": (
        lambda x, w, y, i, m, old, a, s: (lambda z: F.cross_entropy(z, i) + z.logsumexp(-1).square().mean())(
            F.linear(x, w)
        ), N,
    ),
    "detached rows in the loss": (
        lambda x, w, y, i, m, old, a, s: (lambda r: masked_mean(r, m) + r.detach().sum())(rows(x, w, y)), N,
    ),
    "mask of the gradient alone": (
        lambda x, w, y, i, m, old, a, s: MaskedBackwardOnly.apply(rows(x, w, y), m).sum(), N,
    ),
    "mask of the value alone": (lambda x, w, y, i, m, old, a, s: MaskedForwardOnly.apply(rows(x, w, y), m).sum(), N),
    "sums of rows, then the mask": (lambda x, w, y, i, m, old, a, s: (rows(x, w, y).cumsum(0) * m).sum(), N + 22),
    "by their mean, then the mask": (
        lambda x, w, y, i, m, old, a, s: (lambda r: masked_mean(r - r.detach().mean(), m))(rows(x, w, y)), N,
    ),
    "another order, then the mask": (lambda x, w, y, i, m, old, a, s: (rows(x, w, y).flip(0) * m).sum(), N),
    "hardest rows": (lambda x, w, y, i, m, old, a, s: rows(x, w, y).topk(5).values.sum(), 2 * N - 19),
    "mask of the values themselves": (
        lambda x, w, y, i, m, old, a, s: (lambda r: (r * (r.detach() > 1e9)).sum() + r.sum())(rows(x, w, y)), 2 * N,
    ),
    "a mask that is a number": (lambda x, w, y, i, m, old, a, s: (rows(x, w, y) * m[2]).sum(), N),
    "smoothing that forgets the mask": (
        lambda x, w, y, i, m, old, a, s: (lambda p: masked_mean(rows(x, w, y), m) - 0.1 * p.mean(-1).mean())(
            F.linear(x, w).log_softmax(-1)
        ), K + N,
    ),
}  # fmt: skip


def logits_rows(call: Callable[[], object], h: int = H, v: int = V) -> int:
    """Rows of logits that a call computes; dX and dW must be of no more rows."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        call()
    logits = dx = dw = 0
    for event in found.events():
        if event.name in ("aten::mm", "aten::addmm"):
            left, right = event.input_shapes[:2] if event.name == "aten::mm" else event.input_shapes[1:3]
            logits += left[0] if left[1:] == [h] and right == [h, v] else 0
            dx += left[0] if right == [v, h] else 0
            dw += left[1] if left[0] == v else 0
    assert max(dx, dw) <= logits
    return logits


@pytest.mark.parametrize("name, dtype", crossed([*SKIPPED, *ALL], [torch.float32, torch.bfloat16]), ids=str)
def test_rows_computed(name, dtype, installed):
    """The rows that count and no others, and the same results."""
    fn, expected = {**SKIPPED, **ALL}[name]
    args = arguments(dtype)
    compiled = check_against_eager(fn, args)
    assert compiled.counts["rewritten"] and compiled.largest < N * V and not compiled.refusals
    args = fresh(args)
    assert logits_rows(lambda: results(compiled, args)) == expected


@pytest.mark.parametrize(
    "name, dtype",
    crossed(
        ["mean", "mask", "label smoothing", "loss and z-loss", "ratios", "preferences"], [torch.float64, torch.float16]
    ),
    ids=str,
)
def test_dtypes(name, dtype, installed):
    check_against_eager(SKIPPED[name][0], arguments(dtype))


@pytest.mark.parametrize("name", ["mean", "sum", "mask", "label smoothing", "class weights", "entropy"])
def test_how_many(name, installed):
    """None, one, all. A mean over nothing is NaN, as in eager; by a mask, so is the gradient of each row."""
    fn = SKIPPED[name][0]
    compiled = Compiled(fn)
    for kept in ([], [7], list(range(N))):
        args = arguments(kept=kept)
        check_results(fn, args, results(compiled, fresh(args)))
        args = fresh(args)
        expected = N if not kept and name in ("mask", "entropy") else len(kept)
        assert logits_rows(lambda args=args: results(compiled, args)) == expected


@pytest.mark.parametrize("name", ["mean", "sum", "mask"])
def test_no_rows_at_all(name, installed):
    x, w, y, i, m, *others = arguments()
    args = [x.detach()[:0].requires_grad_(), w, y[:0], i[:0], m[:0], *others]
    check_against_eager(SKIPPED[name][0], args)


@pytest.mark.parametrize("name", ["mean", "mask", "mask by where", "z-loss", "entropy", "focal"])
def test_dynamic_shapes(name, installed):
    """One graph; which rows count, and how many, is data."""
    fn = SKIPPED[name][0]
    compiled = Compiled(fn, dynamic=True)
    for times, kept in ((1, KEPT), (2, [0]), (3, list(range(N)))):
        x, w, y, i, m, *others = arguments(kept=kept)
        args = [torch.cat([x.detach()] * times).requires_grad_(), w, *(t.repeat(times) for t in (y, i, m)), *others]
        check_results(fn, args, results(compiled, fresh(args)))
        args = fresh(args)
        expected = len(kept) * times * (2 if name == "focal" else 1)
        assert logits_rows(lambda args=args: results(compiled, args)) == expected
    assert compiled.counts["rewritten"] == 1


@pytest.mark.parametrize("name", ["mean", "mask", "rows that are ignored returned", "ratios"])
def test_without_gradients(name, installed):
    fn, args = SKIPPED[name][0], arguments()
    compiled = Compiled(fn)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*args), fn(*args))
        assert logits_rows(lambda: compiled(*args)) == K
    assert compiled.counts["rewritten"]


def test_times_a_size(installed):
    """A size says nothing of rows."""
    fn = lambda x, w, y, i, m, old, a, s: masked_mean(rows(x, w, y) * x.shape[0], m)
    args = arguments()
    compiled = check_against_eager(fn, args, dynamic=True)
    args = fresh(args)
    assert logits_rows(lambda: results(compiled, args)) == K


@torch._dynamo.config.patch(capture_scalar_outputs=True)
@pytest.mark.parametrize(
    "number", [lambda r: r.detach().sum().item(), lambda r: r.detach().mul(100).sum().long().item()]
)
def test_a_number_read_of_all_rows(number, installed):
    args = arguments()
    fn = lambda x, w, y, i, m, old, a, s: (lambda r: (masked_mean(r, m), y + number(r)))(lse(x, w))
    compiled = check_against_eager(fn, args)
    args = fresh(args)
    assert not compiled.counts["rewritten"] or logits_rows(lambda: results(compiled, args)) == N


def test_only_a_gradient_comes_in(installed):
    """The loss of each row is returned, and only some of them are differentiated."""
    args = arguments()
    compiled = Compiled(lambda *a: rows(*a[:3]))
    (fused, eager), mask = (fresh(args), fresh(args)), args[4]
    r = compiled(*fused)
    assert logits_rows(lambda: (r * mask).sum().backward()) == K
    (rows(*eager[:3]) * mask).sum().backward()
    for f, e in zip(fused[:2], eager[:2]):
        torch.testing.assert_close(f.grad, e.grad)


def test_gradients_accumulate(installed):
    """Micro-batches, one of which has no label at all; the loss is scaled outside."""
    compiled = Compiled(lambda x, w, i: ce(x, w, i, reduction="sum"))
    x, w, _, i, *_ = arguments()
    (mine,), (theirs,) = fresh([w]), fresh([w])
    for part in range(4):
        at = slice(6 * part, 6 * part + 6)
        (compiled(x.detach()[at], mine, i[at]) / K).backward()
        (ce(x.detach()[at], theirs, i[at], reduction="sum") / K).backward()
    torch.testing.assert_close(mine.grad, theirs.grad)


# -- values that are no numbers


@pytest.mark.parametrize("name", ["mean", "mask", "z-loss", "entropy", "log-probabilities"])
def test_a_row_of_weight_zero_that_is_not_finite(name, installed):
    """Zero times NaN is NaN: so such a row is computed, in the forward and in a backward."""
    fn = SKIPPED[name][0]
    compiled = Compiled(fn)
    for bad in (float("inf"), float("nan")):
        args = arguments()
        with torch.no_grad():
            args[0][5] = bad
        check_results(fn, args, results(compiled, fresh(args)))


def test_what_is_made_of_a_row_that_is_not_finite(installed):
    """A ratio of such a row counts as zero, where eager's loss is NaN; the gradients are NaN as eager's."""
    args = arguments()
    with torch.no_grad():
        args[0][5] = float("nan")
    found, eager = results(Compiled(SKIPPED["ratios"][0]), fresh(args)), results(SKIPPED["ratios"][0], fresh(args))
    assert found[0].isfinite() and eager[0].isnan()
    for f, e in zip(found[1:3], eager[1:3]):
        torch.testing.assert_close(f, e, equal_nan=True)


def test_a_factor_that_is_not_finite(installed):
    """It is not zero, so its rows count."""
    args = arguments()
    args[4][4] = float("nan")
    check_against_eager(SKIPPED["mask"][0], args)


@pytest.mark.parametrize("name", ["ratios", "focal"])
def test_what_is_not_needed_can_not_overflow(name, installed):
    """exp(log p - old) is about one in eager; with a log p of zero for rows that are not computed it would be inf."""
    x, w, y, i, m, _, *others = arguments()
    with torch.no_grad():
        x[m == 0] *= 400
    args = [x, w, y, i, m, log_probs(x, w, y).detach(), *others]
    assert args[5][m == 0].min() < -200
    compiled = check_against_eager(SKIPPED[name][0], args)
    args = fresh(args)
    assert logits_rows(lambda: results(compiled, args)) < 2 * N


# -- the graphs


def needed(fn: Fn, *args: Tensor, dynamic: bool = False) -> str:
    """The lines that say which rows are needed, and make zeros of others."""
    traced = joint_graph(fn, *args, dynamic=dynamic)
    assert set(rewritten(traced)) == {"rewritten"}
    lines = listing(traced.graph).splitlines()
    found = [line for line in lines if line.startswith(("ne_scalar", "eq_scalar", "logical_", "where_self"))]
    calls = [
        line.partition("needed=")[2] or "all)"
        for line in lines
        if "row_stats_with_grad(" in line or "row_stats(" in line
    ]
    return "\n".join([*found, *(f"needed={call.removesuffix(')')}" for call in calls)])


def test_graph_of_a_mask():
    x, w, _, i, m, *_ = arguments()
    assert_expected_inline(
        needed(lambda x, w, i, m: masked_mean(rows(x, w, i), m), x, w, i, m),
        """\
where_self = aten.where.self(ne_3, unsqueeze_default_2, scalar_tensor_3)
ne_scalar = aten.ne.Scalar(primals_4, 0)
logical_and_default = aten.logical_and(ne_scalar, ne_1)
needed=logical_and_default""",
    )


def test_graph_of_label_smoothing():
    x, w, _, i, *_ = arguments()
    assert_expected_inline(
        needed(lambda x, w, i: ce(x, w, i, label_smoothing=0.1), x, w, i),
        """\
where_self = aten.where.self(ne_4, div_tensor, scalar_tensor_5)
where_self_1 = aten.where.self(eq, scalar_tensor_3, expand_default)
eq_scalar = aten.eq.Scalar(eq, 0)
logical_or_default = aten.logical_or(ne_1, eq_scalar)
needed=logical_or_default""",
    )


def test_graph_of_ratios():
    """Ratios are zero where they are not needed."""
    x, w, y, _, m, old, a, _ = arguments()
    assert_expected_inline(
        needed(grpo, x, w, y, m, old, a).replace("(gt_1, lt_1)", "(ge, le)"),  # the clamp's derivative, in torch 2.15
        """\
ne_scalar = aten.ne.Scalar(primals_6, 0)
ne_scalar_1 = aten.ne.Scalar(view_1, 0)
logical_and_default = aten.logical_and(reshape_default_5, reshape_default_6)
where_self = aten.where.self(logical_and_default, exp_1, full_default)
logical_and = aten.logical_and(ge, le)
needed=logical_and_default""",
    )


def test_graph_where_all_rows_are_needed():
    """The gradient is masked, the value is not."""
    x, w, _, _, m, *_ = arguments()
    fn = lambda x, w, m: (lambda r: masked_mean(r, m) + r.detach().sum())(lse(x, w))
    assert needed(fn, x, w, m) == "needed=all"


# -- on a GPU


def rows_left_out(dtype: torch.dtype, mask: tuple[bool, bool, bool] | None, n: int = 16384) -> bool:
    """Of cross-entropy at n x 2048 x 131072 on a GPU that need not be there."""
    graph, ops = torch.fx.Graph(), torch.ops.lce_inductor
    with FakeTensorMode(allow_non_fake_inputs=True):
        values = {
            "x": torch.empty(n, 2048, dtype=dtype, device="cuda"),
            "weight": torch.empty(131072, 2048, dtype=dtype, device="cuda"),
            "target": torch.empty(n, 1, dtype=torch.int64, device="cuda"), "g_lse": torch.empty(n, device="cuda"),
            "g_target": torch.empty(n, 1, device="cuda"),
        }  # fmt: skip
    nodes = {name: graph.placeholder(name) for name in values}
    for name, node in nodes.items():
        node.meta["val"] = values[name]
    settings = {
        "epilogue": "",
        "stats": LSE | TARGET,
        "chunk_tokens": 0,
        "workspace_bytes": 3 << 29,
        "output_mask": mask,
    }
    op = ops.row_stats.default if mask is None else ops.row_stats_with_grad.default
    names = [a.name for a in op._schema.arguments if a.name not in ("wide", "needed", "prefer")]
    return leaves_rows_out(graph.call_function(op, tuple((nodes | settings).get(name) for name in names)))


@pytest.mark.parametrize(
    "dtype, mask, n, left_out",
    [
        (torch.bfloat16, (True, True, False), 16384, True),
        (torch.bfloat16, None, 16384, True),
        (torch.bfloat16, (True, True, True), 16384, False),
        (torch.float16, (True, True, False), 16384, False),
        (torch.bfloat16, (True, True, False), 512, False),
    ],
    ids=["three products", "forward", "bias", "fp16", "small"],
)
def test_a_gpu_is_told_where_it_packs(
    dtype: torch.dtype, mask: tuple[bool, bool, bool] | None, n: int, left_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    h100 = plan.Device("cuda", triton=True, capability=(9, 0), hopper=True, clusters=66)
    monkeypatch.setattr(plan, "capabilities", lambda device: h100)
    plan.planned.cache_clear()
    try:
        assert rows_left_out(dtype, mask, n) == left_out
    finally:
        plan.planned.cache_clear()
