"""The corpus: how people write a linear and a loss on its output, each spelling marked with what must become of it."""

from . import (  # noqa: F401
    heads,
    inplace,
    logprobs,
    losses,
    plain,
    regions_heads,
    regions_logits,
    regions_losses,
    regions_teachers,
    returned,
    rows,
    scale,
)
from .registry import CASES, Case, Refuse, Rewrite

__all__ = ["CASES", "Case", "Refuse", "Rewrite"]
