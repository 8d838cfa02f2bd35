"""Layouts of the Triton kernels' products, found by measuring and shipped as data: nothing is searched at run time.

One row per device kind and product: what the kernel multiplies, and up to which inner size the layout is best.
NOTES.md has the measurements. A GPU that is not here has no anchored softmax; see lower/device_policy.py.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Tiles(NamedTuple):
    """Tile sizes of a product: rows and columns of the result, depth of one step; then how it is laid out.

    group: row tiles that share columns. flatten: one loop over tiles and depth, prefetching across tiles.
    """

    rows: int
    columns: int
    depth: int
    group: int
    warps: int
    stages: int
    flatten: bool


WIDE = Tiles(128, 256, 64, group=16, warps=8, stages=3, flatten=True)

# (capability, product) -> rows (largest inner size, layout), in rising order.
TABLE: dict[tuple[tuple[int, int], str], tuple[tuple[float, Tiles], ...]] = {
    ((9, 0), "logits"): ((1024, WIDE._replace(depth=32, stages=6)), (float("inf"), WIDE)),
    ((9, 0), "sums"): ((float("inf"), WIDE._replace(group=8, stages=4)),),
}

# Under the interpreter: the smallest sizes that still make several tiles of everything.
INTERPRETED = Tiles(16, 32, 16, group=2, warps=4, stages=1, flatten=False)


def tiles(capability: tuple[int, int] | None, product: str, inner: int) -> Tiles:
    """Layout for a product with `inner` terms in each sum; capability None is the interpreter.

    Raises:
        KeyError: nothing is known of this device.
    """
    if capability is None:
        return INTERPRETED
    return next(t for limit, t in TABLE[capability, product] if inner <= limit)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
