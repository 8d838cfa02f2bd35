"""The program over the rows of a chunk, block by block: with code for it, or step by step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from . import region_blocks as blocks
from . import region_compiled as compiled
from .region_compiled import Key
from .region_values import wide


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
    size = _rows(key, elements)
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


def _rows(key: Key, elements: int) -> int:
    """Rows of so many logits, of the widest head."""
    widest = max((m.shape[0] for k, m in zip(key.program.inputs, key.inputs) if k == "logits"), default=1)
    return max(elements // max(widest, 1), 1)


def pieces(key: Key, n: int, most: int) -> Iterator[tuple[int, int]]:
    """First row and number of rows of each call of code, of at most so many logits."""
    size = min(compiled.rows_at_a_time(key), max(_rows(key, most), 2))  # there is no code for single rows
    for first in range(0, n, size):
        yield first, min(size, n - first)


def with_code(chunk: Chunk, n: int, most: int, elements: int) -> Iterator[Values]:
    """The same in blocks of `most` logits; step by step, in blocks of `elements`, where no code is and can be made."""
    for first, count in pieces(chunk.key, n, most):
        part = chunk.part(first, count)
        values = compiled.run(chunk.key, count, part.inputs, list(part.homes.values()))
        if values is not None:
            yield first, count, values
            continue
        for start, length, found in step_by_step(part, count, elements):
            yield first + start, length, found
