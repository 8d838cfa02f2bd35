"""The benchmark on small sizes: its gate, its rows for what goes wrong, and a whole run."""

from __future__ import annotations

import csv
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lce_inductor.bench import __main__ as cli
from lce_inductor.bench import measure, plots, processes, table
from lce_inductor.bench.implementations import IMPLEMENTATIONS, Implementation, Loss
from lce_inductor.bench.measure import Job, Row
from lce_inductor.bench.processes import FAILED, OK, OUT_OF_MEMORY, WRONG
from lce_inductor.bench.reference import make_inputs, reference
from lce_inductor.bench.shapes import Shape, parse_shape, parse_sweep

SHAPE = Shape(48, 8, 100)
JOB = Job("eager", SHAPE, "float32", "cpu", reps=2)
CPU = torch.device("cpu")


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loss]:
    """Put a loss among the implementations, under the name "mine"."""

    def add(loss: Loss, **about: object) -> Job:
        monkeypatch.setitem(IMPLEMENTATIONS, "mine", Implementation("mine", lambda reduction: loss, **about))
        return Job(**{**vars(JOB), "impl": "mine"})

    yield add


@pytest.mark.parametrize("peaked", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reference_is_autograd_s(reduction, peaked):
    inputs = make_inputs(Shape(1500, 8, 100), torch.float32, CPU, reduction, peaked)
    x, weight = (t.detach().double().requires_grad_() for t in (inputs.x, inputs.weight))
    loss = F.cross_entropy(x @ weight.T, inputs.target, reduction=reduction)
    loss.backward(None if inputs.cotangent is None else inputs.cotangent.double())
    for found, expected in zip(reference(inputs, reduction, True), (loss, x.grad, weight.grad)):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-14)


def test_peaked_logits_are_those_of_a_trained_model():
    shape = Shape(256, 256, 4096)
    for peaked, low, high in ((False, 0, 0.01), (True, 0.5, 1)):
        inputs = make_inputs(shape, torch.float32, CPU, "mean", peaked)
        valid = inputs.target >= 0
        p = (inputs.x @ inputs.weight.T).softmax(-1)[valid].gather(1, inputs.target[valid, None])
        assert valid.sum() == 240 and low <= p.mean() <= high


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ours_is_measured(reduction):
    row = measure.measure(Job("lce_inductor", SHAPE, "float32", "cpu", reduction=reduction, reps=2))
    assert row.status == OK, row.detail
    assert max(row.err_loss, row.err_dx, row.err_dw) < 1e-5
    assert row.ms > 0 and row.floor_ms > 0
    # dX, dW and one copy of the logits at the least, since this is a single chunk.
    assert row.added_bytes >= 4 * (48 * 8 + 100 * 8 + 48 * 100)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_trl_s_chunked_loss_is_measured(reduction):
    """It computes on a CPU what it does on a GPU, without its kernels."""
    pytest.importorskip("trl")
    row = measure.measure(Job("trl-chunked", SHAPE, "float32", "cpu", reduction=reduction, reps=1))
    assert row.status == OK, row.detail
    assert max(row.err_loss, row.err_dx, row.err_dw) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_forward_only_compares_the_loss_alone(dtype):
    row = measure.measure(Job("eager", SHAPE, dtype, "cpu", forward_only=True, peaked=True, reps=1, with_floor=False))
    assert row.status == OK and row.err_loss < 1e-2
    assert row.err_dx is None and row.err_dw is None and row.floor_ms is None


def test_wrong_gradient_gets_no_time(register):
    job = register(lambda x, weight, target: F.cross_entropy(F.linear(x, weight * 1.0, None).float(), target) * 1.01)
    row = measure.measure(job)
    assert (row.status, row.ms, row.added_bytes) == (WRONG, None, None)
    assert row.err_dx == pytest.approx(0.01, rel=1e-3)
    assert "1.0e-02" in table.cells(row) and table.cells(row)[-1] == "WRONG: error above 1e-04"


def test_missing_or_nan_gradient_is_wrong(register):
    row = measure.measure(register(lambda x, weight, target: F.cross_entropy(F.linear(x, weight.detach()), target)))
    assert (row.status, row.detail, row.ms) == (WRONG, "an input got no gradient", None)
    row = measure.measure(register(lambda x, weight, target: F.cross_entropy(x @ weight.T, target) * float("nan")))
    assert (row.status, row.ms) == (WRONG, None)


