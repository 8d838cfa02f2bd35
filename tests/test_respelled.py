"""Products that make logits and are written in another way: turned, with the classes in front, or scaled.

To accept a wanted change of these graphs: EXPECTTEST_ACCEPT=1 python -m pytest tests/test_respelled.py
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from harness import Compiled, N, check_against_eager, fresh, head, results
from test_regions_write import written


def test_graph_of_classes_in_front():
    assert_expected_inline(
        written(lambda x, w, y: F.cross_entropy((w @ x.t()).t(), y)),
        """\
ne_1 = aten.ne.Scalar(primals_3, -100)
scalar_tensor_1 = aten.scalar_tensor(0, dtype=torch.float32)
ne_2 = aten.ne.Scalar(primals_3, -100)
sum_2 = aten.sum(ne_2)
convert_element_type = prims.convert_element_type(sum_2, torch.float32)
unsqueeze_1 = aten.unsqueeze(primals_3, 1)
ne_3 = aten.ne.Scalar(unsqueeze_1, -100)
scalar_tensor_2 = aten.scalar_tensor(0, dtype=torch.int64)
where_2 = aten.where.self(ne_3, unsqueeze_1, scalar_tensor_2)
ne_4 = aten.ne.Scalar(unsqueeze_1, -100)
scalar_tensor_3 = aten.scalar_tensor(0, dtype=torch.float32)
reshape_default = aten.reshape(where_2, [24, 1])
reshape_default_1 = aten.reshape(reshape_default, [24])
clamp_min_default = aten.clamp_min(reshape_default_1, -9223372036854775807)
unsqueeze_default = aten.unsqueeze(clamp_min_default, 1)
full_default = aten.full([], 1, dtype=torch.float32, device=device(type='cpu'))
div_tensor = aten.div.Tensor(full_default, convert_element_type)
where_self = aten.where.self(ne_4, div_tensor, scalar_tensor_3)
reshape_default_5 = aten.reshape(where_self, [24, 1])
reshape_default_6 = aten.reshape(reshape_default_5, [24])
neg_default_1 = aten.neg(reshape_default_6)
unsqueeze_default_2 = aten.unsqueeze(neg_default_1, 1)
row_stats_with_grad_default = lce_inductor.row_stats_with_grad(primals_1, primals_2, None, unsqueeze_default, None, reshape_default_6, None, unsqueeze_default_2, None, None, '', 3, 0, 1610612736, [True, True, False], needed=ne_1)
select_int = aten.select.int(row_stats_with_grad_default[1], 1, 0)
sub_tensor = aten.sub.Tensor(row_stats_with_grad_default[0], select_int)
convert_element_type_default = prims.convert_element_type(sub_tensor, torch.float32)
reshape_default_2 = aten.reshape(convert_element_type_default, [24])
where_1 = aten.where.self(ne_1, reshape_default_2, scalar_tensor_1)
sum_3 = aten.sum(where_1)
div = aten.div.Tensor(sum_3, convert_element_type)
once_default = lce_inductor.once(tangents_1, [primals_1, primals_2])
mul_tensor = aten.mul.Tensor(row_stats_with_grad_default[7], once_default)
mul_tensor_1 = aten.mul.Tensor(row_stats_with_grad_default[6], once_default)
permute_4 = aten.permute(mul_tensor_1, [1, 0])
permute_6 = aten.permute(permute_4, [1, 0])
return [div, permute_6, mul_tensor, None]
""",
    )


def test_graph_of_a_scaled_product():
    assert_expected_inline(
        written(lambda x, w, y: F.cross_entropy(torch.addmm(w[:, 0], x, w.t(), beta=0.5, alpha=2), y)),
        """\
