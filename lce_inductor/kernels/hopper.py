"""The anchored softmax on sm_90 (H100, H200), and products of any 16-bit head there: hopper*.cu*, compiled by NVRTC.

The products have what Triton 3.6 cannot say: clusters of two blocks that share operands, and two warpgroups that take
turns, so that what is done with a product's result costs no time of its own. They are

    launch_logits           logits as eager rounds them, with what their logsumexp needs
    launch_gradients        the gradient of logits whose lse is known
    Launches.exponentials   E of the anchored softmax
    launch_dx               E or dZ times the weight
    launch_dw               dW (+)= E or dZ, transposed, times x

NOTES.md has the measurements.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import itertools
import logging
import os
from typing import NamedTuple

import torch
from torch import Tensor

from ..spec.epilogue import Steps
from ..spec.sizes import ceil_div
from . import nvrtc, tuning
from .call import Call
from .hopper_arguments import DwArguments, DxArguments, LogitsArguments, RowsArguments
from .hopper_source import COLUMNS, DEPTH, ROWS, Variant, rows_source, source

log = logging.getLogger(__name__)

PAIR = 2 * ROWS  # of the two blocks of a cluster
_THREADS = 384
# Pairs of row tiles that share columns: what 66 clusters work on at a time is about square.
_GROUP = 8
_MOST_PARTS = 8  # of the inner dimension, in the product for dX


def _group(pairs: int) -> int:
    """The same number of pairs for each group, up to _GROUP of them."""
    return ceil_div(pairs, ceil_div(pairs, _GROUP))


_CROSS_ENTROPY = Variant(frozenset({"STORE", "SUM", "HAS_TARGET"}))
_CROSS_ENTROPY_AGAIN = Variant(_CROSS_ENTROPY.flags | {"REDO"})
_LOGITS, _DX, _DW = (Variant(frozenset(flags.split())) for flags in ("STORE SUM PLAIN", "DX", "DW"))
_PRODUCTS = {
    torch.bfloat16: (_LOGITS, _DX, _DW),
    torch.float16: tuple(v._replace(flags=v.flags | {"HALF"}) for v in (_LOGITS, _DX, _DW)),
}
DTYPES = frozenset(_PRODUCTS)


class Products(NamedTuple):
    """The kernels for launch_logits, launch_dx and launch_dw."""

    logits: nvrtc.Kernel
    dx: nvrtc.Kernel
    dw: nvrtc.Kernel


@functools.lru_cache(maxsize=128)
def gradients(
    device: torch.device, dtype: torch.dtype, bias: bool, target: bool, sums: bool, steps: Steps
) -> nvrtc.Kernel | None:
    """The kernel for launch_gradients; None as for `products`. Which of its arguments are there?"""
    flags = {
        "HAS_BIAS": bias, "HAS_TARGET": target, "HAS_SUM": sums, "HAS_STEPS": bool(steps),
        "HALF": dtype == torch.float16,
    }  # fmt: skip
    variant = Variant(frozenset({"STORE", "GRADIENT", *(flag for flag, here in flags.items() if here)}), steps)
    found = _try((variant,), device) if dtype in DTYPES else None
    return None if found is None else found.products[0]


@functools.cache
def supported(device: torch.device) -> bool:
    """True on a GPU of compute capability 9.0 that takes what NVRTC makes of the kernels. device: with its index."""
    # What will be needed is compiled side by side.
    return _try((_CROSS_ENTROPY, _CROSS_ENTROPY_AGAIN, *_PRODUCTS[torch.bfloat16]), device) is not None


@functools.cache
def products(device: torch.device, dtype: torch.dtype) -> Products | None:
    """Products of matrices of a dtype; None where there are none for it and the device (with its index)."""
    found = _try(_PRODUCTS[dtype], device) if dtype in _PRODUCTS else None
    return None if found is None else Products(*found.products)


def _try(variants: tuple[Variant, ...], device: torch.device) -> _Kernels | None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0) or not nvrtc.available():
        return None
    try:
        with torch.cuda.device(device):
            return _kernels(variants, (), device.index)
    except (RuntimeError, OSError) as error:
        log.warning("kernels for compute capability 9.0 cannot be used, Triton's and the library's are: %s", error)
        return None


class _Kernels(NamedTuple):
    products: tuple[nvrtc.Kernel, ...]  # one for each variant asked for
    count: nvrtc.Kernel
    pack: nvrtc.Kernel
    gather: nvrtc.Kernel
    anchors: nvrtc.Kernel
    normalise: nvrtc.Kernel
    spread: nvrtc.Kernel
    collect: nvrtc.Kernel


@functools.lru_cache(maxsize=128)
def _kernels(variants: tuple[Variant, ...], steps: Steps, device: int) -> _Kernels:
    """All kernels of a call on the current device; what is not in the cache yet is compiled side by side."""
    sources = [rows_source(steps), *map(source, variants)]
    with concurrent.futures.ThreadPoolExecutor(min(len(sources), os.cpu_count() or 1)) as pool:
        rows, *products = pool.map(nvrtc.compile, sources)
    small = nvrtc.load(rows, {f"lce_{name}": 0 for name in _Kernels._fields[1:]})
    found = [nvrtc.load(p, {v.name: v.shared_bytes})[v.name] for p, v in zip(products, variants)]
    return _Kernels(tuple(found), *small.values())


@functools.lru_cache(maxsize=128)
def _variants(bias: bool, target: bool, store: bool, known: bool, steps: Steps) -> tuple[Variant, ...]:
    """The first product, and the same for saturated rows unless the anchor is known."""
    flags = {"HAS_BIAS": bias, "HAS_STEPS": bool(steps), "HAS_TARGET": target, "STORE": store, "SUM": not known}
    first = Variant(frozenset(flag for flag, here in flags.items() if here), steps)
    again = () if known else (first._replace(flags=first.flags | {"REDO"}),)
    return (first, *again)


class _Prepared(NamedTuple):
    """What calls of the same sizes share. The arguments have sizes and strides, addresses are each call's own."""

    kernels: _Kernels
    clusters: int
    rows: RowsArguments
    logits: LogitsArguments
    begins: tuple[int, ...]  # of _SCRATCH in their allocation, in bytes; then where the last begins and ends
    marks_apart: int  # from chunk to chunk, in bytes


