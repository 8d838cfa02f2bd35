"""Every spelling of the corpus: right results everywhere, no held logits where it must be rewritten.

Runs go through all of Inductor's graph passes but not through its code generation (see corpus/harness.py). A few
spellings are also compiled for real. Each spelling runs in fp64, those about casts and half of the others in one other
way (see turns.py); LCE_EVERYTHING=1 runs all spellings in all ways, also through code generation.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Callable

import pytest
import torch
from corpus import CASES, Case, Refuse, Rewrite, harness
from corpus.codes import CROSSING, RETURNED, TOO_SMALL, UNSEEN
from corpus.registry import Expectation
from turns import EVERYTHING, one_of, turns

import lce_inductor
from lce_inductor.lower.device_policy import POLICIES
from lce_inductor.lower.plan import using
from lce_inductor.reporting import history

# One or two of each family that differ most in what Inductor then has to compile.
SAMPLE = (
    "plain/causal-lm-padded-labels",
    "plain/weights-without-static-sizes",
    "scale/everything-before-the-loss",
    "rows/permute-bcn",
    "rl/entropy-no-grad-beside-loss",
    "smoothing/trainer",
    "z-loss/pow-masked-sum-shifted",
    "heads/mtp-shared-head",
    "returned/nano-gpt",
)
GROWTH = 6  # tokens that the second call of a dynamic run has more

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def settle(case: Case, expect: Expectation, run: harness.Run) -> None:
    """What became of the head."""
    rewritten = run.counts["rewritten"]
    codes = {k.removeprefix("refused:") for k in run.counts if k.startswith("refused:")}
    seen = f"{case.name}: {rewritten} rewritten, refused {sorted(codes) or 'nothing'}"
    assert "internal-error" not in codes, seen
    if expect == Refuse(UNSEEN):
        assert rewritten == 0 and codes <= {TOO_SMALL}, f"{seen}; no head is there to be seen"
        return
    if isinstance(expect, Refuse):
        assert rewritten == 0 and expect.code in codes, f"{seen}; must be refused with {expect.code!r}"
        return
    assert rewritten >= case.heads, f"{seen}; must be rewritten {case.heads} times"
    if case.rows:
        worst = run.largest
        held = f"{worst.largest_node} of the {worst.kind} graph has {worst.largest} elements, N * V = {case.limit}"
        assert worst.largest < case.limit, f"{case.name}: {held}\n{worst.text}"


def settle_told(case: Case, run: harness.Run) -> None:
    """What report() says of the same run: nothing is called saved that a graph holds."""
    told = lce_inductor.report()
    assert told.rewritten == run.counts["rewritten"]
    held = case.rows and run.largest.largest >= case.limit
    assert not held or any(not r.saved for r in told.records), f"{case.name}: {run.largest.largest_node} is there"


def check(case: Case, dtype: torch.dtype, *, dynamic: bool = False, grad: bool = True, codegen: bool = False) -> None:
    expect = case.expect if grad else case.no_grad
    assert expect is not None
    history.forget()
    sizes = (0, GROWTH) if dynamic else (0,)
    runs = harness.compiled_run(
        case, dtype, package=lce_inductor, dynamic=dynamic, grad=grad, codegen=codegen, grow=sizes
    )
    settle(case, expect, runs[0])
    if not dynamic:
        settle_told(case, runs[0])
    if dynamic and not case.recompiles and len(runs[0].graphs) != len(runs[-1].graphs):
        alone = harness.compiled_run(case, dtype, dynamic=True, grad=grad, codegen=codegen, grow=sizes)
        found, allowed = ([len(run.graphs) for run in each] for each in (runs, alone))
        assert found == allowed, f"{case.name}: another length compiled another graph, {found} where {allowed} need be"
    if runs[0].counts["rewritten"] == 0:
        plain = harness.compiled_run(case, dtype, dynamic=dynamic, grad=grad, codegen=codegen, grow=sizes)
        for ours, theirs in zip(runs, plain, strict=True):
            harness.check_equal(case, ours, theirs)
        return
    for size, run in zip(sizes, runs, strict=True):
        eager = harness.eager_run(case, dtype, grad=grad, grow=size)
        reference, narrowest = harness.reference_run(case, dtype, grad=grad, grow=size)
        harness.check_close(case, run, eager, reference, narrowest)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("teacher/")])
def test_a_teacher_in_blocks(name: str) -> None:
    """Chunks of 11 rows, and blocks of 3 of them for heads without gradients."""
    cpu = POLICIES["cpu"]
    short = dataclasses.replace(cpu, chunks=dataclasses.replace(cpu.chunks, target_rows=11, least_rows=3))
    with using("cpu", short):
        check(CASES[name], torch.float64)


@each_case
def test_fp64(case: Case) -> None:
    check(case, torch.float64)


def dynamic(case: Case) -> None:
    check(case, torch.float32, dynamic=True)


def no_grad(case: Case) -> None:
    check(case, torch.float32, grad=False)


def bfloat16(case: Case) -> None:
    check(case, torch.bfloat16)


def float16(case: Case) -> None:
    check(case, torch.float16)


def limit_bites(case: Case) -> None:
    """Without the package the same run does hold the logits: the check above is not empty."""
    (run,) = harness.compiled_run(case, torch.float32, grad=False)
    assert run.largest.largest >= case.limit


ATEN_UNTRACED = {
    "in-place/weight-stepped-after-loss": "aot_function alone saves the weight, which the program then changes",
    "plain/tied-embedding": "aot_module takes no tied weights",
    "returned/nano-gpt": "aot_module takes no tied weights",
}
# Rows that are put in another order and back, which Inductor would take out before.
ATEN_REFUSED = {"rows/permute-there-and-back": Refuse(CROSSING)}


def aten_graph(case: Case) -> None:
    """The joint graph that AOTAutograd traces of the case as it stands: neither Dynamo nor Inductor simplified it."""
    run = harness.aten_run(case, torch.float64, lce_inductor)
    settle(case, Refuse(RETURNED) if case.deferred else ATEN_REFUSED.get(case.name, case.expect), run)
    eager = harness.eager_run(case, torch.float64)
    harness.check_close(case, run, eager, *harness.reference_run(case, torch.float64))


def ways(case: Case) -> list[Callable[[Case], None]]:
    """The ways in which a case makes sense, beside fp64 with sizes that are numbers."""
    by_dtype = {torch.bfloat16: bfloat16, torch.float16: float16}
    found = [by_dtype[dtype] for dtype in case.low]
    if case.dynamic:
        found.append(dynamic)
    if case.no_grad is not None:
        found.append(no_grad)
        if isinstance(case.expect, Rewrite) and case.rows:
            found.append(limit_bites)
        if not case.unbacked and case.fullgraph and case.name not in ATEN_UNTRACED:  # one graph
            found.append(aten_graph)
    return found


OTHERWISE = [c for c in CASES.values() if c.low or one_of(2, [c.name])]


@pytest.mark.parametrize(
    "case, way", [pytest.param(c, w, id=f"{c.name}-{w.__name__}") for c in OTHERWISE for w in turns(c.name, ways(c))]
)
def test_another_way(case: Case, way: Callable[[Case], None]) -> None:
    way(case)


@pytest.mark.parametrize("name", ["adapter/lora-frozen-base", "adapter/lora-of-detached-state", "adapter/lora-capped"])
def test_no_gradient_of_a_frozen_base(name: str) -> None:
    """The program of an adapter's head makes the gradient of its [V, 4] factor, and none of the [V, H] weight."""
    (run,) = harness.compiled_run(CASES[name], torch.float32, package=lce_inductor)
    programs = re.findall(r'"dw",\d+,"float32",\[101,(\d+)\]', "".join(g.text for g in run.graphs))
    assert run.counts["rewritten"] == 2 and programs == ["4"]


@pytest.mark.parametrize("name", CASES if EVERYTHING else SAMPLE)
def test_full_inductor(name: str) -> None:
    """With code generation; half of them with dynamic shapes."""
    case = CASES[name]
    check(case, torch.float32, dynamic=case.dynamic and zlib.crc32(name.encode()) % 2 == 0, codegen=True)
