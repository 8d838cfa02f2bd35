"""What is written for each kind of label that test_regions_write.py has not: the graph in place of a head, as text.

To accept a wanted change of these graphs: EXPECTTEST_ACCEPT=1 python -m pytest tests/test_regions_kinds.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from harness import H, N, V, head
from test_regions_write import written


def logits_and(*more):
    x, w, _ = head()
    return (x, w, *more)


def test_graph_of_classes_before_positions():
    """[B, V, T], as losses of torch want them: the transpose goes away with the logits."""

    def fn(x, w, y):
        return F.cross_entropy((x @ w.t()).view(2, N // 2, V).transpose(1, 2), y.view(2, N // 2))

    assert_expected_inline(
        written(fn),
        """\
view_1 = aten.view(primals_3, [2, 12])
view_3 = aten.view(view_1, [2, 1, -1])
ne_1 = aten.ne.Scalar(view_3, -100)
scalar_tensor_1 = aten.scalar_tensor(0, dtype=torch.float32)
ne_2 = aten.ne.Scalar(view_3, -100)
sum_2 = aten.sum(ne_2)
convert_element_type = prims.convert_element_type(sum_2, torch.float32)
unsqueeze_1 = aten.unsqueeze(view_3, 1)
ne_3 = aten.ne.Scalar(unsqueeze_1, -100)
scalar_tensor_2 = aten.scalar_tensor(0, dtype=torch.int64)
where_2 = aten.where.self(ne_3, unsqueeze_1, scalar_tensor_2)
ne_4 = aten.ne.Scalar(unsqueeze_1, -100)
scalar_tensor_3 = aten.scalar_tensor(0, dtype=torch.float32)
permute_default = aten.permute(where_2, [0, 3, 1, 2])
reshape_default = aten.reshape(permute_default, [24, 1, 1])
reshape_default_1 = aten.reshape(reshape_default, [24])
clamp_min_default = aten.clamp_min(reshape_default_1, -9223372036854775807)
unsqueeze_default = aten.unsqueeze(clamp_min_default, 1)
full_default = aten.full([], 1, dtype=torch.float32, device=device(type='cpu'))
div_tensor = aten.div.Tensor(full_default, convert_element_type)
where_self = aten.where.self(ne_4, div_tensor, scalar_tensor_3)
permute_default_2 = aten.permute(where_self, [0, 3, 1, 2])
reshape_default_5 = aten.reshape(permute_default_2, [24, 1, 1])
reshape_default_6 = aten.reshape(reshape_default_5, [24])
neg_default_1 = aten.neg(reshape_default_6)
unsqueeze_default_2 = aten.unsqueeze(neg_default_1, 1)
reshape_default_7 = aten.reshape(ne_1, [24])
row_stats_with_grad_default = lce_inductor.row_stats_with_grad(primals_2, primals_1, None, unsqueeze_default, None, reshape_default_6, None, unsqueeze_default_2, None, None, '', 3, 0, 1610612736, [True, True, False], needed=reshape_default_7)
select_int = aten.select.int(row_stats_with_grad_default[1], 1, 0)
sub_tensor = aten.sub.Tensor(row_stats_with_grad_default[0], select_int)
convert_element_type_default = prims.convert_element_type(sub_tensor, torch.float32)
reshape_default_2 = aten.reshape(convert_element_type_default, [2, 1, 12])
where_1 = aten.where.self(ne_1, reshape_default_2, scalar_tensor_1)
sum_3 = aten.sum(where_1)
div = aten.div.Tensor(sum_3, convert_element_type)
once_default = lce_inductor.once(tangents_1, [primals_1, primals_2])
mul_tensor = aten.mul.Tensor(row_stats_with_grad_default[7], once_default)
mul_tensor_1 = aten.mul.Tensor(row_stats_with_grad_default[6], once_default)
permute_4 = aten.permute(mul_tensor, [1, 0])
permute_6 = aten.permute(permute_4, [1, 0])
return [div, permute_6, mul_tensor_1, None]
""",
    )


def test_graph_of_classes_that_are_sliced():
    """Classes beyond a padded vocabulary's are the weight's rows, which are left out."""
    assert_expected_inline(
        written(lambda x, w, y: F.cross_entropy((x @ w.t())[:, : V - 3], y % (V - 3))),
        """\
