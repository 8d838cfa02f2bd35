"""The product for dX on sm_90 ends whatever else the GPU has to do, with the same bits; host and kernels agree on structs."""

from __future__ import annotations

import ctypes
import random
import time
from pathlib import Path

import pytest
import torch

from lce_inductor.kernels import nvrtc

pytest.importorskip("triton")
from hopper_claims import Claims, Launch, Rounds, run

from lce_inductor.kernels import hopper, hopper_arguments, hopper_source, tuning

NEEDS_NVRTC = pytest.mark.skipif(not nvrtc.available(), reason="needs NVRTC, which there is for NVIDIA's GPUs alone")
ON_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
NEEDS_GPU = pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU of compute capability 9.0")
SIZES = [
    (3328, 2048, 131072),
    (2816, 2304, 256000),
    (4096, 4096, 128256),
    (256, 192, 200),
    (1, 8, 1),
    (130, 1024, 5003),
]


@pytest.mark.parametrize("n, H, V", SIZES)
def test_it_ends_with_any_number_of_clusters(n: int, H: int, V: int) -> None:
    """In the same order of additions, launch after launch with the counter as the one before has left it."""
    launch, counter = Launch.of(n, H, V, 66), [0]
    for resident in (1, 2, 3, 5, 17, 33, 65, 66):
        added = run(launch, resident, Claims, counter, seed=resident)
        assert added == [list(range(launch.parts))] * launch.tiles and counter == [0]


def test_any_sizes() -> None:
    g = random.Random(0)
    for seed in range(60):
        clusters = g.choice([1, 2, 3, 6, 57, 66])
        launch, counter = Launch.of(g.randint(1, 4000), g.randint(1, 3000), g.randint(1, 60000), clusters), [0]
        resident = g.randint(1, launch.clusters)
        added = run(launch, resident, Claims, counter, seed)
        assert added == [list(range(launch.parts))] * launch.tiles and counter == [0], (launch, resident)


def test_a_fixed_order_would_not_end() -> None:
    """What the simulation is for: parts that go round wait for clusters that are not there."""
    launch = Launch.of(3328, 2048, 131072, 66)
    assert run(launch, 66, Rounds, [0]) is not None
    assert run(launch, 40, Rounds, [0]) is None


def test_only_claimed_items_wait_for_others() -> None:
    """The kernel that waits claims, and no other kernel waits for another block's memory."""
    folder = Path(hopper.__file__).parent
    waits = [path.name for path in sorted(folder.glob("*.cu*")) if "ld.acquire" in path.read_text()]
    assert waits == ["hopper_dx.cuh"]
    assert "atomicAdd(a.next, 1)" in (folder / "hopper_dx.cuh").read_text()
    loops = (folder / "hopper.cu").read_text().split("#endif")[1]
    assert "blockIdx" not in loops and loops.count("tile = claimed") == 4


# -- structs that the host fills

STRUCTS = {
    "logits": hopper_arguments.LogitsArguments,
    "dx": hopper_arguments.DxArguments,
    "dw": hopper_arguments.DwArguments,
    "rows": hopper_arguments.RowsArguments,
}


def text_of(product: str) -> str:
    flags = {"logits": "STORE SUM PLAIN", "dx": "DX", "dw": "DW"}
    if product == "rows":
        return hopper_source.rows_source(())
    return hopper_source.source(hopper_source.Variant(frozenset(flags[product].split())))


