"""The CUDA C++ that NVRTC compiles for hopper.py: files beside this one, behind what the host defines."""

from __future__ import annotations

import functools
import pathlib
from typing import NamedTuple

from ..spec.epilogue import Steps, reciprocal
from . import nvrtc
from .hopper_arguments import DwArguments, DxArguments, LogitsArguments, RowsArguments, assertions

ROWS, COLUMNS = 128, 192  # of a tile
DEPTH = 64  # of the inner dimension, in one step
CLAIMED = 16  # items that a cluster of the product for dX keeps in mind
_ARGUMENTS = {"logits": LogitsArguments, "dx": DxArguments, "dw": DwArguments}
_FLAGS = ("STORE", "SUM", "REDO", "PLAIN", "GRADIENT", "HALF", "HAS_BIAS", "HAS_STEPS", "HAS_TARGET", "HAS_SUM")


class Variant(NamedTuple):
    """What a kernel is compiled for: which product, by its flags, and the epilogue of the first."""

    flags: frozenset[str]
    steps: Steps = ()

    @property
    def operands(self) -> str:
        return "f16" if "HALF" in self.flags else "bf16"

    @property
    def product(self) -> str:
        """Which of the three: its file is hopper_*.cuh."""
        return "dw" if "DW" in self.flags else "dx" if "DX" in self.flags else "logits"

    @property
    def name(self) -> str:
        """Of the kernel, as a profile shows it."""
        if self.product != "logits" or "PLAIN" in self.flags:
            return f"lce_{self.product}"
        if "GRADIENT" in self.flags:
            return "lce_gradients"
        return "lce_exponentials_redo" if "REDO" in self.flags else "lce_exponentials"

    @property
    def transposed(self) -> tuple[int, int]:
        """Is the inner dimension the outer one of each operand in memory?"""
        return {"logits": (0, 0), "dx": (0, 1), "dw": (1, 1)}[self.product]

    @property
    def staging_bytes(self) -> int:
        """For what is on its way out: a tile of E, or three slices in fp32."""
        return ROWS * COLUMNS * 2 if self.flags & {"STORE", "DX", "DW"} else 0

    @property
    def stages(self) -> int:
        return 4 if self.staging_bytes else 5

    @property
    def shared_bytes(self) -> int:
        stage, claimed = (ROWS + COLUMNS) * DEPTH * 2, CLAIMED if self.product == "dx" else 0
        return 1024 + self.stages * stage + self.staging_bytes + 8 * (2 * self.stages + 4 + claimed)


def source(variant: Variant) -> str:
    """The text of a product that NVRTC compiles."""
    defines = {flag: int(flag in variant.flags) for flag in _FLAGS} | {
        "BN": COLUMNS, "STAGES": variant.stages, "NAME": variant.name, "SHARED_BYTES": variant.shared_bytes,
        **({"CLAIMED": CLAIMED} if variant.product == "dx" else {}),
    }  # fmt: skip
    lines = [f"#define {name} {value}" for name, value in defines.items()]
    wide = [] if variant.product == "logits" else ["hopper_wide.cuh"]
    common, *files = map(_file, ("hopper_common.cuh", *wide, f"hopper_{variant.product}.cuh", "hopper.cu"))
    steps = _epilogue(variant.steps, exact=False)
    layouts = assertions("Arguments", _ARGUMENTS[variant.product]) + assertions("TensorMap", nvrtc.TensorMap)
    return "\n".join([*lines, _wgmma(COLUMNS, variant), common, steps, *files, layouts])


def rows_source(steps: Steps) -> str:
    """The text of the small kernels."""
    return "\n".join([_epilogue(steps, exact=True), _file("hopper_rows.cuh"), assertions("Arguments", RowsArguments)])


@functools.cache
def _file(name: str) -> str:
    return pathlib.Path(__file__).with_name(name).read_text()


def _wgmma(columns: int, variant: Variant) -> str:
    """The product of 64 rows, `columns` columns and 16 terms: an instruction with half of `columns` registers."""
    (a, b), operand = variant.transposed, variant.operands
    n = columns // 2
    registers = ", ".join(f"%{i}" for i in range(n))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(n))
    return f"""
__device__ __forceinline__ void wgmma_bn(float (&d)[{n}], unsigned long long a, unsigned long long b, int add) {{
    asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{n + 2}, 0;\\n"
                 "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{operand}.{operand} "
                 "{{{registers}}}, %{n}, %{n + 1}, p, 1, 1, {a}, {b};\\n}}"
                 : {operands} : "l"(a), "l"(b), "r"(add));
}}"""


def _epilogue(steps: Steps, exact: bool) -> str:
    """f(z) and f'(z), as in rows.py; not exact: an instruction for each function, whose results are within
    2^-22 of IEEE's, for which division is a loop's worth of code."""
    exp, inverse, root = ("expf({})", "1.0f / ({})", "1.0f / sqrtf({})") if exact else (
        "exp2_fast({} * 1.4426950408889634f)", "inverse_fast({})", "rsqrtf({})")  # fmt: skip
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
            half = inverse.format("1.0f + " + exp.format("2.0f * z"))
            lines.append(f"{{ float r = {half}; z = 1.0f - 2.0f * r; slope *= 4.0f * (r - r * r); }}")
        elif name == "sigmoid":
            lines.append(f"z = {inverse.format('1.0f + ' + exp.format('-z'))}; slope *= z * (1.0f - z);")
        else:  # rsqrt_cap A K
            r = root.format(f"z * z + {c[1]}")
            lines.append(f"{{ float r = {r}; z *= {c[0]} * r; slope *= {c[0]} * {c[1]} * r * r * r; }}")
    body = "\n    ".join(lines)
    return f"__device__ __forceinline__ void epilogue(float& z, float& slope) {{\n    {body}\n}}"
