"""A compile from begin to end: what is told of cached graphs, the structured trace, and the one warning."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Compiled, head
from test_explain import WIDE, step, told

import lce_inductor
from lce_inductor import explain
from lce_inductor.config import Config
from lce_inductor.reasons import REASONS
from lce_inductor.reporting import watch

HERE = __file__

# -- cached graphs, and the structured trace

PROBE = """
import json, logging, sys
import torch, torch.nn.functional as F
from torch._dynamo.utils import counters
import lce_inductor

logging.basicConfig(level=logging.DEBUG, stream=sys.stdout, format="%(levelname)s %(message)s")
logging.getLogger("torch").setLevel(logging.WARNING)
logging.getLogger("lce_inductor").setLevel(logging.DEBUG)
lce_inductor.install(min_logits_bytes=0)

def escaping(x, w, y):
    logits = F.linear(x, w)
    return F.cross_entropy(logits, y) + logits.detach().histc(9).sum()

def training(x, w, y):
    logits = F.linear(x, w)
    return F.cross_entropy(logits, y)

x, w, y = torch.ones(6, 4, requires_grad=True), torch.ones(11, 4, requires_grad=True), torch.arange(6)
for fn in (escaping, training):
    torch.compile(fn)(x, w, y).backward()  # a graph is cached with its backward
found = lce_inductor.explain(training)(x, w, y)
print(json.dumps({
    "counts": counters["lce_inductor"],
    "hits": counters["aot_autograd"]["autograd_cache_hit"],
    "codes": [r.code for r in found.records],
    "notes": found.notes,
}))
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]]]:
    """The output lines of two processes that share a cache, and the folder of their traces."""
    folder = tmp_path_factory.mktemp("cached")
    (folder / "probe.py").write_text(PROBE)
    # A copy: the keys of the caches cover the sources, which somebody may be editing.
    package = Path(lce_inductor.__file__).parent
    shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"),
        "TORCH_TRACE": str(folder / "trace"),
        "PYTHONPATH": str(folder),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
    }
    outputs = []
    for _ in range(2):
        command = [sys.executable, str(folder / "probe.py")]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout.splitlines())
    return folder, outputs


def test_a_cached_graph_is_reported(two_processes):
    """With its lines, refusals and counts, and said to be cached; explain() knows without the caches."""
    folder, (cold, warm) = two_processes
    first, second = json.loads(cold[-1]), json.loads(warm[-1])
    assert (first["hits"], second["hits"]) == (0, 2)
    for found, mark in ((first, ""), (second, "cached:")):
        assert (found["counts"][f"{mark}rewritten"], found["counts"][f"{mark}refused:escape"]) == (1, 1)
        assert found["codes"] == [None]
    shown = "from the compile caches: "
    for lines, said in ((cold, ""), (warm, shown)):
        assert any(line.startswith(f"DEBUG {said}rewrote {folder / 'probe.py'}:") for line in lines)
        assert any(line.startswith(f"DEBUG {said}left {folder / 'probe.py'}:") for line in lines)
    assert not first["notes"] and ["compile caches" in note for note in second["notes"]] == [True]


def test_the_warning_survives_a_cache_hit(two_processes):
    """Once in each process: the first compile found a head and left it alone."""
    folder, outputs = two_processes
    for lines in outputs:
        (warning,) = [line for line in lines if line.startswith("WARNING")]
        assert f"{folder / 'probe.py'}:13: logits = F.linear(x, w): escape" in warning and "explain(" in warning


def test_records_stand_beside_generated_code(two_processes):
    """Nothing is written anywhere else."""
    folder, _ = two_processes
    found = list(folder.rglob("*.lce_inductor.json"))
    assert found and all(file.with_name(file.name.split(".")[0] + ".py").is_file() for file in found)
    assert all(folder / "cache" in file.parents for file in found)


def test_trace_artifacts(two_processes):
    """What tlparse shows, as torch writes it: a line of metadata, then its payload, indented by a tab."""
    folder, _ = two_processes
    payloads: dict[str, list[Any]] = {}
    for file in sorted((folder / "trace").iterdir()):
        lines = file.read_text().split("\n")
        for at, line in enumerate(lines):
            match = re.search(r'"artifact": \{"name": "(lce_inductor_\w+)", "encoding": "json"\}', line)
            if match:
                body = next(i for i in range(at + 1, len(lines)) if not lines[i].startswith("\t"))
                payloads.setdefault(match[1], []).append(json.loads("\n".join(lines[at + 1 : body])))
    heads = [record["code"] for payload in payloads["lce_inductor_heads"] for record in payload]
    assert heads == ["escape", None] * 2
    assert len(payloads["lce_inductor_explain"]) == 2
    assert all(p["graphs"][0]["records"][0]["classes"] == "11" for p in payloads["lce_inductor_explain"])


