"""Plan -> graph: what the recognise stage writes in place of a head, and what it leaves as it was.

To accept a wanted change of these graphs: EXPECTTEST_ACCEPT=1 python -m pytest tests/test_rewrite.py
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from harness import (
    V,
    dynamo_graph,
    head,
    listing,
    rewrite,
    symbolic_graph,
)
from lce_inductor.recognize import recognize
from torch import Tensor, nn

from lce_inductor import Config
from lce_inductor.ops import schema  # noqa: F401  (registers the ops)

Fn = Callable[..., Tensor]


def three(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """x [4, 6, H] and target [4, 6]."""
    return x.detach().reshape(4, 6, -1).requires_grad_(x.requires_grad), target.reshape(4, 6)


class Model(nn.Module):
    """Leaf modules in a symbolic trace."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, V)
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.head(self.norm(x)), target)


def before_and_after(gm: torch.fx.GraphModule, **settings: object) -> str:
    before = listing(gm)
    assert rewrite(gm, **settings) == ["rewritten"]
    return f"{before}\n->\n{listing(gm)}\n"


def show(fn: Fn, *args: Tensor) -> str:
    return before_and_after(dynamo_graph(fn, *args))


def test_graph_of_linear_and_cross_entropy():
    x, w, y = head()
    assert_expected_inline(
        show(lambda x, w, y: F.cross_entropy(F.linear(x, w), y), x, w, y),
        """\
linear = linear(x, w)
cross_entropy = cross_entropy(linear, y)
return (cross_entropy)
->
head_stats_default = lce_inductor.head_stats(x, w, None, [y], [-100], None, '', 3, 0, 1610612736)
cross_entropy_default = lce_inductor.cross_entropy(head_stats_default[0], head_stats_default[1][..., 0], None, y, None, 'mean', -100, 0.0, 37, torch.float32)
return (cross_entropy_default)
""",
    )


def test_graph_of_bias_weights_and_smoothing():
    x, w, y = head()
    b, c = torch.zeros(V, requires_grad=True), torch.ones(V)
    assert_expected_inline(
        show(lambda x, w, b, y, c: F.cross_entropy(F.linear(x, w, b), y, c, label_smoothing=0.1), x, w, b, y, c),
        """\
linear = linear(x, w, b)
cross_entropy = cross_entropy(linear, y, c, label_smoothing=0.1)
return (cross_entropy)
->
head_stats_default = lce_inductor.head_stats(x, w, b, [y], [-100], c, '', 7, 0, 1610612736)
cross_entropy_default = lce_inductor.cross_entropy(head_stats_default[0], head_stats_default[1][..., 0], head_stats_default[2], y, c, 'mean', -100, 0.1, 37, torch.float32)
return (cross_entropy_default)
""",
    )


def test_graph_of_transposed_last_dimensions():
    """What is written; the attribute itself is another node from torch 2.14 on."""
    x, w, y = head()
    x, y = three(x, y)
    written = show(lambda x, w, y: F.cross_entropy((x @ w.mT).mT, y), x, w, y).partition("->\n")[2]
    assert_expected_inline(
        "".join(line for line in written.splitlines(True) if not line.startswith(("getattr", "m_t"))),
        """\
head_stats_default = lce_inductor.head_stats(x, w, None, [y], [-100], None, '', 3, 0, 1610612736)
cross_entropy_default = lce_inductor.cross_entropy(head_stats_default[0], head_stats_default[1][..., 0], None, y, None, 'mean', -100, 0.0, 37, torch.float32)
return (cross_entropy_default)
""",
    )


def test_graph_of_matmul_with_the_transposed_weight():
    x, w, y = head()
    assert_expected_inline(
        show(lambda x, w, y: F.cross_entropy(x @ w.t(), y, reduction="sum"), x, w, y),
        """\
t = .t(w)
matmul = matmul(x, t)
cross_entropy = cross_entropy(matmul, y, reduction='sum')
return (cross_entropy)
->
t = .t(w)
head_stats_default = lce_inductor.head_stats(x, w, None, [y], [-100], None, '', 3, 0, 1610612736)
cross_entropy_default = lce_inductor.cross_entropy(head_stats_default[0], head_stats_default[1][..., 0], None, y, None, 'sum', -100, 0.0, 37, torch.float32)
return (cross_entropy_default)
""",
    )


def test_graph_of_matmul_with_a_weight_of_h_times_v():
    x, w, y = head()
    assert_expected_inline(
        show(lambda x, w, y: F.cross_entropy(x @ w, y), x, w.detach().t().contiguous().requires_grad_(), y),
        """\
matmul = matmul(x, w)
cross_entropy = cross_entropy(matmul, y)
return (cross_entropy)
->
t_default = aten.t(w)
head_stats_default = lce_inductor.head_stats(x, t_default, None, [y], [-100], None, '', 3, 0, 1610612736)
cross_entropy_default = lce_inductor.cross_entropy(head_stats_default[0], head_stats_default[1][..., 0], None, y, None, 'mean', -100, 0.0, 37, torch.float32)
return (cross_entropy_default)
""",
    )


