"""The corpus: how people write a linear and a loss on its output, each spelling marked with what must become of it."""

from . import heads, inplace, logprobs, losses, plain, returned, rows, scale  # noqa: F401
from .registry import CASES, Case, Either, Refuse, Rewrite

__all__ = ["CASES", "Case", "Either", "Refuse", "Rewrite"]
