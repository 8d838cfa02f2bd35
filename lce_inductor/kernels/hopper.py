"""The anchored softmax's two large products on sm_90 (H100, H200): hopper.cu, compiled by NVRTC.

They have what Triton 3.6 cannot say: clusters of two blocks that share operands, and two warpgroups that take turns, so
that what is done with a product's result costs no time of its own. NOTES.md has the measurements.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import logging
import os
import pathlib
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.chunking import ceil_div
from ..ops.epilogue import Steps, reciprocal
from . import nvrtc

log = logging.getLogger(__name__)

ROWS, COLUMNS = 128, 192  # of a tile; the two blocks of a cluster take two of them, PAIR rows
PAIR = 2 * ROWS
_THREADS = 384
_DEPTH = 64
_FLAGS = ("STORE", "SUM", "REDO", "HAS_BIAS", "HAS_STEPS", "HAS_TARGET")
# Pairs of row tiles that share columns: what 66 clusters work on at a time is about square.
_GROUP = 4


class LogitsArguments(ctypes.Structure):
    """`Arguments` of hopper_logits.cuh."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("rows", "columns", "inner", "row0", "group")),
        *((name, ctypes.c_void_p) for name in ("anchor", "bias", "target")),
        ("stride_t", ctypes.c_longlong),
        *((name, ctypes.c_void_p) for name in ("sums", "maxima")),
        ("part_stride", ctypes.c_longlong),
        *((name, ctypes.c_void_p) for name in ("row_max", "flag", "found")),
    )


class DwArguments(ctypes.Structure):
    """`Arguments` of hopper_dw.cuh."""

    _fields_ = tuple((name, ctypes.c_int) for name in ("rows", "columns", "inner", "group", "accumulate"))


class Variant(NamedTuple):
    """What a kernel is compiled for: which product, by its flags, and the epilogue of the first."""

    flags: frozenset[str]
    steps: Steps = ()

    @property
    def is_dw(self) -> bool:
        return "DW" in self.flags

    @property
    def staging_bytes(self) -> int:
        """For what is on its way out: a tile of E, or three slices of dW."""
        return ROWS * COLUMNS * 2 if self.flags & {"STORE", "DW"} else 0

    @property
    def stages(self) -> int:
        return 4 if self.staging_bytes else 5

    @property
    def shared_bytes(self) -> int:
        stage = (ROWS + COLUMNS) * _DEPTH * 2
        return 1024 + self.stages * stage + self.staging_bytes + 8 * (2 * self.stages + 4)


_CROSS_ENTROPY = Variant(frozenset({"STORE", "SUM", "HAS_TARGET"}))


@functools.cache
def supported(device: torch.device) -> bool:
    """True on a GPU of compute capability 9.0 that takes what NVRTC makes of the kernel. device: with its index."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0) or not nvrtc.available():
        return False
    try:
        with torch.cuda.device(device):
            _kernel(_CROSS_ENTROPY, device.index)
    except (RuntimeError, OSError) as error:
        log.warning("the kernels for compute capability 9.0 cannot be used, Triton's are: %s", error)
        return False
    return True


def source(variant: Variant) -> str:
    """The text that NVRTC compiles."""
    defines = {flag: int(flag in variant.flags) for flag in _FLAGS} | {"BN": COLUMNS, "STAGES": variant.stages}
    lines = [f"#define {name} {value}" for name, value in defines.items()]
    own = ["hopper_dw.cuh"] if variant.is_dw else ["hopper_logits.cuh"]
    files = [pathlib.Path(__file__).with_name(name) for name in ("hopper_common.cuh", *own, "hopper.cu")]
    text = [_wgmma(COLUMNS, variant.is_dw), _epilogue(variant.steps), *(file.read_text() for file in files)]
    return "\n".join(lines + text)


def _wgmma(columns: int, transposed: bool) -> str:
    """The product of 64 rows, `columns` columns and 16 terms: an instruction with half of `columns` registers."""
    t = int(transposed)
    n = columns // 2
    registers = ", ".join(f"%{i}" for i in range(n))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(n))
    return f"""
__device__ __forceinline__ void wgmma_bn(float (&d)[{n}], unsigned long long a, unsigned long long b, int add) {{
    asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{n + 2}, 0;\\n"
                 "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 "
                 "{{{registers}}}, %{n}, %{n + 1}, p, 1, 1, {t}, {t};\\n}}"
                 : {operands} : "l"(a), "l"(b), "r"(add));
}}"""


def _epilogue(steps: Steps) -> str:
    """f(z) and f'(z), as in anchored_kernels.py, with the approximate division: IEEE's is a loop's worth of code."""
    lines = []
    for name, *constants in steps:
        c = [f"(float)({float(value)!r})" for value in constants]
        if name == "mul":
            lines.append(f"z *= {c[0]}; slope *= {c[0]};")
        elif name == "div":
            r = f"(float)({reciprocal(float(constants[0]))!r})"
            lines.append(f"z *= {r}; slope *= {r};")
        elif name == "add":
            lines.append(f"z += {c[0]};")
        elif name == "tanh":
            lines.append("z = 1.0f - __fdividef(2.0f, 1.0f + __expf(2.0f * z)); slope *= 1.0f - z * z;")
        elif name == "sigmoid":
            lines.append("z = __fdividef(1.0f, 1.0f + __expf(-z)); slope *= z * (1.0f - z);")
        else:  # rsqrt_cap A K
            lines.append(
                f"{{ float r = rsqrtf(z * z + {c[1]}); z *= {c[0]} * r; slope *= {c[0]} * {c[1]} * r * r * r; }}"
            )
    body = "\n    ".join(lines)
    return f"__device__ __forceinline__ void epilogue(float& z, float& slope) {{\n    {body}\n}}"


