"""Logits of a head that has not been computed, which may be differentiated.

A compiled function that is given them is given x, weight and bias; the product stands in its graph, beside the loss,
where the passes find it. What comes back in the backward is not a gradient of the logits, which would be of their size,
but the gradients of x, weight and bias, as one object of the logits' shape:

    eager             x, weight ── _Make ──► logits ──┐           ┌── _Make.backward ◄── LogitsGradient(dx, dweight)
    compiled                               _Split ────┘► loss ─►──┘ _Split.backward

Autograd sees two ordinary functions; hooks on the module and on its output run when eager's would.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils._pytree import tree_iter, tree_map_only

from ..deferred_logits.optimizer_steps import Steps
from ..deferred_logits.seals import traced
from .gradient import LogitsGradient, named, once
from .steps import Spec, Step, compute

START = "these logits are those of a head under lce_inductor.defer(), and not computed"
REMEDY = "read them before, or logits.clone() makes them real"
COPY = "write to logits.clone()"
PARTS = ("x", "weight", "bias")

aten = torch.ops.aten


class Memory:
    """What logits and their views share: how often they were written to, and the module that they are of."""

    def __init__(self, head: weakref.ref[torch.nn.Module] | None = None) -> None:
        self.writes, self.head = 0, head

    def restore(self) -> None:
        """Have FSDP gather the weight again that it freed after the head's forward; its backward frees it."""
        head = None if self.head is None else self.head()
        unshard = getattr(head, "unshard", None)
        if callable(unshard):
            unshard()


