"""Graphs that are not functional: in-place changes, grad mode, autocast. Never wrong, rewritten or not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from effect_cases import CASES
from harness import (
    Compiled,
    N,
    V,
    assert_same_bits,
    check_against_eager,
    check_graph,
    fresh,
    head,
    joint_graph,
    results,
)
from mode_cases import case  # noqa: F401  (registers its cases)

import lce_inductor


@pytest.mark.parametrize("name", CASES)
def test_right_either_way(name, installed):
    fn, rewritten = CASES[name]
    compiled = check_against_eager(fn, head())
    assert "internal-error" not in compiled.refusals
    if rewritten:
        assert compiled.counts["rewritten"] and not compiled.refusals
        assert compiled.largest < N * V


@pytest.mark.parametrize("name", CASES)
def test_right_in_the_graph(name):
    """The joint graph, in which changes in place have become values."""
    fn, rewritten = CASES[name]
    found = check_graph(joint_graph(fn, *head()))
    assert not rewritten or set(found) <= {"kernels", "region"}


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