@functools.lru_cache(maxsize=128)
def _kernel(variant: Variant, device: int) -> nvrtc.Kernel:
    return nvrtc.Kernel(nvrtc.compile(source(variant)), "product", variant.shared_bytes)


class Logits:
    """The launches of one call. x [N, H], weight [V, H], e [chunk rows, row_stride] or None: bf16, aligned rows.

    Everything that chunks share is made once: a launch has to cost the host less than the GPU.

    Args:
        e: where each chunk's exponentials go; None where only their sums are wanted.
        known: the anchor is the row's lse; no sums are taken and nothing is done again.
    """

    def __init__(
        self, x: Tensor, weight: Tensor, e: Tensor | None, bias: Tensor | None, target: Tensor | None, steps: Steps,
        *, anchor: Tensor, sums: Tensor | None, maxima: Tensor | None, row_max: Tensor, flag: Tensor, known: bool,
    ) -> None:  # fmt: skip
        self._e = e
        (N, H), self._V = x.shape, weight.shape[0]
        inputs = {"HAS_BIAS": bias is not None, "HAS_STEPS": bool(steps), "HAS_TARGET": target is not None}
        given = frozenset(flag for flag, here in inputs.items() if here)
        store = frozenset() if e is None else frozenset({"STORE"})
        runs = {"first": store} if known else {"first": store | {"SUM"}, "redo": store | {"SUM", "REDO"}}
        variants = {run: Variant(given | flags, steps) for run, flags in runs.items()}
        self._kernels = dict(zip(variants, _kernels(tuple(variants.values()), x.device.index)))
        self._x_map = nvrtc.tensor_map(x, N, ROWS)
        self._w_map = nvrtc.tensor_map(weight, self._V, COLUMNS // 2)
        self._e_maps: dict[int, nvrtc.TensorMap] = {}
        self._a = LogitsArguments(columns=self._V, inner=H)
        a = self._a
        a.anchor, a.row_max, a.flag = anchor.data_ptr(), row_max.data_ptr(), flag.data_ptr()
        if bias is not None:
            a.bias = bias.data_ptr()
        if target is not None:
            a.target, a.stride_t = target.data_ptr(), target.stride(0)
        if sums is not None and maxima is not None:
            a.sums, a.maxima, a.part_stride = sums.data_ptr(), maxima.data_ptr(), sums.stride(0)
        self._clusters = multiprocessors(x.device) // 2
        self._stream = torch.cuda.current_stream(x.device).cuda_stream

    def launch(self, row0: int, n: int, run: str, found: Tensor) -> None:
        """E and its sums for rows row0 ... row0 + n; run and found: as logits_kernel has them."""
        a, pairs = self._a, ceil_div(n, PAIR)
        a.rows, a.row0, a.found = n, row0, found.data_ptr()
        a.group = ceil_div(pairs, ceil_div(pairs, _GROUP))
        clusters = min(pairs * ceil_div(self._V, COLUMNS), self._clusters)
        self._kernels[run].launch(2 * clusters, _THREADS, (self._x_map, self._w_map, self._e_map(n), a), self._stream)

    def _e_map(self, n: int) -> nvrtc.TensorMap:
        if self._e is None:
            return self._x_map  # not used
        if n not in self._e_maps:
            self._e_maps[n] = nvrtc.tensor_map(self._e, n, ROWS)
        return self._e_maps[n]


class WeightGradient:
    """The launches of dW (+)= E^T xs. dW [V, H] fp32; e [chunk rows, row_stride], xs [chunk rows, H]: bf16."""

    def __init__(self, dw: Tensor, e: Tensor, xs: Tensor) -> None:
        (self._V, self._H), self._e, self._xs = dw.shape, e[:, : len(dw)], xs
        self._kernel = _kernel(Variant(frozenset({"DW"})), dw.device.index)
        self._dw_map = nvrtc.tensor_map(dw, self._V, ROWS)
        self._clusters = multiprocessors(dw.device) // 2
        self._stream = torch.cuda.current_stream(dw.device).cuda_stream

    def launch(self, n: int, accumulate: bool) -> None:
        """With the first n rows of e and xs; not accumulate: whatever was in dW is overwritten."""
        a = DwArguments(rows=self._V, columns=self._H, inner=n, group=1, accumulate=accumulate)
        e_map, xs_map = nvrtc.tensor_map(self._e, n, _DEPTH), nvrtc.tensor_map(self._xs, n, _DEPTH // 2)
        clusters = min(ceil_div(self._V, PAIR) * ceil_div(self._H, COLUMNS), self._clusters)
        self._kernel.launch(2 * clusters, _THREADS, (e_map, xs_map, self._dw_map, a), self._stream)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(maxsize=128)
def _kernels(variants: tuple[Variant, ...], device: int) -> tuple[nvrtc.Kernel, ...]:
    """All kernels of a call; what is not in the cache yet is compiled side by side."""
    with concurrent.futures.ThreadPoolExecutor(min(len(variants), os.cpu_count() or 1)) as pool:
        list(pool.map(lambda v: nvrtc.compile(source(v)), variants))
    return tuple(_kernel(v, device) for v in variants)
