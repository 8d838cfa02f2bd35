"""The program over the rows of a chunk, block by block: with code for it, or step by step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from . import blocks, compiled
from .compiled import Key
from .values import wide


class Chunk(NamedTuple):
    """Some rows as a program sees them.

    Attributes:
        key: what program it is, for what kinds of inputs.
        inputs: in the program's order.
        homes: the memory of each factor of dX and dW that none of the logits' own is for, by value.
        memory: what the blocks of a call leave for the next, by number of rows.
    """

    key: Key
    inputs: Sequence[Tensor]
    homes: dict[int, Tensor]
    memory: dict[int, list[Tensor]]

    def part(self, first: int, count: int) -> Chunk:
        rows = slice(first, first + count)
        inputs = [t if kind == "whole" else t[rows] for kind, t in zip(self.key.program.inputs, self.inputs)]
        return self._replace(inputs=inputs, homes={k: h[rows] for k, h in self.homes.items()})


# First row of a block, number of rows, its values of kind row and sums of those of kind sum.
Values = tuple[int, int, list[Tensor]]


def step_by_step(chunk: Chunk, n: int, elements: int) -> Iterator[Values]:
    """elements: about so many logits are a block."""
    key = chunk.key
    widest = max((m.shape[0] for k, m in zip(key.program.inputs, key.inputs) if k == "logits"), default=1)
    size = max(elements // max(widest, 1), 1)
    for first in range(0, n, size):
        part = chunk.part(first, min(size, n - first))
        count = min(size, n - first)
        memory = chunk.memory.setdefault(count, [])
        values = blocks.run(key.text, count, part.inputs, key.inputs, key.sizes, memory)
        out = []
        for result, value in zip(key.program.results, values):
            if result.kind == "row":
                out.append(value)
            elif result.kind == "sum":
                out.append(value.sum(0, dtype=wide(result.dtype)))
            elif result.value.index in part.homes:
                part.homes.pop(result.value.index).copy_(value)
        yield first, count, out


def with_code(chunk: Chunk, n: int, elements: int) -> Iterator[Values]:
    """The same; step by step, in blocks of `elements`, where there is no code and none can be made now."""
    size = compiled.rows_at_a_time(chunk.key)
    for first in range(0, n, size):
        count = min(size, n - first)
        part = chunk.part(first, count)
        values = compiled.run(chunk.key, count, part.inputs, list(part.homes.values()))
        if values is not None:
            yield first, count, values
            continue
        for start, length, found in step_by_step(part, count, elements):
            yield first + start, length, found