def test_what_goes_wrong_is_a_row(register, monkeypatch):
    # 64 TiB of logits: no machine's allocator grants them.
    huge = measure.measure(Job("eager", Shape(1 << 22, 1, 1 << 22), "float32", "cpu", with_floor=False))
    assert (huge.status, huge.ms) == (OUT_OF_MEMORY, None)
    assert table.cells(huge)[-1] == OUT_OF_MEMORY
    failed = measure.measure(register(lambda x, weight, target: x @ weight))
    assert failed.status == FAILED and failed.detail.startswith("RuntimeError: ")

    def no_memory(*args: object) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(measure, "reference", no_memory)
        unchecked = measure.measure(JOB)
    assert unchecked.status == FAILED and "reference" in unchecked.detail and unchecked.ms is None
    idle = measure.measure(register(IMPLEMENTATIONS["eager"].make("mean"), idle=lambda: "saw nothing"))
    assert (idle.status, idle.detail, idle.ms) == (FAILED, "saw nothing", None)
    no_sum = measure.measure(register(IMPLEMENTATIONS["eager"].make("mean"), reductions=("sum",)))
    assert no_sum.detail == "has no reduction 'mean'"


@pytest.mark.parametrize(
    ("message", "status"),
    [
        ("Triton Error [CUDA]: out of memory", OUT_OF_MEMORY),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", OUT_OF_MEMORY),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes", OUT_OF_MEMORY),
        ("CUDA error: an illegal memory access was encountered", FAILED),
    ],
)
def test_out_of_memory_is_known_by_its_words(message, status):
    assert measure.failure(RuntimeError(message))[0] == status


@pytest.mark.parametrize(
    ("end", "status", "detail"),
    [
        ("os.kill(os.getpid(), 9)", OUT_OF_MEMORY, "killed"),
        ("os.abort()", FAILED, "exit code"),
        ("1/0", FAILED, "Zero"),
    ],
)
def test_process_that_ends_early_is_a_row(monkeypatch, tmp_path, end, status, detail):
    monkeypatch.setattr(measure, "__name__", "ends_early")
    (tmp_path / "ends_early.py").write_text(f"import os\n{end}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    row = measure.measure_isolated(JOB, tmp_path)
    assert row.status == status and detail in row.detail


def test_slow_process_is_a_row(tmp_path):
    row = measure.measure_isolated(JOB, tmp_path, timeout_s=0.05)
    assert (row.status, row.detail) == (FAILED, "no result after 0.05 s")


STEPS = r"""
import json, sys, time
from pathlib import Path
from lce_inductor.bench import processes

def work(job, result):
    name = job["impl"]
    print("chatter")
    if name == "dead":
        sys.exit("died")
    if name == "slow":
        time.sleep(60)

    def step():
        with Path(job["dtype"]).open("a") as log:
            begun = time.monotonic()
            time.sleep(0.01)
            log.write(f"{name} {begun} {time.monotonic()}\n")
        return 1.0

    found = processes.repeated(step, 99, lambda: None)
    result.write_text(json.dumps({"status": "ok", "ms": sum(found)}))

processes.main(sys.argv[1:], work)
"""


def test_steps_in_turns(monkeypatch, tmp_path):
    """All processes are there, and one at a time takes a step; one that ends early, or is late, is a row."""
    (tmp_path / "steps.py").write_text(STEPS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(__file__).parent.parent)]))
    log, begun = tmp_path / "log", []
    jobs = [Job(name, SHAPE, str(log), "cpu") for name in ("a", "dead", "b", "slow", "c")]
    rows = processes.run_in_turns("steps", jobs, tmp_path, 6, 15, begun.append)
    assert begun == jobs
    assert [row["status"] for row in rows] == [OK, FAILED, OK, FAILED, OK]
    assert rows[1]["detail"] == "exit code 1: died" and rows[3]["detail"] == "no result after 15 s"
    assert [row["ms"] for row in rows[::2]] == [6.0, 6.0, 6.0]
    steps = [line.split() for line in log.read_text().splitlines()]
    assert len(steps) == 6 * 3 * 2  # a step before each timed one
    assert all(float(a[2]) <= float(b[1]) for a, b in itertools.pairwise(steps))
    rounds = ["".join(name for name, _, _ in steps[i : i + 6]) for i in range(0, 36, 6)]
    assert {"".join(sorted(r)) for r in rounds} == {"aabbcc"} and len(set(rounds)) > 1


