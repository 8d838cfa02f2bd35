"""Derivatives of other kinds than backward(): compiled autograd, grad in the graph, forward-mode, functorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from harness import Compiled, fresh, head
from test_torch_features import H, Model, batch, compare, grads, loss_of, quick
from torch import Tensor


@pytest.mark.parametrize("inside", [False, True], ids=["around the call", "in the compiled function"])
def test_compiled_autograd(inside):
    def train(compile: Any) -> list[Tensor]:
        model = Model()

        def step(x: Tensor, y: Tensor) -> Tensor:
            loss = model(x, y)
            if inside:
                loss.backward()
            return loss

        run = compile(step)
        with torch._dynamo.config.patch(compiled_autograd=True):
            if inside:
                loss = run(*batch())
            else:
                import torch._dynamo.compiled_autograd as engine

                loss = run(*batch())
                with engine._enable(lambda gm: compile(gm)):
                    loss.backward()
        return [loss.detach(), *grads(model)]

    compare(train)


def test_grad_inside_the_compiled_function():
    """torch.autograd.grad in the graph: loss and gradients are its outputs."""

    def train(compile: Any) -> list[Tensor]:
        x, w, y = fresh(head())

        def step(x: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            loss = loss_of(x, w, y)
            return (loss.detach(), *torch.autograd.grad(loss, (x, w)))

        return list(compile(step)(x, w, y))

    compare(train)


def tangent(run: Callable[..., Tensor], *args: Tensor) -> Tensor | None:
    """The forward-mode derivative of a loss along ones in x."""
    x, *others = args
    with fwAD.dual_level():
        return fwAD.unpack_dual(run(fwAD.make_dual(x, torch.ones_like(x)), *others)).tangent


def test_forward_mode_derivatives(installed):
    """torch.compile raises, or runs eager (torch 2.14): never a tangent that silently is not there."""
    args = [t.detach() for t in head()]
    try:
        found = tangent(quick(loss_of), *args)
    except NotImplementedError as error:
        assert "forward" in str(error)
    else:
        torch.testing.assert_close(found, tangent(loss_of, *args))


def test_the_op_has_no_forward_mode_derivatives():
    x, w, _ = (t.detach() for t in head())
    op = lambda x: torch.ops.lce_inductor.row_stats(x, w, None, None, None, "", 1, 0, 1 << 30)[0]
    with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
        tangent(op, x)
    with fwAD.dual_level():  # a level alone is nothing wrong
        torch.testing.assert_close(op(x).float(), F.linear(x, w).logsumexp(-1))


FUNCTORCH: dict[str, Callable[..., Any]] = {
    "grad": lambda x, w, y: torch.func.grad(loss_of, argnums=(0, 1))(x, w, y),
    "vmap": lambda x, w, y: torch.func.vmap(loss_of, in_dims=(0, None, 0))(x.view(2, 12, H), w, y.view(2, 12)),
    "vmap of weights": lambda x, w, y: torch.func.vmap(loss_of, in_dims=(None, 0, None))(x, torch.stack([w, -w]), y),
    "per-sample gradients": lambda x, w, y: torch.func.vmap(torch.func.grad(loss_of), in_dims=(0, None, 0))(
        x.view(2, 12, H), w, y.view(2, 12)
    ),
    "jvp": lambda x, w, y: torch.func.jvp(lambda x: loss_of(x, w, y), (x,), (x,)),
    "jacrev": lambda x, w, y: torch.func.jacrev(lambda x: loss_of(x, w, y))(x),
}


@pytest.mark.parametrize("name", FUNCTORCH)
def test_functorch_inside_a_compiled_function(name, installed):
    """Gradients taken in the forward are products of logits, which are held; what is a head behind it all is rewritten."""
    args = [t.detach() for t in head()]
    compiled = Compiled(FUNCTORCH[name])
    torch.testing.assert_close(compiled(*args), FUNCTORCH[name](*args))
    assert compiled.counts["rewritten"] == {"vmap": 1, "jvp": 3}.get(name, 0)
    assert "internal-error" not in compiled.refusals


@pytest.mark.parametrize("transform", ["grad", "vmap", "hessian", "jacrev of grad"])
def test_functorch_around_a_compiled_function(transform, installed):
    x, w, y = (t.detach() for t in head())
    run = quick(loss_of)
    apply = {
        "grad": lambda f: torch.func.grad(f, argnums=(0, 1))(x, w, y),
        "vmap": lambda f: torch.func.vmap(f, in_dims=(0, None, 0))(x.view(2, 12, H), w, y.view(2, 12)),
        "hessian": lambda f: torch.func.hessian(lambda x: f(x, w, y))(x),
        "jacrev of grad": lambda f: torch.func.jacrev(torch.func.grad(lambda x: f(x, w, y)))(x),
    }[transform]
    torch.testing.assert_close(apply(run), apply(loss_of))
