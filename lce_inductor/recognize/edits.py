"""Edits of logits, split into what goes into x, weight and bias and what stays for the op's epilogue."""

from __future__ import annotations

from typing import Any, NamedTuple

from .forms import Edit

_NUMBER = ("mul", "div", "add", "tanh", "sigmoid", "rsqrt_cap")
_AGAINST_MASKS = ("class_scale", "scale", "inverse_scale", "rsqrt_cap")


class Folded(NamedTuple):
    """inputs: edits of x, weight and bias, in order, each with the factor that number steps before it make; steps:
    the epilogue's text; classes: how many a slice leaves, None for all."""

    inputs: tuple[tuple[Edit, float], ...]
    steps: str
    classes: int | None


def fold(edits: tuple[Edit, ...]) -> Folded | None:
    """Split edits, or None where a tensor comes after a step that it cannot be pulled through.

    A factor commutes with scales and shrinks a bias; nothing passes a shift or a nonlinear step. A slice of classes
    passes everything.
    """
    inputs: list[tuple[Edit, float]] = []
    steps: list[str] = []
    classes: int | None = None
    factor, linear = 1.0, True
    masked = False
    for edit in edits:
        # -inf changes its sign or becomes NaN under these.
        if masked and (edit.name in _AGAINST_MASKS or (edit.name in ("mul", "div") and edit.args[0] <= 0)):
            return None
        masked = masked or edit.name in ("mask", "fill")
        if edit.name == "classes":
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
        elif edit.name in ("fill", "mask") and edit.args[-1] == float("-inf"):
            # -inf stays -inf under a positive factor and no other step.
            if not linear or factor <= 0:
                return None
            inputs.append((edit, 1.0))
        elif not linear or factor == 0.0:
            return None
        else:
            inputs.append((edit, factor))
    return Folded(tuple(inputs), ";".join(steps), classes)


def number(value: Any) -> float | None:
    """A finite Python number as a float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    value = float(value)
    return value if value == value and abs(value) != float("inf") else None