# Vectors that only the kernels see: anchor, raw [N]; u, row_max, flag [chunk rows]; sums, maxima [tiles * chunk rows],
# of E and of the logits in each column tile; counts, packed [N] and counted [1] where rows are packed; marked [chunks,
# 1 + pairs]. Behind them, what launch_dx counts.
_PACKING = ("counts", "packed", "counted")
_SCRATCH = ("anchor", "raw", "u", "row_max", "flag", "sums", "maxima", *_PACKING, "marked")


@functools.lru_cache(maxsize=128)
def _prepared(
    device: torch.device, N: int, H: int, V: int, chunk_rows: int, chunks: int, tiles: int, samples: int, stride_x: int,
    stride_w: int, stride_t: int, bias: bool, target: bool, store: bool, known: bool, packs: bool, steps: Steps,
) -> _Prepared:  # fmt: skip
    variants = _variants(bias, target, store, known, steps)
    pairs = ceil_div(chunk_rows, PAIR)
    marks, parts = max(chunks, 1) * (1 + pairs), 0 if known else tiles * chunk_rows
    counted = counts_of_dx(chunk_rows, H) if store else 0
    packing = (N, N, 1) if packs else (0, 0, 0)
    sizes = (N, N, chunk_rows, chunk_rows, chunk_rows, parts, parts, *packing, marks, counted)
    rows = RowsArguments(
        N=N, H=H, V=V, samples=samples, tiles=tiles, marks=marks + counted, stride_x=stride_x, stride_w=stride_w,
        stride_t=stride_t, part_stride=chunk_rows,
    )  # fmt: skip
    logits = LogitsArguments(columns=V, inner=H, stride_t=stride_t, part_stride=chunk_rows)
    return _Prepared(
        _kernels(variants, steps, device.index), clusters(device), rows, logits,
        tuple(itertools.accumulate((4 * size for size in sizes), initial=0)), 4 * (1 + pairs),
    )  # fmt: skip


