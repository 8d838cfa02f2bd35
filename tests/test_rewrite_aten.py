"""Plan -> graph: heads in flat graphs of ATen operations, as make_fx traces them.

To accept a wanted change of these graphs: EXPECTTEST_ACCEPT=1 python -m pytest tests/test_rewrite_aten.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from harness import V, aten_graph, head
from test_rewrite import Fn, before_and_after, three
from torch import Tensor


def test_graph_of_aten_operations():
    x, w, y = head()
    gm = aten_graph(lambda x, w, y: F.cross_entropy(F.linear(x, w), y), x.detach(), w.detach(), y)
    assert_expected_inline(
        before_and_after(gm),
        """\
t = aten.t(w_1)
mm = aten.mm(x_1, t)
_log_softmax = aten._log_softmax(mm, 1, False)
nll_loss_forward = aten.nll_loss_forward(_log_softmax, y_1, None, 1, -100)
return nll_loss_forward[0]
->
t = aten.t(w_1)
head_stats_default = lce_inductor.head_stats(x_1, w_1, None, [y_1], [-100], None, '', 3, 0, 1610612736)
cross_entropy_default = lce_inductor.cross_entropy(head_stats_default[0], head_stats_default[1][..., 0], None, y_1, None, 'mean', -100, 0.0, 37, torch.float32)
return cross_entropy_default
""",
    )


def show_aten(fn: Fn, *args: Tensor) -> str:
    return before_and_after(aten_graph(fn, *(a.detach() for a in args)))


def test_graph_of_an_einsum_taken_apart():
    x, w, y = head()
    x3, y3 = three(x, y)
    assert_expected_inline(
        show_aten(lambda x, w, y: F.cross_entropy(torch.einsum("bth,vh->bvt", x, w), y), x3, w, y3),
        """\
unsqueeze = aten.unsqueeze(x_1, 3)
permute = aten.permute(unsqueeze, [0, 3, 1, 2])
unsqueeze_1 = aten.unsqueeze(w_1, 2)
unsqueeze_2 = aten.unsqueeze(unsqueeze_1, 3)
permute_1 = aten.permute(unsqueeze_2, [2, 0, 3, 1])
permute_2 = aten.permute(permute, [0, 2, 3, 1])
view = aten.view(permute_2, [1, 24, 8])
permute_3 = aten.permute(permute_1, [3, 1, 0, 2])
view_1 = aten.view(permute_3, [1, 8, 37])
bmm = aten.bmm(view, view_1)
view_2 = aten.view(bmm, [4, 6, 1, 37])
permute_4 = aten.permute(view_2, [0, 3, 1, 2])
view_3 = aten.view(permute_4, [4, 37, 6])
_log_softmax = aten._log_softmax(view_3, 1, False)
view_4 = aten.view(_log_softmax, [4, 37, 1, -1])
view_5 = aten.view(y_1, [4, 1, -1])
nll_loss2d_forward = aten.nll_loss2d_forward(view_4, view_5, None, 1, -100)
return nll_loss2d_forward[0]
->
unsqueeze = aten.unsqueeze(x_1, 3)
permute = aten.permute(unsqueeze, [0, 3, 1, 2])
unsqueeze_1 = aten.unsqueeze(w_1, 2)
unsqueeze_2 = aten.unsqueeze(unsqueeze_1, 3)
permute_1 = aten.permute(unsqueeze_2, [2, 0, 3, 1])
permute_2 = aten.permute(permute, [0, 2, 3, 1])
view = aten.view(permute_2, [1, 24, 8])
permute_3 = aten.permute(permute_1, [3, 1, 0, 2])
view_1 = aten.view(permute_3, [1, 8, 37])
view_5 = aten.view(y_1, [4, 1, -1])
head_stats_default = lce_inductor.head_stats(view, w_1, None, [view_5], [-100], None, '', 3, 0, 1610612736)
cross_entropy_default = lce_inductor.cross_entropy(head_stats_default[0], head_stats_default[1][..., 0], None, view_5, None, 'mean', -100, 0.0, 37, torch.float32)
return cross_entropy_default
""",
    )


def test_graph_of_class_weights_and_smoothing_taken_apart():
    x, w, y = head()
    c = torch.ones(V)
    assert_expected_inline(
        show_aten(lambda x, w, y, c: F.cross_entropy(F.linear(x, w), y, c, label_smoothing=0.1), x, w, y, c),
        """\
