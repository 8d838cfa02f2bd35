"""What the short examples share: text, two runs in one process, and the comparison of them."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import summary
import torch
from data import END_OF_FILE, Batches, TokenStore, encode, stdlib_corpus, train_tokenizer
from options import Options, Sizes, parse
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from step_memory import record_step, resident_bytes
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

import lce_inductor

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own start and stop messages
WARMUP_STEPS = 2  # the first compiles; the second still sees cold allocators
_COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())


@dataclasses.dataclass
class Program:
    """What an example builds, once without and once with lce_inductor.

    Attributes:
        step: takes one step on the next batch and returns its loss, detached. It releases all that it allocates.
        model, optimizer: what stays in memory between steps.
        train: takes `steps` steps, calls `mark` after each and returns the losses; by default calls `step`.
        rows, classes: size of the logits; by default batch * block and the size of the vocabulary.
        unit: what there are `rows` of.
        falls: does the loss get smaller, or is this no training?
        bf16: does it compute in bf16?
    """

    step: Callable[[], Tensor]
    model: nn.Module
    optimizer: torch.optim.Optimizer | None = None
    train: Callable[[int, Callable[[], None]], list[Tensor]] | None = None
    rows: int | None = None
    classes: int | None = None
    unit: str = "tokens"
    falls: bool = True
    bf16: bool = False

    def run(self, steps: int, mark: Callable[[], None]) -> list[Tensor]:
        if self.train is not None:
            return self.train(steps, mark)
        losses = []
        for _ in range(steps):
            losses.append(self.step())
            mark()
        return losses

    def resident(self, device: torch.device) -> int:
        """Bytes on the device that stay between steps."""
        if device.type == "cuda":
            return torch.cuda.memory_allocated(device)
        state = self.optimizer.state.values() if self.optimizer is not None else ()
        held = [t for values in state for t in values.values() if isinstance(t, Tensor)]
        return resident_bytes([*self.model.parameters(), *self.model.buffers(), *held], device)


Build = Callable[[Sizes, Batches, torch.device], Program]
"""Sizes, batches and the device -> the program; it is called twice and must do the same both times."""


class StepClock:
    """Seconds between marks. On a GPU the marks lie in its own queue, so that nothing waits for them."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[Any] = []
        self.mark()

    def mark(self) -> None:
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between each two marks. On a GPU the last of them must have been reached."""
        pairs = itertools.pairwise(self.marks)
        return [a.elapsed_time(b) / 1000 if self.on_gpu else b - a for a, b in pairs]

    def median_s(self) -> float:
        """The median, because on a shared machine single steps can take many times as long as the others."""
        return statistics.median(self.seconds())


def prepare_tokens(options: Options, console: Console) -> Path:
    """Tokenise the standard library, once per corpus and vocabulary size, and return the file of tokens."""
    corpus = stdlib_corpus(options.corpus_mb)
    size = f"{len(corpus.files):,} files, {corpus.bytes / 1e6:.1f} MB"
    store = TokenStore(corpus, options.sizes.vocab_size, options.cache_dir)
    if store.exists():
        console.print(f"text: {corpus.root} ({size}), tokens from {store.path}", soft_wrap=True)
        return store.path
    console.print(f"text: {corpus.root} ({size})")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("tokenizer training", total=None)
        tokenizer = train_tokenizer(corpus, options.sizes.vocab_size)
        progress.update(task, description="tokenising files ", total=len(corpus.files))
        parts = []
        for count, tokens in encode(corpus, tokenizer):
            parts.append(tokens)
            progress.update(task, advance=count)
    tokens = torch.cat(parts)
    vocabulary = tokenizer.get_vocab_size()
    store.save(tokens, vocabulary, tokenizer.token_to_id(END_OF_FILE))
    console.print(f"{tokens.numel():,} tokens, vocabulary {vocabulary:,}, kept in {store.path}", soft_wrap=True)
    return store.path


@contextlib.contextmanager
def distributed() -> Iterator[None]:
    """A process group, of the processes that torchrun started or of this one alone."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    alone = {} if "RANK" in os.environ else {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1}
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo", **alone)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def learn(model: nn.Module, sizes: Sizes) -> torch.optim.Optimizer:
    """AdamW over all parameters."""
    return torch.optim.AdamW(model.parameters(), lr=sizes.learning_rate)


