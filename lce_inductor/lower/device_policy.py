"""Every threshold by which plan.py decides, each with the measurement that set it (kernels/NOTES.md has the tables).

Chunks weigh memory against time (numbers of an H100):

* Every chunk costs launches, and one more sum into dW, in fp32. What that is of a step falls with rows and with H:
  2048 rows a chunk for 4096 cost 6% at H = 896, 4% at 2048, 2% at 4096. So aim for `target_rows`.
* A chunk takes 2 V bytes a row in bf16 where dW takes 4 V H. Up to `small_hidden` the chunk may be the larger part, up
  to `rows_per_hidden` * H rows, but no more than `most_bytes`; beyond, where dW is what counts, it is at most seven
  eighths of dW: `rows_per_large_hidden` * H rows. Never fewer than `least_rows` for these reasons.
* A backward that computes the logits again may cut the classes instead of the rows (head_classes.py). Of as many bytes,
  a block has more classes than a chunk has rows where N < V, and costs less: the sums are dX's, not dW's. Blocks of
  1 GiB by library products took 38.5 ms for the anchored softmax's 39.2 at 16384 x 2048 x 131072, and 13.7 for its 12.4
  at 32768 x 768 x 50304: where it can be had, it is chosen before them.
* A chunk of less than `least_bytes` is not worth its launches, and a head is not worth chunks that save less than
  `least_saving`: sums, and the pass that multiplies dW by the tangent, cost 3 to 200% of steps of 1 to 10 ms.
* The caller's `workspace_bytes` is a limit and always wins.
* Pieces are equal, rounded up to the tile of the matrix products, so that the last one is no small rest.
"""

from __future__ import annotations

import dataclasses
import functools
import math

# What computes a head.
ANCHORED = "anchored softmax"
# Chosen on sm_90 without NVRTC alone, and measured nowhere else: it is what is left of the speed there, and what the
# interpreter can test of the algorithm without a GPU.
ANCHORED_TRITON = "anchored softmax in Triton"
# Of a backward that computes logits again: the product itself leaves their gradient.
KNOWN = "known softmax"
ROWS = "row kernel"
BLOCKS = "blocks of ATen"


@dataclasses.dataclass(frozen=True)
class Chunks:
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
    rows_per_large_hidden: float = 1.75

    def rows(self, H: int, row_bytes: int) -> int:
        """Rows of a chunk where neither N nor the budget limits them."""
        small = self.small_hidden > H
        for_hidden = (
            min(int(self.rows_per_hidden * H), self.most_bytes // row_bytes)
            if small
            else int(self.rows_per_large_hidden * H)
        )
        return max(min(self.target_rows, max(for_hidden, self.least_rows)), self.least_bytes // row_bytes)


@dataclasses.dataclass(frozen=True)
class Classes:
    """How a kind of device likes its blocks of classes.

    bytes: of a block's logits; least, most: classes of a block, whatever they take; tile: of the products.
    """

    bytes: int
    least: int
    most: float
    tile: int


@dataclasses.dataclass(frozen=True)
class Memory:
    """What changes where a user prefers memory.

    bytes: of a chunk's or a block's logits. least_rows: of a chunk, whatever they take.
    four_products: a backward that computes the logits again takes a third more time. It has to get by with that part
        of what the step with three products takes at its peak.
    """

    bytes: int
    least_rows: int
    four_products: float = 0.75


@dataclasses.dataclass(frozen=True)
class Anchored:
    """Where the anchored softmax is chosen.

    capabilities: of the GPUs that it was measured on; kernels/tuning.py has layouts for no other.
    least_N, least_V, least_work: below these sizes (work is N H V) its launches cost what the saved pass over the
        logits gives.
    sums_bytes: of the partial sums of a forward without gradients, which stores nothing else.
    """

    capabilities: tuple[tuple[int, int] | None, ...] = ((9, 0),)
    least_N: int = 1024
    least_V: int = 4096
    least_work: float = 1e11
    sums_bytes: int = 32 << 20


@dataclasses.dataclass(frozen=True)
class Products:
    """Where our products on sm_90 are faster than the library's.

    logits_least_N, logits_least_V: below these sizes the pass over the logits that ours saves is short.
    dx_least_H, dx_library_full, dx_full: the library's tiles of 128 x 256 fill less than `dx_library_full` of the GPU
        and ours at least `dx_full`, at H = 1024 or more.
    dw_full: of dW's tiles of 192 columns, at least that part is not empty.
    """

    logits_least_N: int = 1024
    logits_least_V: int = 4096
    dx_least_H: int = 1024
    dx_library_full: float = 0.9
    dx_full: float = 0.95
    dw_full: float = 0.9


@dataclasses.dataclass(frozen=True)
class Policy:
    """What is known of a kind of device.

    algorithms: those for it, the fastest first; the last does everywhere.
    sums_are_scaled: does the product with the tangent take a bf16 dW that comes from several chunks as the fp32 sums
        that it is? It is a pass over dW less, and a rounding less; dW is held in both precisions then, as it would be
        where it is rounded.
    """

    chunks: Chunks
    classes: Classes
    memory: Memory
    algorithms: tuple[str, ...] = (BLOCKS,)
    anchored: Anchored = Anchored()
    products: Products = Products()
    sums_are_scaled: bool = False

    @functools.cached_property
    def programs(self) -> Chunks:
        """Chunks of what a program computes, which has more launches: as large as dW. Products of two heads, and those
        for the gradients of one, take 27.2 ms in chunks of 4096 rows and 28.2 of 2816 (8192 x 2048 x 131072, H200)."""
        return dataclasses.replace(self.chunks, rows_per_large_hidden=2.0)


POLICIES = {
    # Unaligned rows make a bf16 product about five times slower: 64 elements are one 128-byte line.
    "cuda": Policy(
        Chunks(
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
        # A block of 256 MiB takes 2 to 4% more time than one of 1 GiB, H100.
        Classes(bytes=1 << 30, least=1024, most=math.inf, tile=256),
        Memory(bytes=256 << 20, least_rows=512),
        algorithms=(ANCHORED, ANCHORED_TRITON, KNOWN, ROWS, BLOCKS),
        sums_are_scaled=True,
    ),
    # Against a processor's slower arithmetic the traffic of dW weighs little, and small chunks stay near its caches.
    "cpu": Policy(
        Chunks(
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
        # Blocks of 512 to 4096 classes take the same time, and all less than chunks of 512 rows: 2.35 for 2.45 s at
        # 2048 x 512 x 32768 and 2.41 for 2.61 at 512 x 1024 x 65536 (fp32, one thread).
        Classes(bytes=16 << 20, least=512, most=2048, tile=16),
        # In fp32, chunks of 128 rows cost 8% of the three products' time there, and chunks of 64 rows 28% and 14%; a
        # fourth product, in blocks of classes, 31% and 27%.
        Memory(bytes=16 << 20, least_rows=64),
    ),
}

# Below this many classes an unaligned product of the library costs less than one more launch.
LEAST_SPLIT = 1024
# Elements of a block of a chunk's rows on the CPU: 2 MiB in fp32.
BLOCK = 1 << 19
# Elements that the CPU widens at a time for the product dW, or whose two parts exist: 4 MiB in fp32. Of 1024, 2048 ...
# 8192 columns of a chunk of 512 rows, 2048 were the fastest.
WIDENED = 1 << 20
