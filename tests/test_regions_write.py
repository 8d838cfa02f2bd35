"""What is written in place of a head, and what must come of it.

To accept a wanted change of these graphs: EXPECTTEST_ACCEPT=1 python -m pytest tests/test_regions_write.py
"""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from harness import Compiled, N, V, check_against_eager, fresh, head, inference_graph, joint_graph, listing, rewrite


def written(fn, *args, how=joint_graph, **settings) -> str:
    """The graph after the rewrite; programs, which have tests of their own, in short."""
    traced = how(fn, *(args or head()))
    assert set(rewrite(traced, **settings)) == {"rewritten"}
    text = re.sub(r"'\[\[.*\]\]'", "<program>", listing(traced.gm))
    text = re.sub(r"sym_size_int_\d+", "sym_size_int_n", text)  # another number with each torch
    return text.replace(", layout=torch.strided, device=device(type='cpu')", "") + "\n"


def test_graph_of_linear_and_cross_entropy():
    """The kernels' own form: statistics and gradients in one call, and the tangent behind it."""
    assert_expected_inline(
        written(lambda x, w, y: F.cross_entropy(F.linear(x, w), y)),
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
permute_2 = aten.permute(mul_tensor, [1, 0])
permute_4 = aten.permute(permute_2, [1, 0])
return [div, mul_tensor_1, permute_4, None]
""",
    )


def test_graph_of_a_bias():
    """A vector over classes; its gradient is one over rows."""
    assert_expected_inline(
        written(lambda x, w, y: F.cross_entropy(F.linear(x, w, w[:, 0]), y)),
        """\
select = aten.select.int(primals_1, 1, 0)
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
full_1 = aten.full([37, 8], 0, dtype=torch.float32, pin_memory=False)
reshape_default = aten.reshape(where_2, [24, 1])
reshape_default_1 = aten.reshape(reshape_default, [24])
clamp_min_default = aten.clamp_min(reshape_default_1, -9223372036854775807)
unsqueeze_default = aten.unsqueeze(clamp_min_default, 1)
full_default = aten.full([], 1, dtype=torch.float32, device=device(type='cpu'))
div_tensor = aten.div.Tensor(full_default, convert_element_type)
where_self = aten.where.self(ne_4, div_tensor, scalar_tensor_3)
reshape_default_6 = aten.reshape(where_self, [24, 1])
reshape_default_7 = aten.reshape(reshape_default_6, [24])
neg_default_1 = aten.neg(reshape_default_7)
unsqueeze_default_2 = aten.unsqueeze(neg_default_1, 1)
row_stats_with_grad_default = lce_inductor.row_stats_with_grad(primals_2, primals_1, select, unsqueeze_default, None, reshape_default_7, None, unsqueeze_default_2, None, None, '', 3, 0, 1610612736, [True, True, True], needed=ne_1)
select_int = aten.select.int(row_stats_with_grad_default[1], 1, 0)
sub_tensor = aten.sub.Tensor(row_stats_with_grad_default[0], select_int)
convert_element_type_default = prims.convert_element_type(sub_tensor, torch.float32)
reshape_default_2 = aten.reshape(convert_element_type_default, [24])
where_1 = aten.where.self(ne_1, reshape_default_2, scalar_tensor_1)
sum_3 = aten.sum(where_1)
div = aten.div.Tensor(sum_3, convert_element_type)
once_default = lce_inductor.once(tangents_1, [primals_1, primals_2])
mul_tensor = aten.mul.Tensor(row_stats_with_grad_default[8], once_default)
mul_tensor_1 = aten.mul.Tensor(row_stats_with_grad_default[7], once_default)
mul_tensor_2 = aten.mul.Tensor(row_stats_with_grad_default[6], once_default)
permute_3 = aten.permute(mul_tensor_1, [1, 0])
permute_4 = aten.permute(permute_3, [1, 0])
reshape_default_5 = aten.reshape(mul_tensor, [1, 37])
view = aten.view(reshape_default_5, [37])
select_scatter = aten.select_scatter(full_1, view, 1, 0)
add = aten.add.Tensor(permute_4, select_scatter)
return [div, add, mul_tensor_2, None]
""",
    )


def test_graph_of_rows_that_are_selected():
    """The move is made with x, and its adjoint with dX."""
    assert_expected_inline(
        written(lambda x, w, y: F.linear(x, w)[:-1].logsumexp(-1).square().sum()),
        """\
reshape_default = aten.reshape(primals_1, [24, 8])
slice_tensor = aten.slice.Tensor(reshape_default, 0, 0, 23, 1)
full_default_1 = aten.full([], 1, dtype=torch.float32, device=device(type='cpu'))
expand_default = aten.expand(full_default_1, [23])
full_default_2 = aten.full([23], 1, dtype=torch.float64, device=device(type='cpu'))
mul_tensor_1 = aten.mul.Tensor(full_default_2, 2.0)
convert_element_type_default_2 = prims.convert_element_type(mul_tensor_1, torch.float32)
reshape_default_7 = aten.reshape(convert_element_type_default_2, [23])
mul_tensor_2 = aten.mul.Tensor(expand_default, reshape_default_7)
unsqueeze_default = aten.unsqueeze(mul_tensor_2, -1)
reshape_default_8 = aten.reshape(unsqueeze_default, [23, 1])
reshape_default_9 = aten.reshape(reshape_default_8, [23])
row_stats_with_grad_default = lce_inductor.row_stats_with_grad(slice_tensor, primals_2, None, None, None, None, reshape_default_9, None, None, None, '', 1, 0, 1610612736, [True, True, False])
convert_element_type_default = prims.convert_element_type(row_stats_with_grad_default[0], torch.float32)
reshape_default_1 = aten.reshape(convert_element_type_default, [23])
pow_1 = aten.pow.Tensor_Scalar(reshape_default_1, 2)
sum_2 = aten.sum(pow_1)
once_default = lce_inductor.once(tangents_1, [primals_1, primals_2])
mul_tensor_3 = aten.mul.Tensor(row_stats_with_grad_default[7], once_default)
mul_tensor_4 = aten.mul.Tensor(row_stats_with_grad_default[6], once_default)
permute_2 = aten.permute(mul_tensor_3, [1, 0])
permute_4 = aten.permute(permute_2, [1, 0])
full_default = aten.full([24, 8], 0, dtype=torch.float32, device=device(type='cpu'))
reshape_default_5 = aten.reshape(mul_tensor_4, [23, 8])
slice_scatter_default = aten.slice_scatter(full_default, reshape_default_5, 0, 0, 23, 1)
reshape_default_6 = aten.reshape(slice_scatter_default, [24, 8])
return [sum_2, reshape_default_6, permute_4]
""",
    )


def test_graph_of_rows_in_another_order():
    assert_expected_inline(
        written(
            lambda x, w, y: (
                F.linear(x.view(4, 6, 8), w).transpose(0, 1).logsumexp(-1) * x[:, 0].detach().view(6, 4)
            ).sum()
        ),
        """\
view = aten.view(primals_1, [4, 6, 8])
view_1 = aten.view(view, [24, 8])
select = aten.select.int(primals_1, 1, 0)
alias_1 = aten.alias(select)
view_3 = aten.view(alias_1, [6, 4])
reshape_default = aten.reshape(view_1, [4, 6, 8])
permute_default = aten.permute(reshape_default, [1, 0, 2])
reshape_default_1 = aten.reshape(permute_default, [24, 8])
full_default = aten.full([], 1, dtype=torch.float32, device=device(type='cpu'))
expand_default = aten.expand(full_default, [6, 4])
mul_tensor = aten.mul.Tensor(expand_default, view_3)
unsqueeze_default = aten.unsqueeze(mul_tensor, -1)
reshape_default_7 = aten.reshape(unsqueeze_default, [24, 1])
reshape_default_8 = aten.reshape(reshape_default_7, [24])
ne_scalar = aten.ne.Scalar(view_3, 0)
reshape_default_9 = aten.reshape(ne_scalar, [24])
row_stats_with_grad_default = lce_inductor.row_stats_with_grad(reshape_default_1, primals_2, None, None, None, reshape_default_8, None, None, None, None, '', 1, 0, 1610612736, [True, True, False], needed=reshape_default_9)
convert_element_type_default = prims.convert_element_type(row_stats_with_grad_default[0], torch.float32)
reshape_default_2 = aten.reshape(convert_element_type_default, [6, 4])
mul = aten.mul.Tensor(reshape_default_2, view_3)
sum_2 = aten.sum(mul)
once_default = lce_inductor.once(tangents_1, [primals_1, primals_2])
mul_tensor_1 = aten.mul.Tensor(row_stats_with_grad_default[7], once_default)
mul_tensor_2 = aten.mul.Tensor(row_stats_with_grad_default[6], once_default)
permute_4 = aten.permute(mul_tensor_1, [1, 0])
permute_6 = aten.permute(permute_4, [1, 0])
reshape_default_5 = aten.reshape(mul_tensor_2, [6, 4, 8])
permute_default_1 = aten.permute(reshape_default_5, [1, 0, 2])
reshape_default_6 = aten.reshape(permute_default_1, [24, 8])
view_5 = aten.view(reshape_default_6, [4, 6, 8])
view_6 = aten.view(view_5, [24, 8])
return [sum_2, view_6, permute_6]
""",
    )


def test_graph_of_softcap():
    """Elementwise steps become the op's epilogue."""
    assert_expected_inline(
        written(lambda x, w, y: F.cross_entropy(3 * torch.tanh(F.linear(x, w) / 3), y)),
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
mul_tensor_2 = aten.mul.Tensor(reshape_default_6, 1.0000000000000002)
mul_tensor_3 = aten.mul.Tensor(reshape_default_6, -1.0000000000000002)
unsqueeze_default_2 = aten.unsqueeze(mul_tensor_3, 1)
row_stats_with_grad_default = lce_inductor.row_stats_with_grad(primals_1, primals_2, None, unsqueeze_default, None, mul_tensor_2, None, unsqueeze_default_2, None, None, 'div 3.0;tanh;mul 3.0', 3, 0, 1610612736, [True, True, False], needed=ne_1)
select_int = aten.select.int(row_stats_with_grad_default[1], 1, 0)
sub_tensor = aten.sub.Tensor(row_stats_with_grad_default[0], select_int)
convert_element_type_default = prims.convert_element_type(sub_tensor, torch.float32)
reshape_default_2 = aten.reshape(convert_element_type_default, [24])
where_1 = aten.where.self(ne_1, reshape_default_2, scalar_tensor_1)
sum_3 = aten.sum(where_1)
div_1 = aten.div.Tensor(sum_3, convert_element_type)
once_default = lce_inductor.once(tangents_1, [primals_1, primals_2])
mul_tensor_4 = aten.mul.Tensor(row_stats_with_grad_default[7], once_default)
mul_tensor_5 = aten.mul.Tensor(row_stats_with_grad_default[6], once_default)
permute_2 = aten.permute(mul_tensor_4, [1, 0])
permute_4 = aten.permute(permute_2, [1, 0])
return [div_1, mul_tensor_5, permute_4, None]
""",
    )


def test_graph_of_a_loss_for_each_row():
    """The tangent has rows: gradients wait for it."""
    assert_expected_inline(
        written(lambda x, w, y: F.cross_entropy(F.linear(x, w), y, reduction="none")),
        """\
ne_1 = aten.ne.Scalar(primals_3, -100)
scalar_tensor_1 = aten.scalar_tensor(0, dtype=torch.float32)
unsqueeze_1 = aten.unsqueeze(primals_3, 1)
ne_2 = aten.ne.Scalar(unsqueeze_1, -100)
scalar_tensor_2 = aten.scalar_tensor(0, dtype=torch.int64)
where_2 = aten.where.self(ne_2, unsqueeze_1, scalar_tensor_2)
unsqueeze_2 = aten.unsqueeze(tangents_1, 1)
ne_3 = aten.ne.Scalar(unsqueeze_1, -100)
scalar_tensor_3 = aten.scalar_tensor(0, dtype=torch.float32)
where_3 = aten.where.self(ne_3, unsqueeze_2, scalar_tensor_3)
reshape_default = aten.reshape(where_2, [24, 1])
reshape_default_1 = aten.reshape(reshape_default, [24])
clamp_min_default = aten.clamp_min(reshape_default_1, -9223372036854775807)
unsqueeze_default = aten.unsqueeze(clamp_min_default, 1)
reshape_default_5 = aten.reshape(ne_3, [24])
logical_or_default = aten.logical_or(ne_1, reshape_default_5)
row_stats_default = lce_inductor.row_stats(primals_1, primals_2, None, unsqueeze_default, None, '', 3, 0, 1610612736, needed=logical_or_default)
select_int = aten.select.int(row_stats_default[1], 1, 0)
sub_tensor = aten.sub.Tensor(row_stats_default[0], select_int)
convert_element_type_default = prims.convert_element_type(sub_tensor, torch.float32)
reshape_default_2 = aten.reshape(convert_element_type_default, [24])
where_1 = aten.where.self(ne_1, reshape_default_2, scalar_tensor_1)
reshape_default_3 = aten.reshape(where_3, [24, 1])
reshape_default_4 = aten.reshape(reshape_default_3, [24])
neg_default = aten.neg(reshape_default_4)
unsqueeze_default_1 = aten.unsqueeze(neg_default, 1)
once_default = lce_inductor.once(reshape_default_4, [primals_1, primals_2])
row_stats_backward_default = lce_inductor.row_stats_backward(primals_1, primals_2, None, unsqueeze_default, None, row_stats_default[0], None, once_default, unsqueeze_default_1, None, None, '', 0, 1610612736, [True, True, False], stats=3)
permute_2 = aten.permute(row_stats_backward_default[1], [1, 0])
permute_4 = aten.permute(permute_2, [1, 0])
return [where_1, row_stats_backward_default[0], permute_4, None]
""",
    )


def test_graph_of_a_program_of_its_own():
    """No rule of the kernels: forward and backward are one program."""
    assert_expected_inline(
        written(lambda x, w, y: F.linear(x, w).sinh().sum(-1).square().sum()),
        """\
permute = aten.permute(primals_2, [1, 0])
permute_3 = aten.permute(permute, [1, 0])
once_default = lce_inductor.once(tangents_1, [primals_1, primals_2])
full_default = aten.full([], 1, dtype=torch.float32, device=device(type='cpu'))
expand_default = aten.expand(full_default, [24])
reshape_default = aten.reshape(expand_default, [24])
reshape_default_1 = aten.reshape(primals_1, [24, 8])
row_region_default = lce_inductor.row_region(24, [primals_1], [permute], [], [False], [reshape_default, reshape_default_1], [], [permute_3], [], <program>, 0, 1610612736)
reshape_default_2 = aten.reshape(row_region_default[0], [24])
pow_1 = aten.pow.Tensor_Scalar(reshape_default_2, 2)
sum_2 = aten.sum(pow_1)
mul_tensor = aten.mul.Tensor(row_region_default[1], once_default)
permute_2 = aten.permute(mul_tensor, [1, 0])
permute_4 = aten.permute(permute_2, [1, 0])
mul_tensor_1 = aten.mul.Tensor(row_region_default[2], once_default)
return [sum_2, mul_tensor_1, permute_4]
""",
    )


def test_graph_of_a_sum_over_rows_and_classes():
    assert_expected_inline(
        written(lambda x, w, y: F.linear(x, w).sinh().sum()),
        """\
permute = aten.permute(primals_2, [1, 0])
permute_3 = aten.permute(permute, [1, 0])
once_default = lce_inductor.once(tangents_1, [primals_1, primals_2])
full_default = aten.full([], 1, dtype=torch.float32, device=device(type='cpu'))
reshape_default = aten.reshape(primals_1, [24, 8])
row_region_default = lce_inductor.row_region(24, [primals_1], [permute], [], [False], [reshape_default], [full_default], [permute_3], [], <program>, 0, 1610612736)
sum_default = aten.sum(row_region_default[0], dtype=torch.float32)
mul_tensor = aten.mul.Tensor(row_region_default[1], once_default)
permute_2 = aten.permute(mul_tensor, [1, 0])
permute_4 = aten.permute(permute_2, [1, 0])
mul_tensor_1 = aten.mul.Tensor(row_region_default[2], once_default)
return [sum_default, mul_tensor_1, permute_4]
""",
    )


def test_graph_of_no_gradients():
    """Statistics alone."""
    assert_expected_inline(
        written(lambda x, w, y: F.cross_entropy(F.linear(x, w), y), how=inference_graph),
        """\
ne = aten.ne.Scalar(arg2_1, -100)
scalar_tensor = aten.scalar_tensor(0, dtype=torch.int64)
where = aten.where.self(ne, arg2_1, scalar_tensor)
unsqueeze = aten.unsqueeze(where, 1)
ne_1 = aten.ne.Scalar(arg2_1, -100)
scalar_tensor_1 = aten.scalar_tensor(0, dtype=torch.float32)
ne_2 = aten.ne.Scalar(arg2_1, -100)
sum_2 = aten.sum(ne_2)
convert_element_type = prims.convert_element_type(sum_2, torch.float32)
reshape_default = aten.reshape(unsqueeze, [24, 1])
reshape_default_1 = aten.reshape(reshape_default, [24])
clamp_min_default = aten.clamp_min(reshape_default_1, -9223372036854775807)
unsqueeze_default = aten.unsqueeze(clamp_min_default, 1)
row_stats_default = lce_inductor.row_stats(arg0_1, arg1_1, None, unsqueeze_default, None, '', 3, 0, 1610612736, needed=ne_1)
select_int = aten.select.int(row_stats_default[1], 1, 0)
sub_tensor = aten.sub.Tensor(row_stats_default[0], select_int)
convert_element_type_default = prims.convert_element_type(sub_tensor, torch.float32)
reshape_default_2 = aten.reshape(convert_element_type_default, [24])
where_1 = aten.where.self(ne_1, reshape_default_2, scalar_tensor_1)
sum_3 = aten.sum(where_1)
div = aten.div.Tensor(sum_3, convert_element_type)
return (div)
""",
    )


def test_graph_of_symbols_for_sizes():
    assert_expected_inline(
        written(
            lambda x, w, y: F.linear(x, w)[:-1].logsumexp(-1).square().sum(),
            how=lambda *a: joint_graph(*a, dynamic=True),
        ),
        """\
reshape_default = aten.reshape(primals_3, [primals_1, primals_2])
slice_tensor = aten.slice.Tensor(reshape_default, 0, 0, -1, 1)
full_default_1 = aten.full([], 1, dtype=torch.float32, device=device(type='cpu'))
sym_size_int_n = aten.sym_size.int(slice_tensor, 0)
full_default_2 = aten.full([sym_size_int_n], 1, dtype=torch.float64, device=device(type='cpu'))
mul_tensor_1 = aten.mul.Tensor(full_default_2, 2.0)
convert_element_type_default_2 = prims.convert_element_type(mul_tensor_1, torch.float32)
sym_size_int = aten.sym_size.int(slice_tensor, 0)
expand_default = aten.expand(full_default_1, [sym_size_int])
reshape_default_7 = aten.reshape(convert_element_type_default_2, [sym_size_int])
mul_tensor_2 = aten.mul.Tensor(expand_default, reshape_default_7)
unsqueeze_default = aten.unsqueeze(mul_tensor_2, -1)
reshape_default_8 = aten.reshape(unsqueeze_default, [sym_size_int, 1])
reshape_default_9 = aten.reshape(reshape_default_8, [sym_size_int])
row_stats_with_grad_default = lce_inductor.row_stats_with_grad(slice_tensor, primals_5, None, None, None, None, reshape_default_9, None, None, None, '', 1, 0, 1610612736, [True, True, False])
convert_element_type_default = prims.convert_element_type(row_stats_with_grad_default[0], torch.float32)
reshape_default_1 = aten.reshape(convert_element_type_default, [sym_size_int])
pow_1 = aten.pow.Tensor_Scalar(reshape_default_1, 2)
sum_2 = aten.sum(pow_1)
once_default = lce_inductor.once(tangents_1, [primals_3, primals_5])
mul_tensor_3 = aten.mul.Tensor(row_stats_with_grad_default[7], once_default)
mul_tensor_4 = aten.mul.Tensor(row_stats_with_grad_default[6], once_default)
permute_2 = aten.permute(mul_tensor_3, [1, 0])
permute_4 = aten.permute(permute_2, [1, 0])
full_default = aten.full([primals_1, primals_2], 0, dtype=torch.float32, device=device(type='cpu'))
reshape_default_5 = aten.reshape(mul_tensor_4, [sym_size_int, primals_2])
slice_scatter_default = aten.slice_scatter(full_default, reshape_default_5, 0, 0, -1, 1)
reshape_default_6 = aten.reshape(slice_scatter_default, [primals_1, primals_2])
return [sum_2, None, None, reshape_default_6, None, permute_4]
""",
    )


def test_program_of_a_head():
    """Rows are one dimension in it, the first; a merged backward has a tangent of one."""
    x, w, y = head()
    traced = joint_graph(lambda x, w, y: F.linear(x, w).sinh().sum(-1).square().sum(), x, w, y)
    rewrite(traced)
    (node,) = traced.graph.find_nodes(op="call_function", target=torch.ops.lce_inductor.row_region.default)
    (text,) = (a for a in node.args if isinstance(a, str))
    assert_expected_inline(
        text.replace("],[", "],\n["),
        """\
[["logits","rows","rows"],
[["aten.sinh.default",[{"v":0}],{}],
["aten.sum.dim_IntList",[{"v":3},[1]],{}],
["aten.pow.Tensor_Scalar",[{"v":4},1.0],{}],
["aten.mul.Scalar",[{"v":5},2.0],{}],
["aten.mul.Tensor",[{"v":1},{"v":6}],{}],
["aten.reshape.default",[{"v":7},[{"n":0},1]],{}],
["aten.expand.default",[{"v":8},[{"n":0},37]],{}],
["aten.cosh.default",[{"v":0}],{}],
["aten.mul.Tensor",[{"v":9},{"v":10}],{}]],
[["row",4,"float32",[],-1],
["dw",11,"float32",[37,8],1],
["dx",11,"float32",[8],0]]]""",
    )


@pytest.mark.parametrize(
    "settings", [{"chunk_tokens": 7}, {"workspace_bytes": 12345}, {"gradients": "recompute"}], ids=str
)
def test_settings_reach_the_ops(settings):
    text = written(lambda x, w, y: F.cross_entropy(F.linear(x, w), y), **settings)
    if "gradients" in settings:
        assert "row_stats_backward" in text and "with_grad" not in text
    else:
        assert f", {next(iter(settings.values()))}" in text


OFFSET_LOSSES = {
    "log_softmax": lambda z, y: -z.log_softmax(-1).gather(-1, y[:, None]).mean(),
    "cross_entropy": lambda z, y: F.cross_entropy(z, y),
    "maximum": lambda z, y: z.log_softmax(-1).max(-1).values.sum(),
}


@pytest.mark.parametrize("loss", OFFSET_LOSSES)
def test_a_trained_number_per_row_that_cancels(loss, installed):
    """Its gradient is a sum that cancels: zeros, or what rounding leaves of them."""
    x, w, y = head()
    offsets = torch.linspace(-1, 1, len(x))[:, None].requires_grad_()
    args = fresh((x, w, offsets, y.clamp(min=0)))
    compiled = Compiled(lambda x, w, o, y: OFFSET_LOSSES[loss](F.linear(x, w) + o, y))
    compiled(*args).backward()
    assert compiled.counts["rewritten"] == 1 and args[2].grad.abs().max() < 1e-5


def test_an_infinite_offset_stays_out_of_the_other_rows(installed):
    x, w, y = head()
    offsets = torch.zeros(len(x), 1)
    offsets[3] = torch.inf
    args = fresh((x, w, offsets.requires_grad_(), y))
    compiled = Compiled(lambda x, w, o, y: F.cross_entropy(F.linear(x, w) + o, y, reduction="none"))
    assert compiled(*args)[4:].isfinite().all()
    assert compiled.counts["rewritten"] == 1


def test_an_ignored_label_outside_the_vocabulary_beside_masked_classes(installed):
    x, w, y = head()
    y = torch.where(y < 0, 500, y)

    def loss(x, w, y):
        return F.cross_entropy(F.linear(x, w).masked_fill(torch.arange(V) > 29, -1e9), y, ignore_index=500)

    compiled = check_against_eager(loss, (x, w, y))
    assert compiled.counts["rewritten"] == 1 and compiled.largest < N * V


def test_a_number_that_is_expanded_to_rows_of_several_dimensions(installed):
    """masked_mean of torch's own samples (seed 51001): one number with a dimension for each of the logits'."""

    def fn(x, w, mask, scale):
        z = F.linear(x.view(4, N // 4, 1, -1), w).log_softmax(-1)
        return (torch.where(mask, z, 0.0) * scale.view(1, 1, 1, 1).expand(z.shape)).sum() / mask.sum()

    x, w, _ = head()
    mask = torch.rand(4, N // 4, 1, V, generator=torch.Generator().manual_seed(0)) > 0.3
    compiled = check_against_eager(fn, [x, w, mask, torch.tensor(1.7)])
    assert compiled.counts["rewritten"] == 1
