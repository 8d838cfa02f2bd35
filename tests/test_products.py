"""Layouts that products like, and dW summed over chunks: on the CPU, whose products take the same arguments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lce_inductor.lower.plan import pieces
from lce_inductor.lower.products import on_sectors, weight_gradient


def rows(N: int, H: int, stride: int, first: int = 0) -> Tensor:
    """[N, H] in bf16, rows `stride` apart, from element `first` of memory that begins on 64 bytes."""
    memory = torch.randn(first + N * stride + 64).bfloat16()
    begin = -memory.data_ptr() // 2 % 32
    return memory[begin + first :].as_strided((N, H), (stride, 1))


@pytest.mark.parametrize(
    "x, copied",
    [
        (rows(7, 48, 48), False),
        (rows(7, 40, 48), False),
        (rows(7, 40, 40), True),  # rows on 16 bytes, every other one on 32
        (rows(7, 48, 48, first=8), True),
        (rows(7, 48, 50), True),
        (rows(7, 48, 48).t(), True),
        (rows(7, 48, 48)[:, ::2], True),
        (rows(7, 48, 48)[:1].expand(5, 48), True),
        (rows(7, 48, 48)[:0], False),
    ],
    ids=[
        "32 bytes",
        "padded",
        "16 bytes",
        "begins on 16",
        "4 bytes",
        "transposed",
        "every other",
        "expanded",
        "no rows",
    ],
)
def test_rows_on_sectors(x: Tensor, copied: bool) -> None:
    found = on_sectors(x)
    assert (found is not x) == copied
    assert found.equal(x)
    assert found.stride(1) == 1 and found.stride(0) * 2 % 32 == 0 and found.stride(0) >= x.shape[1]


@pytest.mark.parametrize("V", [1, 7, 8, 1003, 1024, 1027])
@pytest.mark.parametrize("wide", [True, False])
def test_weight_gradient_over_chunks(V: int, wide: bool) -> None:
    """What lies behind the last class gets into no class."""
    N, H, dtype = 50, 24, torch.float32 if wide else torch.bfloat16
    dz, x = torch.randn(N, -(-V // 64) * 64).bfloat16(), torch.randn(N, H).bfloat16()
    dz[:, V:] = float("nan")
    dw = torch.full((V, H), float("nan"), dtype=dtype)
    for row0 in range(0, N, 20):
        weight_gradient(dw, dz[row0 : row0 + 20], x[row0 : row0 + 20], accumulate=row0 > 0)
    exact = dz[:, :V].double().t() @ x.double()
    assert (dw.double() - exact).norm() <= (1e-6 if wide else 1e-2) * exact.norm()


@pytest.mark.parametrize("itemsize, sizes", [(2, [50256, 1]), (4, [50256, 1]), (8, [50256, 1])])
def test_the_last_classes_apart(itemsize: int, sizes: list[int]) -> None:
    found = pieces(50257, itemsize)
    assert [c.stop - c.start for c in found] == sizes and (found[0].start, found[-1].stop) == (0, 50257)
    assert pieces(50304, itemsize) == [slice(0, 50304)]
    assert len(pieces(1001, itemsize)) == 1  # too few to be worth a launch
