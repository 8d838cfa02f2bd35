"""The benchmark of whole models on tiny ones: its comparison, its search, rows for what goes wrong, a whole run."""

from __future__ import annotations

import csv
import dataclasses
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus.harness import no_codegen_backend

import lce_inductor
from lce_inductor.bench import model_steps, models, plots, table
from lce_inductor.bench.model_steps import CHUNKED, MODELS, WAYS, Job, Row, Turn, Way, largest_batch, measure
from lce_inductor.bench.processes import FAILED, OK, OUT_OF_MEMORY, WRONG
from lce_inductor.deferred_heads.logits import PendingLogits

pytest.importorskip("transformers")
JOB = Job("gpt2", "eager", 4, 32, "cpu", small=True, reps=2)


def row_of(implementation: str, **changes: Any) -> Row:
    usual: dict[str, Any] = {"ms": 2.0, "added_bytes": 3 << 30, "loss": 4.0, "norms": [1.0, 2.0]}
    usual |= {"samples": [[1.0, -1.0], [0.5, 0.0]], "weight_bytes": 1 << 30}
    return Row(**{"job": dataclasses.replace(JOB, implementation=implementation), "status": OK, **usual, **changes})


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile with all of Inductor's passes, its graphs interpreted: C++ would take a minute a model."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile(model, backend=no_codegen_backend([])))


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_measured_and_rewritten(name: str, interpreted: None, tmp_path: Path) -> None:
    """Each way has the turn once it takes steps, and the gradients are those of eager."""
    pytest.importorskip(MODELS[name].package)
    found: list[Row] = []
    ways = {"gpt2": ("eager", "torch.compile", "lce_inductor"), "torchtitan-1b": ("eager", "lce_inductor", CHUNKED)}
    for way in ways.get(name, ("eager", "lce_inductor")):
        lock = str(tmp_path / way)
        measure(dataclasses.replace(JOB, model=name, implementation=way, lock=lock), found.append)
        assert found[-1].status == OK, found[-1].detail
        assert Path(lock).exists()
    rows = models.judged(found)
    assert all(row.status == OK for row in rows), rows
    for row in rows:
        assert row.ms is not None and row.ms > 0 and row.added_bytes and row.weight_bytes and row.samples
        assert row.added_bytes > row.weight_bytes  # the gradients alone are as large
        assert [len(part) > 1000 for part in row.samples] == [True, True]
        assert row.err_head is not None and row.err_head < 2e-2
    assert rows[0].err_loss == 0.0


def test_the_model_is_the_named_one() -> None:
    """Sizes as published; the head is the embedding, and the loss is the one that keeps the graph whole."""
    for name, parameters in {"gpt2": 124_439_808, "llama-1b": 1_235_814_400, "qwen2-0.5b": 494_032_768}.items():
        job = dataclasses.replace(JOB, model=name, small=False)
        with torch.device("meta"):
            model = model_steps.build(job, torch.device("meta"))
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert model.loss_type == "ForCausalLM" and model.training and not model.config.use_cache
        assert model.config._attn_implementation == "sdpa"
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert model.get_parameter(MODELS[name].layer).ndim == 2


def test_torchtitan_s_model_is_the_named_one() -> None:
    """Sizes as published, its own attention on a GPU, and a head that lce_inductor alone defers."""
    pytest.importorskip("torchtitan")
    job = dataclasses.replace(JOB, model="torchtitan-1b", small=False)
    model = model_steps.build(job, torch.device("meta"))
    assert sum(p.numel() for p in model.parameters()) == 1_235_814_400
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and model.training
    assert model.lm_head.weight is model.tok_embeddings.weight
    assert job.kind_of_attention == "causal"
    assert dataclasses.replace(job, device="cuda:0").kind_of_attention == "flex"
    assert dataclasses.replace(job, device="cuda:0", attention="causal").kind_of_attention == "causal"
    assert dataclasses.replace(JOB, device="cuda:0").kind_of_attention == "sdpa"
    small, tokens = dataclasses.replace(JOB, model="torchtitan-1b"), torch.zeros(1, 8, dtype=torch.long)
    with lce_inductor.installed(min_logits_bytes=0):
        for way, kind in (("eager", torch.Tensor), ("lce_inductor", PendingLogits)):
            trained = model_steps.training(dataclasses.replace(small, implementation=way), torch.device("cpu"))
            trained.model.layers.clear()
            assert type(trained.model(*trained.batch(tokens, tokens)[:2])) is kind