def test_whole_run_in_turns(tmp_path):
    command = [sys.executable, "-m", "lce_inductor.bench", "--shape", "48x8x100", "--reps", "3", "--in-turns"]
    command += ["--impl", "floor,eager", "--device", "cpu", "--csv", str(tmp_path / "rows.csv")]
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root}, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["impl"], row["status"]) for row in rows] == [("floor", OK), ("eager", OK)]
    assert all(float(row["ms"]) > 0 and float(row["floor_ms"]) > 0 for row in rows)


def test_whole_run(tmp_path):
    """As the user starts it: two sizes, a table, CSV and a picture, each row in its own process."""
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "lce_inductor.bench", "--shape", "48x8x100", "--sweep", "V=100,200", "--reps", "1"]
    command += ["--impl", "floor,eager", "--device", "cpu", "--csv", str(tmp_path / "rows.csv")]
    command += ["--plot", str(tmp_path / "sweep")]
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root}, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"torch {torch.__version__}" in done.stdout
    assert "N=48 H=8 V=200, float32, cpu, mean (logits: 0.0 MiB)" in done.stdout
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["impl"], row["V"], row["status"]) for row in rows] == [
        ("floor", "100", OK), ("eager", "100", OK), ("floor", "200", OK), ("eager", "200", OK),
    ]  # fmt: skip
    assert float(rows[1]["ms"]) > 0 and int(rows[1]["added_bytes"]) > 0 and float(rows[1]["err_dw"]) < 1e-5
    assert rows[0]["added_bytes"] == rows[0]["err_dx"] == ""
    picture = (tmp_path / "sweep-V.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and len(picture) > 10_000


def test_losing_rows_stay_in_table_and_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    shapes = parse_sweep("N=16,32").shapes(SHAPE)
    jobs = [Job(impl, shape, "float32", "cpu") for shape in shapes for impl in ("eager", "lce_inductor")]
    rows = [
        Row(jobs[0], OK, ms=3.0, floor_ms=1.5, added_bytes=3 << 20, err_loss=0.0),
        Row(jobs[1], OK, ms=2.0, added_bytes=1 << 20),
        Row(jobs[2], OUT_OF_MEMORY),
        Row(jobs[3], WRONG, "error above 1e-04", err_dx=0.5),
    ]
    plots.draw(tmp_path / "a.png", "N", rows, "caption")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    table.show(rows)
    title, headings, eager, _, lost, wrong = capsys.readouterr().out.strip().splitlines()
    assert title == "N=16 H=8 V=100, float32, cpu, mean (logits: 0.0 MiB)"
    assert headings.split() == ["ms", "of", "floor", "added", "MiB", "loss", "dX", "dW"]
    assert eager.split() == ["eager", "3.000", "2.00", "3.0", "0.0e+00"]
    assert lost.split() == ["eager", "out", "of", "memory"]
    assert wrong.split() == ["lce_inductor", "5.0e-01", *["WRONG:", "error", "above", "1e-04"]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--shape 3x4", "'3x4': must be NxHxV, three integers >= 1"),
        ("--shape 3x0x5", "'3x0x5': must be NxHxV"),
        ("--sweep K=1,2", "'K=1,2': must be N=, H= or V= and integers >= 1"),
        ("--sweep V=", "'V=': must be"),
        ("--head gpt5", "invalid choice: 'gpt5'"),
        ("--impl eager,fast", "--impl fast: must be of floor, eager, torch.compile, lce_inductor"),
        ("--impl liger", "--impl liger: "),
        ("--device tpu", "'tpu': must be auto, cpu, cuda or cuda:N"),
        ("--device cuda:99", "--device cuda:99: this PyTorch"),
        ("--reps 0", "'0': must be an integer >= 1"),
        ("--plot x", "--plot draws a sweep: add --sweep"),
        ("--shape 1x1x1 --shape 2x2x2 --sweep N=1", "--sweep varies one shape, and there are 2"),
        ("--csv no/such/rows.csv", "there is no folder"),
    ],
)
def test_bad_argument_is_named(capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(flags.split() if "--device" in flags else ["--device", "cpu", *flags.split()])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_shapes():
    assert parse_shape("8192x2048X128256") == Shape(8192, 2048, 128256)
    assert parse_sweep("h=64,16,64").shapes(SHAPE) == [Shape(48, 16, 100), Shape(48, 64, 100)]


def test_list_names_everything(capsys):
    assert cli.main(["--list", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("floor", *IMPLEMENTATIONS, "gpt2", "llama-3-8b"))


def test_importing_the_package_leaves_the_benchmark_alone():
    code = "import sys, lce_inductor; sys.exit(any(name.startswith('lce_inductor.bench') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