def test_graph_of_addmm():
    x, w, y = head()
    b = torch.zeros(V, requires_grad=True)
    assert_expected_inline(
        show(lambda x, w, b, y: F.cross_entropy(torch.addmm(b, x, w.t()), y), x, w, b, y),
        """\
t = .t(w)
addmm = addmm(b, x, t)
cross_entropy = cross_entropy(addmm, y)
return (cross_entropy)
->
t = .t(w)
head_stats_default = lce_inductor.head_stats(x, w, b, [y], [-100], None, '', 3, 0, 1610612736)
cross_entropy_default = lce_inductor.cross_entropy(head_stats_default[0], head_stats_default[1][..., 0], None, y, None, 'mean', -100, 0.0, 37, torch.float32)
return (cross_entropy_default)
""",
    )


def test_graph_of_einsum():
    x, w, y = head()
    assert_expected_inline(
        show(lambda x, w, y: F.cross_entropy(torch.einsum("nh,vh->nv", x, w), y), x, w, y),
        """\
einsum = einsum('nh,vh->nv', x, w)
cross_entropy = cross_entropy(einsum, y)
return (cross_entropy)
->
head_stats_default = lce_inductor.head_stats(x, w, None, [y], [-100], None, '', 3, 0, 1610612736)
cross_entropy_default = lce_inductor.cross_entropy(head_stats_default[0], head_stats_default[1][..., 0], None, y, None, 'mean', -100, 0.0, 37, torch.float32)
return (cross_entropy_default)
""",
    )


def test_graph_of_casts_and_views():
    x, w, y = head()
    x3, y3 = three(x, y)
    assert_expected_inline(
        show(lambda x, w, y: F.cross_entropy(F.linear(x, w).float().contiguous().view(-1, V), y.view(-1)), x3, w, y3),
        """\
linear = linear(x, w)
float_1 = .float(linear)
contiguous = .contiguous(float_1)
view = .view(contiguous, -1, 37)
view_1 = .view(y, -1)
cross_entropy = cross_entropy(view, view_1)
return (cross_entropy)
->
view_1 = .view(y, -1)
head_stats_default = lce_inductor.head_stats(x, w, None, [view_1], [-100], None, '', 3, 0, 1610612736)
cross_entropy_default = lce_inductor.cross_entropy(head_stats_default[0], head_stats_default[1][..., 0], None, view_1, None, 'mean', -100, 0.0, 37, torch.float32)
return (cross_entropy_default)
""",
    )


def test_graph_of_a_row_slice():
    x, w, y = head()
    x3, y3 = three(x, y)
    assert_expected_inline(
        show(lambda x, w, y: F.cross_entropy(F.linear(x, w)[:, :-1].reshape(-1, V), y[:, 1:].reshape(-1)), x3, w, y3),
        """\
linear = linear(x, w)
getitem = getitem(linear, (slice(None, None, None), slice(None, -1, None)))
reshape = .reshape(getitem, -1, 37)
getitem_1 = getitem(y, (slice(None, None, None), slice(1, None, None)))
reshape_1 = .reshape(getitem_1, -1)
cross_entropy = cross_entropy(reshape, reshape_1)
return (cross_entropy)
->
getitem_1 = getitem(y, (slice(None, None, None), slice(1, None, None)))
reshape_1 = .reshape(getitem_1, -1)
getitem_2 = getitem(x, (slice(None, None, None), slice(None, -1, None)))
head_stats_default = lce_inductor.head_stats(getitem_2, w, None, [reshape_1], [-100], None, '', 3, 0, 1610612736)
cross_entropy_default = lce_inductor.cross_entropy(head_stats_default[0], head_stats_default[1][..., 0], None, reshape_1, None, 'mean', -100, 0.0, 37, torch.float32)
return (cross_entropy_default)
""",
    )


def test_graph_of_a_class_dimension_in_the_middle():
    x, w, y = head()
    x3, y3 = three(x, y)
    assert_expected_inline(
        show(lambda x, w, y: F.cross_entropy(F.linear(x, w).transpose(1, 2), y, reduction="none"), x3, w, y3),
        """\
linear = linear(x, w)
transpose = .transpose(linear, 1, 2)
cross_entropy = cross_entropy(transpose, y, reduction='none')
return (cross_entropy)
->
head_stats_default = lce_inductor.head_stats(x, w, None, [y], [-100], None, '', 3, 0, 1610612736)
cross_entropy_default = lce_inductor.cross_entropy(head_stats_default[0], head_stats_default[1][..., 0], None, y, None, 'none', -100, 0.0, 37, torch.float32)
return (cross_entropy_default)
""",
    )


