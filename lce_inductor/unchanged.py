"""What tells deferred logits that their head is no longer that of the call, where version counters do not.

Fused optimizers raise no version, and neither do writes through `.data` or through a numpy array of the same memory.
So torch's optimizers report their steps (`Steps`), and when logits are read the values are compared, too (`seal`).
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

PIECE_BYTES = 256 << 20
"""A seal that is made to compare takes pieces of the weight, as integers, of about this size."""


def traced(t: Tensor) -> bool:
    return isinstance(t, FakeTensor | FunctionalTensor)


# -- steps of optimizers


class _Memory:
    """One storage that deferred logits depend on, and the number of the last step that may have written to it."""

    __slots__ = ("__weakref__", "step")
    step: int

    def __init__(self) -> None:
        self.step = 0


# By the address of the storage's C++ object. Who holds the value also holds a tensor that keeps the storage alive, so
# an address is not used again before its entry is gone; and were it, an old step number would do no harm.
_watched: weakref.WeakValueDictionary[int, _Memory] = weakref.WeakValueDictionary()
_lock = threading.RLock()  # setdefault of such a dictionary is not atomic
_numbers = itertools.count(1)  # never the same twice, whichever thread asks


class Steps:
    """Whether an optimizer that holds this memory (as a view or another tensor of it, too) stepped since."""

    __slots__ = ("_seen",)

    def __init__(self, t: Tensor) -> None:
        with _lock:
            memories = [_watched.setdefault(address, _Memory()) for address in _storages(t)]
        self._seen = [(memory, memory.step) for memory in memories]

    def none(self) -> bool:
        return all(memory.step == step for memory, step in self._seen)


def _storages(t: Tensor) -> list[int]:
    plain = type(t) is torch.nn.Parameter  # nearly all, twice a step: the other questions cost more than the answer
    if not plain and (traced(t) or not isinstance(t, Tensor)):
        return []
    try:
        if not plain and is_traceable_wrapper_subclass(t):  # DTensor
            return [address for name in t.__tensor_flatten__()[0] for address in _storages(getattr(t, name))]
        return [t.untyped_storage()._cdata]
    except (NotImplementedError, RuntimeError):  # a sparse parameter: no dense head shares memory with it
        return []


def _note_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    # A compiled step raises the versions of what it writes. The question comes first: Dynamo answers it, and traces
    # nothing of the rest.
    if torch.compiler.is_compiling() or not _watched:
        return
    skips_frozen = type(optimizer).__module__.startswith("torch.optim.")
    for group in optimizer.param_groups:
        for p in group["params"]:
            if skips_frozen and p.grad is None and not p.requires_grad:
                continue
            for address in _storages(p):
                memory = _watched.get(address)
                if memory is not None:
                    memory.step = next(_numbers)


# Before the step, too: one that raises half-way has no "after". After it, for logits made in its closure.
register_optimizer_step_pre_hook(_note_step)
register_optimizer_step_post_hook(_note_step)


# -- values


def seal(t: Tensor) -> Tensor:
    """What changes if t does. Of a vector its values; of a matrix, for each row (or column, if those are contiguous),
    the sum of the values' bits, each times a factor of its place.

    One changed value always shows, and so do exchanged ones; several changes of one row cancel only by coincidence. It
    is exact integer arithmetic, the same in any order, compiled or not.
    """
    if t.dim() != 2:
        return t.clone()
    t = t if t.stride(1) == 1 or t.stride(0) != 1 else t.t()
    if t.device.type == "cpu":
        return torch.ops.lce_inductor.row_sums.default(t)
    if traced(t):
        return _sums(t)  # Inductor makes one pass over the weight of it
    return torch.cat([_sums(piece) for piece in t.split(_rows(t))])


def same(t: Tensor, before: Tensor) -> bool:
    return torch.equal(_bits(seal(t)), _bits(before))


def _rows(t: Tensor) -> int:
    return max(1, PIECE_BYTES // max(1, 8 * t.shape[1]))


def _bits(t: Tensor) -> Tensor:
    return t.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])  # NaN equals NaN


def _factors(t: Tensor) -> Tensor:
    """An odd number for each column. Every intermediate that the mask keeps is the same whether or not int32 wraps as
    signed numbers do; no two neighbours are in a fixed ratio."""
    i = torch.arange(t.shape[1], dtype=torch.int32, device=t.device)
    return (((i * i * 0x2545F491 + i * 0x1E3779B1) & 0x3FFFFFFF) | 1).to(torch.int64)


def _sums(t: Tensor) -> Tensor:
    bits = _bits(t)
    if t.element_size() == 8:
        bits = bits ^ (bits >> 32)  # the sign is the highest bit, and two of them would cancel modulo 2**64
    return (bits * _factors(t)).sum(-1)  # the factors make an int64 of the product, in one kernel also in eager


def _row_sums(t: Tensor) -> Tensor:
    """On the CPU: ATen's integer product reads eight bytes at a time, ten times as fast as what Inductor generates.

    The price: an even number of changes in the highest bits of these words, and nowhere else in the row, cancels.
    """
    if t.element_size() < 8:
        with contextlib.suppress(RuntimeError):  # rows that do not begin and end at eight bytes
            words = t.view(torch.int64)
            return torch.mv(words, _factors(words))
    return torch.cat([_sums(piece) for piece in t.split(_rows(t))])


_lib = torch.library.Library("lce_inductor", "FRAGMENT")
_lib.define("row_sums(Tensor t) -> Tensor")
_lib.impl("row_sums", _row_sums, "CPU")
torch.library.register_fake("lce_inductor::row_sums", lambda t: t.new_empty(t.shape[0], dtype=torch.int64), lib=_lib)
