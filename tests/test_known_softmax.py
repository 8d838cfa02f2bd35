"""The known softmax: pieces of logits whose gradient is what the product leaves. On a CPU its launches are decoded and computed by
torch (hopper_emulated.py); test_hopper.py compiles the kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import rows_cases
import torch
from rows_cases import SM_90, Case, Planned, compare, make, whole

pytest.importorskip("triton")
import hopper_emulated

from lce_inductor.kernels import hopper
from lce_inductor.lower import head_classes
from lce_inductor.lower import plan as plans
from lce_inductor.lower.device_policy import ANCHORED, KNOWN, POLICIES, ROWS
from lce_inductor.lower.plan import Device, Request, capabilities, decide, training
from lce_inductor.spec.statistics import LSE, MAX, NEG_ENTROPY, NO_TARGET, SUM, TARGET, RowGrads

ON_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
NEEDS_GPU = pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU of compute capability 9.0")
DEVICE = "cuda" if ON_GPU else "cpu"


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str] | None]:
    """The names of what was launched; None on a GPU, which computes all of this itself."""
    yield None if ON_GPU else hopper_emulated.emulate(monkeypatch)


def run(classes: int) -> Planned:
    device = capabilities(torch.device("cuda", torch.cuda.current_device())) if ON_GPU else SM_90
    return Planned(KNOWN, device, classes=classes)


CE = ("lse", "target")
BF16 = Case(N=300, H=72, V=517, dtype=torch.bfloat16)
CASES = [
    BF16,
    dataclasses.replace(BF16, V=512, H=64, N=256),
    dataclasses.replace(BF16, V=5, N=20),
    dataclasses.replace(BF16, K=0, grads=("lse",)),
    dataclasses.replace(BF16, grads=("lse",)),
    dataclasses.replace(BF16, grads=("lse", "target", "sum")),
    dataclasses.replace(BF16, grads=("lse", "target", "sum"), class_weight=True, bias=True),
    dataclasses.replace(BF16, grads=("lse", "sum"), epilogue="mul 0.5;add 0.25;div 0.7", bias=True, class_weight=True),
    dataclasses.replace(BF16, epilogue=rows_cases.SOFTCAP, bias=True),
    dataclasses.replace(BF16, epilogue="mul 2.0;rsqrt_cap 15.0 225.0;add 0.25;sigmoid;mul 4.0"),
    dataclasses.replace(BF16, scale=30.0),
    dataclasses.replace(BF16, strided=True),
]


# One block; several; several whose last one has fewer classes than a tile; one that ends within a tile. Chunks of rows.
@pytest.mark.parametrize("classes", [1024, 256, 128, 200, 0])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_fp64(case: Case, classes: int, launched: list[str] | None) -> None:
    a, grads = make(case, DEVICE)
    a = a._replace(weight=a.weight.contiguous(), chunk_tokens=0 if classes else 128)
    if case.grads == CE:  # cross-entropy: nothing may cancel
        grads = RowGrads(lse=grads.lse, target=-grads.lse[:, None])
    (exact_stats, exact), (_, eager) = (whole(a, grads, dtype) for dtype in (torch.float64, case.dtype))
    mask = (True, True, case.bias)
    found = run(classes).backward(a, exact_stats.lse, None, grads, mask)
    compare(case, ("dx", "dw", "db"), found, eager, exact, 1.25)
    assert [t.dtype for t in found[:2]] == [case.dtype] * 2 and all(t.is_contiguous() for t in found)
    again = run(classes).backward(a, exact_stats.lse, None, grads, mask)
    assert all(one.equal(two) for one, two in zip(found, again))
    if launched is not None:
        pieces = -(-case.V // classes) if classes else -(-case.N // 128)
        assert len(launched) == 2 * pieces and all("GRADIENT" in name for name in launched)


@pytest.mark.parametrize("mask", [(True, True, False), (False, True, False), (True, False, False), (False, True, True)])
def test_only_what_was_asked(mask: tuple[bool, bool, bool], launched: list[str] | None) -> None:
    a, grads = make(dataclasses.replace(BF16, bias=True), DEVICE)
    lse = whole(a, grads, torch.float64)[0].lse
    whole_of = run(128).backward(a, lse, None, grads, (True, True, True))
    for one, every, asked in zip(run(128).backward(a, lse, None, grads, mask), whole_of, mask):
        assert one.equal(every if asked else every.new_empty(0))


def test_masked_classes(launched: list[str] | None) -> None:
    """As check_masked_classes of the row kernel, with a bias of -inf: no gradient, not even beside an infinite one."""
    a, _ = make(dataclasses.replace(BF16, bias=True), DEVICE)
    hidden = torch.arange(len(a.weight), device=DEVICE) % 5 == 4
    a.bias[hidden] = -torch.inf
    lse = whole(a, RowGrads(), torch.float64)[0].lse
    grads = RowGrads(lse=torch.full((len(a.x),), torch.inf, device=DEVICE))
    _, dw, db = run(128).backward(a, lse, None, grads, (True, True, True))
    assert not db[hidden].any() and not db[~hidden].isfinite().any()
    assert not dw[hidden].any() and not dw[~hidden].isfinite().any()


def test_rows_near_certainty(launched: list[str] | None) -> None:
    """The target's probability is near one, and what is left of the gradient is as exact as eager's."""
    a, _ = make(dataclasses.replace(BF16, scale=0.5), DEVICE)
    target = a.target.clamp(min=0)
    a = a._replace(x=(a.weight[target[:, 0]].float() * 60).to(a.x.dtype), target=target)
    one = torch.ones(len(a.x), device=DEVICE)
    grads = RowGrads(lse=one, target=-one[:, None])
    (stats, exact), (_, eager) = (whole(a, grads, dtype) for dtype in (torch.float64, torch.bfloat16))
    assert (stats.lse - stats.target_logit[:, 0]).median() < 1e-3
    compare(BF16, ("dx", "dw"), run(128).backward(a, stats.lse, None, grads, (True, True, False)), eager, exact, 1.25)


def test_labels_of_no_class(launched: list[str] | None) -> None:
    """Negative ones, those beyond the classes, those that 32 bits don't hold, those just behind a block."""
    a, grads = make(dataclasses.replace(BF16, V=130), DEVICE)
    lse = whole(a, grads, torch.float64)[0].lse
    found = []
    for label in (NO_TARGET, -1, 130, 2**31 + 1, 2**32 + 3):
        target = a.target.clone()
        target[::2] = label
        found.append(run(64).backward(a._replace(target=target), lse, None, grads, (True, True, False))[:2])
    assert all(f.equal(first) for two in found for f, first in zip(two, found[0]))