t = aten.t(w_1)
mm = aten.mm(x_1, t)
_log_softmax = aten._log_softmax(mm, 1, False)
nll_loss_forward = aten.nll_loss_forward(_log_softmax, y_1, c_1, 1, -100)
view = aten.view(c_1, [1, 37])
mul = aten.mul.Tensor(_log_softmax, view)
sum_1 = aten.sum.dim_IntList(mul, [1])
neg = aten.neg(sum_1)
eq = aten.eq.Scalar(y_1, -100)
masked_fill_ = aten.masked_fill_.Scalar(neg, eq, 0.0)
masked_fill = aten.masked_fill.Scalar(y_1, eq, 0)
gather = aten.gather(c_1, 0, masked_fill)
masked_fill__1 = aten.masked_fill_.Scalar(gather, eq, 0)
sum_2 = aten.sum(masked_fill__1)
sum_3 = aten.sum(masked_fill_)
div = aten.div.Tensor(sum_3, sum_2)
mul_1 = aten.mul.Scalar(div, 0.002702702702702703)
mul_2 = aten.mul.Scalar(nll_loss_forward[0], 0.9)
add = aten.add.Tensor(mul_2, mul_1)
return add
->
t = aten.t(w_1)
view = aten.view(c_1, [1, 37])
reshape_default = aten.reshape(view, [-1])
head_stats_default = lce_inductor.head_stats(x_1, w_1, None, [y_1], [-100], reshape_default, '', 7, 0, 1610612736)
cross_entropy_default = lce_inductor.cross_entropy(head_stats_default[0], head_stats_default[1][..., 0], None, y_1, c_1, 'mean', -100, 0.0, 37, torch.float32)
unsqueeze_default = aten.unsqueeze(head_stats_default[2], -1)
unsqueeze_default_1 = aten.unsqueeze(head_stats_default[0], -1)
neg_default = aten.neg(unsqueeze_default_1)
sum_default = aten.sum(view)
mul_tensor = aten.mul.Tensor(neg_default, sum_default)
add_tensor = aten.add.Tensor(unsqueeze_default, mul_tensor)
mul_tensor_1 = aten.mul.Tensor(add_tensor, 1.0)
squeeze_dim = aten.squeeze.dim(mul_tensor_1, 1)
_to_copy_default = aten._to_copy(squeeze_dim, dtype=torch.float32)
neg = aten.neg(_to_copy_default)
eq = aten.eq.Scalar(y_1, -100)
masked_fill_ = aten.masked_fill_.Scalar(neg, eq, 0.0)
masked_fill = aten.masked_fill.Scalar(y_1, eq, 0)
gather = aten.gather(c_1, 0, masked_fill)
masked_fill__1 = aten.masked_fill_.Scalar(gather, eq, 0)
sum_2 = aten.sum(masked_fill__1)
sum_3 = aten.sum(masked_fill_)
div = aten.div.Tensor(sum_3, sum_2)
mul_1 = aten.mul.Scalar(div, 0.002702702702702703)
mul_2 = aten.mul.Scalar(cross_entropy_default, 0.9)
add = aten.add.Tensor(mul_2, mul_1)
return add
""",
    )


def test_graph_of_an_index_taken_apart():
    x, w, y = head()
    assert_expected_inline(
        show_aten(lambda x, w, y: F.linear(x, w)[torch.arange(len(y)), y].mean(), x, w, y.clamp(min=0)),
        """\
t = aten.t(w_1)
mm = aten.mm(x_1, t)
arange = aten.arange(24, device=device(type='cpu'), pin_memory=False)
index = aten.index.Tensor(mm, [arange, y_1])
mean = aten.mean(index)
return mean
->
t = aten.t(w_1)
add_tensor = aten.add.Tensor(y_1, 37)
lt_scalar = aten.lt.Scalar(y_1, 0)
where_self = aten.where.self(lt_scalar, add_tensor, y_1)
head_stats_default = lce_inductor.head_stats(x_1, w_1, None, [where_self], [-9223372036854775808], None, '', 2, 0, 1610612736)
arange = aten.arange(24, device=device(type='cpu'), pin_memory=False)
unsqueeze_default = aten.unsqueeze(head_stats_default[1][..., 0], -1)
squeeze_dim = aten.squeeze.dim(unsqueeze_default, 1)
_to_copy_default = aten._to_copy(squeeze_dim, dtype=torch.float32)
mean = aten.mean(_to_copy_default)
return mean
""",
    )
