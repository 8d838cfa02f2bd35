"""What is as wide as logits, and must not exist as a whole; and what is not, though it has many dimensions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from harness import N, V, head, joint_graph
from test_regions_kinds import logits_and
from test_regions_write import written

from lce_inductor.regions.region import find


def test_graph_of_a_number_made_of_the_hidden_state():
    """x's gradient by way of the number, [N, H], is no logits' size: it stays in the graph and is added to dX."""

    def fn(x, w, y):
        return F.cross_entropy((x @ w.t()) * x.square().sum(1, keepdim=True), y)

    assert_expected_inline(
        written(fn),
        """\
permute = aten.permute(primals_1, [1, 0])
pow_1 = aten.pow.Tensor_Scalar(primals_2, 2)
sum_1 = aten.sum.dim_IntList(pow_1, [1], True)
ne = aten.ne.Scalar(primals_3, -100)
scalar_tensor = aten.scalar_tensor(0, dtype=torch.int64)
where = aten.where.self(ne, primals_3, scalar_tensor)
unsqueeze = aten.unsqueeze(where, 1)
ne_1 = aten.ne.Scalar(primals_3, -100)
scalar_tensor_1 = aten.scalar_tensor(0, dtype=torch.float32)
ne_2 = aten.ne.Scalar(primals_3, -100)
sum_3 = aten.sum(ne_2)
convert_element_type = prims.convert_element_type(sum_3, torch.float32)
unsqueeze_1 = aten.unsqueeze(primals_3, 1)
ne_3 = aten.ne.Scalar(unsqueeze_1, -100)
scalar_tensor_2 = aten.scalar_tensor(0, dtype=torch.int64)
where_2 = aten.where.self(ne_3, unsqueeze_1, scalar_tensor_2)
ne_4 = aten.ne.Scalar(unsqueeze_1, -100)
scalar_tensor_3 = aten.scalar_tensor(0, dtype=torch.float32)
pow_2 = aten.pow.Tensor_Scalar(primals_2, 1.0)
mul_5 = aten.mul.Scalar(pow_2, 2.0)
permute_3 = aten.permute(permute, [1, 0])
once_default = lce_inductor.once(tangents_1, [primals_1, primals_2])
full_default = aten.full([], 1, dtype=torch.float32, device=device(type='cpu'))
reshape_default = aten.reshape(sum_1, [24, 1])
reshape_default_1 = aten.reshape(unsqueeze, [24, 1])
reshape_default_2 = aten.reshape(where_2, [24, 1])
div_tensor = aten.div.Tensor(full_default, convert_element_type)
where_self = aten.where.self(ne_4, div_tensor, scalar_tensor_3)
reshape_default_3 = aten.reshape(where_self, [24, 1])
reshape_default_4 = aten.reshape(primals_2, [24, 8])
row_region_default = lce_inductor.row_region(24, [primals_2], [permute], [], [False], [reshape_default, reshape_default_1, reshape_default_2, reshape_default_3, reshape_default_4], [], [permute_3], [], <program>, 0, 1610612736)
reshape_default_5 = aten.reshape(row_region_default[0], [24, 1])
squeeze = aten.squeeze.dim(reshape_default_5, 1)
neg = aten.neg(squeeze)
where_1 = aten.where.self(ne_1, neg, scalar_tensor_1)
sum_4 = aten.sum(where_1)
div = aten.div.Tensor(sum_4, convert_element_type)
reshape_default_6 = aten.reshape(row_region_default[1], [24, 1])
mul_tensor = aten.mul.Tensor(reshape_default_6, once_default)
expand = aten.expand(mul_tensor, [24, 8])
mul_6 = aten.mul.Tensor(expand, mul_5)
mul_tensor_1 = aten.mul.Tensor(row_region_default[2], once_default)
permute_2 = aten.permute(mul_tensor_1, [1, 0])
permute_4 = aten.permute(permute_2, [1, 0])
mul_tensor_2 = aten.mul.Tensor(row_region_default[3], once_default)
add = aten.add.Tensor(mul_6, mul_tensor_2)
return [div, permute_4, add, None]
""",
    )


def test_values_for_each_class_by_another_symbol():
    """Of an input with a column more: what is made of the loss and of targets is as wide as logits all the same."""

    def fn(x, w, y, t):
        s = F.cross_entropy(x @ w.t(), y, reduction="none")
        return s.mean(), t[:, 1:] * s.detach()[:, None]

    _, _, y = head()
    graph = joint_graph(fn, *logits_and(y, torch.rand(N, V + 1)), dynamic=True).graph
    assert [p.code for p in find(graph).problems.values()] == ["returned"]


def test_as_many_hidden_dimensions_as_classes():
    """There the two are not told apart: the head is left alone, whether or not the number is differentiated."""

    def fn(x, w, y):
        return F.cross_entropy((x @ w.t()) * x.square().sum(1, keepdim=True), y)

    def alone(x, w, y):
        return F.cross_entropy((x @ w.t()) * x.detach().square().sum(1, keepdim=True), y)

    _, _, y = head()
    x, w = torch.randn(N, V, requires_grad=True), torch.randn(V, V, requires_grad=True)
    assert [p.code for p in find(joint_graph(fn, x, w, y).graph).problems.values()] == ["crossing"]
    assert not find(joint_graph(alone, x, w, y).graph).problems
