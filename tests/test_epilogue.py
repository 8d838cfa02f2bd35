"""Epilogues: text form, values and slopes."""

import re

import pytest
import torch

from lce_inductor.kernels import hopper_source
from lce_inductor.spec.epilogue import (
    STEPS,
    affine_slope,
    apply,
    apply_with_slope,
    flatten,
    is_affine,
    is_finite,
    parse,
    unparse,
)

TEXTS = [
    "",
    "mul 0.5",
    "div 3.0;add -1.5",
    "div 30.0;tanh;mul 30.0",
    "sigmoid;mul 4.0",
    "rsqrt_cap 30.0 900.0",
    "mul 2.0;rsqrt_cap 15.0 225.0;add 0.25;tanh",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_round_trip(text):
    assert unparse(parse(text)) == text
    assert is_finite(parse(text))


@pytest.mark.parametrize("text", TEXTS)
def test_slope_is_the_derivative(text):
    steps = parse(text)
    z = (torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 20).requires_grad_()
    expected_y = apply(steps, z)
    (expected_slope,) = torch.autograd.grad(expected_y.sum(), z)
    y, slope = apply_with_slope(steps, z.detach())
    torch.testing.assert_close(y, expected_y.detach(), rtol=0, atol=0)
    torch.testing.assert_close(
        torch.as_tensor(1.0 if slope is None else slope, dtype=z.dtype).expand_as(y), expected_slope
    )


@pytest.mark.parametrize("name", STEPS)
def test_the_same_in_cuda(name):
    """The text for the kernels, read as Python: f and f' of each step there is."""
    steps = ((name, *(1.75, 2.5)[: STEPS[name].constants]),)
    z = torch.linspace(-3, 3, 13, dtype=torch.float64)
    text = hopper_source._epilogue(steps, exact=True).split("{", 1)[1].rpartition("}")[0]
    text = re.sub(r"\(float\)|float |[{}]", "", re.sub(r"(\d\.\d*)f", r"\1", text))
    known = {"expf": torch.exp, "sqrtf": torch.sqrt, "z": z.clone(), "slope": torch.ones_like(z)}
    exec("\n".join(line.strip() for line in text.split(";")), known)
    y, slope = apply_with_slope(steps, z)
    torch.testing.assert_close(known["z"], y)
    torch.testing.assert_close(known["slope"], torch.ones_like(z) * (1.0 if slope is None else slope))


@pytest.mark.parametrize("text", TEXTS)
def test_affine(text):
    steps, z = parse(text), torch.tensor([-2.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(apply(steps, z).sum(), z)
    assert is_affine(steps) == (slopes.max() - slopes.min() < 1e-12).item()
    if is_affine(steps):
        assert abs(affine_slope(steps) - slopes[0].item()) < 1e-12


def test_flat_form():
    assert flatten(parse("mul 2.0;add 0.5;div 4.0;tanh;sigmoid;rsqrt_cap 3.0 9.0")) == (
        0, 2.0, 0, 1, 0.5, 0, 0, 0.25, 0, 2, 0, 0, 3, 0, 0, 4, 3.0, 9.0,
    )  # fmt: skip


def test_softcap_by_hand():
    z = torch.tensor([0.0, 15.0, -1e4])
    expected = 30 * torch.tanh(z / 30)
    torch.testing.assert_close(apply(parse("div 30.0;tanh;mul 30.0"), z), expected)


@pytest.mark.parametrize(
    "text, message",
    [
        ("cosh", "unknown step 'cosh'"),
        ("mul", "mul takes 1 constants, got 0"),
        ("tanh 1.0", "tanh takes 0 constants, got 1"),
        ("mul x", "constant that is no number"),
        ("mul 1.0;", "unknown step ''"),
    ],
)
def test_bad_text(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_not_finite():
    assert not is_finite(parse("mul inf"))


def test_division_by_zero_is_floating_point():
    y, slope = apply_with_slope(parse("div 0.0"), torch.tensor([1.0, -1.0, 0.0]))
    torch.testing.assert_close(y, torch.tensor([float("inf"), float("-inf"), float("nan")]), equal_nan=True)
    assert slope == float("inf")
