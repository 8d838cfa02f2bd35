"""The fused ops on the CPU: registration, statistics and gradients against fp64, what they cost, what they refuse."""

import pytest
import rows_cases
import torch
import torch.nn.functional as F
from harness import assert_as_accurate, error, fresh, head, products, results
from rows_cases import ALL, GRADS, SOFTCAP, Case
from torch.library import opcheck

from lce_inductor.lower import head as heads
from lce_inductor.ops import schema  # noqa: F401  (registers the ops)
from lce_inductor.spec.epilogue import unparse
from lce_inductor.spec.statistics import (
    ARGMAX,
    GRADIENTS,
    LSE,
    MAX,
    NEG_ENTROPY,
    NO_TARGET,
    STATISTICS,
    SUM,
    TARGET,
    HeadArgs,
    RowGrads,
    Stats,
    computed,
)

ops = torch.ops.lce_inductor
BUDGET = 1 << 30

# N odd, V odd, the last chunk shorter than the others, and chunks of every kind of size.
CHUNKS = [
    Case(N=N, V=101, bias=True, chunk_tokens=chunk, grads=("lse", "target"), dtype=dtype)
    for N in (1, 13)
    for chunk in (1, 7, 13, 1000)
    for dtype in (torch.float64, torch.bfloat16)
]
# Sizes at which errors average out: here the bound has to hold without luck.
LARGE = [Case(N=200, H=64, V=1001, dtype=dtype, chunk_tokens=64, grads=GRADS) for dtype in rows_cases.DTYPES]


def flat(a: HeadArgs) -> tuple:
    """Arguments of the ops up to the class weights, and the plan after the statistics."""
    return (a.x, a.weight, a.bias, a.target, a.class_weight), (a.chunk_tokens, a.workspace_bytes)


def row_stats(a: HeadArgs, stats: int) -> Stats:
    tensors, plan = flat(a)
    return Stats(*ops.row_stats(*tensors, unparse(a.epilogue), stats, *plan))


def with_grad(
    a: HeadArgs, stats: int, g: RowGrads, mask: tuple[bool, bool, bool], wide: bool = False
) -> list[torch.Tensor]:
    tensors, plan = flat(a)
    grads = (g.lse, g.lse_slope, g.target, g.sum, g.neg_entropy)
    return list(ops.row_stats_with_grad(*tensors, *grads, unparse(a.epilogue), stats, *plan, mask, wide))


def backward(a: HeadArgs, found: Stats, g: RowGrads, mask: tuple[bool, bool, bool]) -> list[torch.Tensor]:
    tensors, plan = flat(a)
    slope = 0 if g.lse_slope is None else g.lse_slope * found.lse
    g_lse = g.lse if g.lse_slope is None else slope + (0 if g.lse is None else g.lse)
    grads = (g_lse, g.target, g.sum, g.neg_entropy)
    return list(
        ops.row_stats_backward(*tensors, found.lse, found.neg_entropy, *grads, unparse(a.epilogue), *plan, mask)
    )


@pytest.mark.parametrize("case", [*rows_cases.CASES, *CHUNKS, *LARGE], ids=str)
def test_statistics_and_gradients_against_fp64(case):
    a, g = rows_cases.make(case, "cpu")
    exact_stats, exact_grads = rows_cases.whole(a, g, torch.float64)
    eager_stats, eager_grads = rows_cases.whole(a, g, case.dtype)
    mask = (True, True, case.bias)
    statistics = torch.float64 if case.dtype == torch.float64 else torch.float32

    found = row_stats(a, ALL)
    rows_cases.compare(case, Stats._fields, found, eager_stats, exact_stats, 1.25)
    assert [s.dtype for s in found] == [torch.float64, *[statistics] * 4, torch.int64]

    *again, dx, dw, db = with_grad(a, ALL, g, mask)
    for first, second in zip(found, again):
        assert torch.equal(first, second)
    rows_cases.compare(case, ("dx", "dw", "db"), (dx, dw, db), eager_grads, exact_grads, 1.25)
    # fp16 row gradients come normalised; their sums over rows are rescaled by the caller.
    sums = torch.float32 if case.dtype == torch.float16 else case.dtype
    assert [t.dtype for t in (dx, dw, db)] == [case.dtype, sums, sums]
    assert all(t.is_contiguous() for t in (dx, dw, db))

    grads = backward(a, found, g, mask)
    rows_cases.compare(case, ("dx", "dw", "db"), grads, eager_grads, exact_grads, 1.25)
    assert [t.dtype for t in grads] == [case.dtype] * 3


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("epilogue", ["", SOFTCAP])
@pytest.mark.parametrize("K", [0, 1, 3])
def test_gradcheck(K, epilogue, bias):
    a, _ = rows_cases.make(
        Case(N=5, H=3, V=7, K=K, dtype=torch.float64, bias=bias, class_weight=True, scale=1.0), "cpu"
    )

    def statistics(x, weight, bias):
        found = ops.row_stats(x, weight, bias, a.target, a.class_weight, epilogue, ALL, 2, BUDGET)
        return found[:5]

    leaves = [t if t is None else t.requires_grad_() for t in (a.x, a.weight, a.bias)]
    assert torch.autograd.gradcheck(statistics, leaves)