remainder = aten.remainder.Scalar(primals_3, 34)
ne_1 = aten.ne.Scalar(remainder, -100)
scalar_tensor_1 = aten.scalar_tensor(0, dtype=torch.float32)
ne_2 = aten.ne.Scalar(remainder, -100)
sum_2 = aten.sum(ne_2)
convert_element_type = prims.convert_element_type(sum_2, torch.float32)
unsqueeze_1 = aten.unsqueeze(remainder, 1)
ne_3 = aten.ne.Scalar(unsqueeze_1, -100)
scalar_tensor_2 = aten.scalar_tensor(0, dtype=torch.int64)
where_2 = aten.where.self(ne_3, unsqueeze_1, scalar_tensor_2)
ne_4 = aten.ne.Scalar(unsqueeze_1, -100)
scalar_tensor_3 = aten.scalar_tensor(0, dtype=torch.float32)
slice_tensor = aten.slice.Tensor(primals_1, 0, 0, 34)
reshape_default = aten.reshape(where_2, [24, 1])
reshape_default_1 = aten.reshape(reshape_default, [24])
clamp_min_default = aten.clamp_min(reshape_default_1, -9223372036854775807)
unsqueeze_default = aten.unsqueeze(clamp_min_default, 1)
full_default_1 = aten.full([], 1, dtype=torch.float32, device=device(type='cpu'))
div_tensor = aten.div.Tensor(full_default_1, convert_element_type)
where_self = aten.where.self(ne_4, div_tensor, scalar_tensor_3)
reshape_default_5 = aten.reshape(where_self, [24, 1])
reshape_default_6 = aten.reshape(reshape_default_5, [24])
neg_default_1 = aten.neg(reshape_default_6)
unsqueeze_default_2 = aten.unsqueeze(neg_default_1, 1)
row_stats_with_grad_default = lce_inductor.row_stats_with_grad(primals_2, slice_tensor, None, unsqueeze_default, None, reshape_default_6, None, unsqueeze_default_2, None, None, '', 3, 0, 1610612736, [True, True, False], needed=ne_1)
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
full_default = aten.full([37, 8], 0, dtype=torch.float32, device=device(type='cpu'))
slice_scatter_default = aten.slice_scatter(full_default, mul_tensor, 0, 0, 34)
permute_2 = aten.permute(slice_scatter_default, [1, 0])
permute_4 = aten.permute(permute_2, [1, 0])
return [div, permute_4, mul_tensor_1, None]
""",
    )


def test_graph_of_positions_that_are_shifted():
    """[B, T, V] without the last position: what is selected is x."""

    def fn(x, w, y):
        z = (x @ w.t()).view(2, N // 2, V)[:, :-1]
        return F.cross_entropy(z.flatten(0, 1), y.view(2, N // 2)[:, 1:].flatten())

    assert_expected_inline(
        written(fn),
        """\
