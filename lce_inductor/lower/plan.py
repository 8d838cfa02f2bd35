"""How a head is computed: sizes, dtype, needs and a device in, a frozen plan out. device_policy.py has the thresholds.

One function, `decide`. The passes ask it before they rewrite and for what they tell; a call of an op asks it and hands
the plan on to the implementation that it names. Tests and measurements pass a policy, a device or an algorithm in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ..kernels import hopper, hopper_source, nvrtc, tuning
from ..spec.epilogue import Steps, is_affine
from ..spec.sizes import ceil_div, round_up
from ..spec.statistics import LSE, NEG_ENTROPY, SUM, TARGET
from .chunk_plan import ChunkPlan, ClassPlan, anchored_peak_bytes, class_peak_bytes, copied_x_bytes, peak_bytes
from .device_policy import (
    ANCHORED,
    ANCHORED_TRITON,
    BLOCK,
    BLOCKS,
    KNOWN,
    LEAST_SPLIT,
    POLICIES,
    ROWS,
    WIDENED,
    Chunks,
    Policy,
)
from .device_policy import Products as ProductPolicy

log = logging.getLogger(__name__)
# At most, while ATen computes a softcap and its slope.
_COPIES_FOR_A_SLOPE = 4

Mask = tuple[bool, bool, bool]


class Device(NamedTuple):
    """What a plan knows of a device.

    kind: as torch names it, a key of POLICIES; one that is not there is treated as "cpu". capability: of an NVIDIA GPU.
    hopper: are the kernels of kernels/hopper.py to be had? clusters: how many of theirs it takes at a time.
    """

    kind: str
    triton: bool = False
    capability: tuple[int, int] | None = None
    hopper: bool = False
    clusters: int = 0


class Request(NamedTuple):
    """What is asked of a head, as far as it decides how.

    Attributes:
        N, H, V: tokens, hidden, vocabulary. dtype: of x and of the logits.
        chunk_tokens: rows of a chunk as the user wants them; 0 decides automatically.
        workspace_bytes: limit of one chunk's logits in bytes; a single row may exceed it.
        stats: bits of the statistics that are computed. columns: of targets. steps: the epilogue.
        aligned: are the weight's rows contiguous, and do they begin on 16 bytes?
        grads: bits of the statistics that a gradient is given for; None where no gradients are asked for at all.
        mask: which of dX, dW and db are.
        recompute: are they computed by a backward, from logits that it computes again?
        forward: bits of the statistics that the forward of such a backward has computed.
        counts: may rows be left out that don't count?
        prefer: "speed" or "memory".
    """

    N: int
    H: int
    V: int
    dtype: torch.dtype
    chunk_tokens: int
    workspace_bytes: int
    stats: int = 0
    columns: int = 0
    steps: Steps = ()
    bias: bool = False
    aligned: bool = True
    grads: int | None = None
    mask: Mask = (False, False, False)
    recompute: bool = False
    prefer: str = "speed"
    counts: bool = False
    forward: int = 0

    @property
    def for_memory(self) -> bool:
        return self.prefer == "memory"

    def backward(self) -> Request:
        """Of the backward that computes these gradients, where the forward is asked for these statistics alone."""
        return self._replace(stats=0, recompute=True, forward=self.stats)


class Products(NamedTuple):
    """Which products of a chunk are ours; the library has the others, and all whose tensors ours does not take.

    logits: with their logsumexp, so that nothing passes over them for it. dw: where its sums are fp32.
    """

    logits: bool = False
    dx: bool = False
    dw: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """
    Attributes:
        algorithm: ANCHORED, ANCHORED_TRITON, KNOWN, ROWS or BLOCKS.
        classes: blocks of classes that take the place of chunks, or None.
        ruled_out: the faster ones for the device, and why each does not do; empty, too, where the caller chose.
        products: of a chunk; last_products: of the last one, which may have fewer rows.
        packs: are rows that don't count packed away on the device?
        wide: shall what multiplies dW by the tangent take its sums in fp32?
        peak_bytes: predicted, as peak_bytes() has it.
    """

    algorithm: str
    ruled_out: tuple[tuple[str, str], ...]
    chunks: ChunkPlan
    products: Products
    last_products: Products
    wide: bool
    peak_bytes: int
    classes: ClassPlan | None = None
    packs: bool = False

    def products_of(self, n: int) -> Products:
        """Of a chunk of n rows."""
        return self.products if n == self.chunks.rows else self.last_products

    def __str__(self) -> str:
        why = f" ({'; '.join(f'no {name}: {reason}' for name, reason in self.ruled_out)})" if self.ruled_out else ""
        cut = f"{self.chunks.count} chunks of {self.chunks.rows} tokens"
        if self.classes is not None:
            cut = f"{self.classes.count} blocks of {self.classes.classes} classes"
        packs = ", of rows that count" if self.packs else ""
        return f"{cut}{packs}, {self.algorithm}{why}"


@functools.cache
def triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def capabilities(device: torch.device) -> Device:
    """Of a GPU that is not there, as a traced tensor's may be, nothing but its kind is known; nor of AMD's, which torch
    calls "cuda", too: their (9, 0) is an MI200."""
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip:
        return Device(device.type, triton_is_installed())
    capability = torch.cuda.get_device_capability(device)
    ours = capability == (9, 0) and nvrtc.available()
    return Device(device.type, triton_is_installed(), capability, ours, hopper.clusters(device))


def why_not_on(device: torch.device, dtype: torch.dtype, trains: bool) -> str:
    """Why no head is computed on a device; "" where heads are. trains: are gradients computed?"""
    if device.type not in POLICIES:
        return f"never tried on {device.type}"
    if device.type == "cuda" and trains and dtype.itemsize == 2 and not widens(device, dtype):
        return f"torch has no product of {dtype} with its sums in fp32 here"
    return ""


def widens(device: torch.device, dtype: torch.dtype) -> bool:
    """Does a GPU's library take 16-bit matrices and leave their product in fp32 (`out_dtype` of torch.mm)?"""
    if dtype == torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation:
        return False
    if torch.version.hip:
        return _widens_on_amd(device, dtype)
    capability = capabilities(device).capability
    return dtype == torch.float16 or capability is None or capability >= (8, 0)


