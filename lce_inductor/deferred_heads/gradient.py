"""The gradient of pending logits: those of x, weight and bias, with the logits' shape outside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


class LogitsGradient(Tensor):
    """Gradients of x, weight and bias (those that are wanted) that stand for one of logits of this shape and dtype.

    Autograd adds two of them, copies them and hands them on. They have no values of the logits' size: hooks that look
    for some raise an error. Where another reader of the same logits saw values (a custom autograd function), its
    gradient, which is of their size, is added under a name of its own, `logits`.
    """

    tensors: dict[str, Tensor]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: dict[str, Tensor], size: Any, dtype: torch.dtype) -> LogitsGradient:
        device = next(iter(inner.values())).device
        self = Tensor._make_wrapper_subclass(cls, size, dtype=dtype, device=device)
        torch._C._set_throw_on_mutable_data_ptr(self)
        self.tensors = inner
        return self

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return list(self.tensors), self.dtype

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], dtype: torch.dtype, size: Any, stride: Any) -> LogitsGradient:
        return LogitsGradient(inner, size, dtype)

    def __getattr__(self, name: str) -> Any:
        if name not in self.__dict__.get("tensors", ()):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return self.tensors[name]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first, *rest = args
        if func in (aten.add.Tensor, aten.add_.Tensor) and not kwargs and _same_kind(*args):
            added = _added(first, *rest)
            if func is aten.add.Tensor:
                return added
            if isinstance(first, LogitsGradient):  # what an operation in place returns is not looked at
                first.tensors = added.tensors
                return first
        if func in _EACH and isinstance(first, LogitsGradient) and not any(isinstance(a, Tensor) for a in rest):
            inner = {n: func(t, *rest, **kwargs) for n, t in first.tensors.items()}
            return LogitsGradient(inner, first.shape, first.dtype)
        if func is aten.isnan.default:  # detect_anomaly
            return torch.stack([t.isnan().any() for t in first.tensors.values()]).any()
        raise RuntimeError(
            f"{func} asks for values of the gradient of logits under lce_inductor.defer(), which does not exist: their "
            "head gets those of its hidden states and weight. For hooks and functions that read or change it, "
            "logits.clone() before them makes the logits real, or defer(...).remove()"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LogitsGradient(size={tuple(self.shape)}, of={list(self.tensors)})"


# Linear in the gradient, so that it is the same of its parts.
_EACH = {
    aten.detach.default, aten.alias.default, aten.clone.default, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor,
    aten.div.Scalar, aten.neg.default, aten.zeros_like.default,
}  # fmt: skip


def _same_kind(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and (a.shape, a.dtype) == (b.shape, b.dtype)


def _added(a: Tensor, b: Tensor) -> LogitsGradient:
    left, right = named(a), named(b)
    inner = {n: left[n] + right[n] if n in left and n in right else t for n, t in (right | left).items()}
    return LogitsGradient(inner, a.shape, a.dtype)


def named(gradient: Tensor) -> dict[str, Tensor]:
    """What a gradient that came back to logits consists of."""
    return gradient.tensors if isinstance(gradient, LogitsGradient) else {"logits": gradient}


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.view_as(g) for g in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            "logits under lce_inductor.defer() can be differentiated once: for a second derivative take them back, "
            "defer(...).remove()"
        )


def once(found: list[Tensor | None], inputs: tuple[Tensor, ...]) -> list[Tensor | None]:
    """With create_graph: gradients, of which another derivative, with respect to whatever the head's inputs come from,
    is an error and never none at all."""
    given = [g for g in found if g is not None]
    if not torch.is_grad_enabled() or not given:
        return found
    made = iter(_Once.apply(len(given), *(g.detach().requires_grad_() for g in given), *inputs))  # type: ignore[no-untyped-call]
    return [None if g is None else next(made) for g in found]