@pytest.mark.parametrize("stat", [LSE, TARGET, SUM, MAX, ARGMAX, LSE | NEG_ENTROPY])
def test_only_what_was_asked_for(stat):
    a, g = rows_cases.make(Case(K=2, class_weight=True, bias=True, grads=GRADS, chunk_tokens=3), "cpu")
    everything, found = row_stats(a, ALL), row_stats(a, stat)
    merged = with_grad(a, stat, g, (True, True, True))[:6]
    for i, (one, two, whole) in enumerate(zip(found, merged, everything)):
        expected = whole if stat & (1 << i) else whole.new_empty(0)
        assert torch.equal(one, expected) and torch.equal(two, expected)
        assert one.dtype == two.dtype == whole.dtype


def test_empty_statistics_take_no_gradient():
    x, weight, _ = head()
    lse, *empty = ops.row_stats(x, weight, None, None, None, "", LSE, 0, BUDGET)
    assert lse.requires_grad and not any(t.requires_grad for t in empty)


def test_neg_entropy_needs_lse_for_its_gradient():
    x, weight, _ = head()
    value = ops.row_stats(x, weight, None, None, None, "", NEG_ENTROPY, 0, BUDGET)[3]
    with pytest.raises(RuntimeError, match="neg_entropy needs lse"):
        value.sum().backward()


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_entropy_does_not_cancel(scale):
    """lse - sum(p z) would: its error grows with the logits, that of sum(p log p) with the entropy."""
    a, _ = rows_cases.make(Case(N=32, H=64, V=2048, scale=scale), "cpu")

    def eager(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (a.x, a.weight)]
        log_p = F.linear(*leaves).log_softmax(-1)
        (log_p.exp() * log_p).sum().backward()
        return [t.grad for t in leaves]

    one = torch.ones(32)
    ours = with_grad(a, LSE | NEG_ENTROPY, RowGrads(neg_entropy=one), (True, True, False))[6:8]
    for found, plain, exact in zip(ours, eager(torch.float32), eager(torch.float64)):
        assert rows_cases.error(found, exact) <= 1.25 * rows_cases.error(plain, exact) + 1e-6


def test_masked_classes_get_no_gradient_beside_infinite_ones():
    """As masked_fill gives them none, where probability zero times an infinite row gradient would be NaN."""
    a, _ = rows_cases.make(Case(bias=True), "cpu")
    hidden = torch.arange(a.weight.shape[0]) % 5 == 4
    a.bias[hidden] = -torch.inf
    found = row_stats(a, LSE)
    g = RowGrads(lse=torch.full((len(a.x),), torch.inf))
    mask = (True, True, True)
    for _, dw, db in (with_grad(a, LSE, g, mask)[-3:], backward(a, found, g, mask)):
        assert not db[hidden].any() and not db[~hidden].isfinite().any()
        assert not dw[hidden].any() and not dw[~hidden].isfinite().any()


def test_max_needs_argmax_for_its_gradient():
    x, weight, _ = head()
    maximum = ops.row_stats(x, weight, None, None, None, "", MAX, 0, BUDGET)[4]
    with pytest.raises(RuntimeError, match="max_logit needs argmax"):
        maximum.sum().backward()