def test_attention_without_a_mask_and_labels_left_out() -> None:
    """Causal without a mask is what the mask says; a loss of fewer labels is another one."""
    found: list[Row] = []
    for changes in ({}, {"attention": "causal"}, {"attention": "causal", "ignored": 0.75}):
        measure(dataclasses.replace(JOB, model="llama-1b", **changes), found.append)
    masked, causal, fewer = found
    assert {row.status for row in found} == {OK}
    assert causal.loss == pytest.approx(masked.loss, rel=1e-5) and fewer.loss != pytest.approx(masked.loss, rel=1e-5)
    assert causal.norms == pytest.approx(masked.norms, rel=1e-2)


def test_what_does_nothing_or_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WAYS, "mine", Way("lce_inductor", compiled=False))
    torch._dynamo.utils.counters.clear()
    found: list[Row] = []
    measure(dataclasses.replace(JOB, implementation="mine"), found.append)
    assert (found[0].status, found[0].ms) == (FAILED, None) and "rewrote nothing" in found[0].detail

    def no_memory(job: Job) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setitem(WAYS, "mine", Way("eager", no_memory))
    measure(dataclasses.replace(JOB, implementation="mine"), found.append)
    assert found[1].status == OUT_OF_MEMORY
    assert models.cells(found[1])[-1] == OUT_OF_MEMORY


