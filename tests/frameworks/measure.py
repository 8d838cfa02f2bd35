"""One step of a framework twice, without the package and with it: what came out, and what was held."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import os
import re
import subprocess
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._inductor.compile_fx  # once, before a process is copied for each case
from corpus.harness import GraphRecord, no_codegen_backend
from oracle import cheap
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

import lce_inductor
from lce_inductor.deferred_heads import functions
from lce_inductor.deferred_logits import rules, tensor
from lce_inductor.reporting import history

# N tokens of a step, hidden size, vocabulary. V is prime; N is larger than H, so that nothing but logits is as large as
# logits; a chunk of them is much smaller.
BATCH, T, H, V = 4, 32, 16, 509
CHUNK = 8
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}  # of norms: two correct evaluations


@dataclasses.dataclass(frozen=True)
class Case:
    """A program of a framework's. line: what a user adds to it, besides install(). note: what the table says of it.

    dtype: of its logits. logits: their elements. source: a repository that is no package, owner/name.
    """

    name: str
    run: Callable[[Run], None]
    packages: tuple[str, ...]
    line: str = ""
    note: str = ""
    dtype: torch.dtype = torch.float32
    logits: int = BATCH * T * V
    source: str = ""

    def versions(self) -> dict[str, str]:
        """Of what it runs. Raises: PackageNotFoundError or FileNotFoundError for what is not here."""
        found = {p: importlib.metadata.version(p) for p in ("torch", *self.packages)}
        if self.source:
            command = ["git", "-C", str(source_folder(self.source)), "rev-parse", "--short=8", "HEAD"]
            found[self.source] = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        return found


def source_folder(source: str) -> Path:
    """Where a repository was cloned to: below $FRAMEWORKS."""
    folder = Path(os.environ.get("FRAMEWORKS", "frameworks")) / source.rpartition("/")[2]
    if not folder.is_dir():
        raise FileNotFoundError(f"{source}, cloned to {folder}")
    return folder


CASES: dict[str, Case] = {}


def case(name: str, packages: str = "", **more: Any) -> Callable[[Callable[[Run], None]], Callable[[Run], None]]:
    def register(run: Callable[[Run], None]) -> Callable[[Run], None]:
        CASES[name] = Case(name, run, tuple(packages.split()), **more)
        return run

    return register


class Run(contextlib.ExitStack):
    """One way through a case: `ours` is with the package. Collects losses and gradients."""

    def __init__(self, ours: bool) -> None:
        super().__init__()
        self.ours, self.begun = ours, 0
        self.losses: list[Tensor] = []
        self.gradients: list[Tensor] = []

    def begin(self) -> None:
        """The model is there: sizes count from here on."""
        self.begun = time.time_ns()

    def defer(self, module: nn.Module) -> None:
        """The user's line, once the model is there."""
        self.begin()
        if self.ours:
            lce_inductor.defer(module)

    def compiled(self, module: nn.Module) -> None:
        """The user's line, where it compiles more than the framework does: without the package it is not added."""
        if self.ours:
            module.compile()

    def loss(self, *values: Tensor | float) -> None:
        given = [torch.as_tensor(v).detach() for v in values]
        self.losses += [v.double().clone() for v in given if not v.is_meta]

    def gradients_of(self, module: nn.Module | Iterable[Tensor]) -> None:
        parameters = module.parameters() if isinstance(module, nn.Module) else module
        self.gradients += [p.grad.detach().clone() for p in parameters if p.grad is not None]

    def step(self, loss: Tensor, module: nn.Module | Iterable[Tensor]) -> None:
        """A loss and its backward."""
        parameters = list(module.parameters() if isinstance(module, nn.Module) else module)
        for p in parameters:
            p.grad = None
        loss.backward()
        self.loss(loss)
        self.gradients_of(parameters)

    def watch(self, owner: Any, name: str) -> None:
        """Losses are what this function of the framework's returns."""
        function = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            out = function(*args, **kwargs)
            self.loss(out)
            return out

        self.enter_context(mock.patch.object(owner, name, watched))

    def gradients_at_steps(self, optimizer: torch.optim.Optimizer) -> None:
        """Gradients are those that this optimizer is about to use."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.register_step_pre_hook(lambda *_: self.gradients_of(parameters))


@dataclasses.dataclass
class Way:
    """What one way did. largest, peak: bytes, of one tensor and at a time."""

    losses: list[Tensor]
    gradients: list[Tensor]
    largest: int
    peak: int
    graphs: int
    breaks: int
    report: history.Report
    sites: Counter[str]
    error: str = ""


@contextlib.contextmanager
def interpreted(records: list[GraphRecord]) -> Iterator[None]:
    """torch.compile without code generation, which takes ten seconds a graph: all of Inductor's passes, interpreted."""
    backend = no_codegen_backend(records)

    def compile_fx(gm: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
        return backend(gm, inputs)

    with mock.patch("torch._inductor.compile_fx.compile_fx", compile_fx), cheap():
        yield


def go(case: Case, ours: bool, interpret: bool) -> Way:
    torch._dynamo.reset()
    counters.clear()
    history.forget()
    torch.manual_seed(0)
    error, sites, records = "", Counter[str](), list[GraphRecord]()
    if ours:
        lce_inductor.install(min_logits_bytes=0, chunk_tokens=CHUNK)
    try:
        with (
            Run(ours) as run,
            sites_of_reads(sites),
            mock.patch.object(rules, "CHUNK_BYTES", CHUNK * V * 4),
            interpreted(records) if interpret else contextlib.nullcontext(),
            profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
        ):
            try:
                case.run(run)
            except Exception as found:
                traceback.print_exc()
                error = f"{type(found).__name__}: {found}".splitlines()[0]
    finally:
        lce_inductor.uninstall()
    changes = sizes(profiler, run.begun)
    return Way(
        run.losses, run.gradients, max(changes, default=0), max(itertools.accumulate(changes, initial=0)),
        counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()), lce_inductor.report(), sites, error,
    )  # fmt: skip


