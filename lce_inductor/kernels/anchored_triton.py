"""Launches of anchored_kernels.py: the anchored softmax where hopper.py's kernels are not to be had.

That is on compute capability 9.0 without NVRTC, where it beats the row kernel (NOTES.md), and under the interpreter,
which tests the algorithm without a GPU. Nothing else was measured, and it is chosen nowhere else.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..spec.epilogue import flatten
from ..spec.sizes import ceil_div
from . import anchored_kernels as kernels
from . import tuning
from .call import Call
from .hopper import PAIR  # rows that share a mark "one of these is saturated"

# Programs of column_sums: enough of them to have loads in flight all the time.
_COLUMN_SUMS = 2048


class Launches:
    """The launches of one call (see call.py), by their places in it. No reference to it: see hopper.py.

    anchor, raw: [N], as the kernels say; u, row_max, flag: [chunk rows]. sums, maxima: [tiles * chunk rows], of E and
    of the logits in each column tile.
    """

    def __init__(self, h: Call) -> None:
        self._capability = _capability(h.x)
        t = self._tiles = tuning.tiles(self._capability, "logits" if h.store else "sums", h.H)
        self._steps = flatten(h.steps)
        self._x_desc = _descriptor(h.x, t.rows, t.depth)
        self._w_desc = _descriptor(h.weight, t.columns, t.depth)
        self._chunk_rows = h.rows
        # A chunk's marks: whether any row is saturated, then whether one of each PAIR rows is.
        marks = max(h.chunks, 1), 1 + ceil_div(h.rows, PAIR)
        self._marks = h.x.new_zeros(marks, dtype=torch.int32)
        rows, parts = h.rows, 0 if h.known else h.tiles * h.rows
        sizes = [h.N, h.N, rows, rows, rows, parts, parts]
        self.anchor, self.raw, self.u, self.row_max, flag, sums, maxima = h.f32(sum(sizes)).split(sizes)
        self.flag = flag.view(torch.int32)
        self.sums: Tensor | None = None if h.known else sums
        self.maxima: Tensor | None = None if h.known else maxima

    def prepare_products(self, h: Call) -> None:
        """Nothing, as below."""

    def prepare_gradients(self, h: Call) -> None:
        """Nothing: each launch takes what is there."""

    def anchors(self, h: Call) -> None:
        kernels.anchor_kernel[(h.N,)](
            h.x, h.x.stride(0), h.weight, h.weight.stride(0), h.bias, h.target, h.stride_t,
            h.V, h.H, self.anchor, h.target_logit if h.target is not None else None, self.raw,
            h.class_sum, h.sum_logits, h.shift,
            SAMPLES=h.samples, STEPS=self._steps, BLOCK_H=_block(h.H), num_warps=4 if h.H > 256 else 1,
        )  # fmt: skip

    def exponentials(self, h: Call, row0: int, n: int, redo: bool) -> None:
        t = self._tiles
        e_desc = None if h.e is None else _descriptor(h.e, t.rows, t.columns)  # not kept: it holds e
        compiled = self._capability is not None
        programs = ceil_div(n, t.rows) * h.tiles
        most = tuning.multiprocessors(h.x.device) if compiled else 3
        kernels.logits_kernel[(min(programs, most),)](
            self._x_desc, self._w_desc, e_desc,
            h.lse if h.known else self.anchor, h.bias, h.target, h.stride_t,
            self.sums, self.maxima, h.rows, self.row_max, self.flag, self._found(row0),
            n, row0, h.V, h.H,
            STEPS=self._steps, STORE=h.e is not None, SUM=not h.known, REDO=redo,
            COMPILED=compiled, BLOCK_N=t.rows, BLOCK_V=t.columns, BLOCK_H=t.depth,
            GROUP=t.group, FLATTEN=t.flatten and not redo, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip

    def normalise(self, h: Call, row0: int, n: int, redo: bool) -> None:
        g, block = h.grads, 8
        kernels.normalise_kernel[(ceil_div(n, block),)](
            self.sums, self.maxima, h.rows, h.tiles, self.row_max, self.flag, self._found(row0),
            self.anchor, self.raw, h.target, h.stride_t, h.lse,
            g.lse, _stride(g.lse), g.lse_slope, _stride(g.lse_slope),
            None if h.target is None else g.target, _stride(g.target), self.u, h.d, n, row0, h.V,
            STEPS=self._steps, KNOWN=h.known, GRAD=h.d is not None, REDO=redo, PAIR=PAIR, BLOCK_N=block,
            BLOCK_T=128, num_warps=4,
        )  # fmt: skip

    def product(self, h: Call, row0: int, n: int) -> bool:
        """False: left to the library, which is faster than Triton (NOTES.md)."""
        return False

    def spread(self, h: Call, row0: int, n: int, tail: int) -> None:
        assert h.e is not None
        block = min(_block(h.H), 1024)
        kernels.spread_kernel[(n, ceil_div(h.H, block))](
            h.product, h.e, h.e.stride(0), h.x, h.x.stride(0), h.weight, h.weight.stride(0),
            h.target, h.stride_t, self.u, h.d, h.grads.sum, _stride(h.grads.sum), h.class_sum,
            h.dx, h.xs, row0, h.V, h.H,
            TAIL=tail, SLOPE=h.slope, BLOCK_H=block, num_warps=4 if block > 256 else 1,
        )  # fmt: skip

    def collect(self, h: Call, key: Tensor, order: Tensor, ends: Tensor) -> None:
        block = min(_block(h.H), 1024)
        kernels.collect_kernel[(h.N, ceil_div(h.H, block))](
            key, order, ends, h.x, h.x.stride(0), h.d, h.dw, h.db, h.V, h.H,
            BLOCK_R=8, BLOCK_H=block, num_warps=4 if block > 256 else 1,
        )  # fmt: skip

    def _found(self, row0: int) -> Tensor:
        return self._marks[row0 // self._chunk_rows]


def tiles(head: Call) -> int:
    """Tiles that a row of logits is cut into."""
    return ceil_div(head.V, tuning.tiles(_capability(head.x), "logits", head.H).columns)


def column_sums(m: Tensor, scale: Tensor | None) -> Tensor:
    """sum over rows of scale[row] * m[row], fp32 [columns], in a fixed order."""
    rows, columns = m.shape
    block = 256
    across = ceil_div(columns, block)
    splits = min(max(_COLUMN_SUMS // across, 1), ceil_div(rows, 64))
    out = m.new_empty(splits, columns, dtype=torch.float32)
    kernels.column_sums_kernel[(across, splits)](
        m, m.stride(0), scale, _stride(scale), out, rows, columns, ceil_div(rows, splits),
        BLOCK_R=32, BLOCK_C=block, num_warps=4,
    )  # fmt: skip
    return out.sum(0)


def _capability(t: Tensor) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(t.device) if t.is_cuda else None


def _descriptor(t: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, columns])


def _stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def _block(H: int) -> int:
    return min(triton.next_power_of_2(max(H, 16)), 2048)
