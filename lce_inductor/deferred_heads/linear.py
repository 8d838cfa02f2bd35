"""The forward of a head under defer(): its F.linear makes pending logits."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..install import current_config
from .logits import Memory, PendingLogits, of_parts
from .steps import Spec

log = logging.getLogger(__name__)
# Modules that it was said of once.
_without_linear: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with _Linear(module) as linear:
        out = type(module).forward(module, *args, **kwargs)
    if not linear.called and module not in _without_linear:
        _without_linear.add(module)
        log.warning("defer(%s): it calls no F.linear, and is computed as always", type(module).__name__)
    return out


class _Linear(TorchFunctionMode):
    """Makes pending logits of the F.linear inside."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.called = module, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            self.called = True
            out = _pending(self.module, *args, **kwargs)
            if out is not None:
                return out
        return func(*args, **kwargs)


def _pending(module: nn.Module, input: Any, weight: Any, bias: Any = None) -> PendingLogits | None:
    given = [t for t in (input, weight, bias) if t is not None]
    config = current_config()
    plain = all(type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided and not t.is_meta for t in given)
    if config is None or not plain or torch._C._len_torch_dispatch_stack() or torch._C._functorch.maybe_current_level():
        return None
    if input.dim() < 2 or weight.dim() != 2 or input.shape[-1] != weight.shape[1]:
        return None  # eager's error, or a vector
    if len({t.device for t in given}) > 1 or not all(t.is_floating_point() for t in given):
        return None
    cast = torch.is_autocast_enabled(input.device.type)
    dtype = torch.get_autocast_dtype(input.device.type) if cast else input.dtype
    if not cast and any(t.dtype != dtype for t in given):
        return None
    size = (*input.shape[:-1], weight.shape[0])
    if torch.Size(size).numel() * dtype.itemsize < config.min_logits_bytes or not input.numel():
        return None
    return of_parts(input.to(dtype), weight, bias, Spec(dtype, dtype), size, Memory(weakref.ref(module)))