def test_second_derivatives_are_refused():
    x, weight, _ = head()
    lse = ops.row_stats(x, weight, None, None, None, "", LSE, 0, BUDGET)[0]
    (grad,) = torch.autograd.grad(lse.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        grad.sum().backward()


def test_an_op_whose_results_are_gradients_has_none_itself():
    """No silent one: it has to be called without autograd, as compiled code does."""
    x, weight, _ = head()
    arguments = (x, weight, *(None,) * 3, torch.ones(len(x)), *(None,) * 4, "", LSE, 0, BUDGET, [True, True, False])
    with pytest.raises(RuntimeError, match=r"row_stats_with_grad has no derivatives.*no_grad"):
        ops.row_stats_with_grad(*arguments)
    with torch.no_grad():
        found = ops.row_stats_with_grad(*arguments)
    assert not any(t.requires_grad for t in found)


@pytest.mark.parametrize("needed", [(x, w, b) for x in (0, 1) for w in (0, 1) for b in (0, 1) if x or w or b], ids=str)
def test_products_only_for_what_needs_a_gradient(needed):
    a, g = rows_cases.make(Case(N=6, bias=True, chunk_tokens=3), "cpu")
    for tensor, needs in zip((a.x, a.weight, a.bias), needed):
        tensor.requires_grad_(bool(needs))
    chunks, gradients = 2, needed[0] + needed[1]
    found = row_stats(a, LSE | TARGET)
    assert products(lambda: row_stats(a, LSE | TARGET)) == chunks
    total = found.lse.sum() + found.target_logit.sum()
    assert products(lambda: total.backward()) == chunks * (1 + gradients)
    assert [t.grad is not None for t in (a.x, a.weight, a.bias)] == list(map(bool, needed))
    mask = tuple(map(bool, needed))
    with torch.no_grad():
        assert products(lambda: with_grad(a, LSE, g, mask)) == chunks * (1 + gradients)
        empty = with_grad(a, LSE, g, mask)[6:]
    assert [t.numel() > 0 for t in empty] == list(mask)


def test_no_gradient_no_backward():
    """A loss that doesn't depend on the statistics must not recompute the logits."""
    a, _ = rows_cases.make(Case(), "cpu")
    a.x.requires_grad_()
    found = row_stats(a, LSE | ARGMAX)
    assert products(lambda: (found.argmax.sum() + a.x.sum()).backward()) == 0


def test_bias_of_another_dtype():
    """A sum of bf16 logits and an fp32 bias promotes to fp32, and the bias keeps an fp32 gradient."""
    x, weight, _ = head(dtype=torch.bfloat16)
    bias = torch.randn(weight.shape[0], requires_grad=True)
    fused = lambda x, w, b: ops.row_stats(x, w, b, None, None, "", LSE, 7, BUDGET)[0].float().square().sum()
    eager = lambda x, w, b: (F.linear(x, w) + b).logsumexp(1).square().sum()
    leaves = [x, weight, bias]
    double = [t.detach().double().requires_grad_() for t in leaves]
    assert_as_accurate(results(fused, fresh(leaves)), results(eager, fresh(leaves)), results(eager, double))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dw_accumulates_in_fp32(dtype):
    """600 chunks of one row: a bf16 sum would stop growing at 256."""
    n = 600
    x, weight = torch.ones(n, 1, dtype=dtype), torch.zeros(2, 1, dtype=dtype)
    g = torch.ones(n)
    *_, dw, db = ops.row_stats_with_grad(
        x, weight, torch.zeros(2, dtype=dtype), None, None, g, None, None, None, None, "", LSE, 1, BUDGET, [True] * 3
    )
    assert dw.flatten().tolist() == [n / 2] * 2 and db.tolist() == [n / 2] * 2


def test_same_bits_every_time():
    a, g = rows_cases.make(Case(N=50, V=1001, K=2, bias=True, grads=GRADS, chunk_tokens=16), "cpu")
    for one, two in zip(*(with_grad(a, ALL, g, (True, True, True)) for _ in range(2))):
        assert torch.equal(one, two)


def test_chunks_bound_the_workspace():
    """One chunk within workspace_bytes, whatever chunk_tokens says: 64 rows of 1000 fp32 logits take 250 KiB."""
    a, _ = rows_cases.make(Case(N=64, V=1000), "cpu")
    tensors, _ = flat(a)
    for workspace_bytes, chunks in ((1 << 30, 1), (16 * 4000, 4), (1, 64)):
        call = lambda b=workspace_bytes: ops.row_stats(*tensors, "", LSE, 0, b)
        assert products(call) == chunks


def test_bf16_loss_is_better_than_eagers():
    """Eager rounds each row's loss to bf16 before the mean; statistics stay fp32."""
    x, weight, target = head(n=2000, h=64, v=1001, dtype=torch.bfloat16)
    target = target.clamp(min=0)  # -100 is no label for the op
    exact = F.cross_entropy(F.linear(x, weight).double(), target, reduction="none")
    eager = F.cross_entropy(F.linear(x, weight), target, reduction="none")
    lse, picked, *_ = ops.row_stats(x, weight, None, target[:, None], None, "", LSE | TARGET, 0, BUDGET)
    ours = (lse - picked[:, 0]).float()
    assert error(ours, exact) < 0.01 * error(eager, exact)


# -- registration


def opcheck_arguments() -> dict[str, tuple]:
    a, g = rows_cases.make(Case(N=5, H=4, V=7, K=2, bias=True, class_weight=True, grads=GRADS), "cpu")
    tensors, _ = flat(a)
    wanted = tuple(None if t is None else t.detach().clone().requires_grad_() for t in tensors[:3])
    grads = (g.lse, g.target, g.sum, g.neg_entropy)
    found = row_stats(a, ALL)
    needed = torch.arange(5) % 2 > 0
    return {
        "row_stats": (*wanted, *tensors[3:], "", ALL, 2, BUDGET),
        "row_stats-lse": (*wanted[:2], None, None, None, "tanh", LSE, 0, BUDGET),
        "row_stats-frozen": (wanted[0], tensors[1], None, a.target, None, SOFTCAP, LSE | TARGET, 0, BUDGET),
        "row_stats-needed": (*wanted, *tensors[3:], "", ALL, 2, BUDGET, needed),
        "row_stats_backward": (*tensors, found.lse, found.neg_entropy, *grads, "", 0, BUDGET, [True] * 3),
        "row_stats_backward-dx": (*tensors, found.lse, None, g.lse, None, None, None, "", 2, BUDGET, [True, False, False]),
        "row_stats_with_grad": (*tensors, g.lse, g.lse_slope, *grads[1:], "", ALL, 2, BUDGET, [True, True, True]),
        "row_stats_with_grad-needed": (
            *tensors, *(None if t is None else t * needed.view(-1, *[1] * (t.dim() - 1)) for t in g), "", ALL, 2, BUDGET,
            [True, True, True], True, needed,
        ),
        "row_stats_with_grad-dw": (
            *tensors, None, g.lse_slope, None, None, None, SOFTCAP, TARGET, 0, BUDGET, [False, True, False],
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", opcheck_arguments())
def test_opcheck(name):
    opcheck(getattr(ops, name.partition("-")[0]).default, opcheck_arguments()[name])


def test_wide_gradients_are_those_before_rounding():
    a, g = rows_cases.make(Case(bias=True, dtype=torch.bfloat16, chunk_tokens=2), "cpu")
    *_, dx, dw, db = with_grad(a, LSE | TARGET, g, (True, True, True), wide=True)
    assert (dx.dtype, dw.dtype, db.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    narrow = with_grad(a, LSE | TARGET, g, (True, True, True))[6:]
    assert all(t.bfloat16().equal(n) for t, n in zip((dx, dw, db), narrow, strict=True))
    assert not dw.equal(dw.bfloat16().float())


@pytest.mark.parametrize("dtype", rows_cases.DTYPES, ids=str)
@pytest.mark.parametrize("wide", [False, True])
def test_fake_results_are_like_the_real_ones(dtype, wide):
    """Shapes, dtypes and strides: Inductor allocates by them."""
    a, g = rows_cases.make(Case(K=2, bias=True, strided=True, dtype=dtype, grads=GRADS), "cpu")
    real = with_grad(a, ALL, g, (True, True, True), wide)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = with_grad(
            HeadArgs(*(mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in a)),
            ALL, RowGrads(*(mode.from_tensor(t) for t in g)), (True, True, True), wide,
        )  # fmt: skip
    assert [(t.shape, t.dtype, t.stride()) for t in fake] == [(t.shape, t.dtype, t.stride()) for t in real]


# -- bad input


@pytest.mark.parametrize("bad", [101, -1, -100, 2**40, NO_TARGET + 1])
@pytest.mark.parametrize("op", [row_stats, lambda a, stats: with_grad(a, stats, RowGrads(), (True, True, False))])
def test_target_out_of_range(op, bad):
    a, _ = rows_cases.make(Case(N=9, V=101, K=2), "cpu")
    a.target[5, 1] = bad
    with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
        op(a, LSE | TARGET)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(3)}, r"x must be \[N, H\] and weight \[V, H\], got \[3\]"),
        ({"weight": torch.zeros(65, 5)}, r"x \[7, 16\] and weight \[65, 5\] must agree in H"),
        ({"weight": torch.zeros(65, 16, dtype=torch.float64)}, "weight must have the dtype of x, torch.float32"),
        ({"bias": torch.zeros(64)}, r"bias must be a float tensor \[65\], got torch.float32 \[64\]"),
        ({"bias": torch.zeros(65, dtype=torch.int64)}, r"bias must be a float tensor \[65\], got torch.int64"),
        ({"target": torch.zeros(7, dtype=torch.int64)}, r"target must be int64 \[7, K\], got torch.int64 \[7\]"),
        ({"target": torch.zeros(7, 1, dtype=torch.int32)}, r"target must be int64 \[7, K\], got torch.int32"),
        ({"target": torch.zeros(6, 1, dtype=torch.int64)}, r"target must be int64 \[7, K\], got torch.int64 \[6, 1\]"),
        ({"class_weight": torch.ones(3)}, r"class_weight must have shape \[65\], got \[3\]"),
        ({"x": torch.zeros(7, 16, dtype=torch.int64)}, "x must be a floating-point tensor, got torch.int64"),
    ],
)
def test_bad_arguments_are_named(change, message):
    a, _ = rows_cases.make(Case(), "cpu")
    a = a._replace(**change)
    with pytest.raises(RuntimeError, match=message):
        row_stats(a, LSE | TARGET)


