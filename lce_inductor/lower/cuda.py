"""Implementations for CUDA, and the choice between them.

Anchored softmax (lower/anchored.py) where its conditions hold; `_why_rows` lists them. Everywhere else, library
products around one Triton row kernel: for each chunk of rows, logits into a buffer with padded rows, statistics and
then the logits' gradient in place (kernels/rows.py), dX and dW from it. There the logits are rounded to the dtype of x
exactly where eager rounds them.

No host synchronisation and no allocation that depends on values: the ops can be captured in CUDA graphs. Every
product has `out=`, which ambient autocast leaves alone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..spec.epilogue import Steps
from ..spec.types import (
    ARGMAX,
    LSE,
    MAX,
    NEG_ENTROPY,
    NO_TARGET,
    SUM,
    TARGET,
    HeadArgs,
    RowGrads,
    Stats,
    grad_dtype,
    lse_dtype,
    stat_dtype,
)
from .plan import plan
from .products import input_gradient, logits_with_lse, pieces, weight_gradient

log = logging.getLogger(__name__)

Mask = tuple[bool, bool, bool]

# GPUs that the anchored softmax is chosen on: those whose layouts kernels/tuning.py has.
_ANCHORED_CAPABILITIES = ((9, 0),)
_ANCHORED_STATS = LSE | TARGET | SUM
# Below these sizes its launches cost what the saved pass over the logits gives (NOTES.md).
_ANCHORED_LEAST_N, _ANCHORED_LEAST_V, _ANCHORED_LEAST_WORK = 1024, 4096, 1e11
_AFFINE = ("mul", "div", "add")


@functools.cache
def available() -> bool:
    """True where Triton is installed."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _anchored() -> ModuleType:
    from . import anchored

    return anchored


def forward(a: HeadArgs, stats: int, needed: Tensor | None = None) -> Stats:
    """Statistics only: one product, nothing kept, nothing written but statistics. Of all rows, whichever are needed:
    how many there are the host does not know."""
    if _is_anchored(a, stats, None, (False,) * 3):
        with _device(a.x):
            found = _anchored().forward(a, stats)
        _assert_targets(a.target, a.weight.shape[0])
        return _wide_lse(found)
    found = _empty_stats(a, stats)
    _run(a, stats, found, None, None)
    return found


def backward(a: HeadArgs, lse: Tensor, neg_entropy: Tensor | None, grads: RowGrads, mask: Mask) -> tuple[Tensor, ...]:
    """Gradients by computing the logits again: one product, and one for each of dX and dW that is needed."""
    if _is_anchored(a, 0, grads, mask):
        with _device(a.x):
            return _anchored().backward(a, lse, grads, mask)
    found = _empty_stats(a, 0)._replace(lse=lse.contiguous())
    if neg_entropy is not None:
        found = found._replace(neg_entropy=neg_entropy.contiguous())
    out = _Gradients(a, mask, a.weight.dtype)
    if any(mask) and not grads.all_none():
        _run(a, 0, found, grads, out)
    return out.result()


def with_grad(
    a: HeadArgs, stats: int, grads: RowGrads, mask: Mask, wide: bool = False, needed: Tensor | None = None
) -> tuple[Stats, Tensor, Tensor, Tensor]:
    """Statistics, and gradients while each chunk's logits are there: three products. wide: dW and db in fp32. Of all
    rows, whichever are needed."""
    if _is_anchored(a, stats, grads, mask):
        with _device(a.x):
            rows, dx, dw, db = _anchored().with_grad(a, stats, grads, mask, wide)
        _assert_targets(a.target, a.weight.shape[0])
        return _wide_lse(rows), dx, dw, db
    computed = stats
    if grads.neg_entropy is not None:
        computed |= NEG_ENTROPY | LSE
    if grads.lse is not None or grads.lse_slope is not None:
        computed |= LSE
    found = _empty_stats(a, computed)
    out = _Gradients(a, mask, grad_dtype(a.weight.dtype, wide))
    _run(a, computed, found, grads if any(mask) and not grads.all_none() else None, out)
    nothing = _empty_stats(a, 0)
    asked = (LSE, TARGET, SUM, NEG_ENTROPY, MAX, ARGMAX)
    return (Stats(*(f if stats & bit else e for f, e, bit in zip(found, nothing, asked))), *out.result())


def _wide_lse(found: Stats) -> Stats:
    return found._replace(lse=found.lse.double())


