"""GPUs that need not be there: every Triton kernel compiles for each and fits it; and what other devices get.

The launches are the package's own, on memory of the CPU, with the layouts that it chooses on the GPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import pkgutil
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from harness import Compiled, assert_same_bits, decided, fresh, head, inference_graph, joint_graph, results

import lce_inductor
from lce_inductor import Config, kernels, regions
from lce_inductor.lower import plan as plans
from lce_inductor.lower.device_policy import ANCHORED_TRITON, POLICIES, ROWS
from lce_inductor.lower.plan import Device, Request, capabilities, decide
from lce_inductor.passes import HeadsPass
from lce_inductor.spec.statistics import LSE, SUM, TARGET

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled under the interpreter", allow_module_level=True)

from compile_only import compiling_for, stack_bytes  # noqa: E402
from rows_cases import ALL, GRADS, SOFTCAP, Case, Planned, make  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402
from turns import EVERYTHING  # noqa: E402

from lce_inductor.kernels import anchored_triton, rows, tuning  # noqa: E402


class Gpu(NamedTuple):
    """shared_kib: of a thread block at most, as NVIDIA's CUDA C++ programming guide has it ("Technical Specifications
    per Compute Capability"), and of a workgroup in AMD's CDNA 3 ISA reference ("LDS"). device: as a plan knows it."""

    target: GPUTarget
    shared_kib: int
    device: Device

    def __str__(self) -> str:
        return f"sm_{self.target.arch}" if self.target.backend == "cuda" else self.target.arch


def nvidia(major: int, minor: int, shared_kib: int) -> Gpu:
    return Gpu(GPUTarget("cuda", 10 * major + minor, 32), shared_kib, Device("cuda", True, (major, minor)))


SM_86 = nvidia(8, 6, 99)  # A10, RTX 3090
SM_90 = nvidia(9, 0, 227)  # H100, H200, without NVRTC; with it, see test_hopper.py
SM_100 = nvidia(10, 0, 227)  # B200
MI300 = Gpu(GPUTarget("hip", "gfx942", 64), 64, Device("cuda", True))
GPUS = [
    nvidia(8, 0, 163),  # A100
    SM_86,
    nvidia(8, 9, 99),  # L4, L40S, RTX 4090
    SM_90,
    SM_100,
    nvidia(12, 0, 99),  # RTX 5090, RTX PRO 6000
    MI300,
]
OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SMALL = tuning.Tiles(64, 64, 32, group=2, warps=4, stages=2, flatten=False)
REQUEST = Request(
    16384, 2048, 131072, BF16, 0, 3 << 29, stats=LSE | TARGET, columns=1, grads=LSE | TARGET, mask=(True, True, False)
)


NOTHING = contextlib.nullcontext()
Launch = Callable[[], None]

# What cross-entropy needs of the row kernel, for rows that no vector divides; and all that it can do.
CROSS_ENTROPY = [Case(N=2, V=50257, dtype=dtype) for dtype in (FP32, BF16, FP16)]
FULL = [
    Case(2, 16, 50257, 3, dtype, bias=True, class_weight=True, epilogue=SOFTCAP, grads=GRADS) for dtype in (FP64, BF16)
]


def run_row_kernel(gpu: Gpu, case: Case) -> None:
    a, grads = make(case, "cpu")
    full = case in FULL
    Planned(ROWS, gpu.device).with_grad(a, ALL if full else LSE | TARGET, grads, (True, True, full))


def run_lse() -> None:
    rows.launch_lse(*torch.zeros(2, 700, 40), torch.zeros(40, dtype=FP64))


