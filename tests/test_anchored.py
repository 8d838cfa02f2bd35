"""The anchored softmax: every case under Triton's interpreter or on a GPU. test_other_gpus.py compiles it."""

import dataclasses
import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from turns import EVERYTHING, crossed

triton = pytest.importorskip("triton")
# Older interpreters hold scalars as arrays of one element, which NumPy 2.4 no longer takes as a loop's bound.
OLD_INTERPRETER = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)

if INTERPRETED or ON_GPU:
    import anchored_cases as cases
    import counting_cases
    import hopper_emulated
    from rows_cases import ALWAYS_OURS, SM_90, Planned

    from lce_inductor.lower.device_policy import ANCHORED, ANCHORED_TRITON
    from lce_inductor.lower.plan import capabilities
    from lce_inductor.spec.statistics import LSE, TARGET, RowGrads

    ENGINES = ["triton", "hopper"] if INTERPRETED else ["chosen"]

    class Engine(NamedTuple):
        """What computes the cases; launched: the names of what was launched, where hopper.py is emulated."""

        run: Planned
        launched: list[str] | None = None

    @pytest.fixture
    def engine(request, monkeypatch):
        """On a GPU what the device takes; under the interpreter Triton's product, then what hopper.py would launch."""
        if request.param == "chosen":
            return Engine(Planned(ANCHORED, capabilities(torch.device("cuda", torch.cuda.current_device()))))
        if request.param == "triton":
            return Engine(Planned(ANCHORED_TRITON))
        return Engine(Planned(ANCHORED, SM_90, ALWAYS_OURS), hopper_emulated.emulate(monkeypatch))

    DEVICE = "cpu" if INTERPRETED else "cuda"
    # The interpreter truncates where the GPU rounds to bf16: up to twice the error.
    FACTOR = 2.5 if INTERPRETED else 1.25

    # What hopper.py launches is computed by the same Triton kernels, but for the products: a quarter of the cases does,
    # and another is left to Triton's.
    EACH = {
        "hopper": slice(0, None, 4),
        "triton": slice(None) if EVERYTHING else slice(2, None, 4),
        "chosen": slice(None),
    }
    RUNS = [(e, c) for e in ENGINES for c in cases.CASES[EACH[e]]]

    @pytest.mark.parametrize(
        "engine, case",
        RUNS if INTERPRETED else RUNS + [("chosen", c) for c in cases.BIG],
        indirect=["engine"],
        ids=str,
    )
    def test_against_fp64(case, engine):
        cases.check(engine.run, case, DEVICE, FACTOR)
        if engine.launched is not None:
            assert {"anchors", "normalise", "dx", "spread"} <= {*engine.launched}

    SATURATED = {"none": [], "one": [5], "some": [0, 17, 36], "all": list(range(37))}

    @pytest.mark.parametrize(
        "engine, rows",
        [
            pytest.param(e, SATURATED[name], id=f"{name}-{e}")
            for e, name in {**dict.fromkeys(crossed(ENGINES, [*SATURATED])), (ENGINES[-1], "none"): None}
        ],
        indirect=["engine"],
    )
    def test_saturated_rows(rows, engine):
        cases.check_saturation(engine.run, DEVICE, 37, rows, FACTOR, chunk_tokens=32)
        if engine.launched is not None and not rows:
            assert engine.launched and not [name for name in engine.launched if "REDO" in name and "HAS_TARGET" in name]

    @pytest.mark.parametrize("engine", ENGINES, indirect=True)
    def test_classes_of_any_size(engine):
        cases.check_classes(
            engine.run, DEVICE, [1, 33, 2] if INTERPRETED else [1, 700, 33, 2, 32, 31, 8, 7, 1, 1, 64, 257], H=40
        )

    @pytest.mark.parametrize("engine", ENGINES, indirect=True)
    def test_nothing_stays_behind(engine):
        cases.check_nothing_stays_behind(engine.run, DEVICE)

    @pytest.mark.parametrize("engine", ENGINES, indirect=True)
    @pytest.mark.parametrize("name", ["not_finite", "confident", "label_out_of_range"])
    def test_special(name, engine):
        getattr(cases, f"check_{name}")(engine.run, DEVICE)

    COUNTED = counting_cases.FEW if INTERPRETED else counting_cases.SMALL
    PACKING = [e for e in ENGINES if e != "triton"]

    @pytest.mark.parametrize("engine", PACKING, indirect=True)
    @pytest.mark.parametrize("count", counting_cases.FEW_COUNTS if INTERPRETED else counting_cases.COUNTS)
    def test_rows_that_count(count, engine):
        counting_cases.check(engine.run, COUNTED, count, DEVICE, FACTOR)
        if engine.launched is not None:
            assert {"count", "pack", "gather", "dx", "dw", "collect"} <= {*engine.launched}

    @pytest.mark.parametrize("engine", PACKING, indirect=True)
    @pytest.mark.parametrize(
        "changes",
        [
            {"grads": ("lse", "target", "sum"), "epilogue": "mul 0.5;add 0.25"}, {"scale": 200.0},
            {"K": 0, "grads": ("lse",)}, {"epilogue": cases.SOFTCAP}, {"chunk_tokens": 0},
        ][: 1 if INTERPRETED and not EVERYTHING else None],
        ids=str,
    )  # fmt: skip
    def test_rows_that_count_of_other_heads(changes, engine):
        case = dataclasses.replace(COUNTED, **changes)
        counting_cases.check(engine.run, case, 70, DEVICE, FACTOR)

    @pytest.mark.parametrize("engine", PACKING, indirect=True)
    @pytest.mark.parametrize("name", ["what_else_counts", "stale_memory"])
    def test_packed_rows(name, engine):
        getattr(counting_cases, f"check_{name}")(engine.run, COUNTED, DEVICE)