view_2 = aten.view(primals_3, [2, 12])
slice_2 = aten.slice.Tensor(view_2, 1, 1, 9223372036854775807)
clone_1 = aten.clone(slice_2, memory_format=torch.contiguous_format)
view_3 = aten.view(clone_1, [22])
ne_1 = aten.ne.Scalar(view_3, -100)
scalar_tensor_1 = aten.scalar_tensor(0, dtype=torch.float32)
ne_2 = aten.ne.Scalar(view_3, -100)
sum_2 = aten.sum(ne_2)
convert_element_type = prims.convert_element_type(sum_2, torch.float32)
unsqueeze_1 = aten.unsqueeze(view_3, 1)
ne_3 = aten.ne.Scalar(unsqueeze_1, -100)
scalar_tensor_2 = aten.scalar_tensor(0, dtype=torch.int64)
where_2 = aten.where.self(ne_3, unsqueeze_1, scalar_tensor_2)
ne_4 = aten.ne.Scalar(unsqueeze_1, -100)
scalar_tensor_3 = aten.scalar_tensor(0, dtype=torch.float32)
reshape_default = aten.reshape(primals_2, [2, 12, 8])
slice_tensor = aten.slice.Tensor(reshape_default, 1, 0, 11, 1)
reshape_default_1 = aten.reshape(slice_tensor, [22, 8])
reshape_default_2 = aten.reshape(where_2, [22, 1])
reshape_default_3 = aten.reshape(reshape_default_2, [22])
clamp_min_default = aten.clamp_min(reshape_default_3, -9223372036854775807)
unsqueeze_default = aten.unsqueeze(clamp_min_default, 1)
full_default_1 = aten.full([], 1, dtype=torch.float32, device=device(type='cpu'))
div_tensor = aten.div.Tensor(full_default_1, convert_element_type)
where_self = aten.where.self(ne_4, div_tensor, scalar_tensor_3)
reshape_default_9 = aten.reshape(where_self, [22, 1])
reshape_default_10 = aten.reshape(reshape_default_9, [22])
neg_default_1 = aten.neg(reshape_default_10)
unsqueeze_default_2 = aten.unsqueeze(neg_default_1, 1)
row_stats_with_grad_default = lce_inductor.row_stats_with_grad(reshape_default_1, primals_1, None, unsqueeze_default, None, reshape_default_10, None, unsqueeze_default_2, None, None, '', 3, 0, 1610612736, [True, True, False], needed=ne_1)
select_int = aten.select.int(row_stats_with_grad_default[1], 1, 0)
sub_tensor = aten.sub.Tensor(row_stats_with_grad_default[0], select_int)
convert_element_type_default = prims.convert_element_type(sub_tensor, torch.float32)
reshape_default_4 = aten.reshape(convert_element_type_default, [22])
where_1 = aten.where.self(ne_1, reshape_default_4, scalar_tensor_1)
sum_3 = aten.sum(where_1)
div = aten.div.Tensor(sum_3, convert_element_type)
once_default = lce_inductor.once(tangents_1, [primals_1, primals_2])
mul_tensor = aten.mul.Tensor(row_stats_with_grad_default[7], once_default)
mul_tensor_1 = aten.mul.Tensor(row_stats_with_grad_default[6], once_default)
permute_2 = aten.permute(mul_tensor, [1, 0])
permute_4 = aten.permute(permute_2, [1, 0])
full_default = aten.full([2, 12, 8], 0, dtype=torch.float32, device=device(type='cpu'))
reshape_default_7 = aten.reshape(mul_tensor_1, [2, 11, 8])
slice_scatter_default = aten.slice_scatter(full_default, reshape_default_7, 1, 0, 11, 1)
reshape_default_8 = aten.reshape(slice_scatter_default, [24, 8])
return [div, permute_4, reshape_default_8, None]
""",
    )


def test_graph_of_an_index_from_the_end():
    """Rows that are picked by a negative index."""
    assert_expected_inline(
        written(lambda x, w, y: (x @ w.t()).view(2, N // 2, V)[:, -1].logsumexp(-1).sum()),
        """\
