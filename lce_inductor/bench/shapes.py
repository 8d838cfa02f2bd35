"""Sizes to measure: the user's own, those of well-known models, and sweeps over one dimension."""

from __future__ import annotations

import dataclasses

DIMENSIONS = ("N", "H", "V")

# Hidden size and vocabulary (rows of the output projection) as the models' configurations give them.
HEADS: dict[str, tuple[int, int]] = {
    "bert-base": (768, 30522),
    "deepseek-v3": (7168, 129280),
    "gemma-2-2b": (2304, 256000),
    "gemma-2-9b": (3584, 256000),
    "gemma-3-1b": (1152, 262144),
    "gpt2": (768, 50257),
    "gpt2-xl": (1600, 50257),
    "llama-2-7b": (4096, 32000),
    "llama-3-8b": (4096, 128256),
    "llama-3-70b": (8192, 128256),
    "llama-3.2-1b": (2048, 128256),
    "llama-3.2-3b": (3072, 128256),
    "mistral-7b-v0.3": (4096, 32768),
    "mistral-nemo": (5120, 131072),
    "olmo-2-7b": (4096, 100352),
    "phi-3-mini": (3072, 32064),
    "phi-4": (5120, 100352),
    "qwen2.5-0.5b": (896, 151936),
    "qwen2.5-7b": (3584, 152064),
    "qwen3-0.6b": (1024, 151936),
    "qwen3-8b": (4096, 151936),
    "smollm2-135m": (576, 49152),
    "t5-small": (512, 32128),
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """N tokens, H hidden, V vocabulary."""

    N: int
    H: int
    V: int

    def __str__(self) -> str:
        return f"{self.N}x{self.H}x{self.V}"

    @property
    def logits(self) -> int:
        """Elements of the logits."""
        return self.N * self.V


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Values of one dimension, in ascending order."""

    dimension: str
    values: tuple[int, ...]

    def shapes(self, base: Shape) -> list[Shape]:
        return [dataclasses.replace(base, **{self.dimension: value}) for value in self.values]


def parse_shape(text: str) -> Shape:
    """Read `NxHxV`.

    Raises:
        ValueError: it is something else.
    """
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(map(_positive, parts)):
        raise ValueError(f"{text!r}: must be NxHxV, three integers >= 1, such as 8192x2048x128256")
    return Shape(*map(int, parts))


def parse_sweep(text: str) -> Sweep:
    """Read `V=32768,65536`.

    Raises:
        ValueError: it is something else.
    """
    name, _, values = text.partition("=")
    parts = values.split(",")
    if name.upper() not in DIMENSIONS or not all(map(_positive, parts)):
        raise ValueError(f"{text!r}: must be N=, H= or V= and integers >= 1, such as V=32768,65536")
    return Sweep(name.upper(), tuple(sorted(set(map(int, parts)))))


def _positive(text: str) -> bool:
    return text.isdecimal() and int(text) > 0
