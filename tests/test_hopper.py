"""The kernel in CUDA C++: what NVRTC makes of it, without a GPU. Its numbers are in test_anchored.py, on one."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

from lce_inductor.kernels import nvrtc
from lce_inductor.ops.epilogue import parse

triton = pytest.importorskip("triton")
from lce_inductor.kernels import hopper  # noqa: E402

pytestmark = pytest.mark.skipif(not nvrtc.available(), reason="needs NVRTC, which there is for NVIDIA's GPUs alone")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SOFTCAP = "div 30.0;tanh;mul 30.0"
EVERY_STEP = "mul 2.0;add 0.5;div 3.0;tanh;sigmoid;rsqrt_cap 15.0 225.0"
# The largest shared memory of a block on sm_90.
LIMIT = 227 * 1024


def variant(flags: str, epilogue: str = "") -> hopper.Variant:
    steps = parse(epilogue)
    return hopper.Variant(frozenset(flags.split()) | ({"HAS_STEPS"} if steps else set()), steps)


CROSS_ENTROPY = variant("STORE SUM HAS_TARGET")
VARIANTS = [
    CROSS_ENTROPY,
    variant("STORE SUM REDO HAS_TARGET"),
    variant("STORE HAS_TARGET"),
    variant("SUM HAS_TARGET"),
    variant("SUM REDO"),
    variant("STORE SUM HAS_TARGET HAS_BIAS"),
    variant("STORE SUM HAS_TARGET", SOFTCAP),
    variant("STORE SUM REDO HAS_BIAS", EVERY_STEP),
]


def sass(v: hopper.Variant, folder: Path) -> list[str]:
    path = folder / "kernel.cubin"
    path.write_bytes(nvrtc.compile(hopper.source(v), folder=folder))
    run = subprocess.run([str(CUOBJDUMP), "-sass", str(path)], check=True, capture_output=True, text=True)
    return re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(.*?);", run.stdout, re.MULTILINE)


@pytest.mark.parametrize("v", VARIANTS, ids=lambda v: " ".join(sorted(v.flags)))
def test_compiles_to_what_was_meant(v: hopper.Variant, tmp_path: Path) -> None:
    code = sass(v, tmp_path)
    products = [i for i, line in enumerate(code) if "HGMMA.64x192x16.F32.BF16" in line]
    assert len(products) == 8  # two blocks of 64 rows, four times 16 terms: one step of the loop
    assert any("UTMALDG.2D.MULTICAST" in line for line in code)
    assert any("UTMASTG" in line for line in code) == ("STORE" in v.flags)
    # Around the products: no registers in memory, and no fence of the GPU where a stage is given back.
    loop = code[products[0] - 30 : products[-1] + 15]
    assert not [line for line in loop if re.search(r"\b(STL|LDL|MEMBAR)\b", line)]
    assert v.shared_bytes <= LIMIT


def test_no_registers_in_memory_for_cross_entropy(tmp_path: Path) -> None:
    code = sass(CROSS_ENTROPY, tmp_path)
    assert sum("STL" in line for line in code) <= 4


def test_errors_are_the_compilers(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"NVRTC: .*identifier .nonsense. is undefined"):
        nvrtc.compile("__global__ void f() { nonsense; }", folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_cubin_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'extern "C" __global__ void f() {}'
    first = nvrtc.compile(text, folder=tmp_path)
    monkeypatch.setattr(nvrtc, "_compile", None)
    assert nvrtc.compile(text, folder=tmp_path) == first
    assert len(list(tmp_path.iterdir())) == 1


def test_not_on_a_cpu() -> None:
    assert not hopper.supported(torch.device("cpu"))
