"""Time, memory and error of a training step of whole models, for every implementation that is installed.

    python -m lce_inductor.bench.models                                     all models, on the GPU if there is one
    python -m lce_inductor.bench.models --models llama-1b --csv rows.csv --plot bars.png
    python -m lce_inductor.bench.models --device cuda:1 --models gpt2,qwen2-0.5b --implementations eager,lce_inductor
    python -m lce_inductor.bench.models --small                             tiny versions of the models, for a CPU

The models are transformers' own with random bf16 weights, sdpa attention and no dropout, called with labels; they
return logits, and only the loss is read. A step is forward + backward; gradients are dropped between steps.
--attention causal is sdpa without the explicit mask that transformers builds where it is traced; --ignored 0.75 leaves
three quarters of the labels out. torchtitan-1b is torchtitan's own Llama instead, with its compilation of blocks and of
the loss, its loss of whole logits or (torchtitan-chunked) the one in chunks that it trains by, and its flex attention
(on a CPU torch's); with lce_inductor, its head is under defer().

| column | meaning |
|---|---|
| ms | median of --reps steps |
| added | most memory that a step adds to the weights at any time, the gradients included |
| loss | and, beside the eager row's, its relative difference |
| norms | relative difference to the eager row's of the gradient's norm: tied embedding and head, first layer |
| grads | relative difference (2-norm) of 8192 elements of these two gradients |
| largest | with --largest-batch: sequences of the largest step that ran, and of the smallest that did not fit |

A row whose loss or gradients differ too much gets no time. Each row is measured in a process of its own, so running
out of memory, a crash or --timeout is a row and not the end, and --csv is written anew after each. The rows share a
compile cache. With --ahead N, the next N rows build and compile while one is measured; none runs a step meanwhile. With
--in-turns all rows of a model are there together and take one step after another, in an order drawn anew each round;
before each timed step, one is not timed. No other process may hold much of the GPU's memory then.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from . import plots, table
from .arguments import converter, device_name, kind, positive_integer, present, share
from .model_steps import ATTENTION, MODELS, SMALL_BATCH, SMALL_LENGTH, WAYS, Job, Row
from .processes import FAILED, OK, WRONG, run_in_turns, run_isolated

GIB = 1 << 30
# Rounding in bf16 parts single elements of a gradient, far less its norm; what is wrong parts both.
LIMITS = {"err_loss": 2e-2, "err_norm_head": 2e-2, "err_norm_layer": 2e-2, "err_head": 0.25, "err_layer": 0.25}
HEADINGS = ("", "ms", "tokens/s", "added GiB", "loss", "difference", "norms", "grads", "largest", "")
CSV_FIELDS = (
    "model", "implementation", "batch", "length", "attention", "ignored", "device", "small", "status", "ms",
    "tokens_per_s", "added_bytes", "weight_bytes", "loss", *LIMITS, "largest_batch", "too_large_batch", "first_s",
    "reps", "torch", "hardware", "detail",
)  # fmt: skip


def judged(rows: Sequence[Row]) -> list[Row]:
    """Compare the rows of one model with eager's or, without it, with the first in the order of WAYS."""
    exact = next(
        (row for name in WAYS for row in rows if row.job.implementation == name and row.loss is not None), None
    )
    return [row if exact is None or row.loss is None else _judged(row, exact) for row in rows]


def _judged(row: Row, exact: Row) -> Row:
    def difference(found: Any, right: Any) -> float:
        a, b = torch.tensor(found, dtype=torch.float64), torch.tensor(right, dtype=torch.float64)
        return float((a - b).norm() / b.norm())

    assert row.norms and exact.norms and row.samples and exact.samples
    pairs = [(row.loss, exact.loss), *zip(row.norms, exact.norms), *zip(row.samples, exact.samples)]
    errors: dict[str, Any] = {name: difference(*pair) for name, pair in zip(LIMITS, pairs)}
    row = dataclasses.replace(row, **errors)
    beyond = [name.removeprefix("err_") for name, limit in LIMITS.items() if not errors[name] <= limit]
    if beyond:
        detail = f"{', '.join(beyond)} differ from {exact.job.implementation}'s"
        row = dataclasses.replace(row, status=WRONG, detail=detail, ms=None, added_bytes=None, largest_batch=None)
    elif exact.job.implementation != "eager" and not row.detail:
        row = dataclasses.replace(row, detail=f"compared with {exact.job.implementation}, not with eager")
    return row


