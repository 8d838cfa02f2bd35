"""The examples: a very small run of each from start to end, and their parts."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from corpus.harness import no_codegen_backend

for package in ("tokenizers", "rich", "matplotlib"):
    pytest.importorskip(package)

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Import a module of the example, whose folder is no package, and forget it afterwards."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before = set(sys.modules)
    yield importlib.import_module
    for path in EXAMPLES.glob("*.py"):
        if path.stem not in before:
            sys.modules.pop(path.stem, None)


def _subprocess(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # starting a pool takes longer than these few kernels
        "OMP_NUM_THREADS": "1",  # on a busy machine threads wait for each other far longer than these kernels take
    }
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_tiny_run(tmp_path: Path) -> None:
    picture, numbers = tmp_path / "curves.png", tmp_path / "numbers.json"
    sizes = "--batch 4 --block 32 --layers 1 --heads 2 --embd 16 --vocab-size 600 --corpus-mb 0.3"
    command = [sys.executable, str(EXAMPLES / "train_gpt.py"), "--device", "cpu", *sizes.split()]
    command += ["--steps", "20", "--learning-rate", "0.01"]
    command += ["--min-logits-bytes", "0", "--cache-dir", str(tmp_path), "--out", str(picture), "--json", str(numbers)]
    done = _subprocess(command)
    assert done.returncode == 0, done.stdout + done.stderr

    for row in ("peak memory", "tokens/s", "compile time", "first loss", "last loss", "heads rewritten"):
        assert row in done.stdout
    assert picture.read_bytes().startswith(PNG_SIGNATURE)
    assert picture.stat().st_size > 10_000

    runs = json.loads(numbers.read_text())
    without, with_pass = runs["without"], runs["with"]
    assert without["counters"].get("rewritten", 0) == 0
    assert with_pass["counters"]["rewritten"] == 1
    torch.testing.assert_close(torch.tensor(with_pass["losses"]), torch.tensor(without["losses"]), rtol=1e-4, atol=0)
    for run in (without, with_pass):
        assert len(run["losses"]) == 20
        assert run["losses"][-1] < run["losses"][0]
        assert run["peak"] == run["resident"] + max(run["step_bytes"])
        # All that the step allocates it also releases.
        assert run["step_bytes"][-1] == pytest.approx(0, abs=1024)


# Heads rewritten, and the package that each needs beyond those of train_gpt.py.
SHORT_EXAMPLES = {
    "accelerate_loop": (1, "accelerate"),
    "ddp": (1, None),
    "extreme_classification": (1, None),
    "fsdp2": (1, "transformers"),
    "grpo_logprobs": (2, "transformers"),  # the policy and the reference model
    "hf_trainer": (1, "accelerate"),
    "masked_lm": (1, "transformers"),
    "perplexity": (1, None),
    "seq2seq": (1, "transformers"),
    "sequential_recommender": (1, None),
}
SMALL = "--device cpu --min-logits-bytes 0 --layers 1 --heads 2 --embd 16 --batch 8 --block 32 --steps 8"
SMALL += " --vocab-size 600 --corpus-mb 0.3 --learning-rate 0.01"


@pytest.fixture
def without_codegen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile with all of Inductor's passes, and its graphs interpreted: C++ would take a minute an example."""
    compile = torch.compile

    def interpreted(model: Any = None, **options: Any) -> Any:
        return compile(model, backend=no_codegen_backend([]))

    monkeypatch.setattr(torch, "compile", interpreted)
    yield
    # What Trainer's torch_compile=True leaves behind would compile for the examples after it as well.
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def token_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokens")


@pytest.mark.parametrize("name", SHORT_EXAMPLES)
def test_short_example(
    load: Callable[[str], ModuleType],  # the examples' folder on the path
    without_codegen: None,
    token_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    name: str,
) -> None:
    rewritten, package = SHORT_EXAMPLES[name]
    if package is not None:
        pytest.importorskip(package)
    picture, numbers = tmp_path / "picture.png", tmp_path / "numbers.json"
    paths = ["--cache-dir", str(token_cache), "--out", str(picture), "--json", str(numbers)]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *SMALL.split(), *paths])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    shown = capfd.readouterr()
    assert stop.value.code == 0, shown.out + shown.err

    for row in ("peak memory", "added by a step", "/s", "max loss difference", "heads rewritten"):
        assert row in shown.out
    assert picture.read_bytes().startswith(PNG_SIGNATURE) and picture.stat().st_size > 10_000
    runs = json.loads(numbers.read_text())
    without, with_pass = runs["without"], runs["with"]
    assert without["counters"].get("rewritten", 0) == 0
    assert with_pass["counters"]["rewritten"] == rewritten
    tolerance = with_pass["tolerance"]
    torch.testing.assert_close(
        torch.tensor(with_pass["losses"]), torch.tensor(without["losses"]), rtol=0, atol=tolerance
    )
    assert len(with_pass["losses"]) == 8
    assert with_pass["resident"] == without["resident"]
    assert max(with_pass["step_bytes"]) <= 1.05 * max(without["step_bytes"])
    # Single bytes: what the step allocates it also releases, but for scalars that an optimizer keeps.
    assert with_pass["step_bytes"][-1] == pytest.approx(0, abs=4096)