reshape_default = aten.reshape(primals_2, [2, 12, 8])
select_int = aten.select.int(reshape_default, 1, 11)
full_default_1 = aten.full([], 1, dtype=torch.float32, device=device(type='cpu'))
expand_default = aten.expand(full_default_1, [2])
unsqueeze_default = aten.unsqueeze(expand_default, -1)
reshape_default_6 = aten.reshape(unsqueeze_default, [2, 1])
reshape_default_7 = aten.reshape(reshape_default_6, [2])
row_stats_with_grad_default = lce_inductor.row_stats_with_grad(select_int, primals_1, None, None, None, reshape_default_7, None, None, None, None, '', 1, 0, 1610612736, [True, True, False])
convert_element_type_default = prims.convert_element_type(row_stats_with_grad_default[0], torch.float32)
reshape_default_1 = aten.reshape(convert_element_type_default, [2])
sum_2 = aten.sum(reshape_default_1)
once_default = lce_inductor.once(tangents_1, [primals_1, primals_2])
mul_tensor = aten.mul.Tensor(row_stats_with_grad_default[7], once_default)
mul_tensor_1 = aten.mul.Tensor(row_stats_with_grad_default[6], once_default)
permute_2 = aten.permute(mul_tensor, [1, 0])
permute_4 = aten.permute(permute_2, [1, 0])
full_default = aten.full([2, 12, 8], 0, dtype=torch.float32, device=device(type='cpu'))
reshape_default_4 = aten.reshape(mul_tensor_1, [2, 8])
select_scatter_default = aten.select_scatter(full_default, reshape_default_4, 1, 11)
reshape_default_5 = aten.reshape(select_scatter_default, [24, 8])
return [sum_2, permute_4, reshape_default_5]
""",
    )


def test_graph_of_items_of_an_unbind():
    """Each of them is some of the rows."""

    def fn(x, w, y):
        first, second = (x @ w.t()).view(2, N // 2, V).unbind(0)
        return first.logsumexp(-1).sum() - second.logsumexp(-1).mean()

    assert_expected_inline(
        written(fn),
        """\
reshape_default = aten.reshape(primals_2, [2, 12, 8])
select_int = aten.select.int(reshape_default, 0, 0)
full_default_2 = aten.full([], 1, dtype=torch.float32, device=device(type='cpu'))
expand_default = aten.expand(full_default_2, [12])
unsqueeze_default = aten.unsqueeze(expand_default, -1)
reshape_default_12 = aten.reshape(unsqueeze_default, [12, 1])
reshape_default_13 = aten.reshape(reshape_default_12, [12])
reshape_default_1 = aten.reshape(primals_2, [2, 12, 8])
select_int_1 = aten.select.int(reshape_default_1, 0, 1)
cat_default = aten.cat([select_int, select_int_1])
full_default_3 = aten.full([], 1, dtype=torch.float32, device=device(type='cpu'))
neg_default = aten.neg(full_default_3)
expand_default_1 = aten.expand(neg_default, [12])
div_scalar = aten.div.Scalar(expand_default_1, 12)
unsqueeze_default_1 = aten.unsqueeze(div_scalar, -1)
reshape_default_14 = aten.reshape(unsqueeze_default_1, [12, 1])
reshape_default_15 = aten.reshape(reshape_default_14, [12])
cat_default_1 = aten.cat([reshape_default_13, reshape_default_15])
row_stats_with_grad_default_2 = lce_inductor.row_stats_with_grad(cat_default, primals_1, None, None, None, cat_default_1, None, None, None, None, '', 1, 0, 1610612736, [True, True, False], False, None, prefer='speed')
split_with_sizes_default = aten.split_with_sizes(row_stats_with_grad_default_2[0], [12, 12])
split_with_sizes_default_1 = aten.split_with_sizes(row_stats_with_grad_default_2[6], [12, 12])
convert_element_type_default = prims.convert_element_type(split_with_sizes_default[0], torch.float32)
reshape_default_2 = aten.reshape(convert_element_type_default, [12])
sum_2 = aten.sum(reshape_default_2)
convert_element_type_default_1 = prims.convert_element_type(split_with_sizes_default[1], torch.float32)
reshape_default_3 = aten.reshape(convert_element_type_default_1, [12])
mean = aten.mean(reshape_default_3)
sub_2 = aten.sub.Tensor(sum_2, mean)
once_default = lce_inductor.once(tangents_1, [primals_1, primals_2])
mul_tensor = aten.mul.Tensor(row_stats_with_grad_default_2[7], once_default)
mul_tensor_1 = aten.mul.Tensor(split_with_sizes_default_1[0], once_default)
full_default = aten.full([2, 12, 8], 0, dtype=torch.float32, device=device(type='cpu'))
reshape_default_6 = aten.reshape(mul_tensor_1, [12, 8])
select_scatter_default = aten.select_scatter(full_default, reshape_default_6, 0, 0)
reshape_default_7 = aten.reshape(select_scatter_default, [24, 8])
once_default_1 = lce_inductor.once(tangents_1, [primals_1, primals_2])
mul_tensor_3 = aten.mul.Tensor(split_with_sizes_default_1[1], once_default_1)
permute_2 = aten.permute(mul_tensor, [1, 0])
permute_4 = aten.permute(permute_2, [1, 0])
full_default_1 = aten.full([2, 12, 8], 0, dtype=torch.float32, device=device(type='cpu'))
reshape_default_10 = aten.reshape(mul_tensor_3, [12, 8])
select_scatter_default_1 = aten.select_scatter(full_default_1, reshape_default_10, 0, 1)
reshape_default_11 = aten.reshape(select_scatter_default_1, [24, 8])
add_tensor_1 = aten.add.Tensor(reshape_default_7, reshape_default_11)
return [sub_2, permute_4, add_tensor_1]
""",
    )


def test_graph_of_two_heads_that_are_stacked():
    """Both heads' logits in one program: what is said of a stack's part is said of the head."""

    def fn(x, w, y):
        student, teacher = torch.stack([x @ w.t(), (x @ w.flip(0).t()).detach()]).log_softmax(-1)
        return (teacher.exp() * (teacher - student)).sum()

    assert_expected_inline(
        written(fn),
        """\