def test_turns_are_taken_one_after_another(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    first, second = Turn(str(tmp_path / "turn")), Turn(str(tmp_path / "turn"))
    first.take()
    waits = threading.Thread(target=second.take)
    waits.start()
    waits.join(0.2)
    assert waits.is_alive() and first.file is not None
    first.take()  # no second time
    first.file.close()
    waits.join(10)
    assert not waits.is_alive() and second.waited_s > 0.1
    Turn(None).take()


def test_a_failing_search_leaves_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """This PyTorch has no CUDA to ask for its free memory."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 40, 1 << 40))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(model_steps, "largest_batch", lambda peak_of, *_: (peak_of(8) and 8, 9))
    found: list[Row] = []
    measure(dataclasses.replace(JOB, largest=True), found.append)
    assert [row.largest_batch for row in found] == [None, 8] and found[1].too_large_batch == 9
    assert models.cells(found[1])[-2] == "8 (not 9)"
    monkeypatch.setattr(model_steps, "largest_batch", lambda *_: 1 / 0)
    measure(dataclasses.replace(JOB, largest=True), found.append)
    assert found[-1].status == OK and found[-1].ms and found[-1].detail.startswith("largest batch: ZeroDivisionError")


@pytest.mark.parametrize("fixed", [0, 30, 100])
@pytest.mark.parametrize("slack", [0, 5, 25])
def test_largest_batch(fixed: int, slack: int) -> None:
    """100 bytes are fixed and 10 go to each sequence; `slack` bytes of the free ones cannot be had."""
    tried: list[int] = []

    def peak_of(batch: int) -> int | None:
        tried.append(batch)
        return 100 + 10 * batch if 100 + 10 * batch <= 400 - slack else None

    most = (300 - slack) // 10
    assert largest_batch(peak_of, {4: 140}, 400, fixed, 10) == (most, most + 1)
    assert len(tried) <= 6 and len(set(tried)) == len(tried)
    tried.clear()
    best, failed = largest_batch(peak_of, {4: 140}, 400, fixed, 1)
    assert len(tried) == 1 and best <= most and (failed is None or failed > most)


def test_differences_are_judged() -> None:
    rows = [row_of("torch.compile"), row_of("eager"), row_of("lce_inductor", loss=4.2, largest_batch=3)]
    compiled, eager, wrong = models.judged(rows)
    assert (compiled.status, compiled.detail, compiled.err_loss) == (OK, "", 0.0)
    assert eager.ms == 2.0
    assert (wrong.status, wrong.ms, wrong.added_bytes, wrong.largest_batch) == (WRONG, None, None, None)
    assert wrong.err_loss == pytest.approx(0.05) and wrong.detail == "loss differ from eager's"
    assert models.judged([rows[1], row_of("liger", samples=[[-1.0, 1.0], [0.5, 0.0]])])[1].detail.startswith("head ")
    assert models.judged([rows[1], row_of("liger", norms=[1.0, float("nan")])])[1].status == WRONG
    lost = Row(rows[1].job, OUT_OF_MEMORY)
    alone = models.judged([lost, rows[0]])
    assert alone[0] == lost and alone[1].detail == "compared with torch.compile, not with eager"


def test_losing_rows_stay_in_table_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    rows = [row_of("eager"), Row(dataclasses.replace(JOB, implementation="torch.compile"), OUT_OF_MEMORY)]
    table.print_columns("title", [models.HEADINGS, *map(models.cells, models.judged(rows))])
    _, _, eager, lost = capsys.readouterr().out.strip().splitlines()
    assert eager.split() == ["eager", "2.0", "64,000", "3.00", "4.0000", *["0e+00"] * 5]
    assert lost.split() == ["torch.compile", "out", "of", "memory"]
    bars = {"gpt2": [("eager", 2.0, 3.0, OK), ("torch.compile", None, None, OUT_OF_MEMORY)]}
    plots.draw_bars(tmp_path / "a.png", bars, "caption")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_whole_run(tmp_path: Path) -> None:
    """As the user starts it: table, CSV and a picture, each row in its own process, the second one ahead."""
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "lce_inductor.bench.models", "--small", "--models", "gpt2,llama-1b", "--reps", "1"]
    command += ["--implementations", "eager", "--device", "cpu", "--csv", str(tmp_path / "rows.csv"), "--ahead", "1"]
    command += ["--plot", str(tmp_path / "bars.png")]
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root}, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"torch {torch.__version__}" in done.stdout and "transformers" in done.stdout
    assert "gpt2 (small), 4 x 32 tokens, bfloat16, weights 0.00 GiB" in done.stdout
    with (tmp_path / "rows.csv").open() as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["model"])
    assert [(row["model"], row["implementation"], row["status"]) for row in rows] == [
        ("gpt2", "eager", OK),
        ("llama-1b", "eager", OK),
    ]
    assert float(rows[0]["ms"]) > 0 and int(rows[0]["added_bytes"]) > 0 and rows[0]["largest_batch"] == ""
    assert (tmp_path / "bars.png").stat().st_size > 10_000


def test_slow_rows_are_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--small", "--device", "cpu", "--timeout", "0.05", "--implementations", "eager,torch.compile"]
    assert models.main([*flags, "--models", "gpt2", "--csv", str(tmp_path / "rows.csv")]) == 1
    assert capsys.readouterr().out.count("failed: no result after 0.05 s") == 2
    with (tmp_path / "rows.csv").open() as file:
        assert [row["status"] for row in csv.DictReader(file)] == [FAILED, FAILED]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--models gpt5", "--models gpt5: must be of gpt2, llama-1b, qwen2-0.5b"),
        ("--implementations fast", "--implementations fast: must be of eager, torch.compile, lce_inductor"),
        ("--implementations liger", "--implementations liger: "),
        ("--device tpu", "'tpu': must be auto, cpu, cuda or cuda:N"),
        ("--device cuda:99", "--device cuda:99: this PyTorch"),
        ("--reps 0", "'0': must be an integer >= 1"),
        ("--ahead 9", "--ahead: invalid choice"),
        ("--largest-batch", "--largest-batch needs a GPU for itself"),
        ("--csv no/such/rows.csv", "there is no folder"),
    ],
)
def test_bad_argument_is_named(capsys: pytest.CaptureFixture[str], flags: str, message: str) -> None:
    with pytest.raises(SystemExit) as stop:
        models.main(flags.split() if "--device" in flags else ["--device", "cpu", *flags.split()])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
