"""Plan -> graph: classes that are masked, log-probabilities taken apart, and offsets that cancel.

To accept a wanted change of these graphs: EXPECTTEST_ACCEPT=1 python -m pytest tests/test_rewrite_masks.py
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from harness import Compiled, V, check_against_eager, fresh, head
from test_rewrite import show, statistics


def test_graph_of_masked_classes():
    assert_expected_inline(
        statistics(lambda z, y: F.cross_entropy(z.masked_fill(torch.arange(V) > 29, -1e9), y)),
        """\
clamp = .clamp(y, min=0)
arange = arange(37)
gt = gt(arange, 29)
reshape_default = aten.reshape(gt, [-1])
full_default = aten.full([], -inf, device=device(type='cpu'))
where_scalar_other = aten.where.ScalarOther(reshape_default, full_default, 0.0)
head_stats_default = lce_inductor.head_stats(x, w, where_scalar_other, [clamp], [-100], None, '', 3, 0, 1610612736)
ge_scalar = aten.ge.Scalar(clamp, 0)
lt_scalar = aten.lt.Scalar(clamp, 37)
logical_and_default = aten.logical_and(ge_scalar, lt_scalar)
where_scalar_other_1 = aten.where.ScalarOther(logical_and_default, clamp, 0)
index_tensor = aten.index.Tensor(reshape_default, [where_scalar_other_1])
logical_and_default_1 = aten.logical_and(index_tensor, logical_and_default)
view_as_default = aten.view_as(logical_and_default_1, head_stats_default[1][..., 0])
masked_fill_scalar = aten.masked_fill.Scalar(head_stats_default[1][..., 0], view_as_default, -1000000000.0)
cross_entropy_default = lce_inductor.cross_entropy(head_stats_default[0], masked_fill_scalar, None, clamp, None, 'mean', -100, 0.0, 37, torch.float32)
return (cross_entropy_default)
""",
    )


def test_graph_of_a_difference_with_its_logsumexp():
    assert_expected_inline(
        statistics(lambda z, y: (z - z.logsumexp(-1, keepdim=True)).gather(-1, y[:, None])),
        """\
clamp = .clamp(y, min=0)
getitem = getitem(clamp, (slice(None, None, None), None))
select_int = aten.select.int(getitem, 1, 0)
head_stats_default = lce_inductor.head_stats(x, w, None, [select_int], [-9223372036854775808], None, '', 3, 0, 1610612736)
unsqueeze_default = aten.unsqueeze(head_stats_default[0], -1)
_to_copy_default = aten._to_copy(unsqueeze_default, dtype=torch.float32)
unsqueeze_default_1 = aten.unsqueeze(head_stats_default[1][..., 0], -1)
unsqueeze_default_2 = aten.unsqueeze(head_stats_default[0], -1)
neg_default = aten.neg(unsqueeze_default_2)
add_tensor = aten.add.Tensor(unsqueeze_default_1, neg_default)
_to_copy_default_1 = aten._to_copy(add_tensor, dtype=torch.float32)
return (_to_copy_default_1)
""",
    )


def test_graph_of_a_trained_offset_that_cancels():
    x, w, y = head()
    rows = torch.zeros(len(x), 1, requires_grad=True)
    assert_expected_inline(
        show(lambda x, w, rows, y: F.cross_entropy(F.linear(x, w) + rows, y), x, w, rows, y).partition("->\n")[2],
        """\
head_stats_default = lce_inductor.head_stats(x, w, None, [y], [-100], None, '', 3, 0, 1610612736)
cross_entropy_default = lce_inductor.cross_entropy(head_stats_default[0], head_stats_default[1][..., 0], None, y, None, 'mean', -100, 0.0, 37, torch.float32)
nan_to_num_default = aten.nan_to_num(rows)
mul_tensor = aten.mul.Tensor(nan_to_num_default, 0.0)
sum_default = aten.sum(mul_tensor)
type_as_default = aten.type_as(sum_default, cross_entropy_default)
add_tensor = aten.add.Tensor(cross_entropy_default, type_as_default)
return (add_tensor)
""",
    )


def test_graph_of_a_categorical():
    assert_expected_inline(
        statistics(lambda z, y: torch.distributions.Categorical(logits=z, validate_args=False).log_prob(y)),
        """\
clamp = .clamp(y, min=0)
long = .long(clamp)
value = .unsqueeze(long, -1)
select_int = aten.select.int(value, 1, 0)
head_stats_default = lce_inductor.head_stats(x, w, None, [select_int], [-9223372036854775808], None, '', 3, 0, 1610612736)
unsqueeze_default = aten.unsqueeze(head_stats_default[0], -1)
_to_copy_default = aten._to_copy(unsqueeze_default, dtype=torch.float32)
unsqueeze_default_1 = aten.unsqueeze(head_stats_default[1][..., 0], -1)
unsqueeze_default_2 = aten.unsqueeze(head_stats_default[0], -1)
neg_default = aten.neg(unsqueeze_default_2)
add_tensor = aten.add.Tensor(unsqueeze_default_1, neg_default)
_to_copy_default_1 = aten._to_copy(add_tensor, dtype=torch.float32)
squeeze = .squeeze(_to_copy_default_1, -1)
return (squeeze)
""",
    )


OFFSET_LOSSES = {
    "log_softmax": lambda z, y: -z.log_softmax(-1).gather(-1, y[:, None]).mean(),
    "cross_entropy": lambda z, y: F.cross_entropy(z, y),
    "maximum": lambda z, y: z.log_softmax(-1).max(-1).values.sum(),
}


@pytest.mark.parametrize("loss", OFFSET_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_trained_number_per_row_that_cancels_gets_zeros(dtype, loss, installed):
    x, w, y = head(dtype=dtype)
    rows = torch.linspace(-1, 1, len(x)).to(dtype)[:, None].requires_grad_()
    args = fresh((x, w, rows, y.clamp(min=0)))
    compiled = Compiled(lambda x, w, rows, y: OFFSET_LOSSES[loss](F.linear(x, w) + rows, y))
    found = compiled(*args)
    found.backward()
    assert compiled.counts["rewritten"] == 1
    assert found.dtype == dtype and args[2].grad is not None and not args[2].grad.any()


def test_an_infinite_offset_that_cancels_stays_out_of_the_other_rows(installed):
    x, w, y = head()
    rows = torch.zeros(len(x), 1)
    rows[3] = torch.inf
    args = fresh((x, w, rows.requires_grad_(), y))
    compiled = Compiled(lambda x, w, rows, y: F.cross_entropy(F.linear(x, w) + rows, y, reduction="none"))
    assert compiled(*args)[4:].isfinite().all()
    assert compiled.counts["rewritten"] == 1


def test_an_ignored_label_outside_the_vocabulary_beside_masked_classes(installed):
    x, w, y = head()
    y = torch.where(y < 0, 500, y)

    def loss(x, w, y):
        return F.cross_entropy(F.linear(x, w).masked_fill(torch.arange(V) > 29, -1e9), y, ignore_index=500)

    assert check_against_eager(loss, (x, w, y)).counts["rewritten"] == 1
