"""The package's own launches with every Triton kernel compiled for a GPU that need not be there, and not run."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class _Driver:
    """What Triton asks of a driver before it launches. The target stands for the device: kernels are kept by it."""

    def __init__(self, target: GPUTarget) -> None:
        self.get_current_target = lambda: target
        self.get_current_device = lambda: target
        self.get_current_stream = lambda device: 0


@contextlib.contextmanager
def compiling_for(target: GPUTarget) -> Iterator[list[Any]]:
    """What was compiled, one entry for each launch. Results of the launches are arbitrary."""
    found, run, before = [], JITFunction.run, driver._active

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        found.append(run(self, *args, grid=grid, warmup=True, **options))
        return found[-1]

    try:
        driver.set_active(_Driver(target))
        JITFunction.run = compile_only
        yield found
    finally:
        JITFunction.run = run
        driver._active = before


def stack_bytes(kernel: Any, folder: Path) -> int:
    """Of a thread, in memory: registers that were spilled."""
    if "amdgcn" in kernel.asm:
        (size,) = re.findall(r"\.private_segment_fixed_size: (\d+)", kernel.asm["amdgcn"])
        return int(size)
    (folder / "cubin").write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(folder / "cubin")]
    (size,) = re.findall(r"STACK:(\d+)", subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return int(size)
