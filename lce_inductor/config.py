"""Configuration: one frozen, validated dataclass. No torch import: the package must stay light."""

from __future__ import annotations

import dataclasses
from typing import Any

_GRADIENTS = ("auto", "forward", "recompute")
_RETURNED = ("defer", "keep")
_PREFER = ("speed", "memory")


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the passes; part of the key of every compile cache.

    Attributes:
        min_logits_bytes: heads whose logits take fewer bytes, those of all trained heads of one weight
            together, are left alone (0 rewrites all). By hint under dynamic shapes.
        chunk_tokens: rows of logits that exist at a time; None lets the chunk plan decide.
        workspace_bytes: upper limit in bytes for one chunk of logits.
        gradients: "auto" and "forward" compute dX and dW inside the forward wherever that is legal (three
            matrix products instead of four); "forward" also logs a warning where it is not; "recompute"
            never does.
        returned_logits: what becomes of logits that the compiled function also returns. "defer" returns a
            tensor subclass that computes them when somebody reads them; "keep" computes them as before.
        prefer: "memory" takes less of it at the cost of time, in heads that the fused kernels compute: smaller chunks,
            and where that saves a quarter of the peak (in 16 bits, mostly) no gradients in the forward but in a
            backward that computes the logits again, in blocks of classes. gradients="forward" rules out the latter.

    Raises:
        ValueError: naming the field, the value and what is allowed.
    """

    min_logits_bytes: int = 64 << 20
    chunk_tokens: int | None = None
    workspace_bytes: int = 3 << 29
    gradients: str = "auto"
    returned_logits: str = "defer"
    prefer: str = "speed"

    def __post_init__(self) -> None:
        _check_int("min_logits_bytes", self.min_logits_bytes, 0)
        if self.chunk_tokens is not None:
            _check_int("chunk_tokens", self.chunk_tokens, 1, also="None")
        _check_int("workspace_bytes", self.workspace_bytes, 1)
        _check_choice("gradients", self.gradients, _GRADIENTS)
        _check_choice("returned_logits", self.returned_logits, _RETURNED)
        _check_choice("prefer", self.prefer, _PREFER)

    def key(self) -> str:
        """The settings as text: equal texts mean equal compiled code."""
        return repr(dataclasses.astuple(self))


def _check_int(field: str, value: Any, low: int, also: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        allowed = f"an integer >= {low}" + (f" or {also}" if also else "")
        raise ValueError(f"{field} = {value!r}: must be {allowed}")


def _check_choice(field: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{field} = {value!r}: must be one of {', '.join(map(repr, allowed))}")


def make_config(settings: dict[str, Any]) -> Config:
    """Build a Config from keyword arguments; an unknown name raises TypeError listing the known ones."""
    known = [f.name for f in dataclasses.fields(Config)]
    for name in settings:
        if name not in known:
            raise TypeError(f"unknown setting {name!r}: known settings are {', '.join(known)}")
    return Config(**settings)