if ON_GPU and not INTERPRETED:

    @pytest.mark.parametrize("engine", ENGINES, indirect=True)
    @pytest.mark.parametrize("count", [0, 1, 511, 2047, 2048, 2049, 5000])
    def test_rows_that_count_of_many(count, engine):
        case = dataclasses.replace(counting_cases.SMALL, N=5000, H=1032, V=20011, chunk_tokens=2048)
        counting_cases.check(engine.run, case, count, "cuda", FACTOR)

    @pytest.mark.parametrize("engine", ENGINES, indirect=True)
    def test_rows_that_count_in_a_cuda_graph(engine):
        """Their number changes from replay to replay, nothing waits for it, and the bits are the same every time."""
        case = dataclasses.replace(counting_cases.SMALL, N=3000, H=256, V=5003, chunk_tokens=1024)
        a, grads = counting_cases.make(case, "cuda")
        needed = counting_cases.some(3000, 1000, "cuda")
        masks = {c: counting_cases.some(3000, c, "cuda") for c in (0, 1, 1500, 3000)}
        g_lse = torch.empty_like(grads.lse)

        def step():
            g_lse.copy_(grads.lse * needed)
            here = RowGrads(lse=g_lse, target=-g_lse[:, None])
            found, dx, dw, _ = engine.run.with_grad(a, LSE | TARGET, here, (True, True, False), needed=needed)
            again = engine.run.backward(a, found.lse, None, here, (True, True, False))
            return [found.lse, found.target_logit, dx, dw, *again[:2]]

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()
            stream.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                out = step()
        for count in (1500, 0, 3000, 1, *[1500] * 20):
            needed.copy_(masks[count])
            torch.cuda.synchronize()
            graph.replay()
            torch.cuda.synchronize()
            for one, two in zip(out, step()):
                assert one.equal(two)

    @pytest.mark.parametrize("rows", [[777], list(range(2000))], ids=["one", "all"])
    @pytest.mark.parametrize("engine", ENGINES, indirect=True)
    def test_saturated_rows_of_many(rows, engine):
        cases.check_saturation(engine.run, "cuda", 2000, rows, FACTOR, chunk_tokens=768, H=128, V=5003)

    @pytest.mark.parametrize("engine", ENGINES, indirect=True)
    def test_classes_and_columns(engine):
        cases.check_classes(engine.run, "cuda", [1, 700, 33, 2, 32, 31, 8, 7, 1, 1, 64, 257], H=520)


if not INTERPRETED and not torch.cuda.is_available():

    @pytest.mark.skipif(OLD_INTERPRETER, reason="Triton's interpreter is too old for loops with bounds from arguments")
    def test_under_the_interpreter():
        """A process of its own: Triton reads the variable when a kernel is defined."""
        env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
            check=False, env=env, capture_output=True, text=True,
        )  # fmt: skip
        assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
