"""Edits of logits, split into what goes into x, weight and bias and what stays for the op's epilogue."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from .forms import Edit

_NUMBER = ("mul", "div", "add", "tanh", "sigmoid", "rsqrt_cap")
# Under the first four, -inf changes its sign or becomes NaN, under the next two it becomes finite; a bias behind the
# mask has a gradient at masked labels.
_AGAINST_MASKS = ("class_scale", "scale", "inverse_scale", "rsqrt_cap", "tanh", "sigmoid", "bias")


class Folded(NamedTuple):
    """inputs: edits of x, weight and bias, in order, each with the factor that number steps before it make; steps:
    the epilogue's text; classes: how many a slice leaves, None for all; hidden: the number that masked classes were
    set to, None without a mask."""

    inputs: tuple[tuple[Edit, float], ...]
    steps: str
    classes: int | None
    hidden: float | None


def fold(edits: tuple[Edit, ...]) -> Folded | None:
    """Split edits, or None where a tensor comes after a step that it cannot be pulled through.

    A factor commutes with scales and shrinks a bias; nothing passes a shift or a nonlinear step. A slice of classes
    passes everything.
    """
    inputs: list[tuple[Edit, float]] = []
    steps: list[str] = []
    classes: int | None = None
    factor, linear = 1.0, True
    hidden: float | None = None
    for edit in edits:
        if hidden is not None and (edit.name in _AGAINST_MASKS or (edit.name in ("mul", "div") and edit.args[0] <= 0)):
            return None
        if edit.name in ("mask", "fill"):
            # As -inf: under a positive factor and no other step, and never beside another number.
            if not linear or factor <= 0 or edit.args[-1] != (edit.args[-1] if hidden is None else hidden):
                return None
            hidden = edit.args[-1]
            inputs.append((edit, 1.0))
        elif hidden is not None and math.isfinite(hidden):
            return None  # changes the number, or leaves nothing but masked classes
        elif edit.name == "classes":
            start, stop = edit.args
            classes = stop - start
            inputs.append((edit, 1.0))
        elif edit.name in _NUMBER:
            steps.append(" ".join([edit.name, *(repr(float(a)) for a in edit.args)]))
            if edit.name == "mul":
                factor *= edit.args[0]
            elif edit.name == "div":
                factor /= edit.args[0]
            else:
                linear = False
        elif not linear or factor == 0.0:
            return None
        else:
            inputs.append((edit, factor))
    return Folded(tuple(inputs), ";".join(steps), classes, hidden)


def hides(value: Any) -> bool:
    """Is this what masked classes are set to: -inf, or so low that their probability is zero?

    Beside logits above -5000 it is, in every dtype. Only the masked logits themselves tell the difference.
    """
    return isinstance(value, (int, float)) and value <= -1e4


def number(value: Any) -> float | None:
    """A finite Python number as a float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    value = float(value)
    return value if value == value and abs(value) != float("inf") else None
