"""Blocks of classes in a backward that computes logits again, and what prefer="memory" makes of a head."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import rows_cases
import torch
import torch.nn.functional as F
from harness import Compiled, check_against_eager, check_results, error, fresh, head, peak_bytes, results
from rows_cases import Case, Planned, whole
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import lce_inductor
from lce_inductor import explain, regions
from lce_inductor.lower import head_classes
from lce_inductor.lower.chunk_plan import ClassPlan
from lce_inductor.lower.device_policy import ANCHORED, BLOCKS, KNOWN, POLICIES, ROWS, Classes, Memory
from lce_inductor.lower.plan import Device, Request, decide, planned, training, using
from lce_inductor.spec.statistics import LSE, NO_TARGET, TARGET, RowGrads

CPU = Device("cpu", triton=True)
A100 = Device("cuda", triton=True, capability=(8, 0))
H100 = Device("cuda", triton=True, capability=(9, 0), hopper=True, clusters=66)
MIB, GIB = 1 << 20, 1 << 30
ASKED = LSE | TARGET
STEP = Request(2048, 512, 32768, torch.bfloat16, 0, 3 << 29, ASKED, 1, grads=ASKED, mask=(True, True, False))

# -- blocks against chunks, and both against fp64


def aten(classes: int = 0) -> Planned:
    return Planned(BLOCKS, CPU, POLICIES["cpu"], classes)


@pytest.mark.parametrize("case", rows_cases.IN_BLOCKS, ids=str)
def test_against_fp64(case: Case) -> None:
    if case.dtype.itemsize == 2:  # enough values that neither error is a matter of luck
        case = dataclasses.replace(case, N=case.N * 20, H=64, V=case.V * 4)
    rows_cases.check(case, "cpu", 1.25, aten(classes=64))


@pytest.mark.parametrize("classes", [1, 7, 100, 101, 1000])
@pytest.mark.parametrize("mask", [(True, True, True), (True, False, False), (False, True, False), (False, True, True)])
def test_as_chunks_of_rows(classes: int, mask: tuple[bool, bool, bool]) -> None:
    case = Case(N=11, V=101, K=2, dtype=torch.float64, bias=True, class_weight=True, epilogue=rows_cases.SOFTCAP)
    a, grads = rows_cases.make(dataclasses.replace(case, grads=("lse", "target", "sum", "neg_entropy")), "cpu")
    found = aten().forward(a, rows_cases.ALL)
    known = (a, found.lse, found.neg_entropy, grads, mask)
    for mine, theirs, asked in zip(aten(classes).backward(*known), aten().backward(*known), mask):
        assert mine.shape == theirs.shape and bool(mine.numel()) == asked
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_masked_classes() -> None:
    rows_cases.check_masked_classes("cpu", aten(classes=16))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_logits_that_are_not_finite(value: float) -> None:
    """In the block of one class; NaN is in all blocks where it is in all of a chunk."""
    a, grads = rows_cases.make(Case(V=50, bias=True), "cpu")
    a.x[3, 2], a.bias[20] = value, value
    known = (a, aten().forward(a, LSE).lse, None, grads, (True, True, True))
    for mine, theirs in zip(aten(classes=16).backward(*known), aten().backward(*known)):
        torch.testing.assert_close(mine, theirs, equal_nan=True)


def test_dw_in_bf16_is_rounded_once() -> None:
    """Not more than eager's, with no room for luck: each block is one product. Sums over chunks are rounded once, too."""
    case = Case(N=600, H=64, V=2000, dtype=torch.bfloat16)
    a, grads = rows_cases.make(case, "cpu")
    (_, exact), (_, eager) = (whole(a, grads, dtype) for dtype in (torch.float64, torch.bfloat16))
    lse = aten().forward(a, LSE).lse
    for classes in (128, 512):
        found = aten(classes).backward(a, lse, None, grads, (True, True, False))
        for mine, theirs, right in zip(found[:2], eager, exact):
            assert error(mine, right) <= 1.25 * error(theirs, right)


