"""The anchored softmax's two large products on sm_90 (H100, H200): hopper.cu, compiled by NVRTC.

Beside the Triton kernel it has what Triton 3.6 cannot say: clusters of two blocks that share operands, and two
warpgroups that take turns, so that exponentials, and the additions to dW, cost no time of their own. NOTES.md has
the measurements.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import os
import pathlib
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.chunking import ceil_div
from ..ops.epilogue import Steps, reciprocal
from . import nvrtc

ROWS = 128  # of a tile; the two blocks of a cluster take two, PAIR rows
PAIR = 2 * ROWS
_THREADS = 384
_DEPTH = 64
_FLAGS = ("DW", "STORE", "SUM", "MAX", "REDO", "HAS_BIAS", "HAS_STEPS", "HAS_TARGET")


class Arguments(ctypes.Structure):
    """`Arguments` of hopper.cu."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("rows", "columns", "inner", "row0", "group")),
        *((name, ctypes.c_void_p) for name in ("anchor", "bias", "target")),
        ("stride_t", ctypes.c_longlong),
        ("sums", ctypes.c_void_p),
        ("part_stride", ctypes.c_longlong),
        *((name, ctypes.c_void_p) for name in ("row_max", "flag", "found", "out")),
        ("accumulate", ctypes.c_int),
    )


class Variant(NamedTuple):
    """What a kernel is compiled for: flags that are set, tile columns, epilogue."""

    flags: frozenset[str]
    columns: int
    steps: Steps = ()

    @property
    def stages(self) -> int:
        return 4 if "STORE" in self.flags else 5 if self.columns > 128 else 6

    @property
    def shared_bytes(self) -> int:
        stage = (ROWS + self.columns) * _DEPTH * 2
        staging = ROWS * self.columns * 2 if "STORE" in self.flags else 0
        return 1024 + self.stages * stage + staging + 8 * (2 * self.stages + 4)