@functools.cache
def _widens_on_amd(device: torch.device, dtype: torch.dtype) -> bool:
    """It depends on the versions of torch and ROCm: so it is tried."""
    with _disable_current_modes(), torch.no_grad():
        a, out = (torch.zeros(16, 16, dtype=d, device=device) for d in (dtype, torch.float32))
        try:
            torch.mm(a, a, out_dtype=out.dtype, out=out)
            torch.addmm(out, a, a, out_dtype=out.dtype, out=out)
        except RuntimeError:
            return False
    return True


_in_force = dict(POLICIES)


def policy_of(kind: str) -> Policy:
    return _in_force.get(kind, _in_force["cpu"])


@contextlib.contextmanager
def using(kind: str, policy: Policy) -> Iterator[None]:
    """Plan by another policy, to test or to measure: in all threads, autograd's too, and unknown to compile caches."""
    before = policy_of(kind)
    try:
        _in_force[kind] = policy
        _forget()
        yield
    finally:
        _in_force[kind] = before
        _forget()


def _forget() -> None:
    planned.cache_clear()
    products_on.cache_clear()


# The GPU waits for the first launch: what is the same from step to step is decided once.
@functools.lru_cache(maxsize=1024)
def planned(request: Request, device: torch.device) -> Plan:
    """`decide`, for a device as it is."""
    return decide(request, capabilities(device), policy_of(device.type))


@functools.lru_cache(maxsize=1024)
def products_on(n: int, H: int, V: int, dtype: torch.dtype, device: torch.device) -> Products:
    """`products`, for a device as it is."""
    return products(n, H, V, dtype, capabilities(device), policy_of(device.type).products)