@pytest.mark.parametrize("flags", ["", "--masked 0.6"])
def test_loss_curves(
    load: Callable[[str], ModuleType],
    without_codegen: None,
    token_cache: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    flags: str,
) -> None:
    picture, numbers = tmp_path / "picture.png", tmp_path / "numbers.json"
    paths = ["--cache-dir", str(token_cache), "--out", str(picture), "--json", str(numbers)]
    loss_curves = load("loss_curves")
    code = loss_curves.main([*SMALL.split(), *flags.split(), *paths])
    shown = capfd.readouterr()
    assert code == 0, shown.out + shown.err
    assert picture.read_bytes().startswith(PNG_SIGNATURE) and picture.stat().st_size > 10_000
    without, with_pass, other = (loss_curves.Curve(**curve) for curve in json.loads(numbers.read_text()))
    for name in ("without", "with lce_inductor", "another seed"):
        assert name in shown.out
    assert len(without.losses) == 8 and without.losses != other.losses
    torch.testing.assert_close(torch.tensor(with_pass.losses), torch.tensor(without.losses), rtol=1e-5, atol=0)
    assert with_pass.finally_apart(without) < other.finally_apart(without)


@pytest.mark.parametrize(
    ("losses", "rewritten", "message"),
    [
        ([5.0, 4.0, 3.0, 2.0], 0, "rewrote nothing"),
        ([5.0, 4.0, 3.0, 2.3], 1, "parts the losses by 3.0e-01, another seed by 2.0e-01"),
        ([2.0, 3.0, 4.0, 5.0], 1, "with: the loss did not fall"),
        ([5.0, 4.0, 3.0, float("nan")], 1, "with: a loss is not finite"),
        ([5.0, 4.0, 3.0, 2.1], 1, ""),
    ],
)
def test_parted_curves_are_loud(
    load: Callable[[str], ModuleType], losses: list[float], rewritten: int, message: str
) -> None:
    module = load("loss_curves")
    without, with_pass, other = (
        module.Curve(name, values, 1.0, None)
        for name, values in (("without", [5.0, 4.0, 3.0, 2.0]), ("with", losses), ("other", [5.0, 4.0, 3.0, 1.8]))
    )
    found = module.problems(without, with_pass, other, rewritten)
    assert message in " ".join(found) if message else not found


