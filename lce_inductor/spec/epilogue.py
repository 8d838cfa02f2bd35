"""The elementwise function between the linear layer and the statistics: its text form and its reference.

An epilogue is a list of elementary steps, applied from left to right: softcap 30 is "div 30.0;tanh;mul 30.0".

STEPS is what there is of a step: how many constants it takes, f and f'. The functions here and the kernels' flat form
are made from it. The kernels' source has each step once more, in Triton (kernels/rows.py) and in CUDA C++
(kernels/hopper_source.py), where it is an instruction or two: test_epilogue.py and test_rows_kernel.py compare those
with this.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Step = tuple[Any, ...]  # (name, *constants)
Steps = tuple[Step, ...]


class Elementary(NamedTuple):
    """A step Y = f(Z) of so many constants: `value` gives Y of Z and them, `slope` f'(Z) of Z, Y and them.

    affine: is the slope a number, the same for all Z? slope None is the number one.
    """

    constants: int
    value: Callable[..., Any]
    slope: Callable[..., Any] | None
    affine: bool = False


def reciprocal(c: float) -> float:
    """1 / c as floating-point arithmetic has it, 1 / 0 included."""
    return 1 / c if c else math.copysign(math.inf, c)


def _rsqrt_cap_slope(z: Tensor, y: Tensor, a: float, k: float) -> Tensor:
    square = z * z + k
    return a * k / (square * torch.sqrt(square))


STEPS = {
    "mul": Elementary(1, lambda z, c: z * c, lambda z, y, c: c, affine=True),
    "div": Elementary(1, lambda z, c: z / c, lambda z, y, c: reciprocal(c), affine=True),
    "add": Elementary(1, lambda z, c: z + c, None, affine=True),
    "tanh": Elementary(0, torch.tanh, lambda z, y: 1 - y * y),
    "sigmoid": Elementary(0, torch.sigmoid, lambda z, y: y * (1 - y)),
    "rsqrt_cap": Elementary(2, lambda z, a, k: a * z / torch.sqrt(z * z + k), _rsqrt_cap_slope),
}
# What stands for a step in the kernels' flat form, where a division by a constant is a product.
CODES = {name: code for code, name in enumerate(name for name in STEPS if name != "div")}


@functools.lru_cache(maxsize=256)
def parse(text: str) -> Steps:
    """Steps of an epilogue such as "div 30.0;tanh;mul 30.0"; "" is the identity, ().

    Raises:
        ValueError: an unknown step, or a wrong number of constants.
    """
    steps: list[Step] = []
    for part in text.split(";") if text else []:
        name, *constants = part.split()[:4] or [""]
        if name not in STEPS:
            raise ValueError(f"epilogue {text!r}: unknown step {name!r}, known are {', '.join(STEPS)}")
        if len(constants) != STEPS[name].constants:
            raise ValueError(f"epilogue {text!r}: {name} takes {STEPS[name].constants} constants, got {len(constants)}")
        try:
            steps.append((name, *map(float, constants)))
        except ValueError:
            raise ValueError(f"epilogue {text!r}: {part!r} has a constant that is no number") from None
    return tuple(steps)


def unparse(steps: Steps) -> str:
    """The text of `steps`: parse(unparse(s)) == s."""
    return ";".join(" ".join([step[0], *(repr(float(c)) for c in step[1:])]) for step in steps)


def apply(steps: Steps, z: Tensor) -> Tensor:
    """Y = f(Z), elementwise, in the dtype of z."""
    for name, *c in steps:
        z = STEPS[name].value(z, *c)
    return z


def apply_with_slope(steps: Steps, z: Tensor) -> tuple[Tensor, Tensor | float | None]:
    """Y = f(Z) and f'(Z), elementwise, in the dtype of z; a slope that is a number comes as one, 1 as None."""
    slope: Tensor | float | None = None
    for name, *c in steps:
        step = STEPS[name]
        y = step.value(z, *c)
        if step.slope is not None:
            factor = step.slope(z, y, *c)
            slope = factor if slope is None else slope * factor
        z = y
    return z, slope


def affine_slope(steps: Steps) -> float:
    """f' of an affine epilogue."""
    slopes = ((STEPS[name].slope, c) for name, *c in steps)
    return float(math.prod(slope(None, None, *c) for slope, c in slopes if slope is not None))


def flatten(steps: Steps) -> tuple[float, ...]:
    """The steps as the kernels in Triton take them: three numbers for each, its code and its constants."""
    flat: list[float] = []
    for name, *c in steps:
        if name == "div":
            name, c = "mul", [reciprocal(c[0])]
        flat += [CODES[name], *c, *[0.0] * (2 - len(c))]
    return tuple(flat)


def is_affine(steps: Steps) -> bool:
    """True where Y = a Z + b."""
    return all(STEPS[step[0]].affine for step in steps)


def is_finite(steps: Steps) -> bool:
    """True where every constant is a finite number (a head with others is better left alone)."""
    return all(math.isfinite(c) for step in steps for c in step[1:])
