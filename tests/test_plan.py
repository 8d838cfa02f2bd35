"""What is chosen for which head, and why not what is faster: from sizes alone, for devices that need not be there."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from lce_inductor.kernels import tuning
from lce_inductor.lower.device_policy import ANCHORED, ANCHORED_TRITON, BLOCKS, POLICIES, ROWS
from lce_inductor.lower.plan import Device, Products, Request, capabilities, decide, planned, policy_of, using
from lce_inductor.spec.statistics import LSE, MAX, NEG_ENTROPY, SUM, TARGET

H100 = Device("cuda", triton=True, capability=(9, 0), hopper=True, clusters=66)
TRAINING = Request(
    16384, 2048, 131072, torch.bfloat16, 0, 3 << 29, stats=LSE | TARGET, columns=1, grads=LSE | TARGET,
    mask=(True, True, False),
)  # fmt: skip
SOFTCAP = (("div", 30.0), ("tanh",), ("mul", 30.0))


def plan(device: Device = H100, **changes: Any):
    return decide(TRAINING._replace(**changes), device, POLICIES[device.kind])


def test_the_fastest() -> None:
    p = plan()
    assert (p.algorithm, p.ruled_out, p.wide) == (ANCHORED, (), True)
    assert (p.chunks.rows, p.chunks.count) == (3328, 5)
    assert p.products == p.last_products == Products(dx=True, dw=True)
    assert str(p) == "5 chunks of 3328 tokens, anchored softmax"


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"dtype": torch.float16}, "bf16 only"),
        ({"stats": LSE | MAX}, "every logit"),
        ({"grads": NEG_ENTROPY}, "every logit"),
        ({"columns": 2}, "target column"),
        ({"stats": LSE | SUM, "steps": SOFTCAP}, "not affine"),
        ({"grads": SUM, "steps": SOFTCAP}, "not affine"),
        ({"N": 1023}, "too small"),
        ({"V": 4095}, "too small"),
        ({"N": 2048, "H": 64}, "too small"),
        ({"aligned": False}, "16-byte"),
        ({"H": 2047}, "16-byte"),
        ({"grads": 0}, "no gradient"),
        ({"mask": (False, False, False)}, "no gradient"),
        ({"mask": (True, False, True)}, "without the weight's"),
        ({"N": 2048}, "single chunk"),
    ],
    ids=str,
)
def test_why_not_the_anchored_softmax(changes: dict[str, Any], why: str) -> None:
    p = plan(**changes)
    assert p.algorithm == ROWS and [name for name, _ in p.ruled_out] == [ANCHORED, ANCHORED_TRITON]
    assert all(why in reason for _, reason in p.ruled_out)
    assert why in str(p)


@pytest.mark.parametrize(
    "changes", [{"steps": SOFTCAP}, {"mask": (True, False, False), "N": 2048}, {"columns": 0}], ids=str
)
def test_what_is_no_reason(changes: dict[str, Any]) -> None:
    assert plan(**changes).algorithm == ANCHORED


@pytest.mark.parametrize(
    "device, algorithm, ruled_out",
    [
        (H100._replace(hopper=False), ANCHORED_TRITON, [ANCHORED]),
        (H100._replace(capability=(8, 0), hopper=False), ROWS, [ANCHORED, ANCHORED_TRITON]),
        (H100._replace(capability=(10, 0), hopper=False), ROWS, [ANCHORED, ANCHORED_TRITON]),
        (H100._replace(triton=False), BLOCKS, [ANCHORED, ANCHORED_TRITON, ROWS]),
        (Device("cpu", triton=True), BLOCKS, []),
    ],
)
def test_devices(device: Device, algorithm: str, ruled_out: list[str]) -> None:
    p = plan(device)
    assert p.algorithm == algorithm and [name for name, _ in p.ruled_out] == ruled_out
    assert device.hopper or p.products == Products()


def test_statistics_alone_are_cut_by_their_sums() -> None:
    p = plan(grads=None, mask=(False, False, False))
    assert p.algorithm == ANCHORED and p.chunks.row_stride == 0 and p.chunks.rows % 256 == 0
    assert p.peak_bytes == -(-TRAINING.V // 192) * p.chunks.rows * 8 <= POLICIES["cuda"].anchored.sums_bytes


@pytest.mark.parametrize(
    "changes, ours",
    [
        ({}, True),
        ({"dtype": torch.float32}, False),
        ({"bias": True}, False),
        ({"steps": SOFTCAP}, False),
        ({"stats": LSE | MAX}, False),
        ({"stats": TARGET}, False),
        ({"N": 1023}, False),
        ({"V": 4095}, False),
    ],
    ids=str,
)
def test_where_logits_come_with_their_lse(changes: dict[str, Any], ours: bool) -> None:
    assert plan(**{"dtype": torch.float16, **changes}).products.logits == ours


def test_layouts_are_there_for_what_is_chosen() -> None:
    for capability in POLICIES["cuda"].anchored.capabilities:
        for product in ("logits", "sums"):
            assert all(tuning.tiles(capability, product, H) for H in (64, 4096))


def test_a_caller_may_set_the_algorithm_and_the_policy() -> None:
    small = TRAINING._replace(N=4, V=8)
    p = decide(small, H100, POLICIES["cuda"], ANCHORED_TRITON)
    assert p.algorithm == ANCHORED_TRITON and p.ruled_out == ()
    policy = dataclasses.replace(POLICIES["cpu"], sums_are_scaled=True)
    r, cpu = small._replace(chunk_tokens=2), torch.device("cpu")
    assert not planned(r, cpu).wide
    with using("cpu", policy):
        assert planned(r, cpu).wide and policy_of("cpu") is policy
    assert not planned(r, cpu).wide


def test_a_gpu_that_is_not_there() -> None:
    """Traced tensors may live on one."""
    if not torch.cuda.is_available():
        assert capabilities(torch.device("cuda", 0)).capability is None
    assert capabilities(torch.device("cpu")).clusters == 0


def test_a_backward_rounds_logits_as_its_forward_does() -> None:
    """lse is of logits that are rounded, or not."""
    for stats, algorithm in ((LSE | TARGET, ANCHORED), (LSE | TARGET | MAX, ROWS)):
        forward = TRAINING._replace(stats=stats, grads=None, mask=(False,) * 3)
        backward = TRAINING._replace(stats=stats).backward()
        assert (backward.stats, backward.forward, backward.recompute) == (0, stats, True)
        for r in (forward, backward):
            assert decide(r, H100, POLICIES["cuda"]).algorithm == algorithm


@pytest.mark.parametrize(
    "changes, packs",
    [
        ({}, True),
        ({"counts": False}, False),
        ({"grads": None, "mask": (False,) * 3}, True),
        ({"recompute": True}, True),
        ({"mask": (True, False, False)}, True),
        ({"mask": (True, True, True)}, False),  # the gradient of a bias is summed over whole chunks
        ({"dtype": torch.float16}, False),
    ],
    ids=str,
)
def test_where_rows_that_count_are_packed(changes: dict[str, Any], packs: bool) -> None:
    p, all_rows = plan(**({"counts": True} | changes)), plan(**(changes | {"counts": False}))
    assert p.packs == packs and ("of rows that count" in str(p)) == packs
    if packs:
        dw = p.chunks.rows * TRAINING.H * 2  # x of a chunk's rows
        assert p.products.dx and p.products.dw and all_rows.peak_bytes <= p.peak_bytes <= all_rows.peak_bytes + dw
    else:
        assert p == all_rows


def test_a_library_s_product_would_multiply_all_rows() -> None:
    assert not plan(H=768).products.dx and plan(H=768, counts=True).products.dx
