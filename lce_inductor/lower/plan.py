"""How many rows of logits exist at a time: sizes and a budget in, a plan out. No torch here.

The automatic policy weighs memory against time (numbers of an H100; `POLICIES` has each device's):

* Every chunk costs launches, and one more sum into dW, in fp32. What that is of a step falls with rows and with H:
  2048 rows a chunk for 4096 cost 6% at H = 896, 4% at 2048, 2% at 4096. So aim for `target_rows`.
* A chunk takes 2 V bytes a row in bf16 where dW takes 4 V H. Up to `small_hidden` the chunk may be the larger part, up
  to `rows_per_hidden` * H rows, but no more than `most_bytes`; beyond, where dW is what counts, it is at most seven
  eighths of dW: 1.75 H rows. Never fewer than `least_rows` for these reasons.
* A chunk of less than `least_bytes` is not worth its launches, and a head is not worth chunks that save less than
  `least_saving`: sums, and the pass that multiplies dW by the tangent, cost 3 to 200% of steps of 1 to 10 ms.
* `workspace_bytes` is a limit and always wins.
* Pieces are equal, rounded up to the tile of the matrix products, so that the last one is no small rest.
"""

from __future__ import annotations

import dataclasses
import functools
import math

from ..spec.sizes import ceil_div, round_up


@dataclasses.dataclass(frozen=True)
class Policy:
    """How a kind of device likes its chunks; `align` is the unit of the row stride in elements."""

    target_rows: int
    least_rows: int
    least_bytes: int
    least_saving: int
    small_hidden: float
    rows_per_hidden: float
    most_bytes: int
    tile: int
    align: int

    def rows(self, H: int, row_bytes: int) -> int:
        """Rows of a chunk where neither N nor the budget limits them."""
        small = self.small_hidden > H
        for_hidden = min(int(self.rows_per_hidden * H), self.most_bytes // row_bytes) if small else 7 * H // 4
        return max(min(self.target_rows, max(for_hidden, self.least_rows)), self.least_bytes // row_bytes)


POLICIES = {
    # Unaligned rows make a bf16 product about five times slower: 64 elements are one 128-byte line.
    "cuda": Policy(
        4096,
        2048,
        least_bytes=256 << 20,
        least_saving=192 << 20,
        small_hidden=2048,
        rows_per_hidden=4.5,
        most_bytes=1 << 30,
        tile=256,
        align=64,
    ),
    # Against a processor's slower arithmetic the traffic of dW weighs little, and small chunks stay near its caches.
    "cpu": Policy(
        512,
        512,
        least_bytes=0,
        least_saving=0,
        small_hidden=math.inf,
        rows_per_hidden=5,
        most_bytes=1 << 30,
        tile=16,
        align=1,
    ),
}


@dataclasses.dataclass(frozen=True)
class ChunkPlan:
    """`count` chunks of `rows` rows (the last may be shorter), each row `row_stride` elements apart."""

    rows: int
    count: int
    row_stride: int

    def bounds(self, N: int) -> list[tuple[int, int]]:
        """First row and number of rows of each chunk."""
        return [(start, min(self.rows, N - start)) for start in range(0, N, self.rows or 1)]


# Asked for twice in each call of an op, while the GPU waits for its first launch.
@functools.lru_cache(maxsize=256)
def plan(
    N: int, H: int, V: int, itemsize: int, chunk_tokens: int, workspace_bytes: int, device: str = "cuda"
) -> ChunkPlan:
    """Chunks for [N, H] x [V, H]: a pure function of sizes and budget.

    Args:
        itemsize: bytes of one logit.
        chunk_tokens: rows of a chunk as the user wants them; 0 decides automatically.
        workspace_bytes: limit of one chunk's logits in bytes; a single row may exceed it.
        device: a key of POLICIES; any other device is treated as "cpu".
    """
    policy = POLICIES.get(device, POLICIES["cpu"])
    row_stride = max(round_up(V, policy.align), 1)
    if N == 0:
        return ChunkPlan(0, 0, row_stride)
    within_budget = max(workspace_bytes // (row_stride * itemsize), 1)
    if chunk_tokens > 0:
        rows = min(chunk_tokens, within_budget, N)
        return ChunkPlan(rows, ceil_div(N, rows), row_stride)
    limit = min(policy.rows(H, row_stride * itemsize), within_budget)
    if limit >= N:
        return ChunkPlan(N, 1, row_stride)
    if limit >= policy.tile:
        limit -= limit % policy.tile
    rows = ceil_div(N, ceil_div(N, limit))
    rows = min(round_up(rows, policy.tile), limit)
    return ChunkPlan(rows, ceil_div(N, rows), row_stride)


def peak_bytes(p: ChunkPlan, N: int, H: int, V: int, itemsize: int, dx: bool, dw: bool) -> int:
    """Predicted bytes that loss and gradients add at their peak, the gradients included.

    [N] vectors are left out, and what our products on sm_90 leave beside a chunk of a 16-bit head, 2% of it.
    """
    chunk = p.rows * p.row_stride * itemsize
    grad_x = N * H * itemsize if dx else 0
    grad_w = V * H * itemsize if dw else 0
    if p.count <= 1 or itemsize >= 4:
        return chunk + grad_x + grad_w
    sums = V * H * 4 if dw else 0  # fp32, cast to the weight's dtype once the chunk is free
    return grad_x + sums + max(chunk, grad_w)


def saves_little(p: ChunkPlan, N: int, H: int, V: int, itemsize: int, dw: bool, device: str) -> bool:
    """Would torch.compile alone, which holds all logits once, hold hardly more than the plan?"""
    whole = ChunkPlan(N, 1, p.row_stride)
    alone, chunked = (peak_bytes(q, N, H, V, itemsize, dx=True, dw=dw) for q in (whole, p))
    return alone - chunked < POLICIES.get(device, POLICIES["cpu"]).least_saving


def anchored_peak_bytes(p: ChunkPlan, N: int, H: int, V: int, dx: bool, dw: bool) -> int:
    """The same for the anchored softmax in bf16, whose sums are always fp32; the targets' sorted order left out.

    x is taken to have rows that begin on 32 bytes if H allows it; else it is copied to such rows.
    """
    copied = N * round_up(H, 16) * 2 if H % 16 else 0
    chunk = p.rows * p.row_stride * 2 + p.rows * H * (4 * dx + 2 * dw) + ceil_div(V, 192) * p.rows * 8
    return copied + (N * H * 2 if dx else 0) + (V * H * 4 + max(chunk, V * H * 2) if dw else chunk)
