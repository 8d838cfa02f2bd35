"""The kernel in CUDA C++: what NVRTC makes of it, without a GPU. Its numbers are in test_anchored.py, on one."""

from __future__ import annotations

import contextlib
import logging
import re
import subprocess
from pathlib import Path

import pytest
import torch

from lce_inductor.kernels import nvrtc
from lce_inductor.spec.epilogue import parse

triton = pytest.importorskip("triton")
from lce_inductor.kernels import hopper, hopper_source  # noqa: E402
from lce_inductor.lower import plan  # noqa: E402
from lce_inductor.lower.device_policy import POLICIES  # noqa: E402

pytestmark = pytest.mark.skipif(not nvrtc.available(), reason="needs NVRTC, which there is for NVIDIA's GPUs alone")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
H100 = plan.Device("cuda", triton=True, capability=(9, 0), hopper=True, clusters=66)
SOFTCAP = "div 30.0;tanh;mul 30.0"
EVERY_STEP = "mul 2.0;add 0.5;div 3.0;tanh;sigmoid;rsqrt_cap 15.0 225.0"
ON_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
# The largest shared memory of a block on sm_90.
LIMIT = 227 * 1024


def variant(flags: str, epilogue: str = "") -> hopper_source.Variant:
    steps = parse(epilogue)
    return hopper_source.Variant(frozenset(flags.split()) | ({"HAS_STEPS"} if steps else set()), steps)


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
    variant("STORE SUM PLAIN"),
    variant("STORE SUM PLAIN HALF"),
    variant("STORE GRADIENT HAS_TARGET"),
    variant("STORE GRADIENT"),
    variant("STORE GRADIENT HAS_TARGET HAS_BIAS HAS_SUM", EVERY_STEP),
    variant("DX"),
    variant("DX HALF"),
    variant("DW"),
    variant("DW HALF"),
]