def _is_anchored(a: HeadArgs, stats: int, grads: RowGrads | None, mask: Mask) -> bool:
    reason = _why_rows(a, stats, grads, mask)
    if log.isEnabledFor(logging.DEBUG):
        _log_choice(tuple(a.x.shape), a.weight.shape[0], a.x.dtype, stats, grads is not None, reason)
    return reason is None


@functools.lru_cache(maxsize=1024)
def _log_choice(x: tuple[int, ...], V: int, dtype: torch.dtype, stats: int, grads: bool, reason: str | None) -> None:
    """Once for each choice: the cache is what forgets repetitions."""
    chosen = "anchored softmax" if reason is None else f"row kernel: {reason}"
    log.debug("N=%d H=%d V=%d %s stats=%d gradients=%s: %s", *x, V, dtype, stats, grads, chosen)


def _why_rows(a: HeadArgs, stats: int, grads: RowGrads | None, mask: Mask) -> str | None:
    """Why the anchored softmax does not do; None where it does."""
    x, w, g = a.x, a.weight, grads or RowGrads()
    if not x.is_cuda:
        return "not chosen on this device"
    targets = 0 if a.target is None else a.target.shape[1]
    return _why_rows_of(
        x.device, x.dtype, x.shape, w.shape[0], w.stride(), w.data_ptr() % 16, targets, a.epilogue, a.chunk_tokens,
        a.workspace_bytes, stats, mask, grads is not None, g.all_none(), g.sum is not None, g.neg_entropy is not None,
    )  # fmt: skip


# The GPU waits for the first launch: what is the same from step to step is decided once.
@functools.lru_cache(maxsize=1024)
def _why_rows_of(
    device: torch.device, dtype: torch.dtype, x: tuple[int, int], V: int, w_strides: tuple[int, int], w_offset: int,
    targets: int, steps: Steps, chunk_tokens: int, workspace_bytes: int, stats: int, mask: Mask, has_grads: bool,
    no_gradient: bool, has_sum: bool, has_entropy: bool,
) -> str | None:  # fmt: skip
    N, H = x
    if torch.cuda.get_device_capability(device) not in _ANCHORED_CAPABILITIES:
        return "not chosen on this device"
    if dtype != torch.bfloat16:
        return "bf16 only: exponentials need its range"
    if stats & ~_ANCHORED_STATS or has_entropy:
        return "a statistic that needs every logit"
    if targets > 1:
        return "more than one target column"
    if (stats & SUM or has_sum) and any(step[0] not in _AFFINE for step in steps):
        return "sum of logits behind an epilogue that is not affine"
    if N < _ANCHORED_LEAST_N or V < _ANCHORED_LEAST_V or N * H * V < _ANCHORED_LEAST_WORK:
        return "too small"
    if H % 8 or w_strides[1] != 1 or w_strides[0] % 8 or w_offset:
        return "the weight's rows are not contiguous and 16-byte aligned"
    if has_grads and (not any(mask) or no_gradient):
        return "no gradient"
    if mask[2] and not mask[1]:
        return "gradient of the bias without the weight's"
    if mask[1] and plan(N, H, V, 2, chunk_tokens, workspace_bytes, device="cuda").count == 1:
        return "a single chunk, whose dW needs no sums in fp32"
    return None


def _run(a: HeadArgs, stats: int, found: Stats, grads: RowGrads | None, out: _Gradients | None) -> None:
    from ..kernels import rows

    N, H = a.x.shape
    V = a.weight.shape[0]
    x, weight = _for_products(a.x), _for_products(a.weight)
    bias, class_weight = (None if t is None else t.contiguous() for t in (a.bias, a.class_weight))
    p = plan(N, H, V, x.element_size(), a.chunk_tokens, a.workspace_bytes, device="cuda")
    columns = pieces(V, x.element_size())
    # As in eager: one rounding for the product and a bias of its dtype together.
    within = bias if bias is not None and bias.dtype == x.dtype else None
    # Where logits are asked for nothing but their logsumexp and one entry, the product itself can leave it.
    plain = stats & LSE and not stats & ~(LSE | TARGET) and bias is None and not a.epilogue and x.element_size() == 2
    buffer = x.new_empty(p.rows, p.row_stride)
    with _device(x):
        for row0, n in p.bounds(N):
            z, x_chunk = buffer[:n], x[row0 : row0 + n]
            left = plain and logits_with_lse(z, x, weight, row0, found.lse[row0 : row0 + n])
            for c in () if left else columns:
                if within is None:
                    torch.mm(x_chunk, weight[c].t(), out=z[:, c])
                else:
                    torch.addmm(within[c], x_chunk, weight[c].t(), out=z[:, c])
            rows.launch(
                z, V, row0, None if within is not None else bias, a.target, class_weight, a.epilogue,
                stats & ~LSE if left else stats, found, grads, hidden=bias is not None,
            )  # fmt: skip
            if grads is not None and out is not None:
                out.add(row0, z, x_chunk, weight, last=row0 + n == N)
    _assert_targets(a.target, V)  # last: half a dozen launches, and until the first product the GPU waits


