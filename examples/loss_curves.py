"""Loss curves: a small GPT trained without and with lce_inductor, and without from another seed's weights.

    python examples/loss_curves.py      five minutes on two CPU cores; a minute on a CUDA device
    python examples/loss_curves.py --masked 0.75        with most targets masked, as in fine-tuning
    python examples/loss_curves.py --help

All three runs see the same batches of real text. Rounding parts any two runs in time; how far another seed parts
them says how much that means. Exit code 1: nothing was rewritten, a loss did not fall, or lce_inductor parted the
losses more than the seed did.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from compare import StepClock, prepare_tokens
from data import Batches
from gpt import GPT, GPTConfig
from matplotlib.figure import Figure
from options import Options, Sizes, parse
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn
from torch._inductor.utils import fresh_cache

import lce_inductor

SIZES = {
    "cpu": Sizes(steps=200, batch=8, block=128, layers=2, heads=4, embd=128, vocab_size=32_768, learning_rate=1e-3),
    "cuda": Sizes(steps=300, batch=32, block=512, layers=8, heads=8, embd=512, vocab_size=50_257, learning_rate=1e-3),
}
RATE_WARMUP = 8  # one in so many steps
LAST = 10  # likewise: steps that the final figures are means of


@dataclasses.dataclass(frozen=True)
class Curve:
    """One run: its losses, the median time of a step, and on a GPU the most bytes allocated after the first step."""

    name: str
    losses: list[float]
    step_ms: float
    peak: int | None

    @property
    def last(self) -> slice:
        return slice(-max(1, len(self.losses) // LAST), None)

    @property
    def final(self) -> float:
        return statistics.fmean(self.losses[self.last])

    def apart(self, other: Curve) -> list[float]:
        return [abs(a - b) for a, b in zip(self.losses, other.losses, strict=True)]

    def finally_apart(self, other: Curve) -> float:
        return statistics.fmean(self.apart(other)[self.last])


def build(sizes: Sizes, vocab_size: int, seed: int, device: torch.device) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab_size, sizes.block, sizes.layers, sizes.heads, sizes.embd)).to(device)


def train(name: str, model: nn.Module, compiled: Any, batches: Batches, options: Options, progress: Progress) -> Curve:
    sizes, device = options.sizes, torch.device(options.device)
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=sizes.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    autocast = torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext()
    task = progress.add_task(f"{name:<21}", total=sizes.steps)
    clock, losses = StepClock(device), []
    for i in range(sizes.steps):
        for group in optimizer.param_groups:
            group["lr"] = sizes.learning_rate * min(1.0, (i + 1) * RATE_WARMUP / sizes.steps)
        idx, targets = batches.next(device)
        with autocast:
            loss = compiled(idx, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        clock.mark()
        progress.update(task, advance=1)
        if on_gpu and i == 0:
            torch.cuda.reset_peak_memory_stats(device)
    if on_gpu:
        torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else None
    return Curve(name, torch.stack(losses).float().tolist(), 1000 * clock.median_s(), peak)


def run(options: Options, tokens: Path, console: Console) -> tuple[list[Curve], int]:
    """The three curves and how many heads were rewritten."""
    sizes, device, seed = options.sizes, torch.device(options.device), options.seed
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())

    def batches() -> Batches:
        return Batches(tokens, sizes.batch, sizes.block, seed, options.masked)

    vocab_size = batches().vocab_size
    settings = {} if options.min_logits_bytes is None else {"min_logits_bytes": options.min_logits_bytes}
    counters = torch._dynamo.utils.counters["lce_inductor"]
    with fresh_cache(), Progress(*columns, console=console) as progress:
        model = build(sizes, vocab_size, seed, device)
        compiled = torch.compile(model)
        without = train("without", model, compiled, batches(), options, progress)
        # Into the same parameters: what is compiled serves this run as well.
        model.load_state_dict(build(sizes, vocab_size, seed + 1, device).state_dict())
        other = train("another seed, without", model, compiled, batches(), options, progress)

        torch._dynamo.reset()
        counters.clear()
        del model, compiled
        gc.collect()
        with lce_inductor.installed(**settings):
            model = build(sizes, vocab_size, seed, device)
            with_pass = train("with lce_inductor", model, torch.compile(model), batches(), options, progress)
    return [without, with_pass, other], int(counters["rewritten"])


def problems(without: Curve, with_pass: Curve, other: Curve, rewritten: int) -> list[str]:
    """Reasons why this was no success; empty if it was one."""
    found = [] if rewritten else ["lce_inductor rewrote nothing"]
    for curve in (without, with_pass, other):
        if not all(map(math.isfinite, curve.losses)):
            return [*found, f"{curve.name}: a loss is not finite"]
        half = len(curve.losses) // 2
        if statistics.fmean(curve.losses[half:]) >= statistics.fmean(curve.losses[:half]):
            found.append(f"{curve.name}: the loss did not fall")
    difference, spread = with_pass.finally_apart(without), other.finally_apart(without)
    if difference > spread:
        found.append(f"lce_inductor parts the losses by {difference:.1e}, another seed by {spread:.1e}")
    return found


def show(console: Console, without: Curve, with_pass: Curve, other: Curve) -> None:
    steps = len(without.losses)
    table = Table(
        title=f"Losses of {steps} steps; final and apart: means of the last {-without.last.start}", title_justify="left"
    )
    table.add_column("")
    for heading in ("first", "final", "apart", "at most", "ms a step"):
        table.add_column(heading, justify="right")
    for curve in (without, with_pass, other):
        apart = ("", "") if curve is without else (curve.finally_apart(without), max(curve.apart(without)))
        cells = (f"{a:.1e}" if a else str(a) for a in apart)
        table.add_row(curve.name, f"{curve.losses[0]:.4f}", f"{curve.final:.4f}", *cells, f"{curve.step_ms:.1f}")
    console.print(table)
    if without.peak and with_pass.peak:
        console.print(f"peak memory: {without.peak >> 20:,} MiB without, {with_pass.peak >> 20:,} MiB with")


def draw(path: Path, without: Curve, with_pass: Curve, other: Curve, caption: str) -> None:
    """Write a PNG: the three curves, and how far two of them are from the first."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = range(1, len(without.losses) + 1)
    left.plot(steps, other.losses, color="#e69f00", linewidth=1.2, label=other.name)
    left.plot(steps, without.losses, color="#8a8a8a", linewidth=5, alpha=0.6, label=without.name)
    left.plot(steps, with_pass.losses, color="#0b62c4", linewidth=1.2, label=with_pass.name)
    left.set(title="Loss", xlabel="step", ylabel="loss")
    for curve, color in ((other, "#e69f00"), (with_pass, "#0b62c4")):
        label = f"{curve.name}: {curve.finally_apart(without):.1e} at the end"
        # Equal bits have no place on a logarithmic axis: they are gaps.
        right.plot(steps, [a or math.nan for a in curve.apart(without)], color=color, linewidth=1.2, label=label)
    right.set(title="Difference to the loss without", xlabel="step", ylabel="|difference|", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(caption, fontsize=10)
    figure.savefig(path, dpi=130)


def main(argv: list[str]) -> int:
    assert __doc__ is not None
    options = parse(argv, "loss_curves", __doc__, SIZES)
    console = Console(highlight=False)
    on_gpu = options.device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(options.device)
        torch.set_float32_matmul_precision("high")
    curves, rewritten = run(options, prepare_tokens(options, console), console)
    if options.json is not None:
        options.json.write_text(json.dumps([dataclasses.asdict(curve) for curve in curves]))
    threads = torch.get_num_threads()
    machine = torch.cuda.get_device_name(options.device) if on_gpu else f"CPU, {threads} thread{'s'[: threads > 1]}"
    sizes = ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(options.sizes).items())
    masked = f", {options.masked:.0%} of the targets masked" if options.masked else ""
    caption = f"A small GPT on the standard library's sources{masked}\n{sizes}; {machine}; torch {torch.__version__}"
    console.print(caption, soft_wrap=True)
    show(console, *curves)
    draw(options.out, *curves, caption)
    console.print(f"picture: {options.out}", soft_wrap=True)
    found = problems(*curves, rewritten)
    for problem in found:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
