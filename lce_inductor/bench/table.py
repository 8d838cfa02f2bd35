"""What the user reads: the machine, a table for each shape, and a CSV file."""

from __future__ import annotations

import csv
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import lce_inductor

from .implementations import IMPLEMENTATIONS
from .measure import Row
from .processes import OK
from .reference import DTYPES
from .shapes import DIMENSIONS

MIB = 1 << 20
HEADINGS = ("", "ms", "of floor", "added MiB", "loss", "dX", "dW", "")
CSV_FIELDS = (
    "impl", "N", "H", "V", "dtype", "device", "reduction", "forward_only", "peaked", "status", "ms", "floor_ms",
    "added_bytes", "err_loss", "err_dx", "err_dw", "first_s", "reps", "torch", "hardware", "detail",
)  # fmt: skip


def hardware(device: str) -> str:
    """The device's name, on a CPU with the number of threads."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def header(device: str, impls: Iterable[str]) -> str:
    """Hardware and the versions of everything that is compared."""
    versions = [f"torch {torch.__version__}", f"lce_inductor {lce_inductor.__version__}"]
    if device.startswith("cuda"):
        import triton

        versions += [f"CUDA {torch.version.cuda}", f"triton {triton.__version__}"]
    versions += dict.fromkeys(v for name in impls if name in IMPLEMENTATIONS if (v := IMPLEMENTATIONS[name].version()))
    return f"{hardware(device)}; Python {platform.python_version()}; {', '.join(versions)}"


def title(row: Row, but: str = "") -> str:
    """What all rows of one shape have in common, or all of a sweep over the dimension `but`."""
    job = row.job
    parts = [" ".join(f"{name}={getattr(job.shape, name)}" for name in DIMENSIONS if name != but)]
    parts += [job.dtype, job.device, job.reduction]
    parts += ["forward only"] if job.forward_only else []
    parts += ["peaked logits"] if job.peaked else []
    size = f" (logits: {job.shape.logits * DTYPES[job.dtype].itemsize / MIB:,.1f} MiB)"
    return ", ".join(parts) + ("" if but else size)


def cells(row: Row) -> list[str]:
    """One line of the table, in the order of HEADINGS."""
    added = "" if row.added_bytes is None else f"{row.added_bytes / MIB:,.1f}"
    ms = "" if row.ms is None else f"{row.ms:,.1f}" if row.ms >= 10 else f"{row.ms:.3f}"
    ratio = "" if row.of_floor is None else f"{row.of_floor:.2f}"
    errors = ["" if e is None else f"{e:.1e}" for e in (row.err_loss, row.err_dx, row.err_dw)]
    note = "" if row.status == OK else f"{row.status}: {row.detail}" if row.detail else row.status
    return [row.job.impl, ms, ratio, added, *errors, note]


def show(rows: Sequence[Row]) -> None:
    """Print the rows of one shape."""
    print_columns(title(rows[0]), [HEADINGS, *map(cells, rows)])


def print_columns(title: str, lines: Sequence[Sequence[str]]) -> None:
    """Names and notes to the left, what is between to the right; the first line has the headings."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    print(f"\n{title}")
    for name, *numbers, note in lines:
        right = (number.rjust(width) for number, width in zip(numbers, widths[1:]))
        print("  ".join((name.ljust(widths[0]), *right, note)).rstrip(), flush=True)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Every row and figure, with versions and hardware; an empty field was not measured."""
    shapes = ({name: getattr(row.job.shape, name) for name in DIMENSIONS} for row in rows)
    values = ({**vars(row.job), **vars(row), **shape} for row, shape in zip(rows, shapes))
    write_fields(path, CSV_FIELDS, values, rows[0].job.device)


def write_fields(path: Path, fields: Sequence[str], rows: Iterable[dict[str, Any]], device: str) -> None:
    """Write the fields of each row; those named torch and hardware are this machine's."""
    run = {"torch": torch.__version__, "hardware": hardware(device)}
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(fields)
        for row in rows:
            values = {**row, **run}
            writer.writerow(["" if values[name] is None else values[name] for name in fields])
