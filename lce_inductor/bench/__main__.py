"""The command line of the benchmark; the package's docstring says what is measured."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from . import __doc__ as documentation
from . import plots, table
from .arguments import converter, device_name, kind, positive_integer, present
from .implementations import IMPLEMENTATIONS, available
from .measure import FLOOR, Job, Row, measure_in_turns, measure_isolated
from .processes import FAILED, WRONG
from .reference import DTYPES
from .shapes import HEADS, Shape, Sweep, parse_shape, parse_sweep

DEFAULT_SHAPES = {"cpu": Shape(2048, 512, 32768), "cuda": Shape(16384, 2048, 131072)}
DEFAULT_TOKENS = {"cpu": 2048, "cuda": 16384}
DEFAULT_DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
REPS = {"cpu": 5, "cuda": 9}


def main(argv: Sequence[str]) -> int:
    """Measure what the arguments ask for; 1 if a row was wrong or failed, 2 for bad arguments."""
    parser = _parser()
    args = parser.parse_args(argv)
    device = present(parser, args.device)
    if args.list:
        print("\n".join(_listing(device)))
        return 0
    groups = _groups(parser, args, device)
    impls = _impls(parser, args.impl, device)
    for path in (args.csv, args.plot):
        if path is not None and not path.resolve().parent.is_dir():
            parser.error(f"{path}: there is no folder {path.resolve().parent}")

    machine = table.header(device, impls)
    print(machine, flush=True)
    first = Job(
        impls[0],
        Shape(1, 1, 1),
        dtype=args.dtype or DEFAULT_DTYPES[kind(device)],
        device=device,
        reduction=args.reduction,
        forward_only=args.forward_only,
        peaked=args.peaked,
        reps=args.reps or REPS[kind(device)],
    )
    shapes = list(dict.fromkeys(shape for _, part in groups for shape in part))
    rows: list[Row] = []
    with _progress(len(shapes) * len(impls)) as advance, tempfile.TemporaryDirectory(prefix="lce_bench_") as cache:
        for shape in shapes:
            found = []
            jobs = [Job(**{**vars(first), "impl": impl, "shape": shape}) for impl in impls]
            if args.in_turns:
                found = measure_in_turns(
                    jobs, Path(cache), args.timeout, lambda job: advance(f"{job.shape} {job.impl}")
                )
            for job in [] if args.in_turns else jobs:
                advance(f"{shape} {job.impl}")
                found.append(measure_isolated(job, Path(cache), args.timeout))
                if args.csv is not None:
                    table.write_csv(args.csv, rows + found)  # a run that is stopped leaves its rows
            rows += found
            if args.csv is not None:
                table.write_csv(args.csv, rows)
            table.show(found)
    for dimension, part in groups:
        if args.plot is not None:
            path = args.plot.with_name(f"{args.plot.name}-{dimension}.png")
            chosen = [row for row in rows if row.job.shape in part]
            plots.draw(path, dimension, chosen, f"{table.title(chosen[0], but=dimension)}\n{machine}")
            print(f"picture: {path}")
    return 1 if any(row.status in (WRONG, FAILED) for row in rows) else 0


def _groups(parser: argparse.ArgumentParser, args: argparse.Namespace, device: str) -> list[tuple[str, list[Shape]]]:
    """Shapes to measure, by the dimension that is swept ("" if none is)."""
    tokens = args.tokens or DEFAULT_TOKENS[kind(device)]
    bases = list(args.shape) + [Shape(tokens, *HEADS[name]) for name in args.head]
    bases = bases or [DEFAULT_SHAPES[kind(device)]]
    if not args.sweep:
        if args.plot is not None:
            parser.error("--plot draws a sweep: add --sweep, such as --sweep V=32768,65536,131072")
        return [("", bases)]
    if len(bases) > 1:
        parser.error(f"--sweep varies one shape, and there are {len(bases)}")
    if args.plot is not None and not plots.can_plot():
        parser.error("--plot needs matplotlib: pip install matplotlib")
    sweeps: list[Sweep] = args.sweep
    return [(sweep.dimension, sweep.shapes(bases[0])) for sweep in sweeps]


def _impls(parser: argparse.ArgumentParser, text: str | None, device: str) -> list[str]:
    """Names in the order asked for; without any, all that can run here."""
    if text is None:
        return [FLOOR, *available(kind(device))]
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name == FLOOR:
            continue
        if name not in IMPLEMENTATIONS:
            parser.error(f"--impl {name}: must be of {', '.join([FLOOR, *IMPLEMENTATIONS])}")
        obstacle = IMPLEMENTATIONS[name].obstacle(kind(device))
        if obstacle:
            parser.error(f"--impl {name}: {obstacle}")
    return names


def _listing(device: str) -> Iterator[str]:
    yield "implementations"
    yield f"  {FLOOR:<24}the bare matrix products"
    for name, entry in IMPLEMENTATIONS.items():
        yield f"  {name:<24}{entry.obstacle(kind(device)) or entry.version() or 'torch ' + torch.__version__}"
    yield "heads                     H       V"
    for name, (hidden, vocabulary) in HEADS.items():
        yield f"  {name:<20}{hidden:>8}{vocabulary:>8}"


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """Give a function that shows what is measured next: a bar with rich, else a line each, both on stderr."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ModuleNotFoundError:
        counter, start = itertools.count(1), time.monotonic()

        def line(text: str) -> None:
            print(f"[{next(counter)}/{total}] {time.monotonic() - start:.0f} s  {text}", file=sys.stderr, flush=True)

        yield line
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total, completed=-1)
        yield lambda text: bar.update(task, advance=1, description=text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lce_inductor.bench",
        description=documentation,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what to measure")
    shape = converter(parse_shape)
    what.add_argument("--shape", type=shape, action="append", default=[], metavar="NxHxV", help="may be repeated")
    what.add_argument(
        "--head", choices=HEADS, action="append", default=[], metavar="NAME", help="of --list; may be repeated"
    )
    what.add_argument(
        "--tokens", type=converter(positive_integer), metavar="N", help="N of --head (cpu 2048, cuda 16384)"
    )
    what.add_argument(
        "--sweep",
        type=converter(parse_sweep),
        action="append",
        default=[],
        metavar="V=A,B,...",
        help="vary N, H or V of the shape; may be repeated",
    )
    what.add_argument("--impl", metavar="A,B,...", help="of --list (default: all that can run here)")
    how = parser.add_argument_group("how")
    how.add_argument("--dtype", choices=DTYPES, help="(default: cpu float32, cuda bfloat16)")
    how.add_argument(
        "--device", type=converter(device_name), default="auto", help="auto, cpu, cuda or cuda:N (default: auto)"
    )
    how.add_argument("--reduction", choices=("mean", "sum", "none"), default="mean", help="(default: mean)")
    how.add_argument("--forward-only", action="store_true", help="the loss under no_grad")
    how.add_argument("--peaked", action="store_true", help="logits as of a trained model")
    how.add_argument("--in-turns", action="store_true", help="the steps of all implementations in turns, shuffled")
    how.add_argument("--reps", type=converter(positive_integer), metavar="INT", help="steps timed (cpu 5, cuda 9)")
    how.add_argument("--timeout", type=float, metavar="S", help="give up on a row after so many seconds")
    out = parser.add_argument_group("output")
    out.add_argument("--csv", type=Path, metavar="FILE", help="also write every figure")
    out.add_argument("--plot", type=Path, metavar="PREFIX", help="write PREFIX-N.png, -H, -V of each sweep")
    out.add_argument("--list", action="store_true", help="show heads and implementations, and stop")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