class PendingLogits(Tensor):
    """Logits [..., V] of x [..., H], weight [V, H] and bias [V].

    Shape, dtype, device and requires_grad are those of the real logits. Views of rows, casts, scalings by numbers and
    slices of the classes are pending, too; a loss in a compiled function, and F.cross_entropy anywhere, are computed
    from x and the weight; anything else computes the logits, each time anew, with a gradient as eager's.

    Raises:
        RuntimeError: when read after x, weight or bias were written to, or after their memory was freed; when written
            to, but for a scaling in place, and when read then through another view; when differentiated twice.
    """

    tensors: dict[str, Tensor]
    spec: Spec
    memory: Memory
    _writes: int
    _versions: dict[str, int | None]
    _steps: dict[str, Steps]

    @staticmethod
    def __new__(
        cls, inner: dict[str, Tensor], spec: Spec, size: Any, stride: Any = None, memory: Memory | None = None
    ) -> PendingLogits:
        device = inner["x"].device
        self = Tensor._make_wrapper_subclass(cls, size, stride, dtype=spec.dtype, device=device)
        # Who looks for memory finds an exception, and not an address.
        torch._C._set_throw_on_mutable_data_ptr(self)
        self.tensors, self.spec, self.memory = inner, spec, memory or Memory()
        self._writes = self.memory.writes
        self._versions = {n: None if t.is_inference() else t._version for n, t in inner.items()}
        self._steps = {n: Steps(t) for n, t in inner.items()}
        return self

    def __tensor_flatten__(self) -> tuple[list[str], Spec]:
        return list(self.tensors), self.spec

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], spec: Spec, size: Any, stride: Any) -> PendingLogits:
        return PendingLogits(inner, spec, size, stride)

    def __getattr__(self, name: str) -> Any:
        """x, weight, bias: this is also how a compiled function takes the logits apart, at each call."""
        if name not in self.__dict__.get("tensors", ()):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if name == "weight":
            self.check()
        return self.tensors[name]

    def _stable_hash_for_caching(self) -> str:
        """Key of these logits, as an input of a compiled function, in AOTAutograd's cache."""
        layout = [(n, tuple(t.shape), t.stride(), t.storage_offset(), t.dtype) for n, t in self.tensors.items()]
        return repr((tuple(self.shape), self.device, self.requires_grad, self.spec, layout))

    def __coerce_tangent_metadata__(self) -> LogitsGradient:
        return LogitsGradient({n: torch.zeros_like(t) for n, t in self.tensors.items()}, self.shape, self.dtype)

    def check(self) -> None:
        """Raises if the parts are no longer those of the call."""
        if traced(self.tensors["x"]):
            return
        if self._writes != self.memory.writes:
            raise RuntimeError(f"{START}, and were scaled in place through another view of them: {COPY}")
        if any(t.numel() and not t.untyped_storage().nbytes() for t in self.tensors.values()):
            self.memory.restore()
        for name, t in self.tensors.items():
            version = None if t.is_inference() else t._version
            if t.numel() and not t.untyped_storage().nbytes():
                raise RuntimeError(
                    f"{START}; the memory of their {name} was freed since. Where FSDP frees it after the forward, "
                    "shard the head by itself, or the module that holds it with reshard_after_forward=False"
                )
            if version != self._versions[name] or not self._steps[name].none():
                what = "hidden states" if name == "x" else name
                raise RuntimeError(f"{START}; the {what} of their head changed since: {REMEDY}")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Dynamo looks into this, and sees the function that the user called.
        if torch.compiler.is_dynamo_compiling():
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        from .functions import call

        return call(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Below autograd: what a compiler asks, and a custom autograd function's forward."""
        kwargs = kwargs or {}
        z = args[0] if args and isinstance(args[0], PendingLogits) else None
        # Autograd makes another tensor of one that a function returns as it is: a hook's, a checkpoint's.
        same = func is aten.view.default and tuple(args[1]) == tuple(args[0].shape)
        if z is not None and (same or func in (aten.detach.default, aten.alias.default)):
            return z.alias()
        named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        written = [named.get(a.name) for a in func._schema.arguments if a.is_write]
        if any(isinstance(t, PendingLogits) for t in tree_iter(written)):
            raise RuntimeError(f"{START}, and {func} cannot write to them: {COPY}")
        args, kwargs = tree_map_only(PendingLogits, PendingLogits._values, (args, kwargs))
        return func(*args, **kwargs)

    def write(self, step: Step) -> None:
        """A step in place. The gradient of x, weight and bias asks for no other function of autograd's."""
        self.check()
        self.spec = dataclasses.replace(self.spec, steps=(*self.spec.steps, step))
        self.memory.writes += 1
        self._writes = self.memory.writes
        self.__dict__.pop("kept", None)

    def alias(self) -> PendingLogits:
        """The same, as another tensor, which autograd knows nothing of."""
        inner = {n: t.detach() for n, t in self.tensors.items()}
        return PendingLogits(inner, self.spec, self.shape, self.stride(), self.memory)

    def _values(self) -> Tensor:
        self.check()
        return compute(self.tensors["x"], self.tensors["weight"], self.tensors.get("bias"), self.spec)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        # No values: a debugger that shows local variables must not allocate the logits.
        return f"PendingLogits(size={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"


def of_parts(
    x: Tensor, weight: Tensor, bias: Tensor | None, spec: Spec, size: Any, memory: Memory | None = None,
    stride: Any = None,
) -> PendingLogits:  # fmt: skip
    """Logits of tensors that autograd knows."""
    grads = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    needs = [grads and t is not None and t.requires_grad for t in (x, weight, bias)]
    spec = dataclasses.replace(spec, needs=(needs[0], needs[1], needs[2]))
    with torch.set_grad_enabled(grads):
        made: PendingLogits = _Make.apply(x, weight, bias, spec, size, memory, stride)  # type: ignore[no-untyped-call]
    return made


def parts(z: PendingLogits) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, weight and bias, from which gradients go back to those that the logits were made of."""
    z.check()
    with torch._C.DisableTorchFunctionSubclass():
        found = _Split.apply(z)  # type: ignore[no-untyped-call]
    x, weight, *bias = found
    return x, weight, bias[0] if bias else None


class _Make(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, spec: Spec, size: Any, memory: Memory | None,
        stride: Any,
    ) -> PendingLogits:  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.spec = spec
        given = {n: t for n, t in zip(PARTS, (x, weight, bias), strict=True) if t is not None}
        ctx.save_for_backward(*given.values())
        ctx.memory = memory or Memory()
        ctx.writes = ctx.memory.writes
        return PendingLogits({n: t.detach() for n, t in given.items()}, spec, size, stride, ctx.memory)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return (None,) * 7
        inner = named(gradient)
        found = [inner.get(n) for n in PARTS]
        if "logits" in inner:  # of logits that somebody read below autograd's eyes: a custom autograd function
            if ctx.writes != ctx.memory.writes:
                raise RuntimeError(f"{START}, and were scaled in place before they were read: {COPY}")
            more = _of_real(ctx.saved_tensors, ctx.spec, inner["logits"])
            found = [a if b is None else b if a is None else a + b for a, b in zip(found, more, strict=True)]
        return (*once(found, ctx.saved_tensors), None, None, None, None)


def _of_real(given: tuple[Tensor, ...], spec: Spec, gradient: Tensor) -> list[Tensor | None]:
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_(n) for t, n in zip(given, spec.needs, strict=False)]
        x, weight, *bias = leaves
        z = compute(x, weight, bias[0] if bias else None, spec)
        found = iter(torch.autograd.grad(z, [t for t in leaves if t.requires_grad], gradient))
    return [next(found) if n else None for n in spec.needs]


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: PendingLogits) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.names, ctx.shape, ctx.dtype = list(z.tensors), z.shape, z.dtype
        found = tuple(t.detach() for t in z.tensors.values())
        # Of a checkpoint that made them without gradients it is known later which are wanted.
        needs = z.spec.needs if any(z.spec.needs) else (True,) * 3
        ctx.mark_non_differentiable(*(t for n, t in zip(needs, found, strict=False) if not n))
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> LogitsGradient | None:
        inner = {n: g for n, g in zip(ctx.names, gradients, strict=True) if g is not None}
        return LogitsGradient(inner, ctx.shape, ctx.dtype) if inner else None


def real(z: PendingLogits) -> Tensor:
    """The logits as a plain tensor, with a gradient as eager's. A graph that AOTAutograd traces gets one product."""
    found = kept(z)
    if found is None:
        found = compute(*parts(z), z.spec)
        if is_functional(z) or z.spec.kept:
            keep(z, found)
    # A view of kept values has their strides.
    return found if is_functional(z) or found.stride() == z.stride() else found.contiguous()


def keep(z: PendingLogits, values: Tensor) -> None:
    z.__dict__.setdefault("kept", {})[_mode()] = values


def kept(z: PendingLogits) -> Tensor | None:
    """What real() gave, if it was kept."""
    values: dict[tuple[bool, bool], Tensor] = z.__dict__.get("kept", {})
    return values.get(_mode())


def _mode() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def is_functional(z: PendingLogits) -> bool:
    """Is AOTAutograd tracing with these logits?"""
    return isinstance(z.tensors["x"], FunctionalTensor)