class Launches:
    """The launches of one call of the anchored softmax (see call.py), on the current stream.

    Everything that chunks share is made once, and what a launch does not need only after it: a launch has to cost
    the host less than the GPU, and until the first one the GPU waits. Each method is given the head again: a reference
    to it would be a cycle, and its tensors would stay until the garbage collector comes.
    """

    def __init__(self, h: Call) -> None:
        device, x, weight, target = h.x.device, h.x, h.weight, h.target
        self._prepared = p = _prepared(
            device, h.N, h.H, h.V, h.rows, h.chunks, h.tiles, h.samples, x.stride(0), weight.stride(0),
            h.stride_t, h.bias is not None, target is not None, h.store, h.known, h.packs, h.steps,
        )  # fmt: skip
        self._stream = nvrtc.current_stream(device)
        nvrtc.need_context()
        self._kernels, self._chunk_rows, self._counted = p.kernels, h.rows, 0
        self._scratch = h.f32(p.begins[-1] // 4)
        base = self._scratch.data_ptr()
        self._rows = r = RowsArguments.from_buffer_copy(p.rows)
        for name, begin in zip(_SCRATCH, p.begins):
            setattr(r, name, base + begin)
        if h.known:
            r.sums = r.maxima = None
        if not h.packs:
            r.counts = r.packed = r.counted = None
        r.x, r.weight = x.data_ptr(), weight.data_ptr()
        if h.bias is not None:
            r.bias = h.bias.data_ptr()
        if target is not None:
            r.target, r.target_logit = target.data_ptr(), _address(h.target_logit)
        if h.sum_logits is not None:
            r.class_sum, r.shift, r.sum_logits = map(_address, (h.class_sum, h.shift, h.sum_logits))

    @property
    def u(self) -> Tensor:
        return self._vector("u", self._chunk_rows)

    def counts(self, h: Call) -> Tensor:
        """bool [N]: the rows that count."""
        return self._vector("counts", h.N).view(torch.int32) != 0

    def _vector(self, name: str, size: int) -> Tensor:
        begin = self._prepared.begins[_SCRATCH.index(name)] // 4
        return self._scratch[begin : begin + size]

    def prepare_products(self, h: Call) -> None:
        r, lse = self._rows, h.lse
        assert lse is not None
        r.lse = lse.data_ptr()
        self._logits = a = LogitsArguments.from_buffer_copy(self._prepared.logits)
        a.anchor, a.bias, a.target = r.lse if h.known else r.anchor, r.bias, r.target
        a.sums, a.maxima, a.row_max, a.flag = r.sums, r.maxima, r.row_max, r.flag
        a.order, a.counted = r.packed, r.counted
        if h.packs:
            assert h.x_packed is not None
            r.x_packed, r.x_apart = h.x_packed.data_ptr(), h.x_packed.stride(0)
        self._x_map = nvrtc.tensor_map(*((h.x, h.N) if h.x_packed is None else (h.x_packed, h.rows)), ROWS)
        self._w_map = nvrtc.tensor_map(h.weight, h.V, COLUMNS // 2)

    def prepare_gradients(self, h: Call) -> None:
        """Take what the call has by now: gradients of the statistics, and where those of x and weight go."""
        r = self._rows
        self._take_gradients(h)
        r.class_sum, r.slope = _address(h.class_sum), h.slope
        r.d, r.product, r.xs, r.dx, r.dw, r.db = map(_address, (h.d, h.product, h.xs, h.dx, h.dw, h.db))
        assert h.e is not None
        r.e, r.row_stride = _address(h.e), h.e.stride(0)

    def _take_gradients(self, h: Call) -> None:
        r, g = self._rows, h.grads
        r.g_lse, r.g_slope, r.g_target, r.g_sum = map(_address, (g.lse, g.lse_slope, g.target, g.sum))
        r.stride_gl, r.stride_gs, r.stride_gt, r.stride_g = (
            0 if t is None else t.stride(0) for t in (g.lse, g.lse_slope, g.target, g.sum)
        )

    def pack(self, h: Call) -> None:
        """Find the rows that count, and their order; the statistics of the others are zeros."""
        self._take_gradients(h)
        self._rows.lse = None if h.known else _address(h.lse)
        self._rows.needed = _address(h.needed)
        self._kernels.count.launch(ceil_div(h.N, 8), 256, (self._rows,), self._stream)
        self._kernels.pack.launch(1, 1024, (self._rows,), self._stream)

    def anchors(self, h: Call) -> None:
        self._kernels.anchors.launch(ceil_div(h.N, 8), 256, (self._rows,), self._stream)

    def exponentials(self, h: Call, row0: int, n: int, redo: bool) -> None:
        """E and its sums for rows row0 ... row0 + n; redo: as logits_kernel has it."""
        a, pairs = self._logits, ceil_div(n, PAIR)
        a.rows, a.row0, a.found = n, row0, self._found(row0)
        a.x_row0 = 0 if h.packs else row0
        if h.packs and not redo:
            self._rows.row0, self._rows.rows = row0, n
            self._kernels.gather.launch(ceil_div(n, 8), 256, (self._rows,), self._stream)
        a.group = _group(pairs)
        clusters = min(pairs * h.tiles, self._prepared.clusters)
        e_map = self._x_map if h.e is None else nvrtc.tensor_map(h.e, n, ROWS)
        self._kernels.products[redo].launch(2 * clusters, _THREADS, (self._x_map, self._w_map, e_map, a), self._stream)

    def normalise(self, h: Call, row0: int, n: int, redo: bool) -> None:
        r = self._rows
        r.row0, r.rows, r.found = row0, n, self._found(row0)
        flags = ctypes.c_int(h.known), ctypes.c_int(redo)
        self._kernels.normalise.launch(ceil_div(n, 32), 512, (r, *flags), self._stream)

    def product(self, h: Call, row0: int, n: int) -> bool:
        """h.product[:n] = E @ weight, or False where that is left to the library."""
        assert h.product is not None and h.e is not None
        kernels = products(h.x.device, h.x.dtype)
        if kernels is None:
            return False
        counts = self._rows.anchor + self._prepared.begins[-2]
        self._counted += launch_dx(
            kernels.dx, h.product[:n], h.e[:n], h.weight, counts, self._counted, row0, self._rows.counted
        )  # fmt: skip
        return True

    def weight_gradient(self, h: Call, row0: int, n: int) -> None:
        """h.dw (+)= E^T xs, of the rows that count."""
        assert h.dw is not None and h.e is not None and h.xs is not None
        kernels = products(h.x.device, h.x.dtype)
        assert kernels is not None
        launch_dw(kernels.dw, h.dw, h.e[:n], h.xs[:n], row0 > 0, row0, self._rows.counted)

    def spread(self, h: Call, row0: int, n: int, tail: int) -> None:
        self._rows.tail = tail
        self._kernels.spread.launch(ceil_div(n, 8), 256, (self._rows,), self._stream)

    def collect(self, h: Call, key: Tensor, order: Tensor, ends: Tensor) -> None:
        r = self._rows
        r.key, r.order, r.ends = map(_address, (key, order, ends))
        self._kernels.collect.launch(ceil_div(h.N, 8) * ceil_div(h.H, 256), 256, (r,), self._stream)

    def _found(self, row0: int) -> int:
        return self._rows.marked + row0 // self._chunk_rows * self._prepared.marks_apart


def clusters(device: torch.device) -> int:
    """How many of the products' clusters the device takes at a time."""
    return tuning.multiprocessors(device) // 2


def launch_logits(
    kernel: nvrtc.Kernel, z: Tensor, x: Tensor, weight: Tensor, row0: int, sums: Tensor, maxima: Tensor
) -> None:
    """z = x[row0 : row0 + n] @ weight^T, rounded, on the current stream and device.

    Args:
        kernel: of `products` for the device and the dtype of all three.
        z: [n, at least V], x: [N, H], weight: [V, H]. Rows are 16-byte aligned; z beyond V is overwritten, too.
        sums, maxima: fp32 [tiles of COLUMNS classes, n]: of a row's logits in a tile the largest, and the sum of
            exp(logit - largest), or of exp(logit) where the largest is infinite.
    """
    n, (V, H) = len(z), weight.shape
    a = LogitsArguments(
        rows=n, columns=V, inner=H, row0=row0, x_row0=row0, sums=sums.data_ptr(), maxima=maxima.data_ptr(),
        part_stride=n,
    )  # fmt: skip
    _launch_first(kernel, z, x, weight, a)


class RowGradients(NamedTuple):
    """What launch_gradients takes of each row: [N] in fp32, contiguous; target: int64 [N], any stride. None: zeros."""

    lse: Tensor
    g_lse: Tensor
    target: Tensor | None
    g_target: Tensor | None
    g_sum: Tensor | None


def launch_gradients(
    kernel: nvrtc.Kernel, z: Tensor, x: Tensor, weight: Tensor, rows: RowGradients, row0: int, class0: int,
    bias: Tensor | None, class_weight: Tensor | None,
) -> None:  # fmt: skip
    """z = f'(y) (g_lse exp(f(y) - lse) + g_sum class_weight, and g_target more at the target), y = x @ weight^T + bias,
    rounded once, on the current stream and device.

    Args:
        kernel: of `gradients` for the device, the dtype of z, x and weight, and the epilogue f.
        z: [n, at least V], of the rows from row0 on; x: [N, H], weight: [V, H]. Rows are 16-byte aligned; z beyond V is
            overwritten, too.
        class0: the class of weight[0], as targets count.
        bias, class_weight: fp32 [V], contiguous, or None.
    """
    target, (V, H) = rows.target, weight.shape
    a = LogitsArguments(
        rows=len(z), columns=V, inner=H, row0=row0, x_row0=row0, target=_address(target), class0=class0,
        stride_t=0 if target is None else target.stride(0), bias=_address(bias), class_weight=_address(class_weight),
    )  # fmt: skip
    a.lse, a.g_lse, a.g_target, a.g_sum = map(_address, (rows.lse, rows.g_lse, rows.g_target, rows.g_sum))
    _launch_first(kernel, z, x, weight, a)


def _launch_first(kernel: nvrtc.Kernel, z: Tensor, x: Tensor, weight: Tensor, a: LogitsArguments) -> None:
    """A first product into all of z."""
    nvrtc.need_context()
    n, V = len(z), len(weight)
    pairs = ceil_div(n, PAIR)
    a.group = _group(pairs)
    maps = (
        nvrtc.tensor_map(x, len(x), ROWS),
        nvrtc.tensor_map(weight, V, COLUMNS // 2),
        nvrtc.tensor_map(z, n, ROWS),
    )
    blocks = 2 * min(pairs * ceil_div(V, COLUMNS), clusters(z.device))
    kernel.launch(blocks, _THREADS, (*maps, a), nvrtc.current_stream(z.device))


class Parts(NamedTuple):
    """How the product for dX is cut: parts of the inner dimension, and how full its tiles and clusters are, up to 1."""

    count: int
    full: float


@functools.lru_cache(maxsize=256)
def parts_of_dx(n: int, H: int, V: int, clusters: int) -> Parts:
    """The fewest parts with which the tiles come out even on the clusters, or nearly so."""
    tiles, steps = ceil_div(n, PAIR) * ceil_div(H, COLUMNS), ceil_div(V, DEPTH)
    wanted = range(1, _MOST_PARTS + 1)
    full = [even(tiles * parts, clusters) for parts in wanted]
    parts = next((p for p, f in zip(wanted, full) if f > 0.99), wanted[full.index(max(full))])
    parts = ceil_div(steps, ceil_div(steps, parts))  # none of them is empty
    return Parts(parts, even(tiles * parts, clusters) * n * H / (tiles * PAIR * COLUMNS))


def even(tiles: int, at_once: int) -> float:
    """How full the GPU is with so many tiles of which it takes `at_once` at a time, up to 1."""
    return tiles / (at_once * ceil_div(tiles, at_once))


def counts_of_dx(n: int, H: int) -> int:
    """What is claimed; then one for each tile of ROWS rows, of which each PAIR has two, and COLUMNS columns."""
    return 1 + 2 * ceil_div(n, PAIR) * ceil_div(H, COLUMNS)


def launch_dx(
    kernel: nvrtc.Kernel, out: Tensor, e: Tensor, weight: Tensor, counts: int, before: int, row0: int = 0,
    counted: int | None = None,
) -> int:  # fmt: skip
    """out = E @ weight on the current stream and device; returns by how much it raises each of `counts` but the first.

    Args:
        kernel: of `products` for the device and the dtype of e and weight.
        out: [n, H], fp32; e: [n, at least V], weight: [V, H]. Rows are 16-byte aligned.
        counts: address of counts_of_dx numbers, int32, for this stream alone. The first is 0.
        before: what the others are when the product begins.
        row0, counted: of out and e only rows up to row0 + row < counted are there, an int32 on the device at this
            address; None: all.
    """
    nvrtc.need_context()
    (n, H), V, most = out.shape, weight.shape[0], clusters(out.device)
    pairs, steps, parts = ceil_div(n, PAIR), ceil_div(V, DEPTH), parts_of_dx(n, H, V, most).count
    a = DxArguments(
        rows=n, columns=H, inner=V, group=_group(pairs), splits=parts,
        part=ceil_div(steps, parts), before=before, row0=row0, counted=counted, next=counts,
        arrived=counts + ctypes.sizeof(ctypes.c_int),
    )  # fmt: skip
    maps = (
        nvrtc.tensor_map(e[:, :V], n, ROWS),
        nvrtc.tensor_map(weight, V, DEPTH // 2),
        nvrtc.tensor_map(out, n, ROWS),
    )
    blocks = 2 * min(pairs * ceil_div(H, COLUMNS) * parts, most)
    kernel.launch(blocks, _THREADS, (*maps, a), nvrtc.current_stream(out.device))
    return parts


def launch_dw(
    kernel: nvrtc.Kernel, dw: Tensor, e: Tensor, xs: Tensor, accumulate: bool, row0: int = 0, counted: int | None = None
) -> None:
    """dW (+)= E^T xs on the current stream and device.

    Args:
        kernel: of `products` for the device and the dtype of e and xs.
        dw: [V, H], fp32; e: [n, at least V], xs: [n, H], both of the kernel's dtype. Rows are 16-byte aligned.
        accumulate: False overwrites what is in dw.
        row0, counted: as in launch_dx; behind those rows, up to a multiple of DEPTH, e is zero and xs finite.
    """
    nvrtc.need_context()
    (V, H), n = dw.shape, e.shape[0]
    a = DwArguments(rows=V, columns=H, inner=n, group=1, accumulate=accumulate, row0=row0, counted=counted)
    maps = nvrtc.tensor_map(e[:, :V], n, DEPTH), nvrtc.tensor_map(xs, n, DEPTH // 2), nvrtc.tensor_map(dw, V, ROWS)
    blocks = 2 * min(ceil_div(V, PAIR) * ceil_div(H, COLUMNS), clusters(dw.device))
    kernel.launch(blocks, _THREADS, (*maps, a), nvrtc.current_stream(dw.device))


def tiles(head: Call) -> int:
    """Tiles that a row of logits is cut into."""
    return ceil_div(head.V, COLUMNS)


def _address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()