permute = aten.permute(primals_1, [1, 0])
rev = prims.rev(primals_1, [0])
permute_1 = aten.permute(rev, [1, 0])
permute_4 = aten.permute(permute, [1, 0])
once_default = lce_inductor.once(tangents_1, [primals_1, primals_2])
full_default = aten.full([], 1, dtype=torch.float32, device=device(type='cpu'))
reshape_default = aten.reshape(primals_2, [24, 8])
row_region_default = lce_inductor.row_region(24, [primals_2, primals_2], [permute, permute_1], [], [False, False], [reshape_default], [full_default], [permute_4], [], <program>, 0, 1610612736)
sum_default = aten.sum(row_region_default[0], dtype=torch.float32)
mul_tensor = aten.mul.Tensor(row_region_default[1], once_default)
permute_3 = aten.permute(mul_tensor, [1, 0])
permute_5 = aten.permute(permute_3, [1, 0])
mul_tensor_1 = aten.mul.Tensor(row_region_default[2], once_default)
return [sum_default, permute_5, mul_tensor_1]
""",
    )


def test_graph_of_a_class_vector_and_a_row_vector():
    """A mask of classes is whole, a temperature is of rows; the kernels have neither."""

    def fn(x, w, y, mask, tau):
        z = torch.where(mask, x @ w.t(), -1e4) / tau[:, None]
        return F.cross_entropy(z, y)

    _, _, y = head()
    g = torch.Generator().manual_seed(0)
    mask, tau = torch.rand(V, generator=g) > 0.2, torch.rand(N, 1, generator=g)[:, 0] + 0.5
    assert_expected_inline(
        written(fn, *logits_and(y % 2, mask, tau)),
        """\
