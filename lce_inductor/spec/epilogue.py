"""The elementwise function between the linear layer and the statistics: its text form and its reference.

An epilogue is a list of elementary steps, applied from left to right: softcap 30 is "div 30.0;tanh;mul 30.0".
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

Step = tuple  # (name, *constants)
Steps = tuple[Step, ...]

# Step name -> number of constants.
ARITY = {"mul": 1, "div": 1, "add": 1, "tanh": 0, "sigmoid": 0, "rsqrt_cap": 2}


@functools.lru_cache(maxsize=256)
def parse(text: str) -> Steps:
    """Steps of an epilogue such as "div 30.0;tanh;mul 30.0"; "" is the identity, ().

    Raises:
        ValueError: an unknown step, or a wrong number of constants.
    """
    steps: list[Step] = []
    for part in text.split(";") if text else []:
        name, *constants = part.split()[:4] or [""]
        if name not in ARITY:
            raise ValueError(f"epilogue {text!r}: unknown step {name!r}, known are {', '.join(ARITY)}")
        if len(constants) != ARITY[name]:
            raise ValueError(f"epilogue {text!r}: {name} takes {ARITY[name]} constants, got {len(constants)}")
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
        if name == "mul":
            z = z * c[0]
        elif name == "div":
            z = z / c[0]
        elif name == "add":
            z = z + c[0]
        elif name == "tanh":
            z = torch.tanh(z)
        elif name == "sigmoid":
            z = torch.sigmoid(z)
        else:  # rsqrt_cap A K
            z = c[0] * z / torch.sqrt(z * z + c[1])
    return z


def apply_with_slope(steps: Steps, z: Tensor) -> tuple[Tensor, Tensor | float | None]:
    """Y = f(Z) and f'(Z), elementwise, in the dtype of z; a slope that is a number comes as one, 1 as None."""
    slope: Tensor | float | None = None

    def times(factor: Tensor | float) -> Tensor | float:
        return factor if slope is None else slope * factor

    for name, *c in steps:
        if name == "mul":
            z, slope = z * c[0], times(c[0])
        elif name == "div":
            z, slope = z / c[0], times(reciprocal(c[0]))
        elif name == "add":
            z = z + c[0]
        elif name == "tanh":
            z = torch.tanh(z)
            slope = times(1 - z * z)
        elif name == "sigmoid":
            z = torch.sigmoid(z)
            slope = times(z * (1 - z))
        else:  # rsqrt_cap A K
            square = z * z + c[1]
            root = torch.sqrt(square)
            z, slope = c[0] * z / root, times(c[0] * c[1] / (square * root))
    return z, slope


def reciprocal(c: float) -> float:
    """1 / c as floating-point arithmetic has it, 1 / 0 included."""
    return 1 / c if c else math.copysign(math.inf, c)


def is_affine(steps: Steps) -> bool:
    """True where Y = a Z + b."""
    return all(step[0] in ("mul", "div", "add") for step in steps)


def is_finite(steps: Steps) -> bool:
    """True where every constant is a finite number (a head with others is better left alone)."""
    return all(math.isfinite(c) for step in steps for c in step[1:])
