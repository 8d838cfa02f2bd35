"""Only torch's own operations are known: what others call by the same names is what they say it is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from collision_cases import programs
from oracle import judge
from text_programs import make_inputs
from turns import one_of


@pytest.mark.parametrize("text", [pytest.param(programs()[name], id=name) for name in one_of(2, list(programs()))])
def test_other_operations_of_the_same_name(text):
    verdict = text.check()
    assert verdict.kind != "invalid", verdict
    assert not verdict.failed, f"{verdict}\n{text}"


class Linear(torch.nn.Linear):
    """Not what nn.Linear computes."""

    def forward(self, x):
        return F.linear(x.roll(1, 0), self.weight) * 2


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    def forward(self, z, y):
        return super().forward(z * 0.1, y)


class Weight(torch.Tensor):
    """A subclass that computes another product."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        found = super().__torch_function__(func, types, args, kwargs or {})
        return found * 3 if func is F.linear or func is torch._C._nn.linear else found


def test_subclasses_of_modules():
    torch.manual_seed(0)
    linear, loss = Linear(8, 37, bias=False).double(), CrossEntropyLoss()
    x, y = make_inputs(("x", "y"), torch.float64)
    weight = linear.weight.detach().clone().requires_grad_()
    call = lambda x, w, y: loss(torch.func.functional_call(linear, {"weight": w}, (x,)), y)
    assert not (verdict := judge(call, [x, weight, y])).failed, verdict


def test_a_tensor_subclass_with_a_product_of_its_own():
    x, w, y = make_inputs(("x", "w", "y"), torch.float64)
    call = lambda x, w, y: F.cross_entropy(F.linear(x, w.as_subclass(Weight)), y)
    assert not (verdict := judge(call, [x, w, y])).failed, verdict


def test_functions_that_are_replaced(monkeypatch):
    """A library that puts its own function in the place of torch's."""
    real = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda z, y, **k: real(z * 0.1, y, **k))
    assert not (verdict := judge(lambda x, w, y: F.cross_entropy(F.linear(x, w), y), make_inputs(("x", "w", "y"), torch.float64))).failed, verdict  # fmt: skip


def test_methods_that_are_replaced(monkeypatch):
    real = torch.Tensor.log_softmax
    monkeypatch.setattr(torch.Tensor, "log_softmax", lambda z, dim: real(z * 0.1, dim))
    call = lambda x, w, y: F.nll_loss(F.linear(x, w).log_softmax(-1), y)
    assert not (verdict := judge(call, make_inputs(("x", "w", "y"), torch.float64))).failed, verdict