@pytest.mark.parametrize("needed", [torch.ones(6, dtype=torch.bool), torch.ones(7)])
def test_rows_that_are_needed_come_as_bool(needed):
    a, _ = rows_cases.make(Case(), "cpu")
    tensors, plan = flat(a)
    with pytest.raises(RuntimeError, match=r"needed must be bool \[7\], got"):
        ops.row_stats(*tensors, "", LSE, *plan, needed=needed)


def test_unknown_epilogue():
    a, _ = rows_cases.make(Case(), "cpu")
    tensors, plan = flat(a)
    with pytest.raises(ValueError, match="unknown step 'cosh'"):
        ops.row_stats(*tensors, "cosh", LSE, *plan)


def test_statistics_are_listed_once():
    """What a type checker has to see, and the ops' schemas, say what the table says."""
    assert Stats._fields == tuple(s.result for s in STATISTICS)
    assert [f for f in RowGrads._fields if f != "lse_slope"] == [s.name for s in STATISTICS if s.has_gradient]
    for name in ("row_stats", "row_stats_backward", "row_stats_with_grad"):
        op = getattr(torch.ops.lce_inductor, name).default._schema
        grads = [a.name for a in op.arguments if a.name.startswith("g_")]
        results = [r.name for r in op.returns]
        assert [g for g in grads if g != "g_lse_slope"] == ([] if name == "row_stats" else list(GRADIENTS))
        assert results[: len(STATISTICS)] == list(Stats._fields) or name == "row_stats_backward"


@pytest.mark.parametrize("stats", [LSE, LSE | MAX | ARGMAX])
def test_a_backward_is_told_what_its_forward_computed(stats, monkeypatch):
    """By that it takes logits as they were, rounded or not."""
    told, backward = [], heads.backward
    monkeypatch.setattr(heads, "backward", lambda *args, stats: told.append(stats) or backward(*args, stats=stats))
    a, _ = rows_cases.make(Case(), "cpu")
    x = a.x.requires_grad_()
    tensors, plan = flat(a._replace(x=x))
    ops.row_stats(*tensors, "", stats, *plan)[0].sum().backward()
    assert told == [stats]


def test_bits_of_gradients():
    one = torch.ones(1)
    assert RowGrads().bits() == 0 and RowGrads(lse_slope=one).bits() == LSE
    assert RowGrads(lse=one, target=one, sum=one, neg_entropy=one).bits() == LSE | TARGET | SUM | NEG_ENTROPY
    assert computed(TARGET, 0) == TARGET and computed(TARGET, LSE | SUM) == TARGET | LSE
    assert computed(0, NEG_ENTROPY) == LSE | NEG_ENTROPY