def run_anchored_softmax(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """On sm_90 as it is chosen there. Elsewhere it never is: with small tiles, so that its code is known to compile."""
    capability = gpu.device.capability or (0, 0)
    monkeypatch.setattr(anchored_triton, "_capability", lambda t: capability)
    monkeypatch.setattr(tuning, "multiprocessors", lambda device: 100)
    for product in ("logits", "sums"):
        tuning.TABLE.get((capability, product)) or monkeypatch.setitem(
            tuning.TABLE, (capability, product), ((float("inf"), SMALL),)
        )
    planned = Planned(ANCHORED_TRITON, gpu.device._replace(capability=capability))
    case = Case(128, 768, 1003, dtype=BF16, bias=True, class_weight=True, grads=("lse", "lse_slope", "target", "sum"))
    a, grads = make(case, "cpu")
    planned.with_grad(a, LSE | TARGET | SUM, grads, (True, True, True))
    if gpu is SM_90:
        a, grads = make(Case(128, 2048, 1003, dtype=BF16), "cpu")
        planned.backward(a, torch.zeros(128), None, grads, (True, True, False))
        planned.forward(a, LSE | TARGET)


def by_turns(launches: list[Launch], gpu: Gpu) -> list[Launch]:
    """All of them for a GPU of each maker, a third for another, of which the next GPU has the next."""
    return launches if EVERYTHING or gpu in (SM_90, MI300) else launches[GPUS.index(gpu) % 3 :: 3]


def kernels_of_the_package() -> Iterator[str]:
    for module in pkgutil.iter_modules(kernels.__path__, kernels.__name__ + "."):
        found = vars(importlib.import_module(module.name)).items()
        yield from (name for name, value in found if isinstance(value, JITFunction) and name.endswith("_kernel"))


def check(kernel: Any, gpu: Gpu, stack: int, folder: Path) -> None:
    """It fits. stack: so many bytes of a thread's registers may be spilled."""
    assert kernel.asm["cubin" if gpu.target.backend == "cuda" else "hsaco"]
    assert kernel.metadata.shared <= gpu.shared_kib << 10, (kernel.name, kernel.metadata.shared)
    assert stack_bytes(kernel, folder) <= stack, (kernel.name, stack_bytes(kernel, folder))


@pytest.mark.parametrize("gpu", GPUS, ids=str)
def test_every_kernel_compiles(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    vectors = [functools.partial(run_row_kernel, gpu, case) for case in CROSS_ENTROPY]
    others = [functools.partial(run_row_kernel, gpu, case) for case in FULL]
    anchored: Launch = functools.partial(run_anchored_softmax, gpu, monkeypatch)
    every = [*vectors, *others, run_lse, anchored]
    chosen = by_turns(every, gpu)
    fails = {anchored} if gpu is SM_100 and OLD else set()  # a failure inside of Triton's warp specialization
    with compiling_for(gpu.target) as found:
        for launch in chosen:
            with pytest.raises(RuntimeError, match="PassManager::run failed") if launch in fails else NOTHING:
                launch()
    if chosen == every and not fails:
        assert {k.name for k in found} == set(kernels_of_the_package())
    for kernel in {k.hash: k for k in found}.values():
        # A few where all 255 registers of a thread are in use; more in the large product with all in its epilogue.
        large = kernel.name == "logits_kernel" and gpu is SM_90
        check(kernel, gpu, 256 if large else 32, tmp_path)
        with pytest.raises(AssertionError) if large else NOTHING:
            check(kernel, gpu._replace(shared_kib=64), 256, tmp_path)
    if gpu.target.backend == "cuda":  # 16 bytes at a time although V is odd: the row stride is what masks
        assert all("v4" in k.asm["ptx"] for k in found[: sum(launch in vectors for launch in chosen)])
    if gpu is SM_90:
        text = [k.asm["ptx"] for k in found if k.name == "logits_kernel"]
        assert all("wgmma.mma_async.sync.aligned.m64n256k16" in t for t in text)
        assert {e for t in text for e in re.findall(r"ex2[.\w]*", t)} == {"ex2.approx.ftz.f32"}  # one, not four


@pytest.mark.parametrize("gpu", GPUS, ids=str)
def test_what_is_chosen(gpu: Gpu) -> None:
    """The row kernel; for bf16 on sm_90 without NVRTC the anchored softmax in Triton."""
    for dtype in (BF16, FP16, FP32):
        plan = decide(REQUEST._replace(dtype=dtype), gpu.device, POLICIES["cuda"])
        assert plan.algorithm == (ANCHORED_TRITON if gpu is SM_90 and dtype == BF16 else ROWS)


def test_the_page_says_so() -> None:
    rows = re.findall(
        r"^\| .* \| (\w+) \| (\d+) KiB \|", (Path(__file__).parent.parent / "docs/gpus.md").read_text(), re.M
    )
    assert sorted(rows) == sorted((str(gpu), str(gpu.shared_kib)) for gpu in GPUS)


def test_what_does_not_compile_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "SMALL", SMALL._replace(depth=8))
    with pytest.raises(triton.CompilationError, match="K >= 16"), compiling_for(SM_86.target):
        run_anchored_softmax(SM_86, monkeypatch)


# -- what else there is


def loss(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(x, w), y)


def outcome(
    monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype = FP32, trains: bool = True, go: Callable = lambda: 0
) -> str:
    """Of a head that lives on another device. go: makes torch look as it does there, once the graph is traced."""
    traced = (joint_graph if trains else inference_graph)(loss, *head(dtype=dtype))
    before = str(traced.graph)
    go()
    monkeypatch.setattr(regions, "device_type", lambda node: kind)
    ((told, refusal),) = ((h.refusal is None, h.refusal) for h in decided(traced).heads.values())
    assert told or str(traced.graph) == before
    return "rewritten" if told else f"{refusal.reason.code}: {refusal.detail}"


@pytest.mark.parametrize("kind", ["xpu", "mps", "hpu", "privateuseone"])
@pytest.mark.parametrize("trains", [True, False])
def test_other_devices_are_refused(kind: str, trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcome(monkeypatch, kind, trains=trains) == f"device: never tried on {kind}"


def test_a_refused_device_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the bits are those of torch.compile."""
    args = head()
    plain = results(Compiled(loss), fresh(args))
    monkeypatch.setattr(regions, "device_type", lambda node: "xpu")
    with lce_inductor.installed(min_logits_bytes=0):
        compiled = Compiled(loss)
        assert_same_bits(results(compiled, fresh(args)), plain)
        assert compiled.refusals == {"device": 1}
        (record,) = lce_inductor.explain(loss)(*args).records
        assert record.code == "device" and "never tried on xpu" in lce_inductor.explain(loss)(*args).to_json()


@pytest.fixture
def sums_in_fp16() -> Iterator[Callable[[bool], None]]:
    """Sets the setting of that name."""

    def set_to(value: bool) -> None:
        torch.backends.cuda.matmul.allow_fp16_accumulation = value

    yield set_to
    set_to(False)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64])
@pytest.mark.parametrize("trains", [True, False])
def test_the_setting_that_takes_wide_products_away(
    dtype: torch.dtype, trains: bool, sums_in_fp16: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With it, cuBLAS leaves no fp16 product in fp32. The hint is followed."""
    sums_in_fp16(True)
    found = outcome(monkeypatch, "cuda", dtype, trains)
    lost = dtype == FP16 and trains
    assert found == (
        "device: torch has no product of torch.float16 with its sums in fp32 here" if lost else "rewritten"
    )
    sums_in_fp16(False)
    assert outcome(monkeypatch, "cuda", dtype, trains) == "rewritten"


def test_caches_know_of_the_setting(sums_in_fp16: Callable[[bool], None]) -> None:
    keys = set()
    for value in (True, False):
        sums_in_fp16(value)
        keys.add(HeadsPass(Config()).uuid())
    assert len(keys) == 2


# -- AMD's GPUs, which torch calls "cuda", too


@pytest.fixture
def amd(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Makes torch look as it does with ROCm on an MI200, whose numbers are those of an H100."""
    caches = (plans.capabilities, plans._widens_on_amd, plans.planned, plans.products_on)

    def begin() -> None:
        monkeypatch.setattr(torch.version, "hip", "7.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        for cache in caches:
            cache.cache_clear()

    yield begin
    for cache in caches:
        cache.cache_clear()


def test_an_mi200_is_no_h100(amd: Callable[[], None]) -> None:
    amd()
    device = torch.device("cuda", 0)
    assert capabilities(device) == Device("cuda", plans.triton_is_installed())
    assert decide(REQUEST, capabilities(device), POLICIES["cuda"]).algorithm == ROWS
    assert plans.products_on(4096, 2048, 131072, BF16, device) == plans.Products()


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("has", [True, False])
def test_amd_is_asked_for_wide_products(
    has: bool, dtype: torch.dtype, amd: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Versions of torch for ROCm differ in whether products in 16 bits may leave their sums in fp32."""
    asked, zeros = [], torch.zeros

    def product(*args: torch.Tensor, out_dtype: torch.dtype, out: torch.Tensor) -> None:
        asked.append(args[-1].dtype)
        if not has:
            raise RuntimeError("gemm input type at::BFloat16 and output type float is not supported for ROCm")

    def go() -> None:
        amd()
        monkeypatch.setattr(torch, "zeros", lambda *shape, dtype, device: zeros(*shape, dtype=dtype))
        monkeypatch.setattr(torch, "mm", product)
        monkeypatch.setattr(torch, "addmm", product)

    found = outcome(monkeypatch, "cuda", dtype, go=go)
    assert found.startswith("rewritten" if has or dtype == FP32 else "device: torch has no product")
    assert set(asked) == (set() if dtype == FP32 else {dtype})