def decide(r: Request, device: Device, policy: Policy, algorithm: str | None = None) -> Plan:
    """How a head is computed. algorithm: take this one, whatever speaks against it."""
    cut = _chunks_of(r, policy)
    wide = policy.sums_are_scaled and r.dtype == torch.bfloat16 and cut.count > 1
    ruled_out = []
    if algorithm is None:
        for algorithm in policy.algorithms:
            reason = _WHY_NOT[algorithm](r, device, policy, cut)
            if reason is None and algorithm not in _BY_CLASSES and r.for_memory and _blocks_of(r, policy, cut, ROWS):
                reason = "blocks of classes take less memory"
            if reason is None:
                break
            if reason:
                ruled_out.append((algorithm, reason))
    assert algorithm is not None
    blocks = _blocks_of(r, policy, cut, algorithm) if algorithm in _BY_CLASSES else None
    dx, dw = r.mask[:2] if r.grads is not None else (False, False)
    packs = algorithm == ANCHORED and _packs(r)
    if algorithm in (ANCHORED, ANCHORED_TRITON):
        if r.grads is None:
            cut = _chunks_of_sums(r, _tile_columns(r.H, device, algorithm), policy)
        peak = anchored_peak_bytes(cut, r.N, r.H, r.V, dx, dw, packs)
    else:
        peak = _peak(r, blocks or cut, algorithm)
    last = r.N - (cut.count - 1) * cut.rows
    ours = products(cut.rows, r.H, r.V, r.dtype, device, policy.products)
    ours = ours._replace(logits=algorithm == ROWS and _logits_with_lse(r, device, policy.products))
    of_last = ours
    if last != cut.rows:
        of_last = ours._replace(dx=products(last, r.H, r.V, r.dtype, device, policy.products).dx)
    if packs:  # the library's would multiply all rows
        ours = of_last = ours._replace(dx=True, dw=True)
    return Plan(algorithm, tuple(ruled_out), cut, ours, of_last, wide, peak, blocks, packs)


def _packs(r: Request) -> bool:
    """Are rows packed away? The gradient of a bias is summed over whole chunks."""
    return r.counts and not (r.grads is not None and r.mask[2])


class Training(NamedTuple):
    """A training step: are logits computed again for the gradients? And the bytes that it is predicted to add at its
    peak, gradients included."""

    recompute: bool
    peak_bytes: int


def training(r: Request, device: Device, policy: Policy, recompute: bool | None = None) -> Training:
    """How a step is best computed, if `r` is what would be asked for in one go. recompute: it is to be so."""
    three = decide(r, device, policy).peak_bytes
    forward = r._replace(grads=None, mask=(False, False, False))
    four = max(decide(q, device, policy).peak_bytes for q in (forward, r.backward()))
    if recompute is None:
        recompute = r.for_memory and four <= policy.memory.four_products * three
    return Training(recompute, four if recompute else three)


def _why_not_anchored(r: Request, device: Device, policy: Policy, cut: ChunkPlan) -> str | None:
    limits = policy.anchored
    if device.capability not in limits.capabilities:
        return "chosen on compute capability 9.0 alone, where it was measured"
    if not device.triton:
        return "Triton is not installed"
    if r.dtype != torch.bfloat16:
        return "bf16 only: exponentials need its range"
    # A backward takes logits as its forward took them, rounded or not: lse is of those.
    asked = r.stats | r.forward | (r.grads or 0)
    if asked & ~(LSE | TARGET | SUM):
        return "a statistic that needs every logit"
    if r.columns > 1:
        return "more than one target column"
    if asked & SUM and not is_affine(r.steps):
        return "sum of logits behind an epilogue that is not affine"
    if limits.least_N > r.N or limits.least_V > r.V or limits.least_work > r.N * r.H * r.V:
        return "too small"
    if r.H % 8 or not r.aligned:
        return "the weight's rows are not contiguous and 16-byte aligned"
    if r.grads is not None and (not any(r.mask) or not r.grads):
        return "no gradient"
    if r.mask[2] and not r.mask[1]:
        return "gradient of the bias without the weight's"
    if r.mask[1] and cut.count == 1:
        return "a single chunk, whose dW needs no sums in fp32"
    return None


