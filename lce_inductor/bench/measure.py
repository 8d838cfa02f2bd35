"""One row of the table: an implementation on one shape, in this process or in one of its own."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .implementations import IMPLEMENTATIONS, NotApplied
from .reference import DTYPES, ERROR_LIMITS, bare_products, make_inputs, reference, relative_error
from .shapes import Shape

FLOOR = "floor"

OK, OUT_OF_MEMORY, WRONG, FAILED = "ok", "out of memory", "WRONG", "failed"
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
    def from_json(cls, text: str) -> Job:
        fields = json.loads(text)
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


def run_isolated(module: str, job: Any, cache_dir: Path, timeout_s: float | None = None) -> dict[str, Any]:
    """Give a job, a dataclass, to `python -m module JOB RESULT` and return what it writes to the file RESULT.

    Without a result, a status and a detail that say how the process ended.
    """
    with tempfile.TemporaryDirectory(prefix="lce_bench_") as folder:
        result, log = Path(folder) / "row.json", Path(folder) / "log.txt"
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache_dir), "KINETO_LOG_LEVEL": "99"}
        command = [sys.executable, "-m", module, json.dumps(dataclasses.asdict(job)), str(result)]
        late = {"status": FAILED, "detail": f"no result after {timeout_s:g} s"} if timeout_s is not None else {}
        with log.open("w") as output:
            try:
                code = subprocess.run(
                    command, env=environment, stdout=output, stderr=output, timeout=timeout_s
                ).returncode
            except subprocess.TimeoutExpired:
                return json.loads(result.read_text()) if result.exists() else late
        if result.exists():
            found: dict[str, Any] = json.loads(result.read_text())
            return found
        if code == -signal.SIGKILL:
            return {"status": OUT_OF_MEMORY, "detail": "killed, as the system does when memory runs out"}
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        return {"status": FAILED, "detail": f"exit code {code}: {' '.join(last)}"}


def write_result(path: Path, row: Any) -> None:
    """What run_isolated reads: a row without its job. Renamed at the end, since the reader may come at any time."""
    fields = dataclasses.asdict(row)
    del fields["job"]
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(fields))
    unfinished.replace(path)


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
    times: list[float] = []
    floor_times: list[float] = []
    for _ in range(job.reps):
        inputs.clear()
        times.append(timed_ms(step, device))
        if floor is not None:
            floor_times.append(timed_ms(floor, device))
    floor_ms = statistics.median(floor_times) if floor_times else None
    return Row(job, OK, ms=statistics.median(times), floor_ms=floor_ms, **known)


def _floor_row(job: Job) -> Row:
    device = current_device(job.device)
    step = bare_products(job.shape, DTYPES[job.dtype], device, job.forward_only)
    step()
    ms = statistics.median(timed_ms(step, device) for _ in range(job.reps))
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


def _worker(job: str, result: str) -> None:
    write_result(Path(result), measure(Job.from_json(job)))


if __name__ == "__main__":
    _worker(*sys.argv[1:])