class _Gradients:
    """dX by rows; dW and db summed over chunks, in fp32 (fp64) as soon as there are several."""

    def __init__(self, a: HeadArgs, mask: Mask, dtype: torch.dtype) -> None:
        self.like, self.shape, self.dtype, self.mask = a.x, a.weight.shape, dtype, mask
        self.wide = torch.float64 if a.x.dtype == torch.float64 else torch.float32
        # Until the first chunk: before its product, the GPU waits.
        self.dx: Tensor | None = None
        self.dw: Tensor | None = None
        self.db: Tensor | None = None

    def add(self, row0: int, dz: Tensor, x: Tensor, weight: Tensor, last: bool) -> None:
        """Take in a chunk's dZ: [n, row_stride], of which V columns count."""
        if self.mask[0]:
            if self.dx is None:
                self.dx = x.new_empty(self.like.shape)
            input_gradient(self.dx[row0 : row0 + len(dz)], dz, weight)
        if self.mask[1]:
            first = self.dw is None
            if self.dw is None:
                self.dw = x.new_empty(self.shape, dtype=self.dtype if last else self.wide)
            weight_gradient(self.dw, dz, x, accumulate=not first)
        if self.mask[2]:
            column = dz[:, : self.shape[0]].sum(0, dtype=self.wide)
            self.db = column if self.db is None else self.db.add_(column)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """dX, dW, and db as summed. The chunk must be free by now: the cast below is where both forms of dW exist."""

        def zeros(shape: Sequence[int], needed: bool, dtype: torch.dtype) -> Tensor:
            """Where there are no rows, or nothing depends on them."""
            return self.like.new_zeros(shape if needed else (0,), dtype=dtype)

        dx = zeros(self.like.shape, self.mask[0], self.like.dtype) if self.dx is None else self.dx
        dw = zeros(self.shape, self.mask[1], self.dtype) if self.dw is None else self.dw
        db = zeros(self.shape[:1], self.mask[2], self.wide) if self.db is None else self.db
        return dx, dw.to(self.dtype), db


def _for_products(t: Tensor) -> Tensor:
    """t itself where the library takes its strides, else a copy made once and not by every product."""
    rows, columns = t.stride()
    plain = (columns == 1 and rows >= t.shape[1]) or (rows == 1 and columns >= t.shape[0])
    return t if plain else t.contiguous()


def _empty_stats(a: HeadArgs, stats: int) -> Stats:
    N = a.x.shape[0]
    dtype = stat_dtype(a.x)
    columns = 0 if a.target is None else a.target.shape[1]

    def new(bit: int, *more: int, dtype: torch.dtype = dtype) -> Tensor:
        return a.x.new_empty((N, *more) if stats & bit else (0,), dtype=dtype)

    lse, argmax = new(LSE, dtype=lse_dtype(a.x)), new(ARGMAX, dtype=torch.int64)
    return Stats(lse, new(TARGET, columns), new(SUM), new(NEG_ENTROPY), new(MAX), argmax)


def _assert_targets(target: Tensor | None, V: int) -> None:
    """As eager on CUDA: a device-side assertion. The kernel reads nothing out of bounds either way."""
    if target is not None and target.numel():
        ok = ((target >= 0) & (target < V)) | (target == NO_TARGET)
        torch._assert_async(ok.all(), f"target out of bounds: must be in [0, {V})")


def _device(t: Tensor) -> contextlib.AbstractContextManager:
    """Launches go to the current device, which need not be the tensor's."""
    here = not t.is_cuda or t.get_device() == torch._C._cuda_getDevice()
    return contextlib.nullcontext() if here else torch.cuda.device(t.device)
