"""Chunk plans: sizes in, rows out."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from region_programs import distillation

from lce_inductor.config import Config
from lce_inductor.lower.chunk_plan import anchored_peak_bytes, peak_bytes, saves_little
from lce_inductor.lower.device_policy import POLICIES
from lce_inductor.lower.plan import chunks, policy_of, using
from lce_inductor.lower.region import cut_of

GIB = 1 << 30


BUDGET = Config().workspace_bytes


def cuda(N, H, V, itemsize=2, chunk_tokens=0, workspace_bytes=BUDGET):
    return chunks(N, H, V, itemsize, chunk_tokens, workspace_bytes, POLICIES["cuda"].chunks)


@pytest.mark.parametrize(
    "N, H, V, rows, count",
    [
        (32768, 768, 50304, 3328, 10),
        (32768, 768, 50257, 3328, 10),
        (16384, 896, 151936, 3328, 5),
        (16384, 2048, 131072, 3328, 5),
        (8192, 2304, 256000, 2816, 3),
        (10007, 1000, 32003, 3584, 3),
        (16384, 4096, 128256, 4096, 4),
        (81920, 4096, 128256, 4096, 20),
    ],
)
def test_benchmark_shapes(N, H, V, rows, count):
    p = cuda(N, H, V)
    assert (p.rows, p.count) == (rows, count)


@pytest.mark.parametrize(
    "N, H, V, gib",
    [
        (32768, 768, 50304, 0.55),
        (32768, 768, 50257, 0.6),
        (16384, 896, 151936, 1.6),
        (16384, 2048, 131072, 2.0),
        (8192, 2304, 256000, 4.2),
        (10007, 1000, 32003, 0.4),
        (16384, 4096, 128256, 3.2),
        (81920, 4096, 128256, 3.7),
    ],
)
def test_peak_within_target(N, H, V, gib):
    assert peak_bytes(cuda(N, H, V), N, H, V, 2, dx=True, dw=True) <= gib * GIB


@pytest.mark.parametrize(
    "N, H, V, gib",
    [
        (32768, 768, 50304, 0.55),
        (32768, 768, 50257, 0.6),
        (16384, 896, 151936, 1.6),
        (16384, 2048, 131072, 2.0),
        (8192, 2304, 256000, 4.2),
        (10007, 1000, 32003, 0.4),
        (16384, 4096, 128256, 3.2),
        (81920, 4096, 128256, 3.7),
    ],
)
def test_peak_of_the_anchored_softmax(N, H, V, gib):
    assert anchored_peak_bytes(cuda(N, H, V), N, H, V, dx=True, dw=True) <= gib * GIB


@pytest.mark.parametrize(
    "N, H, V, itemsize, dw, little",
    [
        (2048, 768, 50304, 2, True, True),  # one chunk
        (4096, 768, 50304, 2, True, True),  # 197 MiB of logits saved, 74 more for dW in fp32
        (4096, 768, 50304, 2, False, False),
        (8192, 768, 16384, 2, True, True),
        (8192, 768, 30522, 2, True, False),
        (4096, 2048, 128256, 2, True, True),  # dW in fp32 takes what the chunks save
        (4096, 2048, 128256, 2, False, False),
        (32768, 768, 4096, 2, True, True),
        (8192, 768, 50304, 2, True, False),
        (10007, 1000, 32003, 2, True, False),
        (8192, 1024, 50304, 4, True, False),
    ],
)
def test_saving(N, H, V, itemsize, dw, little):
    p = cuda(N, H, V, itemsize)
    assert saves_little([(p, N, H, V, itemsize)], dw, POLICIES["cuda"].chunks) == little
    assert not saves_little([(p, N, H, V, itemsize)], dw, POLICIES["cpu"].chunks)


@pytest.mark.parametrize("rows, little", [((7680, 7680), False), ((100, 7680), True), ((512, 512, 512), False)])
def test_saving_of_several_weights(rows, little):
    """What torch.compile alone holds are all logits at once; by plan, gradients, and the sums of one head in fp32."""
    H, V = 4096, 128256
    heads = [(cuda(N, H, V), N, H, V, 2) for N in rows]
    assert saves_little(heads, True, POLICIES["cuda"].chunks) == little


@settings(deadline=None)  # a busy machine is no failure
@given(
    N=st.integers(0, 100_000),
    H=st.integers(1, 8192),
    V=st.integers(1, 300_000),
    itemsize=st.sampled_from([2, 4, 8]),
    chunk_tokens=st.integers(0, 10_000),
    workspace_bytes=st.integers(1, 4 * GIB),
    device=st.sampled_from(["cuda", "cpu"]),
)
def test_covers_every_row_once_within_budget(N, H, V, itemsize, chunk_tokens, workspace_bytes, device):
    policy = POLICIES[device].chunks
    p = chunks(N, H, V, itemsize, chunk_tokens, workspace_bytes, policy)
    bounds = p.bounds(N)
    assert len(bounds) == p.count
    assert sum(n for _, n in bounds) == N and all(0 < n <= p.rows for _, n in bounds)
    assert [start for start, _ in bounds] == [i * p.rows for i in range(p.count)]
    assert p.row_stride % policy.align == 0 and V <= p.row_stride < V + policy.align
    assert p.rows <= 1 or p.rows * p.row_stride * itemsize <= workspace_bytes
    if chunk_tokens:
        assert p.rows <= chunk_tokens
    else:
        assert p.rows <= max(policy.target_rows, policy.least_bytes // (p.row_stride * itemsize))
        if p.count > 1 and p.rows >= policy.tile:
            assert p.rows % policy.tile == 0


def test_chunk_tokens_is_taken_as_given():
    assert cuda(1000, 64, 1000, chunk_tokens=300).bounds(1000) == [(0, 300), (300, 300), (600, 300), (900, 100)]


def test_small_hidden_size_keeps_enough_rows():
    assert cuda(100_000, 16, 100_000).rows == POLICIES["cuda"].chunks.least_rows


def test_tiny_workspace_gives_one_row():
    p = cuda(5, 64, 1000, workspace_bytes=1)
    assert (p.rows, p.count) == (1, 5)


def test_no_rows():
    assert cuda(0, 64, 1000).bounds(0) == []


def test_unknown_device_is_planned_as_a_cpu():
    assert policy_of("meta") is policy_of("cpu")


def test_a_teacher_leaves_the_student_more_of_the_budget() -> None:
    """Unless there is no room for its block."""
    short = dataclasses.replace(POLICIES["cpu"].chunks, least_rows=3)
    with using("cpu", dataclasses.replace(POLICIES["cpu"], chunks=short)):
        for rows, cut in ((13, (10, 3)), (8, (5, 3)), (4, (2, 2))):
            found = cut_of(distillation(23, 6, 311, torch.float64).arguments(workspace_bytes=rows * 311 * 8))
            assert (found.chunks.rows, found.block) == cut