permute = aten.permute(primals_1, [1, 0])
unsqueeze = aten.unsqueeze(primals_4, 1)
ne = aten.ne.Scalar(primals_5, -100)
scalar_tensor_1 = aten.scalar_tensor(0, dtype=torch.int64)
where_1 = aten.where.self(ne, primals_5, scalar_tensor_1)
unsqueeze_1 = aten.unsqueeze(where_1, 1)
ne_1 = aten.ne.Scalar(primals_5, -100)
scalar_tensor_2 = aten.scalar_tensor(0, dtype=torch.float32)
ne_2 = aten.ne.Scalar(primals_5, -100)
sum_2 = aten.sum(ne_2)
convert_element_type = prims.convert_element_type(sum_2, torch.float32)
unsqueeze_2 = aten.unsqueeze(primals_5, 1)
ne_3 = aten.ne.Scalar(unsqueeze_2, -100)
scalar_tensor_3 = aten.scalar_tensor(0, dtype=torch.int64)
where_3 = aten.where.self(ne_3, unsqueeze_2, scalar_tensor_3)
ne_4 = aten.ne.Scalar(unsqueeze_2, -100)
scalar_tensor_4 = aten.scalar_tensor(0, dtype=torch.float32)
permute_3 = aten.permute(permute, [1, 0])
once_default = lce_inductor.once(tangents_1, [primals_1, primals_2])
full_default = aten.full([], 1, dtype=torch.float32, device=device(type='cpu'))
reshape_default = aten.reshape(unsqueeze, [24, 1])
reshape_default_1 = aten.reshape(unsqueeze_1, [24, 1])
reshape_default_2 = aten.reshape(where_3, [24, 1])
div_tensor = aten.div.Tensor(full_default, convert_element_type)
where_self = aten.where.self(ne_4, div_tensor, scalar_tensor_4)
reshape_default_3 = aten.reshape(where_self, [24, 1])
reshape_default_4 = aten.reshape(primals_2, [24, 8])
row_region_default = lce_inductor.row_region(24, [primals_2], [permute], [], [False], [reshape_default, reshape_default_1, reshape_default_2, reshape_default_3, reshape_default_4], [primals_3], [permute_3], [], <program>, 0, 1610612736)
reshape_default_5 = aten.reshape(row_region_default[0], [24, 1])
squeeze = aten.squeeze.dim(reshape_default_5, 1)
neg = aten.neg(squeeze)
where_2 = aten.where.self(ne_1, neg, scalar_tensor_2)
sum_3 = aten.sum(where_2)
div_1 = aten.div.Tensor(sum_3, convert_element_type)
mul_tensor = aten.mul.Tensor(row_region_default[1], once_default)
permute_2 = aten.permute(mul_tensor, [1, 0])
permute_4 = aten.permute(permute_2, [1, 0])
mul_tensor_1 = aten.mul.Tensor(row_region_default[2], once_default)
return [div_1, permute_4, mul_tensor_1, None, None, None]
""",
    )


def test_graph_of_a_sum_of_products():
    """A frozen base and two trained factors: no dW of the base."""

    def fn(x, w, y, a, b):
        return F.cross_entropy(x @ w.detach().t() + 2 * ((x @ a.t()) @ b.t()), y)

    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(s, generator=g).requires_grad_() for s in ((3, H), (V, 3)))
    assert_expected_inline(
        written(fn, *logits_and(head()[2], a, b)),
        """\