def operands(
    N: int, V: int, rows: int, H: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, hopper.Products]:
    """E [N, V] in padded rows, another matrix [rows, H], and the products of their dtype."""
    g = torch.Generator("cuda").manual_seed(0)
    e = torch.randn(N, -(-V // 64) * 64, device="cuda", generator=g).to(dtype)
    other = torch.randn(rows, H, device="cuda", generator=g).to(dtype)
    e[:, V:] = float("nan")  # beyond the classes: not read
    kernels = hopper.products(e.device, dtype)
    assert kernels is not None
    return e, other, kernels


def sass(source: str, folder: Path) -> list[str]:
    path = folder / "kernel.cubin"
    path.write_bytes(nvrtc.compile(source, folder=folder))
    run = subprocess.run([str(CUOBJDUMP), "-sass", str(path)], check=True, capture_output=True, text=True)
    return re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(.*?);", run.stdout, re.MULTILINE)


@pytest.mark.parametrize("v", VARIANTS, ids=lambda v: " ".join(sorted(v.flags)))
def test_compiles_to_what_was_meant(v: hopper_source.Variant, tmp_path: Path) -> None:
    code = sass(hopper_source.source(v), tmp_path)
    products = [
        i for i, line in enumerate(code) if "HGMMA.64x192x16.F32" + ("" if "HALF" in v.flags else ".BF16") in line
    ]
    assert len(products) == 8  # two blocks of 64 rows, four times 16 terms: one step of the loop
    assert any("UTMALDG.2D.MULTICAST" in line for line in code)
    assert any("UTMASTG" in line for line in code) == bool(v.flags & {"STORE", "DX", "DW"})
    assert any("UTMAREDG" in line and "ADD" in line for line in code) == (v.product != "logits")
    assert ["tnsp" + name in code[products[0]] for name in "AB"] == [bool(t) for t in v.transposed]
    # All products of a step under way at once: the compiler has found no reason to wait after each.
    assert sum("gsb0" in code[i] for i in products) == 1
    # Around the products: no registers in memory, and no fence of the GPU where a stage is given back.
    loop = code[products[0] - 30 : products[-1] + 15]
    assert not [line for line in loop if re.search(r"\b(STL|LDL|MEMBAR)\b", line)]
    assert v.shared_bytes <= LIMIT


@pytest.mark.parametrize(
    "v, most",
    [
        (CROSS_ENTROPY, 0),
        (variant("SUM HAS_TARGET"), 0),
        (variant("STORE SUM HAS_TARGET", SOFTCAP), 0),
        (variant("STORE SUM HAS_TARGET HAS_BIAS"), 16),  # once a tile
        (variant("STORE SUM PLAIN"), 12),  # these too, and the next once a part of one
        (variant("STORE SUM PLAIN HALF"), 28),
        (variant("STORE GRADIENT HAS_TARGET"), 0),
        (variant("STORE GRADIENT HAS_TARGET", SOFTCAP), 0),
        (variant("STORE GRADIENT HAS_TARGET HAS_BIAS"), 24),
        (variant("STORE GRADIENT HAS_TARGET HAS_SUM"), 28),
        (variant("DX"), 2),
        (variant("DW"), 0),
    ],
    ids=lambda v: " ".join(sorted(v.flags)) if isinstance(v, hopper_source.Variant) else "",
)
def test_no_registers_in_memory(v: hopper_source.Variant, most: int, tmp_path: Path) -> None:
    code = sass(hopper_source.source(v), tmp_path)
    assert sum("STL" in line for line in code) <= most


@pytest.mark.parametrize("H, fills", [(192, True), (768, True), (896, True), (1024, False), (640, False), (4096, True)])
def test_where_tiles_of_dw_are_full(H: int, fills: bool) -> None:
    assert plan.products(256, H, 50257, torch.float16, H100, POLICIES["cuda"].products).dw == fills


@pytest.mark.parametrize("steps", ["", SOFTCAP, EVERY_STEP])
def test_small_kernels(steps: str, tmp_path: Path) -> None:
    """16 bytes at a time, no registers in memory, and divisions as exact as Triton's."""
    code = sass(hopper_source.rows_source(parse(steps)), tmp_path)
    assert sum("LDG.E.128" in line for line in code) >= 10
    assert sum("STG.E.128" in line for line in code) >= 4
    # The exact square root and division are calls where a row's epilogue has both: one register is saved around them.
    assert len([line for line in code if re.search(r"\b(STL|LDL)\b", line)]) <= (2 if steps == EVERY_STEP else 0)


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


@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU of compute capability 9.0")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("N, H, V", [(256, 64, 192), (1300, 200, 5003), (2048, 768, 50257)])
def test_logits_against_fp64(N: int, H: int, V: int, dtype: torch.dtype) -> None:
    """Rounded once, with their logsumexp; infinite ones, too, and none that counts."""
    from lce_inductor.lower import products

    g = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(N, H, device="cuda", generator=g).to(dtype)
    weight = torch.randn(V, H, device="cuda", generator=g).to(dtype)
    x[7], x[8], x[9] = 0, float("inf"), float("nan")
    weight[:, 0] = weight[:, 0].abs()  # x[8] @ weight is infinite or NaN as in eager
    x[8, 1:] = 0
    stride = -(-V // 64) * 64
    z = torch.empty(N, stride, dtype=dtype, device="cuda")
    lse = torch.empty(N, dtype=torch.float64, device="cuda")
    half = N // 2 // hopper.PAIR * hopper.PAIR or N
    for row0 in range(0, N, half):
        rows = slice(row0, min(row0 + half, N))
        assert products.logits_with_lse(z[rows], x, weight, row0, lse[rows])
    library = x @ weight.t()
    exact = x.double() @ weight.double().t()
    finite = exact.isfinite().all(1)
    assert (z[finite, :V] - exact[finite]).norm() <= 1.001 * (library[finite] - exact[finite]).norm()
    torch.testing.assert_close(z[~finite, :V], library[~finite], equal_nan=True)
    torch.testing.assert_close(lse, z[:, :V].double().logsumexp(1), rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(
    "n, H, V, parts, full",
    [
        (3328, 2048, 131072, 6, 0.97),  # 143 tiles: 858 parts are 13 of each of 66 clusters
        (2816, 2304, 256000, 1, 1.0),  # 132 tiles
        (4096, 4096, 128256, 3, 0.97),
        (1, 8, 1, 1, 0.0),
        (256, 192, 200, 4, 0.06),  # no more parts than steps of 64 classes
    ],
)
def test_parts_of_dx(n: int, H: int, V: int, parts: int, full: float) -> None:
    found = hopper.parts_of_dx(n, H, V, 66)
    assert found.count == parts and abs(found.full - full) < 0.006


@pytest.mark.parametrize(
    "n, H, ours",
    [(3328, 2048, True), (2816, 2304, True), (2048, 2048, False), (4096, 4096, False), (3328, 768, False)],
)
def test_which_product_for_dx(n: int, H: int, ours: bool, caplog: pytest.LogCaptureFixture) -> None:
    """As measured, see NOTES.md; said once."""
    r = plan.Request(n, H, 128256, torch.bfloat16, n, 4 << 30, grads=1, mask=(True, True, False))
    with caplog.at_level(logging.DEBUG, logger=plan.log.name):
        found = plan.decide(r, H100, POLICIES["cuda"])
    assert found.products.dx == found.products_of(n).dx == ours
    said = [m for m in caplog.messages if m.startswith(f"dX of {n} rows, H={H} ")]
    assert len(said) == 1 and ("ours in" in said[0]) == ours


@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU of compute capability 9.0")
@pytest.mark.parametrize(
    "n, H, V", [(256, 192, 256), (1000, 200, 1003), (768, 1152, 20011), (130, 1024, 5003), (3328, 2048, 5003)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dx_against_fp64(n: int, H: int, V: int, dtype: torch.dtype) -> None:
    """Sizes that are no multiple of a tile, several parts, launches one after another; each time the same bits."""
    e, weight, kernels = operands(n, V, V, H, dtype)
    counts = torch.zeros(hopper.counts_of_dx(n, H), dtype=torch.int32, device="cuda")
    counted, found = 0, []
    for _ in range(5):
        found.append(torch.full((n, H), float("nan"), device="cuda"))
        counted += hopper.launch_dx(kernels.dx, found[-1], e, weight, counts.data_ptr(), counted)
    exact = e[:, :V].double() @ weight.double()
    assert (found[0] - exact).norm() < 2e-5 * exact.norm()
    assert all(f.equal(found[0]) for f in found) and counts[0] == 0 and (counts[1:] == counted).all()


@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU of compute capability 9.0")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("N, H, V, rows", [(256, 64, 256, 256), (1000, 200, 1003, 512), (2000, 768, 5003, 768)])
def test_dw_against_fp64(N: int, H: int, V: int, rows: int, dtype: torch.dtype) -> None:
    """Chunk by chunk, sizes that are no multiple of a tile, more tiles than blocks; twice the same bits."""
    e, xs, kernels = operands(N, V, N, H, dtype)
    found = []
    for _ in range(2):
        buffer, scaled = torch.full_like(e[:rows], float("nan")), torch.full_like(xs[:rows], float("nan"))
        dw = torch.full((V, H), float("nan"), device="cuda")
        for row0 in range(0, N, rows):
            n = min(rows, N - row0)
            buffer[:n], scaled[:n] = e[row0 : row0 + n], xs[row0 : row0 + n]
            hopper.launch_dw(kernels.dw, dw, buffer[:n], scaled[:n], accumulate=row0 > 0)
        found.append(dw)
    exact = e[:, :V].double().t() @ xs.double()
    assert (found[0] - exact).norm() < 2e-6 * exact.norm()
    assert found[0].equal(found[1])


def test_products_are_loaded_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each in its place, those of a dtype compiled once; another dtype has none."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(hopper, "_kernels", hopper._kernels.__wrapped__)
    monkeypatch.setattr(nvrtc, "load", lambda cubin, sizes: {name: (name, size) for name, size in sizes.items()})
    compiled = []
    monkeypatch.setattr(nvrtc, "compile", lambda source: compiled.append(source) or source.encode())
    find = hopper.products.__wrapped__
    for dtype, half in ((torch.bfloat16, 0), (torch.float16, 1)):
        compiled.clear()
        found = find(torch.device("cuda", 0), dtype)
        assert [name for name, _ in found] == ["lce_logits", "lce_dx", "lce_dw"] and len(set(compiled)) == 4
        assert sum(f"#define HALF {half}" in source for source in compiled) == 3
    assert find(torch.device("cuda", 0), torch.float32) is None
    assert find(torch.device("cpu"), torch.bfloat16) is None


def test_not_on_a_cpu() -> None:
    assert not hopper.supported(torch.device("cpu"))