def test_graph_of_log_softmax_and_nll_loss():
    x, w, y = head()
    assert_expected_inline(
        show(lambda x, w, y: F.nll_loss(F.log_softmax(F.linear(x, w), -1), y), x, w, y),
        """\
linear = linear(x, w)
log_softmax = log_softmax(linear, -1)
nll_loss = nll_loss(log_softmax, y)
return (nll_loss)
->
head_stats_default = lce_inductor.head_stats(x, w, None, [y], [-100], None, '', 3, 0, 1610612736)
cross_entropy_default = lce_inductor.cross_entropy(head_stats_default[0], head_stats_default[1][..., 0], None, y, None, 'mean', -100, 0.0, 37, torch.float32)
return (cross_entropy_default)
""",
    )


def test_graph_of_a_target_computed_after_the_linear():
    """What computes the target moves up to the linear."""
    x, w, y = head()

    def fn(x, w, y):
        z = F.linear(x, w)
        labels = torch.where(y > 3, y, -100)
        return F.cross_entropy(z, labels)

    assert_expected_inline(
        show(fn, x, w, y),
        """\
z = linear(x, w)
gt = gt(y, 3)
labels = where(gt, y, -100)
cross_entropy = cross_entropy(z, labels)
return (cross_entropy)
->
gt = gt(y, 3)
labels = where(gt, y, -100)
head_stats_default = lce_inductor.head_stats(x, w, None, [labels], [-100], None, '', 3, 0, 1610612736)
cross_entropy_default = lce_inductor.cross_entropy(head_stats_default[0], head_stats_default[1][..., 0], None, labels, None, 'mean', -100, 0.0, 37, torch.float32)
return (cross_entropy_default)
""",
    )


def test_graph_of_two_losses_on_one_head():
    """One head_stats serves both."""
    x, w, y = head()

    def fn(x, w, y):
        z = F.linear(x, w)
        return F.cross_entropy(z, y) + F.cross_entropy(z, y.roll(1), reduction="sum")

    assert_expected_inline(
        show(fn, x, w, y),
        """\
z = linear(x, w)
cross_entropy = cross_entropy(z, y)
roll = .roll(y, 1)
cross_entropy_1 = cross_entropy(z, roll, reduction='sum')
add = add(cross_entropy, cross_entropy_1)
return (add)
->
roll = .roll(y, 1)
head_stats_default = lce_inductor.head_stats(x, w, None, [y, roll], [-100, -100], None, '', 3, 0, 1610612736)
cross_entropy_default = lce_inductor.cross_entropy(head_stats_default[0], head_stats_default[1][..., 0], None, y, None, 'mean', -100, 0.0, 37, torch.float32)
cross_entropy_default_1 = lce_inductor.cross_entropy(head_stats_default[0], head_stats_default[1][..., 1], None, roll, None, 'sum', -100, 0.0, 37, torch.float32)
add = add(cross_entropy_default, cross_entropy_default_1)
return (add)
""",
    )


def test_graph_of_leaf_modules():
    x, _, y = head()
    assert_expected_inline(
        before_and_after(symbolic_graph(Model(), x.detach(), y)),
        """\
norm = self.norm(x)
head = self.head(norm)
loss = self.loss(head, target)
return loss
->
norm = self.norm(x)
head_stats_default = lce_inductor.head_stats(norm, head.weight, head.bias, [target], [-100], None, '', 7, 0, 1610612736)
cross_entropy_default = lce_inductor.cross_entropy(head_stats_default[0], head_stats_default[1][..., 0], head_stats_default[2], target, None, 'mean', -100, 0.1, 37, torch.float32)
return cross_entropy_default
""",
    )


def statistics(fn: Fn) -> str:
    x, w, y = head()
    return show(lambda x, w, y: fn(F.linear(x, w), y.clamp(min=0)), x, w, y).partition("->\n")[2]


def test_graph_of_logsumexp():
    assert_expected_inline(
        statistics(lambda z, y: z.logsumexp(-1).square().mean()),
        """\
head_stats_default = lce_inductor.head_stats(x, w, None, [], [], None, '', 1, 0, 1610612736)
clamp = .clamp(y, min=0)
unsqueeze_default = aten.unsqueeze(head_stats_default[0], -1)
squeeze_dim = aten.squeeze.dim(unsqueeze_default, 1)
_to_copy_default = aten._to_copy(squeeze_dim, dtype=torch.float32)
square = .square(_to_copy_default)
mean = .mean(square)
return (mean)
""",
    )