alias = aten.alias(primals_1)
permute = aten.permute(alias, [1, 0])
permute_1 = aten.permute(primals_3, [1, 0])
mm_1 = aten.mm(primals_2, permute_1)
permute_2 = aten.permute(primals_4, [1, 0])
ne = aten.ne.Scalar(primals_5, -100)
scalar_tensor = aten.scalar_tensor(0, dtype=torch.int64)
where = aten.where.self(ne, primals_5, scalar_tensor)
unsqueeze = aten.unsqueeze(where, 1)
ne_1 = aten.ne.Scalar(primals_5, -100)
scalar_tensor_1 = aten.scalar_tensor(0, dtype=torch.float32)
ne_2 = aten.ne.Scalar(primals_5, -100)
sum_2 = aten.sum(ne_2)
convert_element_type = prims.convert_element_type(sum_2, torch.float32)
unsqueeze_1 = aten.unsqueeze(primals_5, 1)
ne_3 = aten.ne.Scalar(unsqueeze_1, -100)
scalar_tensor_2 = aten.scalar_tensor(0, dtype=torch.int64)
where_2 = aten.where.self(ne_3, unsqueeze_1, scalar_tensor_2)
ne_4 = aten.ne.Scalar(unsqueeze_1, -100)
scalar_tensor_3 = aten.scalar_tensor(0, dtype=torch.float32)
permute_5 = aten.permute(permute_2, [1, 0])
permute_9 = aten.permute(permute_1, [1, 0])
permute_11 = aten.permute(permute, [1, 0])
once_default = lce_inductor.once(tangents_1, [primals_1, primals_2, primals_3, primals_4])
full_default = aten.full([], 1, dtype=torch.float32, device=device(type='cpu'))
reshape_default = aten.reshape(unsqueeze, [24, 1])
reshape_default_1 = aten.reshape(where_2, [24, 1])
div_tensor = aten.div.Tensor(full_default, convert_element_type)
where_self = aten.where.self(ne_4, div_tensor, scalar_tensor_3)
reshape_default_2 = aten.reshape(where_self, [24, 1])
reshape_default_3 = aten.reshape(mm_1, [24, 3])
row_region_default = lce_inductor.row_region(24, [primals_2, mm_1], [permute, permute_2], [], [False, False], [reshape_default, reshape_default_1, reshape_default_2, reshape_default_3], [], [permute_5, permute_11], [], <program>, 0, 1610612736)
reshape_default_4 = aten.reshape(row_region_default[0], [24, 1])
squeeze = aten.squeeze.dim(reshape_default_4, 1)
neg = aten.neg(squeeze)
where_1 = aten.where.self(ne_1, neg, scalar_tensor_1)
sum_3 = aten.sum(where_1)
div = aten.div.Tensor(sum_3, convert_element_type)
mul_tensor = aten.mul.Tensor(row_region_default[1], once_default)
permute_4 = aten.permute(mul_tensor, [1, 0])
permute_6 = aten.permute(permute_4, [1, 0])
mul_tensor_1 = aten.mul.Tensor(row_region_default[2], once_default)
permute_7 = aten.permute(mul_tensor_1, [1, 0])
mm_5 = aten.mm(permute_7, primals_2)
permute_8 = aten.permute(mm_5, [1, 0])
permute_10 = aten.permute(permute_8, [1, 0])
mm_6 = aten.mm(mul_tensor_1, permute_9)
mul_tensor_2 = aten.mul.Tensor(row_region_default[3], once_default)
add_1 = aten.add.Tensor(mm_6, mul_tensor_2)
return [div, None, add_1, permute_10, permute_6, None]
""",
    )


def test_graph_of_targets_for_each_class():
    """Row x class inputs are read chunk by chunk."""

    def fn(x, w, y, soft):
        return -(soft * (x @ w.t()).log_softmax(-1)).sum(-1).mean()

    soft = torch.rand(N, V, generator=torch.Generator().manual_seed(0)).softmax(-1)
    assert_expected_inline(
        written(fn, *logits_and(head()[2], soft)),
        """\
permute = aten.permute(primals_1, [1, 0])
permute_3 = aten.permute(permute, [1, 0])
once_default = lce_inductor.once(tangents_1, [primals_1, primals_2])
full_default = aten.full([], 1, dtype=torch.float32, device=device(type='cpu'))
reshape_default = aten.reshape(primals_3, [24, 37])
neg_default = aten.neg(full_default)
expand_default = aten.expand(neg_default, [24])
div_scalar = aten.div.Scalar(expand_default, 24)
unsqueeze_default = aten.unsqueeze(div_scalar, -1)
reshape_default_1 = aten.reshape(unsqueeze_default, [24, 1])
reshape_default_2 = aten.reshape(primals_2, [24, 8])
row_region_default = lce_inductor.row_region(24, [primals_2], [permute], [], [False], [reshape_default, reshape_default_1, reshape_default_2], [], [permute_3], [], <program>, 0, 1610612736)
reshape_default_3 = aten.reshape(row_region_default[0], [24])
mean = aten.mean(reshape_default_3)
neg = aten.neg(mean)
mul_tensor = aten.mul.Tensor(row_region_default[1], once_default)
permute_2 = aten.permute(mul_tensor, [1, 0])
permute_4 = aten.permute(permute_2, [1, 0])
mul_tensor_1 = aten.mul.Tensor(row_region_default[2], once_default)
return [neg, permute_4, mul_tensor_1, None]
""",
    )
