"""Steps of torch's optimizers: they tell deferred logits that their head may have changed.

A file of its own, since Dynamo looks into the hook when it compiles a step, and at nothing else of this room.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .seals import traced


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
