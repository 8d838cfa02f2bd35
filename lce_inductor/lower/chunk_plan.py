"""Pieces of the logits, chunks of rows or blocks of classes, and the bytes that a step with them takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..spec.sizes import ceil_div, round_up
from .device_policy import Chunks


@dataclasses.dataclass(frozen=True)
class ChunkPlan:
    """`count` chunks of `rows` rows (the last may be shorter), each row `row_stride` elements apart."""

    rows: int
    count: int
    row_stride: int

    def bounds(self, N: int) -> list[tuple[int, int]]:
        """First row and number of rows of each chunk."""
        return [(start, min(self.rows, N - start)) for start in range(0, N, self.rows or 1)]


@dataclasses.dataclass(frozen=True)
class ClassPlan:
    """`count` blocks of `classes` classes (the last may have fewer), rows rounded up to `align` elements."""

    classes: int
    count: int
    align: int

    def bounds(self, V: int) -> list[tuple[int, int]]:
        """First class and number of classes of each block."""
        return [(start, min(self.classes, V - start)) for start in range(0, V, self.classes or 1)]


def peak_bytes(p: ChunkPlan, N: int, H: int, V: int, itemsize: int, dx: bool, dw: bool, beside: int = 0) -> int:
    """Predicted bytes that loss and gradients add at their peak, the gradients included.

    [N] vectors are left out, and what our products on sm_90 leave beside a chunk of a 16-bit head, 2% of it.
    beside: bytes of what else there is only while a chunk is.
    """
    chunk = p.rows * p.row_stride * itemsize + beside
    return _with_sums(chunk, N * H * itemsize * dx, V * H * itemsize * dw, p.count, itemsize)


def class_peak_bytes(p: ClassPlan, N: int, H: int, V: int, itemsize: int, dx: bool, dw: bool, beside: int = 0) -> int:
    """The same for blocks of classes: it is dX that all of them add to."""
    block = N * round_up(p.classes, p.align) * itemsize + beside
    return _with_sums(block, V * H * itemsize * dw, N * H * itemsize * dx, p.count, itemsize)


def _with_sums(piece: int, placed: int, summed: int, count: int, itemsize: int) -> int:
    """placed: bytes of the gradient that each piece of the logits has a part of for its own; summed: of the other one,
    in fp32 if there are several, and cast once the piece is free."""
    if count <= 1 or itemsize >= 4:
        return piece + placed + summed
    return placed + summed // itemsize * 4 + max(piece, summed)


def saves_little(heads: Sequence[tuple[ChunkPlan, int, int, int, int]], dw: bool, policy: Chunks) -> bool:
    """Would torch.compile alone hold hardly more than a head's plan? Of several heads, would it hold less?

    heads: plan, N, H, V and bytes of a logit of each, in order. Alone, all logits are held until the backward, which
    puts gradients in their place from the last head on. By plan, the others' gradients are there while one is computed.
    """
    logits = [N * p.row_stride * itemsize for p, N, _, _, itemsize in heads]
    grads = [(N + V * dw) * H * itemsize for _, N, H, V, itemsize in heads]
    peaks = [peak_bytes(p, N, H, V, itemsize, dx=True, dw=dw) for p, N, H, V, itemsize in heads]
    alone = max(sum(logits) + grads[-1], logits[0] + sum(grads))
    ours = sum(grads) + max(peak - own for peak, own in zip(peaks, grads))
    return alone - ours < (policy.least_saving if len(heads) == 1 else 0)


def anchored_peak_bytes(p: ChunkPlan, N: int, H: int, V: int, dx: bool, dw: bool, packs: bool = False) -> int:
    """The same for the anchored softmax in bf16, whose sums are always fp32; the targets' sorted order left out."""
    copied = copied_x_bytes(N, H)
    chunk = p.rows * p.row_stride * 2 + p.rows * H * (4 * dx + 2 * dw + 2 * packs) + ceil_div(V, 192) * p.rows * 8
    return copied + (N * H * 2 if dx else 0) + (V * H * 4 + max(chunk, V * H * 2) if dw else chunk)


def copied_x_bytes(N: int, H: int) -> int:
    """Of a copy of x in 16 bits whose rows begin on 32 bytes, for our products on sm_90. x is taken to be so itself if
    H allows it."""
    return N * round_up(H, 16) * 2 if H % 16 else 0