def test_rows_that_nothing_comes_in_for(launched: list[str] | None) -> None:
    """Their forward may have left anything where lse is, as head.backward has it; x is theirs, and finite."""
    a, grads = make(BF16, DEVICE)
    lse = whole(a, grads, torch.float64)[0].lse
    none = torch.arange(len(lse), device=DEVICE) % 3 == 1
    grads = RowGrads(lse=grads.lse * ~none, target=grads.target * ~none[:, None])
    want = run(128).backward(a, lse, None, grads, (True, True, False))
    found = run(128).backward(a, lse.masked_fill(none, 0.0), None, grads, (True, True, False))
    assert all(one.equal(two) for one, two in zip(found, want)) and not found[0][none].any()


def test_without_the_kernel_it_is_the_row_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "gradients", lambda *_: None)
    a, grads = make(BF16, "cpu")
    work = head_classes._work(a, grads.lse.double(), None, grads, KNOWN)
    assert type(work) is head_classes._RowKernel


# -- the plan

H100 = Device("cuda", triton=True, capability=(9, 0), hopper=True, clusters=66)
STEP = Request(
    16384, 2048, 131072, torch.bfloat16, 0, 3 << 29, grads=LSE | TARGET, columns=1, mask=(True, True, False),
    recompute=True, prefer="memory", counts=True,
)  # fmt: skip


def plan(device: Device = H100, **changes: Any) -> plans.Plan:
    return decide(STEP._replace(**changes), device, POLICIES["cuda"])


def test_memory_mode_takes_it() -> None:
    p = plan()
    assert p.algorithm == KNOWN and dict(p.ruled_out)[ANCHORED] == "blocks of classes take less memory"
    assert str(p).startswith("16 blocks of 8192 classes, known softmax (no anchored softmax: ")
    assert not p.packs  # its products are the library's, which multiply all rows
    sizes = [N * 2**20 for N in (512, 128, 256)]  # dW, the sums of dX, a block
    assert p.peak_bytes == sum(sizes)
    assert plan(H=2056).peak_bytes == 131072 * 2056 * 2 + 16384 * (2056 * 4 + 8192 * 2 + 2064 * 2)  # and a copy of x
    step = training(STEP._replace(stats=LSE | TARGET, recompute=False), H100, POLICIES["cuda"])
    assert step.recompute and step.peak_bytes == p.peak_bytes