def test_graph_of_gathered_log_probabilities():
    assert_expected_inline(
        statistics(lambda z, y: z.log_softmax(-1).gather(-1, y[:, None]).squeeze(-1)),
        """\
clamp = .clamp(y, min=0)
getitem = getitem(clamp, (slice(None, None, None), None))
select_int = aten.select.int(getitem, 1, 0)
head_stats_default = lce_inductor.head_stats(x, w, None, [select_int], [-9223372036854775808], None, '', 3, 0, 1610612736)
unsqueeze_default = aten.unsqueeze(head_stats_default[1][..., 0], -1)
unsqueeze_default_1 = aten.unsqueeze(head_stats_default[0], -1)
neg_default = aten.neg(unsqueeze_default_1)
add_tensor = aten.add.Tensor(unsqueeze_default, neg_default)
_to_copy_default = aten._to_copy(add_tensor, dtype=torch.float32)
squeeze = .squeeze(_to_copy_default, -1)
return (squeeze)
""",
    )


def test_graph_of_argmax():
    """The index alone; nobody needs a gradient of it."""
    assert_expected_inline(
        statistics(lambda z, y: z.argmax(-1)),
        """\
head_stats_default = lce_inductor.head_stats(x, w, None, [], [], None, '', 32, 0, 1610612736)
clamp = .clamp(y, min=0)
unsqueeze_default = aten.unsqueeze(head_stats_default[5], -1)
squeeze_dim = aten.squeeze.dim(unsqueeze_default, 1)
clone_default = aten.clone(squeeze_dim)
return (clone_default)
""",
    )


def test_graph_of_entropy():
    assert_expected_inline(
        statistics(lambda z, y: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)),
        """\
head_stats_default = lce_inductor.head_stats(x, w, None, [], [], None, '', 9, 0, 1610612736)
clamp = .clamp(y, min=0)
unsqueeze_default = aten.unsqueeze(head_stats_default[3], -1)
squeeze_dim = aten.squeeze.dim(unsqueeze_default, 1)
_to_copy_default = aten._to_copy(squeeze_dim, dtype=torch.float32)
neg = neg(_to_copy_default)
return (neg)
""",
    )


def test_graph_of_softcap():
    """Elementwise steps become the op's epilogue."""
    assert_expected_inline(
        statistics(lambda z, y: F.cross_entropy(30 * torch.tanh(z / 30), y)),
        """\
clamp = .clamp(y, min=0)
head_stats_default = lce_inductor.head_stats(x, w, None, [clamp], [-100], None, 'div 30.0;tanh;mul 30.0', 3, 0, 1610612736)
cross_entropy_default = lce_inductor.cross_entropy(head_stats_default[0], head_stats_default[1][..., 0], None, clamp, None, 'mean', -100, 0.0, 37, torch.float32)
return (cross_entropy_default)
""",
    )


def test_graph_of_a_temperature_in_place():
    assert_expected_inline(
        statistics(lambda z, y: F.cross_entropy(z.div_(0.7), y)),
        """\
clamp = .clamp(y, min=0)
head_stats_default = lce_inductor.head_stats(x, w, None, [clamp], [-100], None, 'div 0.7', 3, 0, 1610612736)
cross_entropy_default = lce_inductor.cross_entropy(head_stats_default[0], head_stats_default[1][..., 0], None, clamp, None, 'mean', -100, 0.0, 37, torch.float32)
return (cross_entropy_default)
""",
    )


def test_graph_of_a_class_slice():
    """Padded classes are cut off the weight."""
    assert_expected_inline(
        statistics(lambda z, y: F.cross_entropy(z[..., :30], y.clamp(max=29))),
        """\
clamp = .clamp(y, min=0)
clamp_1 = .clamp(clamp, max=29)
slice_tensor = aten.slice.Tensor(w, 0, 0, 30)
head_stats_default = lce_inductor.head_stats(x, slice_tensor, None, [clamp_1], [-100], None, '', 3, 0, 1610612736)
cross_entropy_default = lce_inductor.cross_entropy(head_stats_default[0], head_stats_default[1][..., 0], None, clamp_1, None, 'mean', -100, 0.0, 30, torch.float32)
return (cross_entropy_default)
""",
    )


def test_settings_reach_the_op():
    x, w, y = head()
    gm = dynamo_graph(lambda x, w, y: F.cross_entropy(F.linear(x, w), y), x, w, y)
    recognize(gm.graph, Config(min_logits_bytes=0, chunk_tokens=7, workspace_bytes=12345))
    (stats,) = gm.graph.find_nodes(op="call_function", target=torch.ops.lce_inductor.head_stats.default)
    assert stats.args[-2:] == (7, 12345)