def cells(row: Row) -> list[str]:
    """One line of the table, in the order of HEADINGS."""

    def text(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    def both(a: float | None, b: float | None) -> str:
        return "" if a is None or b is None else f"{a:.0e} {b:.0e}"

    added = None if row.added_bytes is None else row.added_bytes / GIB
    largest = text(row.largest_batch, "d") + (f" (not {row.too_large_batch})" if row.too_large_batch else "")
    note = ": ".join(part for part in ("" if row.status == OK else row.status, row.detail) if part)
    return [
        row.job.implementation, text(row.ms, ".1f"), text(row.tokens_per_s, ",.0f"), text(added, ".2f"),
        text(row.loss, ".4f"), text(row.err_loss, ".0e"), both(row.err_norm_head, row.err_norm_layer),
        both(row.err_head, row.err_layer), largest, note,
    ]  # fmt: skip


def csv_values(row: Row) -> dict[str, Any]:
    return {**vars(row.job), **vars(row), "tokens_per_s": row.tokens_per_s}


def main(argv: Sequence[str]) -> int:
    """Measure what the arguments ask for; 1 if a row was wrong or failed, 2 for bad arguments."""
    parser = _parser()
    args = parser.parse_args(argv)
    device = present(parser, args.device)
    names = _chosen(parser, "--models", args.models, MODELS)
    ways = _chosen(parser, "--implementations", args.implementations, WAYS)
    ways = [name for name in ways if args.implementations or not WAYS[name].obstacle(device)]
    for way in ways:
        if obstacle := WAYS[way].obstacle(device):
            parser.error(f"--implementations {way}: {obstacle}")
    names = [name for name in names if args.models or not MODELS[name].missing]
    for name in names:
        if package := MODELS[name].missing:
            parser.error(f"--models {name}: pip install {package}")
    if args.largest_batch and (kind(device) != "cuda" or args.ahead or args.in_turns):
        parser.error("--largest-batch needs a GPU for itself: a CUDA device, no --ahead and no --in-turns")
    if args.ahead and args.in_turns:
        parser.error("--in-turns starts the rows one after another: without --ahead")
    for path in (args.csv, args.plot):
        if path is not None and not path.resolve().parent.is_dir():
            parser.error(f"{path}: there is no folder {path.resolve().parent}")
    if args.plot is not None and not plots.can_plot():
        parser.error("--plot needs matplotlib: pip install matplotlib")
    packages = {MODELS[name].package for name in names}
    versions = [f"{package} {importlib.metadata.version(package)}" for package in sorted(packages)]
    machine = ", ".join([table.header(device, [WAYS[way].like for way in ways]), *versions])
    print(machine, flush=True)

    rows: dict[str, dict[str, Row]] = {name: {} for name in names}  # by model and implementation
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lce_bench_") as cache, ThreadPoolExecutor(1 + args.ahead) as pool:
        jobs = []
        for name in names:
            batch, length = MODELS[name].batch, MODELS[name].length
            if args.small:
                batch, length = SMALL_BATCH, SMALL_LENGTH
            lock = str(Path(cache) / "turn") if args.ahead else None
            for way in (way for way in ways if name in WAYS[way].models):
                size = (args.batch or batch, args.length or length)
                job = Job(name, way, *size, device, args.small, args.reps, args.largest_batch, lock)
                jobs.append(dataclasses.replace(job, attention=args.attention, ignored=args.ignored))
        results: Iterator[tuple[Job, dict[str, Any]]]
        if args.in_turns:
            results = _in_turns(jobs, Path(cache), args.timeout)
        else:
            found = {pool.submit(run_isolated, Row.__module__, job, Path(cache), args.timeout): job for job in jobs}
            results = ((found[done], done.result()) for done in as_completed(found))
        for job, result in results:
            mine = rows[job.model]
            mine[job.implementation] = row = Row(job, **result)
            shown = "  ".join(filter(None, cells(row)))
            print(f"{time.monotonic() - start:.0f} s  {job.model}  {shown}", file=sys.stderr, flush=True)
            if args.csv is not None:
                part = [row for model in rows.values() for row in judged(list(model.values()))]
                table.write_fields(args.csv, CSV_FIELDS, map(csv_values, part), device)
    tables = {name: judged([mine[way] for way in ways if way in mine]) for name, mine in rows.items() if mine}
    for name, part in tables.items():
        weights = next((f", weights {row.weight_bytes / GIB:.2f} GiB" for row in part if row.weight_bytes), "")
        job = part[0].job
        title = f"{name}{' (small)' * args.small}, {job.batch} x {job.length} tokens, bfloat16{weights}"
        title += f", {job.kind_of_attention} attention"
        title += f", {job.ignored:.0%} of the labels ignored" if job.ignored else ""
        table.print_columns(title, [HEADINGS, *map(cells, part)])
    if args.plot is not None:
        bars = {
            name: [
                (row.job.implementation, row.ms, row.added_bytes and row.added_bytes / GIB, cells(row)[-1][:60])
                for row in p
            ]
            for name, p in tables.items()
        }
        plots.draw_bars(args.plot, bars, f"Training step of whole models, bfloat16\n{machine}")
        print(f"picture: {args.plot}")
    return 1 if any(row.status in (WRONG, FAILED) for part in tables.values() for row in part) else 0


def _in_turns(jobs: Sequence[Job], cache: Path, timeout_s: float) -> Iterator[tuple[Job, dict[str, Any]]]:
    """What each job came to, those of one model timed in turns."""
    for _, group in itertools.groupby(jobs, key=lambda job: job.model):
        part = list(group)
        yield from zip(part, run_in_turns(Row.__module__, part, cache, part[0].reps, timeout_s))


def _chosen(parser: argparse.ArgumentParser, flag: str, text: str | None, known: dict[str, Any]) -> list[str]:
    names = list(dict.fromkeys(text.split(","))) if text else list(known)
    for name in names:
        if name not in known:
            parser.error(f"{flag} {name}: must be of {', '.join(known)}")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lce_inductor.bench.models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole, add = converter(positive_integer), parser.add_argument
    add("--models", metavar="A,B,...", help=f"of {', '.join(MODELS)} (default: all)")
    add("--implementations", metavar="A,B,...", help=f"of {', '.join(WAYS)} (default: all that can run here)")
    add("--device", type=converter(device_name), default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--batch", type=whole, metavar="B", help="sequences of a step (default: each model's own)")
    add("--length", type=whole, metavar="T", help="tokens of a sequence (default: each model's own)")
    add("--attention", choices=ATTENTION, default="sdpa", help="sdpa, or causal: sdpa without an explicit mask")
    add("--ignored", type=converter(share), default=0.0, metavar="SHARE", help="of the labels, from 0 to below 1 (0)")
    add("--small", action="store_true", help="the same models with two layers of width 32, in seconds on a CPU")
    add("--reps", type=whole, default=8, metavar="INT", help="steps timed (default: 8)")
    add("--largest-batch", action="store_true", help="look for it as well (CUDA; some compilations more for each row)")
    add("--ahead", type=int, choices=range(8), default=0, metavar="N", help="rows that compile beforehand (default: 0)")
    add("--in-turns", action="store_true", help="the steps of all rows of a model in turns, shuffled")
    add("--timeout", type=float, default=300.0, metavar="S", help="give up on a row after so many seconds (300)")
    add("--csv", type=Path, metavar="FILE", help="also write every figure, anew after each row")
    add("--plot", type=Path, metavar="FILE.png", help="also draw bars")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
