"""How much tensor memory one training step takes, moment by moment."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

_DEVICE_TYPES = {"cpu": 0, "cuda": 1}  # c10::DeviceType, as the trace writes it


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Bytes above the level at the step's start, after each allocation and each release."""

    milliseconds: list[float]
    bytes: list[int]

    @property
    def peak(self) -> int:
        return max(self.bytes)


def record_step(step: Callable[[], object], device: torch.device) -> Timeline:
    """Run `step` once under the profiler and return its memory timeline.

    The resident set of a process is no measure for this: it has the compiler's and the allocator's leftovers in
    it. The profiler instead reports every allocation and release of PyTorch's allocators, compiled code's
    included, so the running sum is exact. The release of something allocated before the profiler started is
    not reported on the CPU: let `step` release only what it allocated, above all by clearing the gradients of
    the step before it first.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as prof:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        # The exported trace is the public form of the single events.
        trace = Path(folder) / "trace.json"
        prof.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event["name"] == "[memory]" and event["args"]["Device Type"] == _DEVICE_TYPES[device.type]
    )
    if not changes:
        raise RuntimeError("the profiler reported no memory events")
    times, levels, level = [0.0], [0], 0
    for when, change in changes:
        level += change
        times.append((when - changes[0][0]) / 1000)
        levels.append(level)
    return Timeline(times, levels)


def resident_bytes(tensors: Iterable[Tensor], device: torch.device) -> int:
    """Bytes of the storages behind the tensors that lie on `device`, each storage once; a DTensor's local part."""
    local = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local if t.device == device}
    return sum(storages.values())