def _why_not_anchored_in_cuda(r: Request, device: Device, policy: Policy, cut: ChunkPlan) -> str | None:
    return _why_not_anchored(r, device, policy, cut) or (None if device.hopper else "NVRTC is not installed")


def _why_not_known(r: Request, device: Device, policy: Policy, cut: ChunkPlan) -> str | None:
    """It is for what the anchored softmax has computed the forward of: lse is of logits that are not rounded, as those
    here are not. An empty reason: it is out of the question."""
    if not (r.recompute and r.grads and any(r.mask) and r.N):
        return ""
    if not r.grads & LSE:
        return "nothing comes in for lse"
    forward = r._replace(stats=r.stats | r.grads, grads=None, mask=(False, False, False))
    return _why_not_anchored_in_cuda(forward, device, policy, cut)


def _why_not_rows(r: Request, device: Device, policy: Policy, cut: ChunkPlan) -> str | None:
    return None if device.triton else "Triton is not installed"


# Those that compute blocks of classes.
_BY_CLASSES = (KNOWN, ROWS, BLOCKS)

_WHY_NOT: dict[str, Callable[[Request, Device, Policy, ChunkPlan], str | None]] = {
    ANCHORED: _why_not_anchored_in_cuda,
    ANCHORED_TRITON: _why_not_anchored,
    KNOWN: _why_not_known,
    ROWS: _why_not_rows,
    BLOCKS: lambda *_: None,
}


def products(n: int, H: int, V: int, dtype: torch.dtype, device: Device, policy: ProductPolicy) -> Products:
    """Which products of dZ [n, V] are ours: dX by the weight [V, H], dW by x [n, H]."""
    if not device.hopper or dtype not in hopper.DTYPES or not n:
        return Products()
    # Does our product for dX come out even, where the library's tiles of 128 x 256 do not?
    library = hopper.even(ceil_div(n, 128) * ceil_div(H, 256), 2 * device.clusters)
    parts = hopper.parts_of_dx(n, H, V, device.clusters)
    dx = policy.dx_least_H <= H and library < policy.dx_library_full and parts.full >= policy.dx_full
    log.debug("dX of %d rows, H=%d V=%d: %s", n, H, V, f"ours in {parts.count} parts" if dx else "the library's")
    return Products(dx=dx, dw=policy.dw_full * round_up(H, hopper_source.COLUMNS) <= H)


def _logits_with_lse(r: Request, device: Device, policy: ProductPolicy) -> bool:
    """Where logits are asked for nothing but their logsumexp and one entry, the product itself can leave it."""
    plain = bool(r.stats & LSE) and not r.stats & ~(LSE | TARGET) and not r.bias and not r.steps
    large = policy.logits_least_N <= r.N and policy.logits_least_V <= r.V
    return plain and large and device.hopper and r.dtype in hopper.DTYPES


