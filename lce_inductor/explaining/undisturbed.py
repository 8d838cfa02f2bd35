"""The user's state around a run of explain(): what it changes is put back."""

from __future__ import annotations

import contextlib
import inspect
import random
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def undisturbed(fn: Any, args: Any, kwargs: Any) -> Iterator[None]:
    """Gradients, buffers, random numbers and torch's counters are afterwards what they were."""
    import torch
    from torch._dynamo.utils import counters
    from torch.utils._pytree import tree_leaves

    held = [*tree_leaves((args, kwargs)), *reached(fn)]
    modules = {m: dict(m._buffers) for root in held if isinstance(root, torch.nn.Module) for m in root.modules()}
    values = {b: b.clone() for found in modules.values() for b in found.values() if b is not None}
    tensors = [t for t in held if isinstance(t, torch.Tensor)] + [p for m in modules for p in m._parameters.values()]
    grads = {t: t.grad for t in tensors if t is not None and t.is_leaf and t.requires_grad}
    counts = {key: Counter(found) for key, found in counters.items()}
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    numpy: Any = sys.modules.get("numpy")
    states = random.getstate(), numpy.random.get_state() if numpy is not None else None
    try:
        for tensor in grads:
            tensor.grad = None
        with torch.random.fork_rng(devices):
            yield
    finally:
        for tensor, grad in grads.items():
            tensor.grad = grad
        with torch.no_grad():
            for module, found in modules.items():
                module._buffers.clear()
                module._buffers.update(found)
            for buffer, value in values.items():
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        counters.clear()
        counters.update(counts)
        random.setstate(states[0])
        if numpy is not None:
            numpy.random.set_state(states[1])


def reached(fn: Any) -> list[Any]:
    """Objects that a function reads by itself: its own, and those of its closure and its globals."""
    fn = inspect.unwrap(fn)
    found = [fn, getattr(fn, "__self__", None), getattr(fn, "_orig_mod", None)]
    with contextlib.suppress(TypeError, ValueError):  # not a function
        variables = inspect.getclosurevars(getattr(fn, "__func__", fn))
        found += [*variables.nonlocals.values(), *variables.globals.values()]
    return found