def test_code_without_records_tells_by_its_ops(tmp_path):
    """A cache that came over the network has the code only."""
    (tmp_path / "code.py").write_text("buf = torch.ops.lce_inductor.row_stats_with_grad.default(arg0, arg1)\n")
    (record,) = watch._kept([tmp_path / "code.py"], "f")
    assert record.rewritten and record.inserted == ("row_stats_with_grad",)
    for function, code in (("f", "escape"), ("g", "crossing")):
        watch._keep([tmp_path / "code.py"], function, [record.refused(code)])
    found = {name: watch._kept([tmp_path / "code.py"], name)[0].code for name in ("f", "g", "of another line")}
    assert found == {"f": "escape", "g": "crossing", "of another line": "crossing"}


# -- the warning


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [r for r in caplog.records if r.name.startswith("lce_inductor") and r.levelno >= logging.WARNING]
    return [r.getMessage() for r in found]


def escaping(x, w, y):
    logits = F.linear(x, w)
    return F.cross_entropy(logits, y) + logits.detach().histc(9).sum()


def test_one_warning_when_nothing_was_found(installed, caplog):
    for n in (24, 26, 28):  # compiled again: said once all the same
        Compiled(escaping, dynamic=False)(*head(n=n))
    (text,) = warnings_of(caplog)
    assert f"{HERE}:" in text and "3.5 KiB" in text and ": logits = F.linear(x, w): escape: " in text
    assert REASONS["escape"].explanation in text and "lce_inductor.explain(fn)" in text
    lce_inductor.uninstall()
    lce_inductor.install(min_logits_bytes=0)
    Compiled(escaping)(*head())
    assert len(warnings_of(caplog)) == 2, "another install() may say it again"


def test_a_warning_after_a_compile_that_never_ended(installed, caplog):
    """An interrupt leaves the record of its compile, and torch._dynamo.reset() forgets who would have ended it."""
    watch._thread.now = watch._Compile(Config(), 0)
    torch._dynamo.reset()
    Compiled(escaping)(*head())
    assert len(warnings_of(caplog)) == 1


@pytest.mark.parametrize("what", ["loss outside", "head outside"])
def test_a_warning_for_half_of_it(what, installed, caplog):
    x, w, y = head(v=WIDE)
    if what == "loss outside":
        Compiled(lambda x, w: F.linear(x, w))(x, w)
    else:
        Compiled(lambda z, y: F.cross_entropy(z, y))(F.linear(x, w), y)
    (text,) = warnings_of(caplog)
    assert ("returned-loss-free" if what == "loss outside" else "no-head") in text and f"{HERE}:" in text


QUIET: dict[str, tuple[Callable[..., Any], int]] = {
    "no head": (lambda x, w, y: (x @ x.T).sin(), 0),
    "small": (escaping, 1 << 20),
    "rewritten": (step, 0),
    "rewritten beside a refused one": (lambda x, w, y: step(x, w, y) + escaping(x, w * 2, y), 0),
    "convolution": (lambda x, w, y: F.cross_entropy(F.conv1d(x[None], w[..., None], padding=0)[0].T, y[:8]), 0),
    "a layer of the body": (lambda x, w, y: F.silu(F.linear(x, w)).sum(), 0),
}


@pytest.mark.parametrize("what", QUIET)
def test_no_warning(what, caplog):
    fn, least = QUIET[what]
    x, w, y = head()
    if what == "convolution":
        x = torch.randn(8, 8, requires_grad=True)
    with lce_inductor.installed(min_logits_bytes=least):
        Compiled(fn)(x, w, y)
    assert warnings_of(caplog) == []


def test_no_warning_without_gradients_nor_after_a_rewrite(installed, caplog):
    with torch.no_grad():
        Compiled(lambda x, w: F.linear(x, w))(*head(v=WIDE)[:2])
        Compiled(escaping)(*head())
    Compiled(step)(*head())
    Compiled(escaping)(*head())
    assert warnings_of(caplog) == []


def test_no_warning_by_explain_or_without_install(caplog):
    told(escaping, *head())
    Compiled(escaping)(*head())
    lce_inductor.install(min_logits_bytes=0)
    explain(escaping)(*head())
    assert warnings_of(caplog) == []
    Compiled(escaping)(*head())
    assert len(warnings_of(caplog)) == 1, "explain() did not use it up"