def test_a_target_is_one_of_one_block() -> None:
    a, _ = rows_cases.make(Case(V=10, K=2, bias=True, class_weight=True), "cpu")
    target = torch.tensor([[0, 9], [3, NO_TARGET], [4, 6], [NO_TARGET, NO_TARGET]])
    block = head_classes.block_of(a._replace(target=target), 4, 3)
    none = NO_TARGET
    assert block.target.tolist() == [[none, none], [none, none], [0, 2], [none, none]]
    assert [len(t) for t in (block.weight, block.bias, block.class_weight)] == [3, 3, 3]
    assert block.weight.data_ptr() == a.weight[4].data_ptr()


# -- the plan


def backward(device: Device = CPU, **changes: Any) -> Any:
    return decide(STEP._replace(**changes).backward(), device, POLICIES[device.kind])


@pytest.mark.parametrize(
    "device, changes, classes",
    [
        (CPU, {}, 2048),
        (CPU, {"dtype": torch.float32}, 2048),
        (CPU, {"N": 8192}, 1024),
        (CPU, {"N": 1 << 15, "V": 1 << 16}, 512),
        (CPU, {"N": 512, "dtype": torch.float32}, 2048),
        (A100, {"N": 8192, "H": 4096, "V": 128256}, 64256),
        (A100, {"N": 16384, "H": 2048, "V": 131072}, 32768),
    ],
    ids=str,
)
def test_where_blocks_of_classes_are_faster(device: Device, changes: dict[str, Any], classes: int) -> None:
    p = backward(device, **changes)
    V = changes.get("V", STEP.V)
    assert p.classes == ClassPlan(classes, -(-V // classes), POLICIES[device.kind].chunks.align)
    bounds = p.classes.bounds(V)
    assert bounds[0][0] == 0 and all(a + n == b for (a, n), (b, _) in itertools.pairwise(bounds))
    assert sum(bounds[-1]) == V and len(bounds) == p.classes.count
    assert str(p).startswith(f"{p.classes.count} blocks of {classes} classes, ")
    rows = decide(STEP._replace(**changes), device, POLICIES[device.kind], p.algorithm)
    assert p.peak_bytes <= rows.peak_bytes and rows.classes is None


@pytest.mark.parametrize(
    "device, changes",
    [
        (CPU, {"N": 512}),  # one chunk: its products are as narrow as their factors
        (CPU, {"N": 40000}),  # more rows than classes: dX's sums are larger than dW's, and blocks than chunks
        (CPU, {"mask": (True, False, False)}),
        (CPU, {"grads": 0}),
        (CPU, {"chunk_tokens": 100}),
        (CPU, {"N": 0}),
        (CPU, {"V": 512}),
        (CPU, {"workspace_bytes": 2048 * 2 * 511}),
        (CPU, {"prefer": "memory", "workspace_bytes": 2048 * 2 * 511}),
        (CPU, {"prefer": "memory", "mask": (True, False, True)}),
        (A100, {"N": 32768, "H": 768, "V": 50304}),  # a block is larger than a chunk and all sums
        (A100, {"N": 4096, "H": 4096, "V": 128256}),
        (H100, {"N": 16384, "H": 2048, "V": 131072}),
    ],
    ids=str,
)
def test_where_chunks_of_rows_stay(device: Device, changes: dict[str, Any]) -> None:
    assert backward(device, **changes).classes is None


@pytest.mark.parametrize("N, H, V, gib", [(8192, 4096, 128256, 1.45), (16384, 2048, 131072, 1.0)])
@pytest.mark.parametrize("device", [A100, H100], ids=["A100", "H100"])
def test_memory_on_a_gpu(device: Device, N: int, H: int, V: int, gib: float) -> None:
    """Where the anchored softmax would be faster, the plan says why not."""
    p = backward(device, N=N, H=H, V=V, prefer="memory")
    assert p.algorithm == (KNOWN if device is H100 else ROWS) and p.classes is not None and p.peak_bytes < gib * GIB
    assert N * p.classes.classes * 2 <= 256 * MIB
    why = dict(p.ruled_out)[ANCHORED]
    assert ("less memory" in why) == (device is H100)
    r = STEP._replace(N=N, H=H, V=V, prefer="memory")
    step = training(r, device, POLICIES["cuda"])
    assert step.recompute and step.peak_bytes == p.peak_bytes
    assert not training(r._replace(prefer="speed"), device, POLICIES["cuda"]).recompute


def test_memory_within_the_callers_limits() -> None:
    p = backward(prefer="memory", chunk_tokens=64, N=2048, V=1 << 15)
    assert 2048 * p.classes.classes <= 64 * (1 << 15)
    assert backward(prefer="memory", workspace_bytes=4 * MIB).classes.classes == 1024
    forward = STEP._replace(grads=None, mask=(False,) * 3)
    for r, limit in (
        (forward._replace(prefer="memory"), 16 * MIB),
        (forward._replace(prefer="memory", workspace_bytes=MIB), MIB),
    ):
        chunks = decide(r, CPU, POLICIES["cpu"]).chunks
        assert limit / 2 < chunks.rows * STEP.V * 2 <= limit
    assert decide(forward._replace(prefer="memory", chunk_tokens=500), CPU, POLICIES["cpu"]).chunks.rows == 500


@pytest.mark.parametrize(
    "changes, recompute",
    [
        ({}, True),
        ({"mask": (False, True, False)}, True),
        ({"dtype": torch.float32}, False),  # dW has no sums in another dtype: smaller chunks do
        ({"mask": (True, False, False)}, False),
        ({"prefer": "speed"}, False),
    ],
    ids=str,
)
def test_a_fourth_product_has_to_save_a_quarter(changes: dict[str, Any], recompute: bool) -> None:
    r = STEP._replace(**{"prefer": "memory", **changes})
    three, four, chosen = (training(r, CPU, POLICIES["cpu"], way) for way in (False, True, None))
    assert chosen == (four if recompute else three) and chosen.recompute == recompute
    if r.prefer == "memory":
        assert (four.peak_bytes <= 0.75 * three.peak_bytes) == recompute
        assert chosen.peak_bytes < training(r._replace(prefer="speed"), CPU, POLICIES["cpu"]).peak_bytes


# -- whole steps

SMALL = dataclasses.replace(
    POLICIES["cpu"], classes=Classes(bytes=1, least=8, most=8, tile=1), memory=Memory(1, 12, four_products=9.0)
)


@pytest.fixture
def in_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """prefer="memory" with blocks of 8 classes; the first class of each block."""
    seen: list[int] = []
    of = head_classes.block_of
    monkeypatch.setattr(head_classes, "block_of", lambda a, first, n: seen.append(first) or of(a, first, n))
    with using("cpu", SMALL), lce_inductor.installed(min_logits_bytes=0, prefer="memory"):
        yield seen


def log_probabilities(z: Tensor, y: Tensor) -> Tensor:
    return z.log_softmax(-1).gather(-1, y.clamp(min=0)[:, None])[:, 0]


def entropy(z: Tensor) -> Tensor:
    return -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)


HEADS: dict[str, Callable[..., Any]] = {
    "mean": lambda z, y: F.cross_entropy(z, y),
    "each token": lambda z, y: F.cross_entropy(z, y, reduction="none").square().mean(),
    "returned losses": lambda z, y: F.cross_entropy(z, y, reduction="none"),
    "smoothing": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
    "class weights": lambda z, y: F.cross_entropy(z, y, torch.linspace(0.1, 2, z.shape[1], dtype=z.dtype)),
    "z-loss": lambda z, y: F.cross_entropy(z, y) + 0.1 * z.logsumexp(-1).square().mean(),
    "softcap": lambda z, y: F.cross_entropy(3 * torch.tanh(z / 3), y),
    "entropy": lambda z, y: log_probabilities(z, y).exp().mean() + 0.1 * entropy(z).mean(),
    "two targets": lambda z, y: F.cross_entropy(z, y) + 0.3 * F.cross_entropy(z, y.clamp(min=0).roll(1)),
    "no valid row": lambda z, y: F.cross_entropy(z, y.clamp(max=-1) * 0 - 100),
    "a few rows": lambda z, y: F.cross_entropy(z, y.where(torch.arange(len(y)) % 4 == 2, -100)),
    "accuracy": lambda z, y: (F.cross_entropy(z, y), (z.argmax(-1) == y).float().mean()),
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps(name: str, dtype: torch.dtype, in_blocks: list[int]) -> None:
    x, w, y = head(dtype=dtype)
    bias = torch.randn(len(w)).to(dtype).requires_grad_()
    compiled = check_against_eager(lambda x, w, b, y: HEADS[name](F.linear(x, w, b).float(), y), [x, w, bias, y])
    assert compiled.gradients == ["recompute"]
    assert in_blocks == ([] if name == "no valid row" else list(range(0, 37, 8)))


OTHERS: dict[str, Callable[..., Any]] = {
    "checkpointed": lambda x, w, y: checkpoint(lambda x: F.cross_entropy(x @ w.t(), y), x.sin(), use_reentrant=False),
    "shifted": lambda x, w, y: F.cross_entropy(F.linear(x, w)[:-1], y[1:]),
    "classes cut off": lambda x, w, y: F.cross_entropy(F.linear(x, w)[:, :30], y.clamp(max=29)),
    "two heads": lambda x, w, y: F.cross_entropy(F.linear(x, w), y) + F.cross_entropy(F.linear(x.sin(), w * 2), y),
}


@pytest.mark.parametrize("name", OTHERS)
def test_programs(name: str, in_blocks: list[int]) -> None:
    check_against_eager(OTHERS[name], head())
    assert in_blocks


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_frozen(frozen: str, in_blocks: list[int]) -> None:
    x, w, y = head()
    (x if frozen == "x" else w).requires_grad_(False)
    compiled = check_against_eager(lambda x, w, y: F.cross_entropy(F.linear(x, w), y), [x, w, y])
    # dX alone has no sums: blocks of classes would only add them.
    assert (compiled.gradients, bool(in_blocks)) == (["recompute"], frozen == "x")


def test_autocast(in_blocks: list[int]) -> None:
    def fn(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(F.linear(x, w), y)

    check_against_eager(fn, head())
    assert in_blocks


def test_dynamic_shapes(in_blocks: list[int]) -> None:
    fn = lambda x, w, y: F.cross_entropy(F.linear(x, w), y, reduction="sum")
    compiled = Compiled(fn, dynamic=True)
    for n in (24, 7, 50):
        args = head(n=n)
        check_results(fn, args, results(compiled, fresh(args)))
    assert len(compiled.graphs) == 2 and len(in_blocks) == 5 * 3


# -- what a step takes


@pytest.mark.parametrize("prefer", ["speed", "memory"])
@pytest.mark.parametrize("each", [False, True], ids=["mean", "each token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peak_is_what_the_plan_predicts(dtype: torch.dtype, each: bool, prefer: str) -> None:
    N, H, V = 1024, 192, 6144
    x, w = (torch.randn(size).to(dtype).requires_grad_() for size in ((N, H), (V, H)))
    y = torch.randint(0, V, (N,))

    def fn(x: Tensor, w: Tensor) -> Tensor:
        losses = F.cross_entropy(F.linear(x, w), y, reduction="none")
        return losses.square().sum() if each else losses.sum()

    r = STEP._replace(N=N, H=H, V=V, dtype=dtype, prefer=prefer)
    step = training(r, CPU, POLICIES["cpu"], recompute=True if each else None)
    with lce_inductor.installed(min_logits_bytes=0, prefer=prefer):
        compiled = Compiled(fn)
        results(compiled, fresh([x, w]))
        assert compiled.gradients == ["recompute" if step.recompute else "forward"]
        args = fresh([x, w])
        measured = peak_bytes(lambda: compiled(*args).backward())
    assert abs(measured / step.peak_bytes - 1) < 0.05, (measured, step)
    rows = sum(t.nbytes for t in (x, w))
    assert prefer == "speed" or measured < rows + 16 * MIB


# -- what is told


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("lce_inductor")]


def step(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w), y)


def test_log_and_explain_name_the_mode(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "lce_inductor")
    with using("cpu", SMALL), lce_inductor.installed(min_logits_bytes=0, prefer="memory"):
        compiled = Compiled(step)
        compiled(*head()).backward()
        found = explain(step)(*head())
    (line,) = [line for line in lines(caplog) if line.startswith("rewrote")]
    assert "5 blocks of 8 classes, blocks of ATen; fused kernels, 4 products, prefer='memory')" in line
    assert any(line.endswith("recompute the logits (4 products): prefer='memory'") for line in lines(caplog))
    assert "rewritten, 4 products, kernels, prefer='memory'" in str(found)
    assert found.as_dict()["settings"]["prefer"] == "memory"
    assert found.as_dict()["graphs"][0]["records"][0]["prefer"] == "memory"
    assert "prefer" not in str(explain(step, min_logits_bytes=0)(*head()))


def test_forward_gradients_that_were_asked_for_stay() -> None:
    with using("cpu", SMALL), lce_inductor.installed(min_logits_bytes=0, prefer="memory", gradients="forward"):
        compiled = check_against_eager(step, head())
    assert compiled.gradients == ["forward"]


N, H, V = 24, 8, 300
# A head of 24 x 300 logits saves nothing in chunks, as one of 8192 x 128256 does on a GPU.
LARGE_CHUNKS = dataclasses.replace(
    POLICIES["cuda"],
    chunks=dataclasses.replace(POLICIES["cuda"].chunks, least_bytes=1 << 30, least_saving=9000),
    classes=Classes(bytes=1, least=50, most=50, tile=1),
    memory=Memory(1, 4),
)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(regions, "device_type", lambda node: "cuda")
    with using("cuda", LARGE_CHUNKS):
        yield


def clamped(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """No loss of the fused kernels."""
    return F.cross_entropy(F.linear(x, w).clamp(-1, 1), y)


@pytest.mark.parametrize("fn, kernels", [(step, True), (clamped, False)])
def test_a_head_that_saves_nothing_otherwise(fn: Any, kernels: bool, as_on_a_gpu: None) -> None:
    args = head(N, H, V, dtype=torch.bfloat16)
    (record,) = explain(fn, min_logits_bytes=1)(*args).records
    assert record.code == "little-saved"
    alone = 2 * (N * V + N * H + V * H)
    r = STEP._replace(N=N, H=H, V=V, prefer="memory")
    took = training(r, Device("cuda", triton=True), LARGE_CHUNKS).peak_bytes
    assert took <= alone - 9000
    text = (
        f"prefer='memory' would add {took / 1024:.1f} KiB at the peak of a step, gradients included, where "
        f"torch.compile alone adds {alone / 1024:.1f} KiB; matrix products: 4 for its 3"
    )
    assert (text in record.hint) == kernels and ("prefer=" in record.hint) == kernels
    (record,) = explain(fn, min_logits_bytes=1, prefer="memory")(*args).records
    assert record.rewritten == kernels and "prefer=" not in record.hint
    assert record.code == (None if kernels else "little-saved")


def test_memory_saves_as_little(as_on_a_gpu: None) -> None:
    """No head is rewritten, and none promised more, that torch.compile alone computes in as little."""
    args = head(N, 512, V, dtype=torch.bfloat16)  # dX's and dW's bytes are what it takes
    for prefer in ("speed", "memory"):
        (record,) = explain(step, min_logits_bytes=1, prefer=prefer)(*args).records
        assert record.code == "little-saved" and "prefer=" not in record.hint


def test_a_rewritten_head_that_saves_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """On a CPU: one chunk of all rows."""
    caplog.set_level(logging.DEBUG, "lce_inductor")
    small = dataclasses.replace(POLICIES["cpu"], memory=Memory(1, 4))
    args = head(N, H, V)
    with using("cpu", small):
        found = explain(step, min_logits_bytes=0)(*args)
        with lce_inductor.installed(min_logits_bytes=0):
            Compiled(step)(*args).backward()
        quiet = explain(step, min_logits_bytes=0, prefer="memory")(*args)
    (record,) = found.records
    assert record.rewritten and record.hint.startswith("prefer='memory' would add")
    assert record.hint.endswith("matrix products: 3 for its 3")
    assert f"  hint: {record.hint}" in str(found).split("\n") and f"  hint: {record.hint}" in lines(caplog)
    assert "hint" not in str(quiet)


def test_the_plan_of_a_call_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "lce_inductor")
    with using("cpu", SMALL):
        planned.cache_clear()
        a, grads = rows_cases.make(Case(V=40), "cpu")
        lse = aten().forward(a, LSE).lse
        a = a._replace(prefer="memory")
        lce_inductor.lower.head.backward(a, lse, None, RowGrads(lse=grads.lse), (True, True, False))
    assert any("5 blocks of 8 classes" in line for line in lines(caplog))
