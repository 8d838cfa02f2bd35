"""One row of the table: an implementation on one shape, in this process or in one of its own."""

from __future__ import annotations

import dataclasses
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from . import processes
from .implementations import IMPLEMENTATIONS, NotApplied
from .processes import FAILED, OK, OUT_OF_MEMORY, WRONG, repeated, run_in_turns, run_isolated, write_result
from .reference import DTYPES, ERROR_LIMITS, bare_products, make_inputs, reference, relative_error
from .shapes import Shape

FLOOR = "floor"

_ERRORS = ("err_loss", "err_dx", "err_dw")


@dataclasses.dataclass(frozen=True)
class Job:
    """What to measure: `impl` is a name of IMPLEMENTATIONS or FLOOR; `with_floor` times the floor in turns with it."""

    impl: str
    shape: Shape
    dtype: str
    device: str
    reduction: str = "mean"
    forward_only: bool = False
    peaked: bool = False
    reps: int = 5
    with_floor: bool = True

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Job:
        return cls(**{**fields, "shape": Shape(**fields["shape"])})


@dataclasses.dataclass(frozen=True)
class Row:
    """What came out. A figure that was not measured is None.

    Attributes:
        status: OK, OUT_OF_MEMORY, WRONG or FAILED; `detail` says more about the last two.
        ms, floor_ms: medians.
        added_bytes: most memory that a step adds to the inputs.
        err_loss, err_dx, err_dw: relative errors.
        first_s: seconds of the first step, compilation included.
    """

    job: Job
    status: str
    detail: str = ""
    ms: float | None = None
    floor_ms: float | None = None
    added_bytes: int | None = None
    err_loss: float | None = None
    err_dx: float | None = None
    err_dw: float | None = None
    first_s: float | None = None

    @property
    def of_floor(self) -> float | None:
        return self.ms / self.floor_ms if self.ms is not None and self.floor_ms else None


def measure(job: Job) -> Row:
    """Measure in this process. Whatever the implementation raises becomes the row's status."""
    try:
        return _floor_row(job) if job.impl == FLOOR else _row(job)
    except Exception as error:
        return Row(job, *failure(error))


def failure(error: Exception) -> tuple[str, str]:
    """Status and detail of a row that this ended."""
    if isinstance(error, NotApplied):
        return FAILED, str(error)
    if _is_out_of_memory(error):
        return OUT_OF_MEMORY, ""
    # The first line of a compiler's error only says whose error follows.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return FAILED, f"{type(error).__name__}: {' '.join(lines[:2])}"


def measure_isolated(job: Job, cache_dir: Path, timeout_s: float | None = None) -> Row:
    """Measure in a new process, whose end by the system or by a crash is a row as well."""
    return Row(job, **run_isolated(__name__, job, cache_dir, timeout_s))


def measure_in_turns(
    jobs: Sequence[Job], cache_dir: Path, timeout_s: float | None, starting: Callable[[Job], object]
) -> list[Row]:
    """The same for jobs of one shape, their steps in turns."""
    found = run_in_turns(__name__, jobs, cache_dir, jobs[0].reps, timeout_s, starting)
    return [Row(job, **fields) for job, fields in zip(jobs, found)]


def _row(job: Job) -> Row:
    dtype, device = DTYPES[job.dtype], current_device(job.device)
    entry = IMPLEMENTATIONS[job.impl]
    if job.reduction not in entry.reductions:
        raise NotApplied(f"has no reduction {job.reduction!r}")
    inputs = make_inputs(job.shape, dtype, device, job.reduction, job.peaked)
    loss = entry.make(job.reduction)

    def step() -> torch.Tensor:
        if job.forward_only:
            with torch.no_grad():
                return loss(inputs.x, inputs.weight, inputs.target)
        value = loss(inputs.x, inputs.weight, inputs.target)
        value.backward(inputs.cotangent)
        return value.detach()

    start = time.perf_counter()
    value = step()
    finish(device)
    known: dict[str, Any] = {"first_s": time.perf_counter() - start}
    if entry.idle():
        raise NotApplied(entry.idle())

    found = [value] if job.forward_only else [value, inputs.x.grad, inputs.weight.grad]
    try:
        exact = reference(inputs, job.reduction, not job.forward_only)
    except torch.OutOfMemoryError:
        return Row(job, FAILED, "ran, but there is no memory for the reference to check it with", **known)
    if any(t is None for t in found):
        return Row(job, WRONG, "an input got no gradient", **known)
    errors = [relative_error(a, b) for a, b in zip(found, exact, strict=True) if a is not None]
    known |= dict(zip(_ERRORS, errors))
    if not all(e <= ERROR_LIMITS[job.dtype] for e in errors):
        return Row(job, WRONG, f"error above {ERROR_LIMITS[job.dtype]:.0e}", **known)
    del value, found, exact

    known["added_bytes"] = peak_added(step, inputs.clear, device)
    floor = bare_products(job.shape, dtype, device, job.forward_only) if job.with_floor else None

    def both() -> tuple[float, float | None]:
        inputs.clear()
        return timed_ms(step, device), None if floor is None else timed_ms(floor, device)

    times, floor_times = zip(*repeated(both, job.reps, inputs.clear))
    floor_ms = None if floor is None else statistics.median(floor_times)
    return Row(job, OK, ms=statistics.median(times), floor_ms=floor_ms, **known)


def _floor_row(job: Job) -> Row:
    device = current_device(job.device)
    step = bare_products(job.shape, DTYPES[job.dtype], device, job.forward_only)
    step()
    ms = statistics.median(repeated(lambda: timed_ms(step, device), job.reps, lambda: None))
    return Row(job, OK, ms=ms, floor_ms=ms)


def peak_added(step: Callable[[], object], clear: Callable[[], object], device: torch.device) -> int:
    """Most bytes that one step holds above what is there; `clear` drops an earlier step's gradients before."""
    clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        finish(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        finish(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        step()
    with tempfile.TemporaryDirectory(prefix="lce_bench_") as folder:
        trace = Path(folder) / "trace.json"
        prof.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes: list[tuple[float, int]] = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    return max(accumulate((size for _, size in changes), initial=0))


def timed_ms(step: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call; on CUDA between two events of the stream."""
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return 1000 * (time.perf_counter() - start)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    step()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last))


def current_device(name: str) -> torch.device:
    """The device of that name, made the current one: events and Triton's kernels go there."""
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _is_out_of_memory(error: Exception) -> bool:
    """The CPU's allocator has no error type of its own, nor have Triton, cuBLAS and CUDA's loader of kernels."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        text in str(error)
        for text in ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    )


if __name__ == "__main__":
    processes.main(sys.argv[1:], lambda job, result: write_result(result, measure(Job.of(job))))
