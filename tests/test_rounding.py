"""16-bit heads on the CPU: however a step is cut into chunks, its gradients are as near to fp64 as eager's."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from harness import Compiled, N, error, head
from test_regions_write import written
from torch import Tensor
from turns import EVERYTHING, crossed

import lce_inductor
from lce_inductor.lower.device_policy import POLICIES
from lce_inductor.lower.plan import Request, planned, using
from lce_inductor.ops import schema  # noqa: F401  (registers the ops)
from lce_inductor.spec.statistics import LSE, TARGET

ops = torch.ops.lce_inductor
SIZES = [(2048, 32, 1000), (1024, 8, 2000), (640, 16, 5003), (700, 128, 1001), (96, 64, 257)]
CHUNKS = [1, 2, 3, 4, 5, 8, 16, 31, 64]
DTYPES = [torch.bfloat16, torch.float16]


def tensors(N: int, H: int, V: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(*size, generator=g) * s for size, s in (((N, H), 1), ((V, H), 0.02), ((V,), 0.1)))
    return x.to(dtype), weight.to(dtype), bias.to(dtype), torch.randint(0, V, (N,), generator=g)


@functools.cache
def eager(N: int, H: int, V: int, dtype: torch.dtype, seed: int) -> tuple[tuple[Tensor, ...], list[float]]:
    """The gradients of the sum in fp64, and the errors of eager's."""
    *leaves, y = tensors(N, H, V, dtype, seed)

    def gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        inputs = [t.clone().to(dtype).requires_grad_() for t in leaves]
        z = F.linear(*inputs).to(torch.promote_types(dtype, torch.float32))
        return torch.autograd.grad(F.cross_entropy(z, y, reduction="sum"), inputs)

    exact = gradients(torch.float64)
    return exact, [error(g, e) for g, e in zip(gradients(dtype), exact)]


def cases() -> list[tuple[tuple[int, int, int], torch.dtype, int]]:
    """Each size and each number of chunks in each dtype; which sizes are cut into how many chunks goes by turns."""
    return [(size, dtype, chunks) for dtype in DTYPES for size, chunks in crossed(SIZES, CHUNKS)]