def pieces(V: int, itemsize: int) -> list[slice]:
    """The classes, in pieces that the library's products run well on.

    Padded rows are not enough: cuBLAS looks at the sizes too, and an odd V costs up to seven times the time (93
    TFLOP/s at V = 50257 against 628 at 50304, H100). So the last few classes get products of their own.
    """
    rest = V % (16 // itemsize)
    return [slice(0, V - rest), slice(V - rest, V)] if rest and V >= LEAST_SPLIT else [slice(0, V)]


@functools.lru_cache(maxsize=256)
def chunks(N: int, H: int, V: int, itemsize: int, chunk_tokens: int, workspace_bytes: int, policy: Chunks) -> ChunkPlan:
    """Chunks for [N, H] x [V, H], whose logits have `itemsize` bytes; the others as in Request."""
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


def _chunks_of(r: Request, policy: Policy) -> ChunkPlan:
    """Chunks for a request. Where memory is preferred they are smaller, but for those that the caller chose."""
    limit, itemsize = r.workspace_bytes, r.dtype.itemsize
    if r.for_memory and not r.chunk_tokens:
        least = policy.memory.least_rows * round_up(r.V, policy.chunks.align) * itemsize
        limit = min(limit, max(policy.memory.bytes, least))
    return chunks(r.N, r.H, r.V, itemsize, r.chunk_tokens, limit, policy.chunks)


def _blocks_of(r: Request, policy: Policy, cut: ChunkPlan, algorithm: str) -> ClassPlan | None:
    """Blocks of classes, where they do better than these chunks of rows."""
    if not (r.recompute and r.grads and r.mask[1] and r.N and r.H and r.V):
        return None
    of, align, column = policy.classes, policy.chunks.align, r.N * r.dtype.itemsize
    limit = min(r.workspace_bytes, r.chunk_tokens * r.V * r.dtype.itemsize or r.workspace_bytes) // column
    most = int(min(max((policy.memory if r.for_memory else of).bytes // column, of.least), of.most, limit))
    if most >= r.V or most < of.least:
        return None
    most -= most % of.tile
    count = ceil_div(r.V, most)
    blocks = ClassPlan(min(round_up(ceil_div(r.V, count), of.tile), most), count, align)
    more = _peak(r, blocks, algorithm) - _peak(r, cut, algorithm)
    # Of a single chunk in 16 bits, no product is wider than its factors.
    quick = r.N <= r.V and (cut.count > 1 or r.dtype.itemsize >= 4) and not r.chunk_tokens
    return blocks if (quick and more <= 0) or (r.for_memory and more < 0) else None


def _tile_columns(H: int, device: Device, algorithm: str) -> int:
    return hopper_source.COLUMNS if algorithm == ANCHORED else tuning.tiles(device.capability, "logits", H).columns


def _chunks_of_sums(r: Request, columns: int, policy: Policy) -> ChunkPlan:
    """Of the anchored softmax without gradients, which writes only partial sums of each tile's columns."""
    unit = hopper.PAIR
    most = max(policy.anchored.sums_bytes // (8 * ceil_div(r.V, columns)) // unit, 1) * unit
    rows = min(round_up(ceil_div(r.N, ceil_div(r.N, most)), unit), r.N) if r.N else 1
    return ChunkPlan(rows, ceil_div(r.N, rows), 0)


def _peak(r: Request, cut: ChunkPlan | ClassPlan, algorithm: str) -> int:
    dx, dw = r.mask[:2] if r.grads is not None else (False, False)
    sizes = r.N, r.H, r.V, r.dtype.itemsize, dx, dw
    beside = copied_x_bytes(r.N, r.H) if algorithm == KNOWN else 0
    if isinstance(cut, ClassPlan):
        if algorithm == BLOCKS:
            beside = _beside(r, r.N, cut.classes, cut.classes, dx and cut.count > 1)
        return class_peak_bytes(cut, *sizes, beside)
    if algorithm == BLOCKS:
        beside = _beside(r, cut.rows, r.V, cut.rows, dw and cut.count > 1)
    return peak_bytes(cut, *sizes, beside)


def _beside(r: Request, n: int, classes: int, factor: int, summed: bool) -> int:
    """What ATen makes beside a piece of the logits [n, classes]: copies of a few of its rows for the arithmetic, and
    factors that are widened for sums in fp32, of which the other one is [factor, H]."""
    if not classes:
        return 0
    narrow = r.dtype.itemsize < 4
    forward, slope = r.grads is None, r.grads is not None and not is_affine(r.steps)
    making = _COPIES_FOR_A_SLOPE if slope else min(narrow + len(r.steps), 2)
    kept = (narrow or bool(r.steps)) + slope
    reading = max(2 * bool(r.stats & NEG_ENTROPY), forward or bool((r.grads or 0) & NEG_ENTROPY))
    copies = max(making, kept + reading)
    block = min(max(BLOCK // classes, 1), n) * classes * max(r.dtype.itemsize, 4)
    widened = (min(WIDENED, n * classes) + factor * r.H) * 4
    return max(block * copies, widened * (narrow and summed))