@functools.cache
def supported(device: torch.device) -> bool:
    """True on a GPU of compute capability 9.0 with NVRTC beside it."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0) and nvrtc.available()


def source(variant: Variant) -> str:
    """The text that NVRTC compiles."""
    defines = {flag: int(flag in variant.flags) for flag in _FLAGS}
    defines |= {"BN": variant.columns, "STAGES": variant.stages}
    lines = [f"#define {name} {value}" for name, value in defines.items()]
    lines += [_wgmma(variant.columns, transposed="DW" in variant.flags), _epilogue(variant.steps)]
    return "\n".join([*lines, pathlib.Path(__file__).with_name("hopper.cu").read_text()])


def _wgmma(columns: int, transposed: bool) -> str:
    """The product of 64 rows, `columns` columns and 16 terms: an instruction with half of `columns` registers."""
    n = columns // 2
    registers = ", ".join(f"%{i}" for i in range(n))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(n))
    t = int(transposed)
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


def dw_columns(H: int) -> int:
    """Tile columns for dW: 192 share operands better, 128 may waste fewer columns."""
    return min((192, 128), key=lambda columns: ceil_div(H, columns) * columns * (1.0 if columns == 192 else 1.08))


class Products:
    """The large products of one call. x [N, H], weight [V, H], e [chunk rows, row_stride] or None: bf16, aligned rows.

    Everything that chunks share is made once: a launch has to cost the host less than the GPU.

    Args:
        e: where each chunk's exponentials go; None where only their sums are wanted.
        known: the anchor is the row's lse; no sums are taken and nothing is done again.
        dw: `dw` will be called.
    """

    columns = 192  # of a tile of logits

    def __init__(
        self, x: Tensor, weight: Tensor, e: Tensor | None, bias: Tensor | None, target: Tensor | None, steps: Steps,
        *, anchor: Tensor, sums: Tensor | None, row_max: Tensor, flag: Tensor, known: bool, dw: bool,
    ) -> None:  # fmt: skip
        self._e = e
        (N, self._H), self._V = x.shape, weight.shape[0]
        self._device = x.device
        inputs = {"HAS_BIAS": bias is not None, "HAS_STEPS": bool(steps), "HAS_TARGET": target is not None}
        given = frozenset(flag for flag, here in inputs.items() if here)
        store = frozenset() if e is None else frozenset({"STORE"})
        runs = (
            {"first": store} if known else {"first": store | {"SUM"}, "max": {"MAX"}, "redo": store | {"SUM", "REDO"}}
        )
        variants = {run: Variant(given | flags, self.columns, steps) for run, flags in runs.items()}
        if dw:
            variants["dw"] = Variant(frozenset({"DW"}), dw_columns(self._H))
        self._kernels = dict(zip(variants, _kernels(tuple(variants.values()), x.device.index)))
        self._dw_tiles = ceil_div(self._V, PAIR) * ceil_div(self._H, dw_columns(self._H))
        self._x_map = nvrtc.tensor_map(x, N, ROWS)
        self._w_map = nvrtc.tensor_map(weight, self._V, self.columns // 2)
        self._maps: dict[int, tuple[nvrtc.TensorMap, nvrtc.TensorMap]] = {}
        self._a = Arguments(columns=self._V, inner=self._H, group=8)
        a = self._a
        a.anchor, a.row_max, a.flag = anchor.data_ptr(), row_max.data_ptr(), flag.data_ptr()
        if bias is not None:
            a.bias = bias.data_ptr()
        if target is not None:
            a.target, a.stride_t = target.data_ptr(), target.stride(0)
        if sums is not None:
            a.sums, a.part_stride = sums.data_ptr(), sums.stride(0)
        self._inputs = (x, weight, bias, target, anchor, sums, row_max, flag)  # kept alive
        self._clusters = multiprocessors(x.device) // 2
        self._stream = torch.cuda.current_stream(x.device).cuda_stream

    def logits(self, row0: int, n: int, run: str, found: Tensor) -> None:
        """E and its sums for rows row0 ... row0 + n; run and found: as logits_kernel has them."""
        a = self._a
        a.rows, a.row0, a.found = n, row0, found.data_ptr()
        e_map = self._x_map if self._e is None else self._e_maps(n)[0]
        tiles = ceil_div(n, PAIR) * ceil_div(self._V, self.columns)
        self._launch(run, (self._x_map, self._w_map, e_map, a), tiles)

    def dw(self, out: Tensor, n: int, scaled: Tensor, accumulate: bool) -> None:
        """out [V, H] fp32 (+)= E^T scaled, over the chunk's first n rows. scaled: [chunk rows, H]."""
        a = Arguments(rows=self._V, columns=self._H, inner=n, group=1, out=out.data_ptr(), accumulate=accumulate)
        e_map, scaled_map = self._e_maps(n)[1], nvrtc.tensor_map(scaled, n, _DEPTH // 2)
        self._launch("dw", (e_map, scaled_map, e_map, a), self._dw_tiles)

    def _e_maps(self, n: int) -> tuple[nvrtc.TensorMap, nvrtc.TensorMap]:
        """E's first n rows as the first product writes them, and as the second reads them."""
        assert self._e is not None
        if n not in self._maps:
            written = nvrtc.tensor_map(self._e, n, ROWS)
            self._maps[n] = (written, nvrtc.tensor_map(self._e[:, : self._V], n, _DEPTH))
        return self._maps[n]

    def _launch(self, name: str, arguments: tuple[ctypes.Structure, ...], tiles: int) -> None:
        self._kernels[name].launch(2 * min(tiles, self._clusters), _THREADS, arguments, self._stream)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(maxsize=128)
def _kernels(variants: tuple[Variant, ...], device: int) -> tuple[nvrtc.Kernel, ...]:
    """All kernels of a call; what is not in the cache yet is compiled side by side."""
    with concurrent.futures.ThreadPoolExecutor(min(len(variants), os.cpu_count() or 1)) as pool:
        list(pool.map(lambda v: nvrtc.compile(source(v)), variants))
    return tuple(_kernel(v, device) for v in variants)