def test_ddp_on_two_processes(token_cache: Path, tmp_path: Path) -> None:
    """As its docstring starts it, with code generation: one table, and one picture."""
    picture = tmp_path / "ddp.png"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(EXAMPLES / "ddp.py")]
    command += [*SMALL.split(), "--cache-dir", str(token_cache), "--out", str(picture)]
    done = _subprocess(command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("heads rewritten") == 1
    assert picture.read_bytes().startswith(PNG_SIGNATURE)


def test_every_example_is_run() -> None:
    """A file that can be started is in the table above, or has a test of its own."""
    started = {path.stem for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text("utf-8")}
    assert started == {*SHORT_EXAMPLES, "loss_curves", "train_gpt"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--steps 4", "--steps: '4': must be an integer >= 5"),
        ("--steps many", "--steps: 'many': must be an integer >= 5"),
        ("--batch 0", "--batch: '0': must be an integer >= 1"),
        ("--vocab-size 256", "--vocab-size: '256': must be an integer >= 257"),
        ("--device tpu", "--device: 'tpu': must be auto, cpu, cuda or cuda:N"),
        ("--device cuda:99", "--device cuda:99"),
        ("--learning-rate nan", "--learning-rate: 'nan': must be a number > 0"),
        ("--corpus-mb -1", "--corpus-mb: '-1': must be a number > 0"),
        ("--embd 100 --heads 3", "--embd 100 must be a multiple of --heads 3"),
        ("--out curves.jpg", "--out curves.jpg: must end in .png"),
        ("--out no/such/folder/curves.png", "--out no/such/folder/curves.png: there is no folder"),
    ],
)
def test_bad_flag_is_named(
    load: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    argv = flags.split() if "--device" in flags else ["--device", "cpu", *flags.split()]
    with pytest.raises(SystemExit) as stop:
        load("options").parse(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_every_size_has_a_flag(load: Callable[[str], ModuleType]) -> None:
    options = load("options")
    wanted = {f.name: 8 for f in dataclasses.fields(options.Sizes)} | {"vocab_size": 300}
    argv = [text for name, value in wanted.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    assert dataclasses.asdict(options.parse(["--device", "cpu", *argv]).sizes) == wanted


def _run(load: Callable[[str], ModuleType], **changes: Any) -> Any:
    usual = {
        "losses": [5.0, 4.0, 3.0, 2.0],
        "resident": 1000,
        "peak": 2000,
        "step_ms": [0.0, 1.0],
        "step_bytes": [0, 1000],
        "tokens_per_s": 10.0,
        "compile_s": 1.0,
        "logits_bytes": 500,
        "tolerance": 1e-3,
        "counters": {"rewritten": 1},
    }
    return load("summary").Run(**{**usual, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counters": {"refused": 2}}, "rewrote nothing (its counters: refused: 2)"),
        ({"losses": [5.0, 5.0, 5.0, 5.0]}, "did not fall"),
        ({"losses": [5.0, 4.0, 3.0, float("nan")]}, "is not finite"),
        ({"losses": [5.0, 4.0, 3.0, 2.1]}, "differ by 1.0e-01"),
    ],
)
def test_failure_is_loud(
    load: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
) -> None:
    train_gpt = load("train_gpt")
    monkeypatch.setattr(train_gpt, "run_in_fresh_process", lambda job: _run(load, **(changes if job.install else {})))
    argv = ["--device", "cpu", "--cache-dir", str(tmp_path), "--out", str(tmp_path / "a.png"), "--control"]
    assert train_gpt.main([*argv, "--vocab-size", "300", "--corpus-mb", "0.1", "--block", "8"]) == 1
    assert message in capfd.readouterr().err


def test_timeline_is_exact(load: Callable[[str], ModuleType]) -> None:
    def step() -> None:
        first = torch.empty(1 << 20, dtype=torch.uint8)
        second = torch.empty(2 << 20, dtype=torch.uint8)
        del first
        third = torch.empty(512 << 10, dtype=torch.uint8)
        del second, third

    timeline = load("step_memory").record_step(step, torch.device("cpu"))
    assert [level >> 10 for level in timeline.bytes] == [0, 1024, 3072, 2048, 2560, 512, 0]
    assert timeline.peak == 3 << 20
    assert timeline.milliseconds == sorted(timeline.milliseconds)


def test_resident_counts_a_storage_once(load: Callable[[str], ModuleType]) -> None:
    storage = torch.zeros(64)
    tensors = [storage, storage[8:], torch.zeros(4), torch.zeros(4, device="meta")]
    assert load("step_memory").resident_bytes(tensors, torch.device("cpu")) == 4 * 64 + 4 * 4


def test_batches(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    data = load("data")
    path = tmp_path / "tokens.pt"
    tokens = torch.arange(50, dtype=torch.int32) % 10
    torch.save({"tokens": tokens, "vocab_size": 10, "end_of_file": 7}, path)
    one, same, other = (data.Batches(path, 3, 12, seed) for seed in (1, 1, 2))
    idx, targets = one.next(torch.device("cpu"))
    assert idx.shape == targets.shape == (3, 12)
    assert torch.equal(targets, torch.where(idx == 7, -1, (idx + 1) % 10))
    assert all(torch.equal(a, b) for a, b in zip((idx, targets), same.next(torch.device("cpu")), strict=True))
    assert not torch.equal(idx, other.next(torch.device("cpu"))[0])
    assert data.Batches(path, 3, 48, 0).next(torch.device("cpu"))[1].shape == (3, 48)
    idx, targets = data.Batches(path, 4000, 40, 0, masked=0.6).next(torch.device("cpu"))
    answers = (targets >= 0).int().cumsum(1) > 0  # from the first that is to be predicted to the end
    assert torch.equal(answers & (idx != 7), targets >= 0) and answers.sum(1).double().std() > 2
    assert 0.58 < 1 - answers.double().mean() < 0.65
    with pytest.raises(ValueError, match="block = 49: the text has only 50 tokens"):
        data.Batches(path, 3, 49, 0)


def test_tokens_spell_the_text(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    data = load("data")
    source = "def füñf(x):\n    return '€' * 5  # five\n"
    (tmp_path / "a.py").write_text(source, "utf-8")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "b.py").write_text("not the standard library's", "utf-8")
    corpus = data.Corpus(tmp_path, None)
    tokenizer = data.train_tokenizer(corpus, 300)
    ((count, tokens),) = data.encode(corpus, tokenizer)
    assert count == 1
    assert tokenizer.id_to_token(int(tokens[-1])) == data.END_OF_FILE
    assert tokenizer.decode(tokens[:-1].tolist()) == source
    with pytest.raises(FileNotFoundError, match="no Python sources"):
        data.Corpus(tmp_path / "nothing", None)


def test_names_are_numbered_by_frequency(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    data = load("data")
    (tmp_path / "a.py").write_text("left = right + right  # 2 rare", "utf-8")
    (tmp_path / "b.py").write_text("right = left", "utf-8")
    corpus = data.Corpus(tmp_path, None)
    items, count = data.name_ids(corpus, 3)
    files = {"a.py": [2, 1, 1, 0], "b.py": [1, 2, 0]}
    assert items.tolist() == [i for path in corpus.files for i in files[path.name]]
    assert count == 3
    assert data.name_ids(corpus, 100)[1] == 4


def test_model_file_is_plain_torch() -> None:
    tree = ast.parse((EXAMPLES / "gpt.py").read_text("utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {name.split(".")[0] for name in imported if name} == {"__future__", "dataclasses", "math", "torch"}