@contextlib.contextmanager
def sites_of_reads(found: Counter[str]) -> Iterator[None]:
    """Lines of the framework's that read logits which nobody had computed."""
    read = history.deferred_read

    def watched(*args: Any, **kwargs: Any) -> None:
        frames = [f for f in traceback.extract_stack() if not set(Path(f.filename).parts) & OURS]
        frame = frames[-1]
        found[f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno}: {frame.line}"] += 1
        read(*args, **kwargs)

    with mock.patch.object(functions, "deferred_read", watched), mock.patch.object(tensor, "deferred_read", watched):
        yield


OURS = {"lce_inductor", "torch", "contextlib.py", "measure.py"}


def sizes(profiler: profile, since: int = 0) -> list[int]:
    """Bytes that were taken, and given back, in order."""
    results = profiler.profiler.kineto_results
    found = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]" and e.start_ns() >= since]
    return [size for _, size in sorted(found, key=lambda f: f[0])]


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference of a tensor, by 2-norm, relative to its own or a thousandth of the largest one's."""
    if len(found) != len(expected) or any(a.shape != b.shape for a, b in zip(found, expected)):
        return float("inf")
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected)]
    floor = max(1e-3 * max((b.norm().item() for _, b in pairs), default=0.0), 1e-30)
    return max(((a - b).norm().item() / max(b.norm().item(), floor) for a, b in pairs), default=float("nan"))


def compare(case: Case, interpret: bool) -> dict[str, Any]:
    """A row of the table, as data."""
    plain, ours = go(case, False, interpret), go(case, True, interpret)
    itemsize = case.dtype.itemsize
    records = ours.report.records
    reads = ours.report.reads
    row = {
        "name": case.name,
        "line": case.line,
        "note": case.note,
        "versions": case.versions(),
        "error": ours.error or (plain.error and f"without the package: {plain.error}"),
        "steps": len(ours.losses),
        "loss": difference(ours.losses, plain.losses),
        "gradient": difference(ours.gradients, plain.gradients),
        "tolerance": TOLERANCE[case.dtype],
        "norm": max((t.double().norm().item() for t in plain.gradients or plain.losses), default=0.0),
        "logits": case.logits * itemsize,
        "largest": [plain.largest, ours.largest],
        "peak": [plain.peak, ours.peak],
        "graphs": [plain.graphs, ours.graphs],
        "breaks": [plain.breaks, ours.breaks],
        "rewritten": ours.report.rewritten,
        "tiers": sorted({r.tier for r in records if r.rewritten}),
        "codes": sorted({r.code for r in records if r.code}),
        "saved": ours.report.saved_bytes,
        "held": ours.report.held_bytes,
        "reads": sum(r.count for r in reads),
        "sites": ours.sites,
        "report": str(ours.report),
        "read_products": sum(r.products for r in reads),
    }
    return row


def recipe(run: Run, page: str) -> None:
    """The Python of a page of docs/recipes/, which leaves `losses` and a `model` with gradients."""
    text = (Path(__file__).parents[2] / "docs" / "recipes" / f"{page}.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.S | re.M)
    for name in ("install",) if run.ours else ("install", "defer"):  # installed it is, with chunks for these sizes
        run.enter_context(mock.patch.object(lce_inductor, name))
    found: dict[str, Any] = {"__name__": f"recipe_{page}"}
    exec(compile(code, f"docs/recipes/{page}.md", "exec"), found)
    run.loss(*found["losses"])
    run.gradients_of(found["model"])


def file_of(package: str, path: str) -> Any:
    """A module of a package without the package around it, which imports what is not here."""
    found = importlib.metadata.files(package) or []
    (file,) = [f for f in found if str(f) == path]
    name = path.removesuffix(".py").replace("/", ".")
    spec = importlib.util.spec_from_file_location(name, file.locate())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