@pytest.mark.parametrize("chosen", [{"N": 2048}, {"mask": (True, False, True)}], ids=str)
def test_where_chunks_of_rows_are_not_the_anchored_softmaxs(chosen: dict[str, Any]) -> None:
    """Its forward has taken logits as they are, and the row kernel would round them."""
    p = plan(prefer="speed", **chosen)
    assert p.algorithm == KNOWN and p.classes is None and not p.packs and ANCHORED in dict(p.ruled_out)
    assert (
        p.peak_bytes == plans.decide(STEP._replace(prefer="speed", **chosen), H100, POLICIES["cuda"], ROWS).peak_bytes
    )
    forward = STEP._replace(**chosen | {"mask": (False,) * 3}, grads=None, recompute=False, stats=LSE | TARGET)
    assert decide(forward, H100, POLICIES["cuda"]).algorithm == ANCHORED


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"grads": LSE | NEG_ENTROPY}, "every logit"),
        ({"forward": LSE | TARGET | MAX}, "every logit"),  # whose logits are rounded, and so are those here
        ({"grads": TARGET}, "for lse"),
        ({"columns": 2}, "target column"),
        ({"dtype": torch.float16}, "bf16 only"),
        ({"aligned": False}, "16-byte"),
        ({"grads": LSE | SUM, "steps": (("tanh",),)}, "not affine"),
        ({"device": H100._replace(hopper=False)}, "NVRTC"),
        ({"device": H100._replace(capability=(8, 0), hopper=False)}, "9.0 alone"),
        ({"N": 1020, "V": 1 << 18}, "too small"),
    ],
    ids=str,
)
def test_where_the_row_kernel_computes_the_blocks(changes: dict[str, Any], why: str) -> None:
    p = plan(**changes)
    assert p.algorithm == ROWS and p.classes is not None and why in dict(p.ruled_out)[KNOWN] and why in str(p)


@pytest.mark.parametrize(
    "changes",
    [
        {"prefer": "speed"},
        {"recompute": False},
        {"mask": (False, False, False)},
        {"N": 0},
        {"grads": None, "mask": (False, False, False), "recompute": False, "stats": LSE | TARGET},
        {"grads": None, "mask": (False, False, False), "recompute": False, "stats": LSE | MAX},
        {"dtype": torch.float32, "recompute": False},
    ],
    ids=str,
)
def test_where_it_is_out_of_the_question(changes: dict[str, Any]) -> None:
    p = plan(**changes)
    assert p.algorithm in (ANCHORED, ROWS) and p.classes is None and KNOWN not in dict(p.ruled_out)
    assert KNOWN not in str(p)


# -- on a GPU


@NEEDS_GPU
@pytest.mark.parametrize("scale, grads", [(3.0, CE), (20.0, (*CE, "sum"))])
@pytest.mark.parametrize("classes", [16384, 8192])
def test_larger_heads(classes: int, scale: float, grads: tuple[str, ...]) -> None:
    case = Case(N=3000, H=520, V=50257, dtype=torch.bfloat16, scale=scale, grads=grads)
    a, incoming = make(case, "cuda")
    (stats, exact), (_, eager) = (whole(a, incoming, dtype) for dtype in (torch.float64, torch.bfloat16))
    found = run(classes).backward(a, stats.lse, None, incoming, (True, True, False))
    compare(case, ("dx", "dw"), found, eager, exact, 1.25)


@NEEDS_GPU
def test_same_bits_without_a_synchronisation_in_a_graph_and_the_peak() -> None:
    case = Case(N=4096, H=1024, V=65536, dtype=torch.bfloat16)
    a, grads = make(case, "cuda")
    a, mask = a._replace(prefer="memory"), (True, True, False)
    lse = (a.x @ a.weight.t()).float().logsumexp(1).double()
    from lce_inductor.lower import head as heads

    p = plans.planned(heads.request(a, 0, grads, mask, recompute=True, counts=True), a.x.device)
    assert p.algorithm == KNOWN
    want = heads.backward(a, lse, None, grads, mask)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        heads.backward(a, lse, None, grads, mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    measured = torch.cuda.max_memory_allocated() - before
    assert abs(measured / p.peak_bytes - 1) < 0.05, (measured, p)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = heads.backward(a, lse, None, grads, mask)
    for _ in range(5):
        for t in got:
            t.fill_(float("nan"))
        graph.replay()
        assert all(one.equal(two) for one, two in zip(want[:2], got[:2]))
