"""Graphs that are not functional: in-place changes, grad mode, autocast. Never wrong, rewritten or not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from harness import Compiled, N, V, assert_same_bits, check_against_eager, dynamo_graph, fresh, head, results, rewrite
from torch import Tensor

import lce_inductor
from lce_inductor.ops import schema  # noqa: F401  (registers the ops)

Fn = Callable[..., Tensor]
CASES: dict[str, tuple[Fn, bool | None]] = {}


def case(rewritten: bool | None = None) -> Callable[[Fn], Fn]:
    """A function of x, weight, target; is it rewritten (None: either is right)?"""

    def register(fn: Fn) -> Fn:
        CASES[fn.__name__] = (fn, rewritten)
        return fn

    return register


# -- the logits or an alias of them change


@case()
def divided_in_place(x, w, y):
    z = F.linear(x, w)
    z.div_(2.0)
    return F.cross_entropy(z, y)


@case()
def divided_after_the_view(x, w, y):
    z = F.linear(x, w)
    flat = z.view(-1, V)
    z.div_(2.0)
    return F.cross_entropy(flat, y)


@case()
def divided_through_the_view(x, w, y):
    z = F.linear(x, w)
    z.view(-1, V).div_(2.0)
    return F.cross_entropy(z, y)


@case()
def divided_between_two_losses(x, w, y):
    z = F.linear(x, w)
    first = F.cross_entropy(z.clone(), y)
    z /= 2.0
    return first + F.cross_entropy(z, y)


@case()
def divided_after_a_copy(x, w, y):
    z = F.linear(x, w)
    copy = z.clone()
    z *= 3.0
    return F.cross_entropy(copy, y) + F.cross_entropy(z, y)


@case()
def copy_divided(x, w, y):
    z = F.linear(x, w)
    copy = z.clone()
    copy *= 3.0
    return F.cross_entropy(copy, y) + F.cross_entropy(z, y)


@case()
def float_of_float_divided(x, w, y):
    """`.float()` of fp32 is the tensor itself."""
    z = F.linear(x, w)
    z.float().mul_(2.0)
    return F.cross_entropy(z, y)


@case()
def contiguous_divided(x, w, y):
    """`.contiguous()` of contiguous logits is the tensor itself."""
    z = F.linear(x, w)
    z.contiguous().mul_(2.0)
    return F.cross_entropy(z, y)


@case()
def to_the_same_dtype_divided(x, w, y):
    z = F.linear(x, w)
    z.to(torch.float32).mul_(2.0)
    return F.cross_entropy(z, y)


@case()
def reshape_divided(x, w, y):
    z = F.linear(x, w)
    z.reshape(4, 6, V).mul_(2.0)
    return F.cross_entropy(z, y)


@case()
def added_operator(x, w, y):
    z = F.linear(x, w)
    z += 1.0
    z -= x.sum(1, keepdim=True)
    return F.cross_entropy(z, y)


@case()
def added_bias(x, w, y):
    z = F.linear(x, w)
    z += w.sum(1)
    return F.cross_entropy(z, y)


@case()
def class_columns_set(x, w, y):
    z = F.linear(x, w)
    z[:, 30:] = -1e4
    return F.cross_entropy(z, y.clamp(max=29))


@case()
def class_columns_filled_through_a_slice(x, w, y):
    z = F.linear(x, w)
    z[:, 30:].fill_(-1e4)
    return F.cross_entropy(z, y.clamp(max=29))


@case()
def row_set(x, w, y):
    z = F.linear(x, w)
    z[0] = 0.0
    return F.cross_entropy(z, y)


@case()
def row_zeroed_through_select(x, w, y):
    z = F.linear(x, w)
    z[0].zero_()
    return F.cross_entropy(z, y)


@case()
def part_of_the_flat_view(x, w, y):
    z = F.linear(x, w)
    z.view(-1)[:50].mul_(3.0)
    return F.cross_entropy(z, y)


@case()
def masked_fill(x, w, y):
    z = F.linear(x, w)
    z.masked_fill_(z > 2, 2.0)
    return F.cross_entropy(z, y)


@case()
def index_fill(x, w, y):
    z = F.linear(x, w)
    z.index_fill_(1, torch.tensor([3, 4]), -100.0)
    return F.cross_entropy(z, y)


@case()
def scattered(x, w, y):
    z = F.linear(x, w)
    z.scatter_(1, y.clamp(min=0).unsqueeze(1), 0.5)
    return F.cross_entropy(z, y)


@case()
def margin_at_the_target(x, w, y):
    z = F.linear(x, w)
    z[torch.arange(N), y.clamp(min=0)] -= 0.35
    return F.cross_entropy(z, y)


@case()
def relu_keyword(x, w, y):
    z = F.linear(x, w)
    F.relu(z, inplace=True)
    return F.cross_entropy(z, y)


@case()
def relu_positional(x, w, y):
    z = F.linear(x, w)
    F.relu(z, True)
    return F.cross_entropy(z, y)


@case()
def dropout_in_place(x, w, y):
    z = F.linear(x, w)
    F.dropout(z, 0.0, True, True)
    return F.cross_entropy(z, y)


@case()
def clamped(x, w, y):
    z = F.linear(x, w)
    torch.clamp_(z, -1, 1)
    return F.cross_entropy(z, y)


@case()
def detached_alias(x, w, y):
    z = F.linear(x, w)
    z.detach().mul_(2.0)
    return F.cross_entropy(z, y)


@case()
def data_alias(x, w, y):
    z = F.linear(x, w)
    z.data.mul_(2.0)
    return F.cross_entropy(z, y)


@case()
def transposed_alias(x, w, y):
    z = F.linear(x, w)
    z.t().mul_(2.0)
    return F.cross_entropy(z, y)


@case()
def transposed_alias_part(x, w, y):
    z = F.linear(x, w)
    z.transpose(0, 1)[3].zero_()
    return F.cross_entropy(z, y)


@case()
def diagonal_alias(x, w, y):
    z = F.linear(x, w)
    z.diagonal().zero_()
    return F.cross_entropy(z, y)


@case()
def out_of_another_operation(x, w, y):
    z = F.linear(x, w).detach()
    torch.mul(z, 2.0, out=z)
    return F.cross_entropy(z, y) + x.sum()


@case()
def log_softmax_changed(x, w, y):
    p = F.linear(x, w).detach().log_softmax(-1)
    p.mul_(0.5)
    return F.nll_loss(p, y) + x.sum()


@case()
def log_softmax_changed_by_class(x, w, y):
    p = F.linear(x, w).detach().log_softmax(-1)
    p[:, 3] = -1.0
    return F.nll_loss(p, y) + x.sum()


@case()
def logits_changed_after_log_softmax(x, w, y):
    z = F.linear(x, w)
    p = z.log_softmax(-1)
    z.mul_(0.5)
    return F.nll_loss(p, y) + F.cross_entropy(z, y)


@case()
def changed_after_the_loss(x, w, y):
    z = F.linear(x, w)
    loss = F.cross_entropy(z, y)
    z.detach().mul_(0.0)
    return loss


@case()
def changed_twice(x, w, y):
    z = F.linear(x, w)
    z.mul_(0.5)
    first = F.cross_entropy(z.clone(), y)
    z.add_(w.sum(1))
    return first + F.cross_entropy(z, y, reduction="sum")


@case()
def swapped_buffers(x, w, y):
    """Another tensor is filled with the logits, and the logits with zeros."""
    z = F.linear(x, w)
    kept = torch.empty_like(z).copy_(z)
    z.zero_()
    return F.cross_entropy(kept, y) + F.cross_entropy(z, y)


# -- inputs of the head or of the loss change


@case()
def labels_changed_before_the_loss(x, w, y):
    z = F.linear(x, w)
    y.fill_(3)
    return F.cross_entropy(z, y)


@case()
def labels_changed_twice(x, w, y):
    z = F.linear(x, w)
    y.fill_(3)
    first = F.cross_entropy(z, y.clone())
    y[::2] = 5
    return first + F.cross_entropy(z, y)


@case()
def labels_clone_changed(x, w, y):
    z = F.linear(x, w)
    labels = y.clone()
    labels[0] = -100
    return F.cross_entropy(z, labels)


@case()
def labels_rolled_and_changed(x, w, y):
    z = F.linear(x, w)
    labels = y.roll(1)
    labels[-1] = -100
    return F.cross_entropy(z, labels)


@case(rewritten=True)
def labels_computed_after_the_linear(x, w, y):
    z = F.linear(x, w)
    labels = torch.where(y > 5, y, -100)
    return F.cross_entropy(z, labels)


@case()
def pseudo_labels(x, w, y):
    z = F.linear(x, w)
    return F.cross_entropy(z, z.argmax(-1))


@case()
def pseudo_labels_without_grad(x, w, y):
    z = F.linear(x, w)
    with torch.no_grad():
        labels = z.softmax(-1).argmax(-1)
    return F.cross_entropy(z, labels)


@case()
def labels_masked_by_confidence(x, w, y):
    z = F.linear(x, w)
    with torch.no_grad():
        unsure = z.max(-1).values < 2
    return F.cross_entropy(z, torch.where(unsure, -100, y))


@case()
def class_weights_from_the_logits(x, w, y):
    z = F.linear(x, w)
    return F.cross_entropy(z, y, z.detach().mean(0).exp())


@case(rewritten=True)
def class_weights_after_the_linear(x, w, y):
    z = F.linear(x, w)
    return F.cross_entropy(z, y, torch.ones(V, dtype=x.dtype) * 2, label_smoothing=0.1)


@case()
def class_weights_changed(x, w, y):
    c = torch.ones(V, dtype=x.dtype)
    z = F.linear(x, w)
    first = F.cross_entropy(z, y, c.clone())
    c[3] = 5.0
    return first + F.cross_entropy(z, y, c)


# -- the loss changes


@case(rewritten=True)
def loss_added_to(x, w, y):
    loss = F.cross_entropy(F.linear(x, w), y)
    loss += x.sum()
    return loss


@case(rewritten=True)
def loss_multiplied(x, w, y):
    loss = F.cross_entropy(F.linear(x, w), y)
    loss.mul_(3.0)
    return loss * 2


@case(rewritten=True)
def total_added_to(x, w, y):
    total = x.square().sum()
    total += F.cross_entropy(F.linear(x, w), y)
    return total


@case(rewritten=True)
def loss_rows_set(x, w, y):
    loss = F.cross_entropy(F.linear(x, w), y, reduction="none")
    loss[y == 3] = 0.0
    loss[0] = 1.0
    return loss.sum()


@case(rewritten=True)
def loss_rows_masked(x, w, y):
    loss = F.cross_entropy(F.linear(x, w), y, reduction="none")
    loss.masked_fill_(loss > 5, 0.0)
    return loss.mean()


# -- grad mode


@case(rewritten=True)
def loss_without_grad(x, w, y):
    z = F.linear(x, w)
    with torch.no_grad():
        loss = F.cross_entropy(z, y)
    return loss + x.sum()


@case(rewritten=True)
def one_loss_without_grad(x, w, y):
    z = F.linear(x, w)
    with torch.no_grad():
        metric = F.cross_entropy(z, y)
    return metric + F.cross_entropy(z, y, reduction="sum")


@case(rewritten=True)
def one_loss_detached(x, w, y):
    z = F.linear(x, w)
    return F.cross_entropy(z.detach(), y) + F.cross_entropy(z, y, reduction="sum")


@case(rewritten=True)
def linear_without_grad(x, w, y):
    with torch.no_grad():
        z = F.linear(x, w)
    return F.cross_entropy(z, y) + x.sum()


@case()
def labels_without_grad_between(x, w, y):
    z = F.linear(x, w)
    with torch.no_grad():
        labels = y.clone()
        scale = x.mean().abs() * 0 + 1
    return F.cross_entropy(z * scale, labels)


@case(rewritten=True)
def grad_enabled_inside_no_grad(x, w, y):
    with torch.no_grad():
        aux = F.cross_entropy(F.linear(x, w), y)
        with torch.enable_grad():
            loss = F.cross_entropy(F.linear(x, w), y, reduction="sum")
    return loss + aux


@case(rewritten=True)
def weight_detached(x, w, y):
    return F.cross_entropy(F.linear(x, w.detach()), y) + w.sum()


@case(rewritten=True)
def x_detached(x, w, y):
    return F.cross_entropy(F.linear(x.detach(), w), y) + x.sum()


@case(rewritten=True)
def log_probabilities_detached(x, w, y):
    p = F.linear(x, w).log_softmax(-1)
    return F.nll_loss(p.detach(), y) + F.nll_loss(p, y, reduction="sum")


# -- autocast


@case(rewritten=True)
def autocast_over_both(x, w, y):
    with torch.autocast("cpu", torch.bfloat16):
        return F.cross_entropy(F.linear(x, w), y)


@case(rewritten=True)
def autocast_over_the_linear(x, w, y):
    with torch.autocast("cpu", torch.bfloat16):
        z = F.linear(x, w)
    return F.cross_entropy(z.float(), y)


@case(rewritten=True)
def autocast_over_the_linear_loss_in_bf16(x, w, y):
    with torch.autocast("cpu", torch.bfloat16):
        z = F.linear(x, w)
    return F.cross_entropy(z, y, reduction="none")


@case(rewritten=True)
def autocast_over_the_loss(x, w, y):
    z = F.linear(x, w)
    with torch.autocast("cpu", torch.bfloat16):
        return F.cross_entropy(z, y)


@case(rewritten=True)
def autocast_switched_off_inside(x, w, y):
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        return F.cross_entropy(F.linear(x, w), y)


@case(rewritten=True)
def autocast_log_softmax(x, w, y):
    with torch.autocast("cpu", torch.bfloat16):
        return F.nll_loss(F.log_softmax(F.linear(x, w), -1), y, reduction="none")


@case()
def autocast_matmul_and_bias(x, w, y):
    with torch.autocast("cpu", torch.bfloat16):
        return F.cross_entropy(x @ w.T + w.sum(1), y)


@case(rewritten=True)
def autocast_fp16(x, w, y):
    with torch.autocast("cpu", torch.float16):
        return F.cross_entropy(F.linear(x, w), y)


@case(rewritten=True)
def autocast_labels_after_the_block(x, w, y):
    """The target is computed outside: it may move into the block, the arithmetic of the loss may not."""
    with torch.autocast("cpu", torch.bfloat16):
        z = F.linear(x, w)
    labels = torch.where(y > 5, y, -100)
    return F.cross_entropy(z.float(), labels, reduction="none")


@case()
def autocast_class_weights(x, w, y):
    with torch.autocast("cpu", torch.bfloat16):
        z = F.linear(x, w)
        c = (w @ w.T).diagonal().detach().abs()
    return F.cross_entropy(z.float(), y, c.float(), label_smoothing=0.1)


@pytest.mark.parametrize("name", CASES)
def test_right_either_way(name, installed):
    fn, rewritten = CASES[name]
    compiled = check_against_eager(fn, head())
    assert "internal-error" not in compiled.refusals
    if rewritten:
        assert compiled.counts["rewritten"] and not compiled.refusals
        assert compiled.largest < N * V


@pytest.mark.parametrize("name", CASES)
def test_right_in_the_torch_level_graph(name):
    """The rewritten graph, interpreted with its side effects, before AOTAutograd makes it functional."""
    fn, _ = CASES[name]
    args = head()
    gm = dynamo_graph(lambda x, w, y: fn(x, w, y), *fresh(args))
    order = ["xwy".index(n.target.removeprefix("L_").removesuffix("_")) for n in gm.graph.find_nodes(op="placeholder")]

    def run(*values: Tensor) -> Tensor:
        return gm(*(values[i] for i in order))

    unchanged = results(run, fresh(args))
    before = str(gm.graph)
    found = rewrite(gm)
    rewritten = results(run, fresh(args))
    if "rewritten" in found:
        assert str(gm.graph) != before
        for f, e in zip(rewritten, unchanged, strict=True):
            bf16 = "autocast" in name
            torch.testing.assert_close(f, e, rtol=2e-2 if bf16 else 1e-4, atol=3e-2 if bf16 else 1e-5)
    else:
        assert str(gm.graph) == before
        assert_same_bits(rewritten, unchanged)


# -- x or weight change between the linear and the loss


def x_changed(x, w, y):
    z = F.linear(x, w)
    x.mul_(2.0)
    return F.cross_entropy(z, y)


def weight_changed(x, w, y):
    z = F.linear(x, w)
    w.mul_(2.0)
    return F.cross_entropy(z, y)


def weight_changed_after_the_loss(x, w, y):
    loss = F.cross_entropy(F.linear(x, w), y)
    w.zero_()
    return loss


def all_changed(x, w, y):
    """Not even the first loss can be computed at the second."""
    z = F.linear(x, w)
    x.zero_()
    w.zero_()
    y.fill_(1)
    return F.cross_entropy(z, y)


def labels_need_what_changed_x(x, w, y):
    z = F.linear(x, w)
    x.mul_(2.0)
    return F.cross_entropy(z, (x.sum(1) > 0).long())


@pytest.mark.parametrize(
    "fn", [x_changed, weight_changed, weight_changed_after_the_loss, all_changed, labels_need_what_changed_x]
)
@pytest.mark.parametrize("changes", ["inputs", "values of the graph"])
def test_inputs_of_the_linear_change(fn, changes, installed):
    x, w, y = head()

    def computed(x, w, y):
        """x and w are values of this graph."""
        with torch.no_grad():
            return fn(x * 1.0, w * 1.0, y * 1)

    args = [x.detach(), w.detach(), y]
    compiled = check_against_eager(fn if changes == "inputs" else computed, args)
    assert "internal-error" not in compiled.refusals


@pytest.mark.parametrize("package", [False, True], ids=["plain", "installed"])
@pytest.mark.parametrize("fn", [x_changed, weight_changed])
def test_a_change_that_autograd_forbids_stays_forbidden(fn, package):
    """The backward needs the old value: eager raises, torch.compile raises, so do we."""
    x, w, y = head()

    def scaled(x, w, y):
        return fn(x * 1.0, w * 1.0, y)

    if package:
        lce_inductor.install(min_logits_bytes=0)
    for run in (scaled, torch.compile(scaled, backend="aot_eager" if not package else "inductor")):
        with pytest.raises(Exception, match="modified by an inplace operation"):
            run(x, w, y).backward()


def test_random_numbers_keep_their_order(installed):
    """Labels drawn after the linear: the same seed gives the same labels, and the same numbers to later code."""
    x, w, _ = head()

    def fn(x, w):
        noise = torch.rand(3)
        z = F.linear(x, w)
        labels = torch.randint(0, V, (N,))
        return F.cross_entropy(z, labels), labels, noise, torch.rand(2)

    from torch._inductor import config

    with config.patch(fallback_random=True):
        compiled = Compiled(fn)
        torch.manual_seed(7)
        loss, *found = compiled(x, w)
        torch.manual_seed(7)
        expected, *drawn = fn(x, w)
    torch.testing.assert_close(loss, expected)
    assert_same_bits(found, drawn)


def test_autocast_around_the_compiled_function(installed):
    """The dtypes come from the ambient state, and the state may change between calls."""
    args = head()
    compiled = Compiled(lambda x, w, y: F.cross_entropy(F.linear(x, w), y, reduction="none"))
    eager = lambda x, w, y: F.cross_entropy(F.linear(x, w), y, reduction="none")
    for dtype in (None, torch.bfloat16, torch.float16, None):
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            found, expected = results(compiled, fresh(args)), results(eager, fresh(args))
        for f, e in zip(found, expected, strict=True):
            assert f.dtype == e.dtype
            torch.testing.assert_close(f, e, rtol=2e-2, atol=2e-2)
