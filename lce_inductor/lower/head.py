"""The fused ops' work: each call gets a plan, and the implementation that the plan names does it.

What does not depend on how a head is computed is here: the current device, and the check of the targets on a GPU.
No host synchronisation and no allocation that depends on values: the ops can be captured in CUDA graphs.

Everything takes a plan; without one, it is made for the device as it is.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..spec.statistics import NO_TARGET, TARGET, HeadArgs, RowGrads, Stats, computed, stat_dtype
from .device_policy import ANCHORED, ANCHORED_TRITON, BLOCKS, KNOWN, ROWS
from .head_cpu import check_target
from .plan import Mask, Plan, Request, planned
from .products import aligned
from .rows_that_count import counting, packed, packed_grads, unpacked, unpacked_stats

log = logging.getLogger(__name__)

CLASSES = "blocks of classes"
_MODULES = {
    ANCHORED: "head_anchored", ANCHORED_TRITON: "head_anchored", KNOWN: "head_cuda", ROWS: "head_cuda",
    BLOCKS: "head_cpu", CLASSES: "head_classes",
}  # fmt: skip


def forward(a: HeadArgs, stats: int, needed: Tensor | None = None, plan: Plan | None = None) -> Stats:
    """Statistics only: one product, nothing kept, nothing written but statistics; zeros in rows that don't count."""
    rows = None if needed is None or _packs(plan) else counting(a, needed)
    if rows is not None:
        _check_targets(a, stats)
        return unpacked_stats(forward(packed(a, rows), stats, plan=plan), stats, rows, len(a.x))
    p = plan or _plan(request(a, stats, counts=needed is not None), a)
    with _device(a.x):
        found: Stats = _module(p.algorithm).forward(a, stats, p, **_needed(p, needed))
        _assert_targets(a, p)
    return found


def backward(
    a: HeadArgs, lse: Tensor, neg_entropy: Tensor | None, grads: RowGrads, mask: Mask, plan: Plan | None = None,
    stats: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients by computing the logits again: one product, and one for each of dX and dW that is needed; dX is zero in
    rows that don't count. stats: bits of those that the forward has computed."""
    rows = None if _packs(plan) else counting(a, None, grads)
    if rows is not None:
        of_rows = lse[rows], None if neg_entropy is None else neg_entropy[rows], packed_grads(grads, rows)
        dx, dw, db = backward(packed(a, rows), *of_rows, mask, plan, stats)
        return unpacked(dx, rows, len(a.x)) if mask[0] else dx, dw, db
    p = plan or _plan(request(a, 0, grads, mask, recompute=True, counts=True)._replace(forward=stats), a)
    if not _packs(p):
        lse = _read(a, lse, grads)
    with _device(a.x):
        module = _module(p.algorithm if p.classes is None else CLASSES)
        found: tuple[Tensor, Tensor, Tensor] = module.backward(a, lse, neg_entropy, grads, mask, p)
    return found


def with_grad(
    a: HeadArgs, stats: int, grads: RowGrads, mask: Mask, wide: bool = False, needed: Tensor | None = None,
    plan: Plan | None = None,
) -> tuple[Stats, Tensor, Tensor, Tensor]:  # fmt: skip
    """Statistics, and gradients while each chunk's logits are there: three products. Statistics and dX are zero in rows
    that don't count. wide: dW and db in fp32."""
    rows = None if needed is None or _packs(plan) else counting(a, needed, grads)
    if rows is not None:
        _check_targets(a, stats)
        found, dx, dw, db = with_grad(packed(a, rows), stats, packed_grads(grads, rows), mask, wide, plan=plan)
        return unpacked_stats(found, stats, rows, len(a.x)), unpacked(dx, rows, len(a.x)) if mask[0] else dx, dw, db
    p = plan or _plan(request(a, computed(stats, grads.bits()), grads, mask, counts=needed is not None), a)
    with _device(a.x):
        module = _module(p.algorithm)
        made: tuple[Stats, Tensor, Tensor, Tensor] = module.with_grad(
            a, stats, grads, mask, wide, p, **_needed(p, needed)
        )
        _assert_targets(a, p)
    return made


def request(
    a: HeadArgs, stats: int, grads: RowGrads | None = None, mask: Mask = (False,) * 3, recompute: bool = False,
    counts: bool = False,
) -> Request:  # fmt: skip
    """What a call asks for. stats: bits of those that it computes."""
    (N, H), given = a.x.shape, None if grads is None else grads.bits()
    return Request(
        N, H, a.weight.shape[0], a.x.dtype, a.chunk_tokens, a.workspace_bytes, stats,
        0 if a.target is None else a.target.shape[1], a.epilogue, a.bias is not None, aligned(a.weight), given, mask,
        recompute, a.prefer, counts,
    )  # fmt: skip


def _read(a: HeadArgs, lse: Tensor, grads: RowGrads) -> Tensor:
    """lse of the rows that something comes in for, elsewhere so large that nothing of a row's softmax is left.

    The forward may not have computed those, and below a lse of zero exponentials overflow: zero times that is NaN. So
    is zero times infinity, which the gradient of the entropy would have: large, and finite.
    """
    read = torch.zeros_like(lse, dtype=torch.bool)
    for g in grads:
        if g is not None:
            read |= (g != 0).any(1) if g.dim() > 1 else g != 0
    return torch.where(read, lse, torch.finfo(stat_dtype(a.x)).max / 4)


def _packs(plan: Plan | None) -> bool:
    """Does the implementation that was chosen for this call pack its rows?"""
    return plan is not None and plan.packs


def _needed(p: Plan, needed: Tensor | None) -> dict[str, Tensor | None]:
    """For an implementation that packs rows on the device; the others compute them all."""
    return {"needed": needed} if p.packs else {}


def _plan(r: Request, a: HeadArgs) -> Plan:
    p = planned(r, a.x.device)
    if log.isEnabledFor(logging.DEBUG):
        _log(r, p)
    return p


@functools.lru_cache(maxsize=1024)
def _log(r: Request, p: Plan) -> None:
    """Once for each choice: the cache is what forgets repetitions."""
    log.debug("N=%d H=%d V=%d %s stats=%d gradients=%s: %s", *r[:4], r.stats, r.grads is not None, p)


@functools.cache
def _module(algorithm: str) -> ModuleType:
    """Imported when it is needed: Triton need not be there."""
    return importlib.import_module(f".{_MODULES[algorithm]}", __package__)


def _check_targets(a: HeadArgs, stats: int) -> None:
    """Of rows that don't count, too."""
    if stats & TARGET and a.target is not None:
        check_target(a.target, a.weight.shape[0])


def _assert_targets(a: HeadArgs, p: Plan) -> None:
    """As eager on CUDA: a device-side assertion; the CPU's way raises an error. No kernel reads out of bounds.

    Last: half a dozen launches, and until the first product the GPU waits.
    """
    target, V = a.target, a.weight.shape[0]
    if p.algorithm != BLOCKS and target is not None and target.numel():
        ok = ((target >= 0) & (target < V)) | (target == NO_TARGET)
        torch._assert_async(ok.all(), f"target out of bounds: must be in [0, {V})")


def _device(t: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launches go to the current device, which need not be the tensor's."""
    here = not t.is_cuda or t.get_device() == torch._C._cuda_getDevice()
    return contextlib.nullcontext() if here else torch.cuda.device(t.device)
