"""Functions of pending logits that are compiled, also in a loop that compiles nothing itself.

They are losses, and what eager losses read a row through, as logits.logsumexp(-1). Each is a compiled function of its
own, which computes the product again in its backward: one that has the whole loss costs less.
"""

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

from ..graph.values import WRAPPERS
from ..reporting.records import log

WRAPPERS.add(__file__)  # reports name the line that called what is compiled here


class _Inside(threading.local):
    """Is the compiled function running? Where Dynamo gives up, it calls what it was to compile."""

    now = False


_inside = _Inside()
_failed: set[Any] = set()
"""What torch could not compile."""


def _run(func: Any, *args: Any, **kwargs: Any) -> Any:
    """func of these arguments, compiled, or NotImplemented: read the logits."""
    if _inside.now or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return NotImplemented
    kind = func, _kind(kwargs), *map(_kind, args)
    if kind in _failed:
        return NotImplemented
    _inside.now = True
    try:
        # A loop that compiles nothing may keep its graph for a second backward; the cache would not tell these apart.
        with functorch_config.patch(donated_buffer=False, enable_autograd_cache=False):
            return _nothing_donated(_compiled(*kind)(*args, **kwargs))
    except torch._dynamo.exc.TorchRuntimeError:  # bad input: the error is to be eager's
        return NotImplemented
    except torch._dynamo.exc.BackendCompilerFailed as error:
        _failed.add(kind)
        log.warning("%s of pending logits is not compiled, and reads them: %s", func.__name__[1:], error)
        return NotImplemented
    finally:
        _inside.now = False


def _nothing_donated(out: Tensor) -> Tensor:
    """Compiled without donated buffers, a graph has None for their list, which a backward takes for some if it keeps
    the graph and was compiled before it was known that it would."""
    metadata: Any = getattr(getattr(out.grad_fn, "_forward_cls", None), "metadata", None)
    if getattr(metadata, "bw_donated_idxs", ()) is None:
        metadata.bw_donated_idxs = []
    return out


def _kind(value: Any) -> Any:
    """What another compilation is needed for, whatever the sizes are."""
    if isinstance(value, dict):
        return tuple((k, _kind(v)) for k, v in sorted(value.items()))
    if isinstance(value, tuple | list):
        return tuple(map(_kind, value))
    if isinstance(value, Tensor):
        return value.dtype, value.dim(), value.requires_grad, getattr(value, "spec", None)
    return value


@functools.lru_cache(maxsize=64)
def _compiled(func: types.FunctionType, *kinds: Any) -> Callable[..., Tensor]:
    """With code of its own for each kind: Dynamo gives up after some compilations of one."""
    return torch.compile(types.FunctionType(func.__code__.replace(co_name=func.__name__), globals()))


def cross_entropy(z: Tensor, *args: Any, **kwargs: Any) -> Any:
    return _run(_cross_entropy, z, *args, **kwargs)


def of_rows(name: str, position: int = 0) -> Callable[..., Any]:
    """A method of tensors that makes few numbers of each row, if its dimension (that argument) is the classes'."""
    func = _METHODS[name]

    def rule(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        dim = args[position] if len(args) > position else kwargs.get("dim")
        dim = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
        return _run(func, z, *args, **kwargs) if type(dim) is int and dim in (-1, z.dim() - 1) else NotImplemented

    return rule


def _cross_entropy(z: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return F.cross_entropy(z, *args, **kwargs)


def _gather(z: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return z.gather(*args, **kwargs)


def _logsumexp(z: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return z.logsumexp(*args, **kwargs)


def _sum(z: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return z.sum(*args, **kwargs)


def _mean(z: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return z.mean(*args, **kwargs)


_METHODS = {"gather": _gather, "logsumexp": _logsumexp, "sum": _sum, "mean": _mean}