@NEEDS_NVRTC
@pytest.mark.parametrize("what", ["two fields change places", "a field more", "a field less", "another type"])
@pytest.mark.parametrize("product", STRUCTS)
def test_another_layout_does_not_compile(
    product: str, what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fields = list(STRUCTS[product]._fields_)
    if what in ("two fields change places", "another type") and nvrtc.version() < (13, 5):
        pytest.skip("needs NVRTC 13.5: older ones compare sizes alone, having no offsetof of a struct's field")
    if what == "two fields change places":
        fields[1], fields[2] = fields[2], fields[1]
    elif what == "a field more":
        fields.insert(3, ("unknown", ctypes.c_longlong))
    elif what == "a field less":
        del fields[-1]
    else:
        fields[0] = (fields[0][0], ctypes.c_longlong)
    changed = type("Changed", (ctypes.Structure,), {"_fields_": tuple(fields)})
    if product == "rows":
        monkeypatch.setattr(hopper_source, "RowsArguments", changed)
    else:
        monkeypatch.setitem(hopper_source._ARGUMENTS, product, changed)
    with pytest.raises(RuntimeError, match=r"the host has another|has no member"):
        nvrtc.compile(text_of(product), folder=tmp_path)


@NEEDS_NVRTC
def test_another_size_of_shared_memory_does_not_compile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = hopper_source.Variant.shared_bytes.fget
    assert real is not None
    monkeypatch.setattr(hopper_source.Variant, "shared_bytes", property(lambda v: real(v) - 8))
    with pytest.raises(RuntimeError, match="shared memory is not what the host gives"):
        nvrtc.compile(text_of("dx"), folder=tmp_path)


# -- on a GPU

# Takes a multiprocessor for each block until it is told to go, or for five seconds.
SPIN = """
extern "C" __global__ void spin(const volatile int* go, int* running) {
    if (threadIdx.x) return;
    atomicAdd(running, 1);
    unsigned long long begin, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
    do asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    while (!*go && now - begin < 5000000000ull);
}
"""


def operands(n: int, H: int, V: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator("cuda").manual_seed(0)
    e = torch.randn(n, -(-V // 64) * 64, device="cuda", generator=g).bfloat16()
    return e, torch.randn(V, H, device="cuda", generator=g).bfloat16()


@NEEDS_GPU
@pytest.mark.parametrize("left", [12, 40, 66, 100], ids=lambda left: f"{left} multiprocessors")
@pytest.mark.parametrize("n, H, V", [(3328, 2048, 5003), (3328, 2048, 131072)])
def test_it_ends_beside_a_kernel_that_stays(n: int, H: int, V: int, left: int, tmp_path: Path) -> None:
    """Most multiprocessors are taken, and given back only when the product is over: the bits are those of a free GPU."""
    e, weight = operands(n, H, V)
    kernels = hopper.products(e.device, e.dtype)
    assert kernels is not None
    counts = torch.zeros(hopper.counts_of_dx(n, H), dtype=torch.int32, device="cuda")
    found = [torch.full((n, H), float("nan"), device="cuda") for _ in range(3)]
    counted = hopper.launch_dx(kernels.dx, found[0], e, weight, counts.data_ptr(), 0)
    torch.cuda.synchronize()
    spin = nvrtc.load(nvrtc.compile(SPIN, folder=tmp_path), {"spin": 200 * 1024})["spin"]  # alone on a multiprocessor
    go, running = (torch.zeros(1, dtype=torch.int32).pin_memory() for _ in range(2))
    others, ours, over = torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.Event()
    taken = tuning.multiprocessors(e.device) - left
    arguments = tuple(ctypes.c_void_p(t.data_ptr()) for t in (go, running))
    spin.launch(taken, 32, arguments, others.cuda_stream)
    limit = time.monotonic() + 3
    while running.item() < taken and time.monotonic() < limit:
        time.sleep(1e-3)
    assert running.item() == taken
    with torch.cuda.stream(ours):
        for out in found[1:]:
            counted += hopper.launch_dx(kernels.dx, out, e, weight, counts.data_ptr(), counted)
        over.record()
    while not over.query() and time.monotonic() < limit:
        time.sleep(1e-3)
    ended = over.query()
    go.fill_(1)
    torch.cuda.synchronize()
    assert ended, "the product waited until the other kernel was gone"
    assert found[1].equal(found[0]) and found[2].equal(found[0])
    assert counts[0] == 0 and (counts[1:] == counted).all()


@NEEDS_GPU
def test_replays_of_a_graph_have_the_same_bits() -> None:
    n, H, V = 3328, 2048, 5003
    e, weight = operands(n, H, V)
    kernels = hopper.products(e.device, e.dtype)
    assert kernels is not None
    counts = torch.zeros(hopper.counts_of_dx(n, H), dtype=torch.int32, device="cuda")
    out, first = (torch.empty(n, H, device="cuda") for _ in range(2))
    hopper.launch_dx(kernels.dx, first, e, weight, counts.data_ptr(), 0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        counts.zero_()
        hopper.launch_dx(kernels.dx, out, e, weight, counts.data_ptr(), 0)
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        assert out.equal(first) and counts[0] == 0
