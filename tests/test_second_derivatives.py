"""Second derivatives: torch.compile has none, and says so. Nor have we, and never is one silently not there."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from harness import Compiled, head
from test_torch_features import H, loss_of, quick
from torch import Tensor
from turns import crossed

import lce_inductor

REFUSED = r"double backward|second derivatives"
V = 57
SIZES = {"body": (H, H), "weight": (V, H), "bias": (V,), "x": (24, H), "factor": (24,)}
Inputs = dict[str, Tensor]


def with_bias(p: Inputs, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(p["x"], p["weight"], p["bias"]), y)


# A loss, and what is differentiated.
LOSSES: dict[str, tuple[Callable[[Inputs, Tensor], Tensor], tuple[str, ...]]] = {
    "head": (with_bias, ("x", "weight", "bias")),
    "frozen input": (with_bias, ("weight", "bias")),
    "frozen weight": (with_bias, ("x", "bias")),
    "weight alone": (with_bias, ("weight",)),
    "input alone": (with_bias, ("x",)),
    "bias alone": (with_bias, ("bias",)),
    "body": (lambda p, y: F.cross_entropy(F.linear((p["x"] @ p["body"]).tanh(), p["weight"]), y), ("body", "weight")),
    "factor for each row": (
        lambda p, y: (F.cross_entropy(F.linear(p["x"], p["weight"]), y, reduction="none") * p["factor"]).sum(),
        ("x", "weight", "factor"),
    ),
    "not linear in lse": (lambda p, y: F.linear(p["x"], p["weight"]).logsumexp(-1).exp().mean(), ("x", "weight")),
}


@pytest.mark.parametrize("name, gradients, autocast", crossed([*LOSSES], ["auto", "recompute"], [False, True]))
def test_an_error_for_each_pair(name: str, gradients: str, autocast: bool) -> None:
    """Of each gradient with respect to each input, also where None would be allowed."""
    lce_inductor.install(min_logits_bytes=0, gradients=gradients)
    fn, wanted = LOSSES[name]
    g = torch.Generator().manual_seed(0)
    p = {n: torch.randn(size, generator=g).mul_(0.3).requires_grad_(n in wanted) for n, size in SIZES.items()}
    y, compiled = head(h=H, v=V)[2], Compiled(fn)
    for of, by, allow_unused in itertools.product(wanted, wanted, (False, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = compiled(p, y)
        (first,) = torch.autograd.grad(loss, p[of], create_graph=True)
        with pytest.raises(RuntimeError, match=REFUSED):
            torch.autograd.grad(first.square().sum(), p[by], allow_unused=allow_unused)
    assert compiled.counts["rewritten"]


@pytest.mark.parametrize("package", ["", "recompute", "auto"])
def test_an_error_where_gradients_are_part_of_a_loss(package: str) -> None:
    """The message is torch.compile's: with and without the package."""
    if package:
        lce_inductor.install(min_logits_bytes=0, gradients=package)
    x, w, y = head()
    run = quick(loss_of)
    loss = run(x, w, y)
    dx, dw = torch.autograd.grad(loss, (x, w), create_graph=True)
    for penalty in (dx.sum(), dw.square().mean(), loss + dx.norm() + dw.norm()):
        with pytest.raises(RuntimeError, match=REFUSED):
            penalty.backward(retain_graph=True)
    # Row by row, as a Hessian is made. (torch.autograd.functional passes views: torch.compile takes them for constants.)
    for g in (*dx.flatten()[:3], *dw.flatten()[:3]):
        with pytest.raises(RuntimeError, match=REFUSED):
            torch.autograd.grad(g, (x, w), retain_graph=True, allow_unused=True)


@pytest.mark.parametrize("gradients", ["auto", "recompute"])
def test_an_error_where_the_graph_holds_the_first_gradient(gradients: str) -> None:
    """torch.autograd.grad with create_graph inside the compiled function."""
    lce_inductor.install(min_logits_bytes=0, gradients=gradients)
    x, w, y = head()

    def penalty(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(loss_of(x, w, y), w, create_graph=True)
        return g.square().sum()

    exact = torch.autograd.grad(penalty(x, w, y), (x, w))
    try:
        found = torch.autograd.grad(quick(penalty)(x, w, y), (x, w), allow_unused=True)
    except RuntimeError:
        return
    torch.testing.assert_close(found, exact)


def test_an_error_of_the_ops_alone() -> None:
    x, w, _ = head()
    b = torch.zeros(len(w), requires_grad=True)
    lse = torch.ops.lce_inductor.row_stats(x, w, b, None, None, "", 1, 0, 1 << 30)[0]
    given = torch.ones_like(lse, requires_grad=True)
    first = torch.autograd.grad(lse, (x, w, b), given, create_graph=True)
    for g, by in itertools.product(first, (x, w, b, given)):
        with pytest.raises(RuntimeError, match="no second derivatives"):
            torch.autograd.grad(g.sum(), by, allow_unused=True, retain_graph=True)


def test_naming_the_inputs_leaves_no_kernel(installed: None) -> None:
    from torch._inductor.utils import fresh_cache, run_and_get_code

    x, w, y = head()
    run = torch.compile(loss_of)
    with fresh_cache():  # what it leaves would be found by tests that look at graphs
        _, code = run_and_get_code(lambda: run(x, w, y).backward())
    forward, backward = code
    assert "row_stats_with_grad" in forward and "lce_inductor" not in backward.replace("lce_inductor_", "")


def test_inputs_that_take_no_gradient_are_not_held(installed: None) -> None:
    x, w, y = head()
    compiled = Compiled(lambda x, w, y: F.cross_entropy(F.linear(x * 2, w), y))
    compiled(x.detach(), w, y).backward()
    (named,) = [line for line in compiled.graphs[-1].text.splitlines() if "lce_inductor.once" in line]
    assert named.count("primals") == 1


def test_an_input_written_to_in_the_graph(installed: None) -> None:
    """It has another value by the time of the backward, which is not to fail for that."""
    x, w, y = head()
    count = torch.zeros(())

    def fn(x: Tensor, w: Tensor, y: Tensor, count: Tensor) -> Tensor:
        count.add_(1)
        with torch.no_grad():
            w.mul_(1.0)
        return F.cross_entropy(F.linear(x, w), y)

    found = [torch.autograd.grad(run(x, w, y, count), (x, w)) for run in (fn, quick(fn))]
    torch.testing.assert_close(found[0], found[1])
    assert count == 2