select = aten.select.int(primals_1, 1, 0)
permute = aten.permute(primals_1, [1, 0])
mul_tensor_1 = aten.mul.Tensor(select, 0.5)
ne = aten.ne.Scalar(primals_3, -100)
scalar_tensor = aten.scalar_tensor(0, dtype=torch.int64)
where = aten.where.self(ne, primals_3, scalar_tensor)
unsqueeze = aten.unsqueeze(where, 1)
ne_1 = aten.ne.Scalar(primals_3, -100)
scalar_tensor_1 = aten.scalar_tensor(0, dtype=torch.float32)
ne_2 = aten.ne.Scalar(primals_3, -100)
sum_2 = aten.sum(ne_2)
convert_element_type = prims.convert_element_type(sum_2, torch.float32)
unsqueeze_1 = aten.unsqueeze(primals_3, 1)
ne_3 = aten.ne.Scalar(unsqueeze_1, -100)
scalar_tensor_2 = aten.scalar_tensor(0, dtype=torch.int64)
where_2 = aten.where.self(ne_3, unsqueeze_1, scalar_tensor_2)
ne_4 = aten.ne.Scalar(unsqueeze_1, -100)
scalar_tensor_3 = aten.scalar_tensor(0, dtype=torch.float32)
permute_1 = aten.permute(permute, [1, 0])
full_1 = aten.full([37, 8], 0, dtype=torch.float32, pin_memory=False)
once_default = lce_inductor.once(tangents_1, [primals_1, primals_2])
full_default = aten.full([], 1, dtype=torch.float32, device=device(type='cpu'))
reshape_default = aten.reshape(unsqueeze, [24, 1])
reshape_default_1 = aten.reshape(where_2, [24, 1])
div_tensor = aten.div.Tensor(full_default, convert_element_type)
where_self = aten.where.self(ne_4, div_tensor, scalar_tensor_3)
reshape_default_2 = aten.reshape(where_self, [24, 1])
reshape_default_3 = aten.reshape(primals_2, [24, 8])
row_region_default = lce_inductor.row_region(24, [primals_2], [permute], [], [False], [reshape_default, reshape_default_1, reshape_default_2, reshape_default_3], [mul_tensor_1], [permute_1], [], <program>, 0, 1610612736)
reshape_default_4 = aten.reshape(row_region_default[0], [24, 1])
squeeze = aten.squeeze.dim(reshape_default_4, 1)
neg = aten.neg(squeeze)
where_1 = aten.where.self(ne_1, neg, scalar_tensor_1)
sum_3 = aten.sum(where_1)
div = aten.div.Tensor(sum_3, convert_element_type)
mul_tensor_2 = aten.mul.Tensor(row_region_default[1], once_default)
mul_2 = aten.mul.Scalar(mul_tensor_2, 2)
mul_tensor_3 = aten.mul.Tensor(row_region_default[2], once_default)
permute_3 = aten.permute(mul_tensor_3, [1, 0])
mul_3 = aten.mul.Scalar(permute_3, 2)
permute_4 = aten.permute(mul_3, [1, 0])
reshape_default_5 = aten.reshape(row_region_default[3], [1, 37])
mul_tensor_4 = aten.mul.Tensor(reshape_default_5, once_default)
view = aten.view(mul_tensor_4, [37])
select_scatter = aten.select_scatter(full_1, view, 1, 0)
add = aten.add.Tensor(permute_4, select_scatter)
return [div, add, mul_2, None]
""",
    )


# What the two ways of writing do not mean: both dimensions are read at once, or the rounding would be another.
LEFT = {
    "both ways, as in contrastive losses": (
        lambda x, w, y: F.cross_entropy(w[:N] @ x.t(), y % N) + F.cross_entropy((w[:N] @ x.t()).t(), y % N),
        torch.float32,
    ),
    "cumulated both ways": (lambda x, w, y: F.cross_entropy((w @ x.t()).cumsum(0).cumsum(1).t(), y), torch.float32),
    "a symmetric sum": (lambda x, w, y: (lambda z: (z + z.t()).logsumexp(0).sum())(w[:N] @ x.t()), torch.float32),
    "scaled in 16 bits": (
        lambda x, w, y: F.cross_entropy(torch.addmm(w[:, 0], x, w.t(), alpha=2).float(), y), torch.bfloat16,
    ),
    "a bias for each row in 16 bits": (
        lambda x, w, y: F.cross_entropy(torch.addmm(x[:, :1], x, w.t()).float(), y), torch.bfloat16,
    ),
    "no product at all": (lambda x, w, y: F.cross_entropy(torch.addmm(w[:, 0], x, w.t(), alpha=0), y), torch.float32),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_left_alone_with_a_code(name, installed):
    """And as it was: the same bits as without the package."""
    fn, dtype = LEFT[name]
    args = [t.detach().to(dtype).requires_grad_() if t.is_floating_point() else t for t in head()]
    compiled = Compiled(fn)
    found = results(compiled, fresh(args))
    assert not compiled.counts["rewritten"] and set(compiled.refusals) & {"crossing", "foreign-product"}
    assert not compiled.counts["refused:internal-error"]
    for f, e in zip(found, results(Compiled(fn), fresh(args)), strict=True):
        assert torch.equal(f, e)


@pytest.mark.parametrize("change", ["nothing", "detach x", "detach w", "no_grad on a part", "permuted rows"])
def test_as_the_plain_spelling(change, installed):
    """The same program in two spellings, changed in the same way: the same numbers, and both rewritten."""

    def program(turned):
        def fn(x, w, y):
            x = x.detach() if change == "detach x" else x
            w = w.detach() if change == "detach w" else w
            x = x[torch.arange(N).flip(0)] if change == "permuted rows" else x
            z = (w @ x.t()).t() if turned else x @ w.t()
            if change == "no_grad on a part":
                with torch.no_grad():
                    top = z.amax(-1, keepdim=True)
                z = z - top
            return F.cross_entropy(z, y, reduction="none").square().mean()

        return fn

    found = check_against_eager(program(True), head())
    assert found.counts["rewritten"] == 1 and not found.refusals
    assert check_against_eager(program(False), head()).counts["rewritten"] == 1


def test_lengths_that_change(installed):
    compiled = Compiled(lambda x, w, y: F.cross_entropy((w @ x.t()).t(), y), dynamic=True)
    for n in (N, N - 5):
        x, w, y = head(n=n)
        torch.testing.assert_close(compiled(x, w, y), F.cross_entropy(F.linear(x, w), y))
    assert compiled.counts["rewritten"] == 1
