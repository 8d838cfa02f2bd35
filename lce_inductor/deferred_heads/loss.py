"""F.cross_entropy of pending logits: compiled, also in a loop that compiles nothing itself."""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config as functorch_config


class _Inside(threading.local):
    """Is the compiled loss running? Where Dynamo gives up, it calls what it was to compile."""

    now = False


_inside = _Inside()


def cross_entropy(z: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The loss of these logits, or NotImplemented: read them."""
    if _inside.now or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return NotImplemented
    _inside.now = True
    try:
        # A loop that compiles nothing may keep its graph for a second backward.
        with functorch_config.patch(donated_buffer=False):
            return _compiled(_kind(z), _kind(kwargs), *map(_kind, args))(z, *args, **kwargs)
    except torch._dynamo.exc.TorchRuntimeError:  # bad input: the error is to be eager's
        return NotImplemented
    finally:
        _inside.now = False


def _kind(value: Any) -> Any:
    """What another compilation is needed for, whatever the sizes are."""
    if isinstance(value, dict):
        return tuple((k, _kind(v)) for k, v in sorted(value.items()))
    if isinstance(value, Tensor):
        return value.dtype, value.dim(), value.requires_grad, getattr(value, "spec", None)
    return value


@functools.lru_cache(maxsize=64)
def _compiled(*kinds: Any) -> Callable[..., Tensor]:
    """A function of its own for each kind: Dynamo gives up after some compilations of one."""
    code = _cross_entropy.__code__.replace(co_name=_cross_entropy.__name__)
    return torch.compile(types.FunctionType(code, globals()))


def _cross_entropy(z: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return F.cross_entropy(z, *args, **kwargs)