def main(file: str, documentation: str, build: Build, defaults: dict[str, Sizes], prepare: Any = prepare_tokens) -> int:
    """Build and run a program twice, without and with lce_inductor; print a table and draw a picture.

    Args:
        file, documentation: of the example.
        build: makes the program.
        defaults: its sizes, for "cpu" and "cuda".
        prepare: makes the file of tokens that its batches are taken from.

    Returns:
        The exit code: 1 if the second run rewrote nothing, the losses differ, or one that must fall did not.
    """
    name, title = Path(file).stem, documentation.partition("\n")[0]
    options = parse(sys.argv[1:], name, documentation, defaults)
    first = int(os.environ.get("RANK", 0)) == 0  # torchrun starts several processes, of which one reports
    console = Console(highlight=False, quiet=not first)
    tokens = prepare(options, console)
    without, _ = _run(options, build, tokens, console, install=False)
    with_pass, program = _run(options, build, tokens, console, install=True)
    if not first:
        return 0
    on_gpu = options.device.startswith("cuda")
    threads = torch.get_num_threads()
    machine = torch.cuda.get_device_name(options.device) if on_gpu else f"CPU, {threads} thread{'s'[: threads > 1]}"
    sizes = ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(options.sizes).items())
    caption = f"{title}\n{sizes}; {machine}; torch {torch.__version__}"
    console.print(caption, soft_wrap=True)
    summary.print_table(console, without, with_pass)
    summary.draw(options.out, without, with_pass, caption)
    console.print(f"picture: {options.out}", soft_wrap=True)
    if options.json is not None:
        runs = {"without": without, "with": with_pass}
        options.json.write_text(json.dumps({key: dataclasses.asdict(run) for key, run in runs.items()}))
    found = summary.problems(without, with_pass, falls=program.falls)
    for problem in found:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if found else 0


def _run(options: Options, build: Build, tokens: Path, console: Console, install: bool) -> tuple[summary.Run, Program]:
    """Build the program from the same seed and run it. All that differs is `install`."""
    sizes, device = options.sizes, torch.device(options.device)
    on_gpu = device.type == "cuda"
    torch._dynamo.reset()
    gc.collect()
    counters = torch._dynamo.utils.counters["lce_inductor"]
    counters.clear()
    torch.manual_seed(options.seed)
    if on_gpu:
        torch.cuda.empty_cache()
        torch.set_float32_matmul_precision("high")
    settings = {} if options.min_logits_bytes is None else {"min_logits_bytes": options.min_logits_bytes}
    passes = lce_inductor.installed(**settings) if install else contextlib.nullcontext()
    rank = int(os.environ.get("RANK", 0))
    # An empty cache for each: compiled code from an earlier run would hide what the passes do, and the time it takes.
    with passes, fresh_cache(), Progress(*_COLUMNS, console=console) as progress:
        batches = Batches(tokens, sizes.batch, sizes.block, options.seed + rank)
        program = build(sizes, batches, device)
        task = progress.add_task("with lce_inductor" if install else "without          ", total=sizes.steps)
        clock = StepClock(device)

        def mark() -> None:
            clock.mark()
            progress.update(task, advance=1)

        losses = program.run(sizes.steps - 1, mark)
        if on_gpu:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        resident = program.resident(device)
        timeline = record_step(lambda: losses.append(program.step()), device)
        peak = torch.cuda.max_memory_allocated(device) if on_gpu else resident + timeline.peak
        progress.update(task, advance=1)
    first_s, *others = clock.seconds()
    usual_s = statistics.median(others[WARMUP_STEPS - 1 :])
    rows, classes = program.rows or sizes.batch * sizes.block, program.classes or batches.vocab_size
    run = summary.Run(
        losses=torch.stack([loss.float().cpu() for loss in losses]).tolist(),
        resident=resident,
        peak=peak,
        step_ms=timeline.milliseconds,
        step_bytes=timeline.bytes,
        tokens_per_s=rows / usual_s,
        compile_s=max(0.0, first_s - usual_s),
        logits_bytes=rows * classes * (2 if program.bf16 else 4),
        tolerance=2e-2 if program.bf16 or on_gpu else 1e-3,  # on a GPU products are in TF32
        counters={key: int(value) for key, value in counters.items()},
        unit=program.unit,
    )
    return run, program
