"""lower/head_cuda.py on a GPU, against fp64; nothing here measures time."""

import dataclasses
import subprocess
import sys

import pytest
import rows_cases
import torch

from lce_inductor.lower import head as heads
from lce_inductor.lower.device_policy import ROWS
from lce_inductor.lower.plan import capabilities, planned
from lce_inductor.spec.statistics import LSE, SUM, TARGET, RowGrads

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

BIG = [
    rows_cases.Case(N=1000, H=256, V=50257, dtype=dtype, scale=scale, chunk_tokens=chunk, grads=grads)
    for dtype, scale, chunk, grads in (
        (torch.bfloat16, 3.0, 0, ("lse", "target")),
        (torch.bfloat16, 20.0, 300, ("lse", "target", "sum")),
        (torch.float16, 3.0, 300, ("lse", "target")),
        (torch.float32, 3.0, 300, ("lse", "target", "neg_entropy")),
        (torch.float64, 3.0, 500, ("lse", "target", "neg_entropy")),
    )
]


@pytest.mark.parametrize("case", rows_cases.CASES + BIG, ids=str)
def test_against_fp64(case):
    if 5 < case.N < 1000:  # enough values that neither error is a matter of luck
        case = dataclasses.replace(case, N=case.N * 50, chunk_tokens=case.chunk_tokens * 50)
    rows_cases.check(case, "cuda", 1.25)


@pytest.mark.parametrize("case", rows_cases.IN_BLOCKS + BIG, ids=str)
def test_blocks_of_classes(case):
    classes = 16384 if case.N >= 1000 else 64
    if 5 < case.N < 1000:
        case = dataclasses.replace(case, N=case.N * 50, H=case.H * 4)
    device = capabilities(torch.device("cuda", torch.cuda.current_device()))
    rows_cases.check(case, "cuda", 1.25, rows_cases.Planned(ROWS, device, classes=classes))


@pytest.mark.parametrize("name", ["only_what_was_asked", "not_finite", "masked_classes", "padding", "ties"])
def test_special(name):
    getattr(rows_cases, f"check_{name}")("cuda")


def test_same_bits_every_time():
    a, grads = rows_cases.make(BIG[1], "cuda")
    first = heads.with_grad(a, LSE | TARGET | SUM, grads, (True, True, False))
    second = heads.with_grad(a, LSE | TARGET | SUM, grads, (True, True, False))
    for one, two in zip([*first[0], *first[1:]], [*second[0], *second[1:]]):
        assert one.equal(two)


def test_no_synchronisation_and_captured_in_a_graph():
    a, grads = rows_cases.make(rows_cases.Case(N=300, H=64, V=1003, dtype=torch.bfloat16, chunk_tokens=128), "cuda")
    want = heads.with_grad(a, LSE | TARGET, grads, (True, True, False))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        heads.with_grad(a, LSE | TARGET, grads, (True, True, False))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = heads.with_grad(a, LSE | TARGET, grads, (True, True, False))
    for t in (*got[0], *got[1:]):
        if t.is_floating_point():
            t.fill_(float("nan"))
    graph.replay()
    for one, two in zip([*want[0], *want[1:]], [*got[0], *got[1:]]):
        assert one.equal(two)


@pytest.mark.parametrize("N, H", [(8192, 512), (16384, 768)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_peak_is_what_the_plan_predicts(dtype, N, H):
    V = 50257
    x = torch.randn(N, H, device="cuda", dtype=dtype)
    w = torch.randn(V, H, device="cuda", dtype=dtype)
    target = torch.randint(0, V, (N, 1), device="cuda")
    one = torch.ones(N, device="cuda")
    a = rows_cases.HeadArgs(x, w, None, target, None, (), 0, 1 << 30)
    grads = RowGrads(lse=one, target=-one[:, None])
    heads.with_grad(a, LSE | TARGET, grads, (True, True, False))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    heads.with_grad(a, LSE | TARGET, grads, (True, True, False))
    measured = torch.cuda.max_memory_allocated() - before
    p = planned(heads.request(a, LSE | TARGET, grads, (True, True, False)), x.device)
    assert dtype == torch.bfloat16 or p.algorithm == ROWS
    assert abs(measured / p.peak_bytes - 1) < 0.05, (measured, p)


def test_offsets_beyond_two_to_the_31():
    N, H, V = 9000, 8, 250_000  # 2.25e9 logits in one chunk
    x = torch.randn(N, H, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(V, H, device="cuda", dtype=torch.bfloat16)
    target = torch.randint(0, V, (N, 1), device="cuda")
    one = torch.ones(N, device="cuda")
    a = rows_cases.HeadArgs(x, w, None, target, None, (), N, 1 << 40)
    stats, dx, _, _ = heads.with_grad(a, LSE | TARGET, RowGrads(lse=one, target=-one[:, None]), (True, False, False))
    z = (x[-5:] @ w.t()).float()
    torch.testing.assert_close(stats.lse[-5:], z.double().logsumexp(1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(stats.target_logit[-5:], z.gather(1, target[-5:]), rtol=1e-2, atol=1e-2)
    dz = z.softmax(1).scatter_add_(1, target[-5:], -torch.ones(5, 1, device="cuda"))
    torch.testing.assert_close(dx[-5:].float(), dz @ w.float(), rtol=3e-2, atol=3e-2)


def test_target_out_of_bounds_is_a_device_assertion():
    script = """
import torch
from lce_inductor.lower import head as heads
from lce_inductor.spec.statistics import HeadArgs
x = torch.randn(4, 8, device="cuda"); w = torch.randn(9, 8, device="cuda")
t = torch.tensor([[1], [2], [9], [0]], device="cuda")
heads.forward(HeadArgs(x, w, None, t, None, (), 0, 1 << 30), 3)
torch.cuda.synchronize()
"""
    run = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert run.returncode != 0 and "out of bounds" in run.stderr + run.stdout