@pytest.mark.parametrize("seed", range(3 if EVERYTHING else 1))
@pytest.mark.parametrize("size, dtype, chunks", cases(), ids=str)
def test_errors_for_any_number_of_chunks(
    size: tuple[int, int, int], dtype: torch.dtype, chunks: int, seed: int
) -> None:
    """A part of dW that is rounded before it is added made 1.4 times eager's error: 1.05 leaves no room for that."""
    N, H, V = size
    x, weight, bias, y = tensors(N, H, V, dtype, seed)
    head, plan = (x, weight, bias, y[:, None], None), (-(-N // chunks), 1 << 40)
    one, mask = torch.ones(N, dtype=torch.float64), (True, True, True)
    found = ops.row_stats_with_grad(*head, one, None, -one[:, None].float(), None, None, "", LSE | TARGET, *plan, mask)
    again = ops.row_stats_backward(*head, found[0], None, one, -one[:, None].float(), None, None, "", *plan, mask)
    exact, errors = eager(N, H, V, dtype, seed)
    for gradients in (found[-3:], again):
        for g, e, limit in zip(gradients, exact, errors):
            assert error(g.to(dtype), e) <= 1.05 * limit
    for one_way, other in zip(found[-3:], again):
        torch.testing.assert_close(one_way.to(dtype), other)


@pytest.mark.parametrize("wide", [False, True])
def test_the_only_chunk_is_rounded_like_eagers(wide: bool) -> None:
    """In one product, with nothing in fp32 beside it unless that is asked for."""
    x, weight, bias, _ = tensors(64, 16, 257, torch.bfloat16, 0)
    given = torch.ones(64, dtype=torch.float64)
    *_, dw, _ = ops.row_stats_with_grad(
        x, weight, bias, None, None, given, None, None, None, None, "", LSE, 0, 1 << 40, (False, True, True), wide
    )
    assert dw.dtype == (torch.float32 if wide else torch.bfloat16)
    p = F.linear(x, weight, bias).float().softmax(-1).bfloat16()
    exact = p.double().t() @ x.double()
    assert error(dw, exact) < (1e-4 if wide else 1.05 * error(p.t() @ x, exact))


# -- sums in fp32


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "loss", [F.cross_entropy, lambda z, y: z.sigmoid().square().mean()], ids=["kernels", "program"]
)
def test_a_product_takes_the_sums_of_dw_before_they_are_rounded(loss, dynamic):
    """What a GPU does where dW comes from several chunks: one rounding, after the tangent."""
    fn = lambda x, w, y: 3 * loss(F.linear(x, w), y)
    args = [t.detach().bfloat16().requires_grad_() if t.is_floating_point() else t for t in head()]
    as_on_a_gpu = using("cpu", dataclasses.replace(POLICIES["cpu"], sums_are_scaled=True))
    with lce_inductor.installed(min_logits_bytes=0, chunk_tokens=N // 2), as_on_a_gpu:
        compiled = Compiled(fn, dynamic=dynamic)
        compiled(*args).backward()
    assert compiled.gradients == ["forward"] and not compiled.refusals
    exact = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in args]
    fn(*exact).backward()
    for found, want in zip(args[:2], exact[:2], strict=True):
        assert found.grad.dtype == torch.bfloat16
        assert (found.grad - want.grad).norm() < 1e-2 * want.grad.norm()
    casts = [line.rpartition(", ")[0] for line in compiled.graphs[1].text.splitlines() if "convert_element" in line]
    assert sum(cast.endswith("float32)") for cast in casts) == 1  # dX's alone


def test_graph_of_a_program_s_sums():
    """dW leaves the op in fp32 and is rounded once, behind the tangent; dX as it was."""
    as_on_a_gpu = using("cpu", dataclasses.replace(POLICIES["cpu"], sums_are_scaled=True))
    args = [t.detach().bfloat16().requires_grad_() if t.is_floating_point() else t for t in head()]
    with as_on_a_gpu:
        text = written(lambda x, w: F.linear(x, w).sigmoid().sum(), *args[:2], chunk_tokens=N // 2)
    assert_expected_inline(
        text,
        """\
permute = aten.permute(primals_2, [1, 0])
permute_3 = aten.permute(permute, [1, 0])
once_default = lce_inductor.once(tangents_1, [primals_1, primals_2])
full_default = aten.full([], 1, dtype=torch.bfloat16, device=device(type='cpu'))
reshape_default = aten.reshape(primals_1, [24, 8])
row_region_default = lce_inductor.row_region(24, [primals_1], [permute], [], [False], [reshape_default], [full_default], [permute_3], [], <program>, 12, 1610612736)
sum_default = aten.sum(row_region_default[0], dtype=torch.bfloat16)
mul_tensor = aten.mul.Tensor(row_region_default[1], once_default)
convert_element_type_default = prims.convert_element_type(mul_tensor, torch.bfloat16)
permute_2 = aten.permute(convert_element_type_default, [1, 0])
permute_4 = aten.permute(permute_2, [1, 0])
convert_element_type_default_1 = prims.convert_element_type(row_region_default[2], torch.float32)
mul_tensor_1 = aten.mul.Tensor(convert_element_type_default_1, once_default)
convert_element_type_default_2 = prims.convert_element_type(mul_tensor_1, torch.bfloat16)
return [sum_default, convert_element_type_default_2, permute_4]
""",
    )


@pytest.mark.parametrize(
    "device, dtype, N, H, V, chunk_tokens, wide",
    [
        ("cuda", torch.bfloat16, 9000, 64, 50000, 0, True),
        ("cuda", torch.bfloat16, 2000, 64, 50000, 0, False),
        ("cuda", torch.bfloat16, 2000, 64, 50000, 500, True),
        ("cuda", torch.float32, 9000, 64, 50000, 0, False),
        ("cpu", torch.bfloat16, 9000, 64, 50000, 0, False),
        ("cuda", torch.bfloat16, 16384, 4096, 128256, 0, True),
        ("cuda", torch.bfloat16, 81920, 4096, 128256, 0, True),
    ],
)
def test_where_dw_stays_in_fp32(device, dtype, N, H, V, chunk_tokens, wide):
    assert planned(Request(N, H, V, dtype, chunk_tokens, 1 << 30), torch.device(device)).wide == wide
