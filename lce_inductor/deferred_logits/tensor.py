"""Logits that a compiled region returns without computing them.

The pre-grad pass puts `defer_logits` in place of the logits that a graph returns beside a loss it has rewritten:

    before                                          after
    logits = linear(x, weight, bias)                deferred = defer_logits(x, weight, bias, ...)
    loss = cross_entropy(logits, target)            loss = <row statistics of (x, weight, bias, target)>
    return loss, logits                             return loss, deferred

AOTAutograd traces through the op, takes the `DeferredLogits` it finds among the outputs apart into tensors that exist
anyway (hidden states and weight, both detached) and puts it together again around the real ones after every call. No
tangent of size N*V is asked for, because detached tensors need none; see `_NoGradient` for what a gradient meets.

`defer_logits` is a CompositeImplicitAutograd op and not a Python function for the sake of caching: AOTAutograd's cache
accepts any OpOverload as a call target, and such an op leaves no trace in the graph that Inductor compiles.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map_only

from ..reporting.history import deferred_read, read_by_compiled
from ..spec.epilogue import apply, parse
from .optimizer_steps import Steps
from .rules import View, answer, keeps_values
from .seals import same, seal, traced

# Between graph breaks Dynamo looks at every function that runs. What runs here when logits are read is not the user's
# code, and it would trace half of it, with real tensors where it expects its own.
for _function in (answer, same, apply, deferred_read):
    torch._dynamo.trace_rules.add(_function.__module__)
torch._dynamo.trace_rules.add(__name__)

_START = "these logits were returned by lce_inductor without being computed"
_REMEDY = 'or keep real logits with lce_inductor.install(returned_logits="keep")'
_START_PENDING = "these logits are those of a head under lce_inductor.defer(), and not computed"
_REMEDY_PENDING = "or have the head compute them, with defer(...).remove()"


@dataclasses.dataclass(frozen=True)
class Spec:
    """How the logits follow from hidden states and weight. AOTAutograd's cache pickles it; guards compare it.

    compute_dtype is the dtype of the linear layer (what autocast made of it), dtypes what its result is cast to, one
    after the other. The epilogue acts before the first of these casts or after it. views act on the logits at last.
    pending: they are those of a head under defer(), detached.
    """

    epilogue: str
    epilogue_after_cast: bool
    compute_dtype: torch.dtype
    dtypes: tuple[torch.dtype, ...]
    requires_grad: bool
    views: tuple[View, ...] = ()
    pending: bool = False


class _NoGradient(torch.autograd.Function):
    """Makes deferred logits require a gradient, as eager's do, and raises when one arrives.

    It is applied inside AOTAutograd's own Function, which marks the output as not differentiable. Autograd would detach
    such an output, but it leaves a view as it is. So z.grad_fn is this node, and whatever is computed from z (also by a
    custom autograd.Function, which __torch_function__ would not see) is connected to it. `inputs` are what the logits
    would have gradients for: torch.autograd.grad() runs only what leads to one of the tensors that it is asked for, and
    would else answer None where the caller allows that.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *inputs: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, ...]:
        # DDP passes outputs that the loss does not use through a Function of its own, which hands None on. Behind a
        # graph break zeros come of values that nobody differentiates.
        if grad is not None and bool(grad.any()):
            raise RuntimeError(
                f"{_START}, and a gradient that reached them would be lost. Compute this part of the loss inside the "
                f"compiled function, put the head under lce_inductor.defer(head), whose logits have one, {_REMEDY}"
            )
        return (None,) * len(ctx.needs_input_grad)


class DeferredLogits(Tensor):
    """Logits [..., V] of x [..., H], weight [V, H] and bias [V], computed when an operation asks for them.

    Shape, dtype, device and requires_grad are those of the real logits. Row slices stay deferred, so do casts and views
    that keep the vocabulary; reductions over the vocabulary are answered by chunks; anything else computes the logits,
    each time anew: nothing of their size is kept.

    Raises:
        RuntimeError: when read after x, weight or bias were written to; when differentiated; when written to.
    """

    # Operations are handled below autograd, in __torch_dispatch__.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    # x, weight, bias (or not), and for each of them (or not):
    # _owner  its base, if it is a view. A compiled graph returns an input as the same tensor, but a view of an input
    #         as one with a version counter of its own: so the base is what to ask for the version.
    # _seal   what its values were: see `seal`. Fused optimizers and writes through .data do not count versions.
    tensors: dict[str, Tensor]
    _versions: dict[str, int | None]
    _steps: dict[str, Steps]
    _returned: Tensor
    spec: Spec

    @staticmethod
    def __new__(
        cls, inner: dict[str, Tensor], spec: Spec, like: Any = None, versions: Any = None, steps: Any = None
    ) -> DeferredLogits:
        x = inner["x"]
        size, stride, offset = like or ((*x.shape[:-1], inner["weight"].shape[0]), None, None)
        self = Tensor._make_wrapper_subclass(cls, size, stride, offset, dtype=spec.dtypes[-1], device=x.device)
        # Who looks for memory (share_memory_(), set_(), another tensor's .data) finds an exception, and not an address.
        torch._C._set_throw_on_mutable_data_ptr(self)
        self.tensors, self.spec = inner, spec
        names = [n for n in ("x", "weight", "bias") if n in inner]
        self._versions = versions or {n: _version(inner, n) for n in names}
        self._steps = steps or {n: Steps(inner[n]) for n in names}
        return self

    @property
    def _start(self) -> str:
        """What an error says of these logits, and of what to do without them."""
        return _START_PENDING if self.spec.pending else _START

    @property
    def _remedy(self) -> str:
        return _REMEDY_PENDING if self.spec.pending else _REMEDY

    def __tensor_flatten__(self) -> tuple[list[str], Spec]:
        return list(self.tensors), self.spec

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], spec: Spec, size: Any, stride: Any) -> DeferredLogits:
        # Detached again: at run time these can be parameters, whose .data may be replaced, or x can be returned, too.
        z = DeferredLogits({name: t.detach() for name, t in inner.items()}, spec, (size, stride, 0))
        z._returned = inner["x"]  # CUDA graphs mark their outputs when they free them, those that are still alive
        return _with_barrier(z, inner)

    def __getattr__(self, name: str) -> Any:
        """x, weight, ...: this is also how a compiled function reads logits that it is given."""
        if name not in self.__dict__.get("tensors", ()):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if name == "weight":
            self._check()
        return self.tensors[name]

    def _stable_hash_for_caching(self) -> str:
        """Key of these logits, as an input of another compiled function, in AOTAutograd's cache."""
        layout = [(n, tuple(t.shape), t.stride(), t.storage_offset(), t.dtype) for n, t in self.tensors.items()]
        return repr((tuple(self.shape), self.device, self.requires_grad, self.spec, layout))

    def _check(self, values: bool = True) -> None:
        """Raises if the parts are no longer those of the call. values: compare the seals, too (synchronises)."""
        weight = self.tensors["weight"]
        values = values and not traced(weight) and not (weight.is_cuda and torch.cuda.is_current_stream_capturing())
        if values and weight.numel() and not weight.untyped_storage().nbytes():
            raise RuntimeError(
                f"{self._start}, and their weight was freed since (FSDP?). Read them before, {self._remedy}"
            )
        for name, version in self._versions.items():
            unchanged = _version(self.tensors, name) == version and self._steps[name].none()
            before = self.tensors.get(f"{name}_seal")
            if unchanged and values and before is not None:
                owner = self.tensors.get("x_owner", self.tensors["x"])  # these may be some of its rows
                with _disable_current_modes():  # Dynamo takes the real logits apart under a fake mode
                    unchanged = same(_rows(owner) if name == "x" else self.tensors[name], before)
            if not unchanged:
                what = "hidden states" if name == "x" else name
                raise RuntimeError(
                    f"{self._start}, and the {what} of their head changed since. Read them before optimizer.step() "
                    f"(logits.detach().clone() makes them real), {self._remedy}"
                )

    def derive(self, x: Tensor | None = None, copied: bool = False, **changes: Any) -> DeferredLogits:
        """The same head on other rows, x, or with another spec. copied: x shares no memory with these rows."""
        self._check(values=False)
        inner, versions, steps = dict(self.tensors), dict(self._versions), dict(self._steps)
        if x is not None:
            inner["x"] = x
            if copied:
                inner.pop("x_owner", None)
                inner.pop("x_seal", None)
                versions["x"], steps["x"] = _version(inner, "x"), Steps(x)
            else:  # below autograd a view has a version counter of its own, too
                inner.setdefault("x_owner", self.tensors["x"])
        like = changes.pop("like", None if x is not None else self)
        spec = dataclasses.replace(self.spec, requires_grad=False, **changes)
        layout = None if like is None else (like.shape, like.stride(), like.storage_offset())
        return DeferredLogits(inner, spec, layout, versions, steps)

    def head(self) -> Callable[[Tensor], Tensor]:
        """The function from x to logits, once the parts are found to be unchanged."""
        self._check()
        spec, steps, x = self.spec, parse(self.spec.epilogue), self.tensors["x"]
        weight, bias = self.tensors["weight"].to(spec.compute_dtype), self.tensors.get("bias")
        if not traced(x):
            whole = self.tensors.get("x_owner", x)  # these may be some of its rows
            rows, hidden = x.shape[:-1].numel(), max(x.shape[-1], 1)
            itemsize = spec.dtypes[-1].itemsize
            deferred_read(whole.numel() // hidden, rows, weight.shape[0], itemsize, pending=spec.pending)
        elif not spec.pending:  # those are what a compiled function is given
            read_by_compiled()
        bias = None if bias is None else bias.to(spec.compute_dtype)

        def logits(x: Tensor) -> Tensor:
            # The reader may be under autocast; the logits are those of the moment of the call.
            with torch.autocast(x.device.type, enabled=False):
                z = F.linear(x, weight, bias)
                z = z if spec.epilogue_after_cast else apply(steps, z)
                z = z.to(spec.dtypes[0])
                z = apply(steps, z) if spec.epilogue_after_cast else z
                for dtype in spec.dtypes[1:]:
                    z = z.to(dtype)
                return z

        return logits

    def _compute(self) -> Tensor:
        return functools.reduce(lambda z, view: view(z), self.spec.views, self.head()(self.tensors["x"]))

    def _real(self) -> Tensor:
        """The logits as a plain tensor, behind the same barrier."""
        with torch.enable_grad():
            return self.clone()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        z = args[0] if args and isinstance(args[0], DeferredLogits) else None
        if z is not None:
            out = answer(func, z, *args[1:], **kwargs)
            # Inside another compiled function all is real at once: if it is returned, its tangent is a plain tensor.
            if isinstance(z.tensors["x"], FunctionalTensor) and not keeps_values(func):
                out = tree_map_only(DeferredLogits, DeferredLogits._compute, out)
            if out is not NotImplemented:
                return out
        _refuse_writes(func, args, kwargs)
        args, kwargs = tree_map_only(DeferredLogits, DeferredLogits._compute, (args, kwargs))
        return func(*args, **kwargs)

    # What reads a tensor's memory without an operation.

    def numpy(self, *, force: bool = False) -> Any:
        return self._real().numpy(force=force)

    def tolist(self) -> Any:
        return self._real().tolist()

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return self._real().__dlpack__(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if traced(self.tensors["x"]):  # wanted for a cache key (torch 2.11 and 2.12)
            return str, (self._stable_hash_for_caching(),)
        # Who unpickles eager's logits gets a leaf, too.
        return self._real().detach().requires_grad_(self.requires_grad).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return memo.setdefault(id(self), self._real())

    def share_memory_(self) -> Any:
        raise RuntimeError(f"{self._start}, and have no memory: share logits.clone(), {self._remedy}")

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else object.__format__(self, spec)

    def data_ptr(self) -> int:
        raise RuntimeError(f"{self._start}, and have no memory: pass logits.clone(), {self._remedy}")

    def retain_grad(self) -> None:
        raise RuntimeError(f"{self._start}, and get no gradient: do without it, {self._remedy}")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        # No values: a debugger that shows local variables must not allocate the logits.
        return f"DeferredLogits(size={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"


def _refusing(name: str) -> Callable[..., Any]:
    """A method of Tensor that writes: with gradients on, autograd would speak of views before dispatch is reached."""
    method = getattr(Tensor, name)

    @functools.wraps(method)
    def write(self: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
        if self.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{self._start}, and {name} cannot write to them: write to a copy (logits.clone()), {self._remedy}"
            )
        return method(self, *args, **kwargs)

    return write


for _name in (
    "__setitem__ __iadd__ __isub__ __imul__ __itruediv__ __ipow__ add_ sub_ mul_ div_ pow_ neg_ exp_ tanh_ sigmoid_ "
    "clamp_ clamp_min_ clamp_max_ nan_to_num_ fill_ zero_ copy_ masked_fill_ masked_scatter_ index_fill_ index_copy_ "
    "index_add_ index_put_ scatter_ scatter_add_ addcmul_ addcdiv_ lerp_"
).split():
    setattr(DeferredLogits, _name, _refusing(_name))


def _version(inner: dict[str, Tensor], name: str) -> int | None:
    t = inner.get(f"{name}_owner", inner[name])
    return None if t.is_inference() else t._version  # inference tensors have none


def _with_barrier(z: DeferredLogits, given: dict[str, Tensor]) -> DeferredLogits:
    if not z.spec.requires_grad or traced(z.tensors["x"]):
        return z
    with torch.enable_grad():
        marked: DeferredLogits = _NoGradient.apply(z.requires_grad_(), *_owned(given))  # type: ignore[no-untyped-call]
    return marked


def _owned(given: dict[str, Tensor]) -> list[Tensor]:
    """x, weight and bias themselves, where these are at hand and differentiated."""
    return [t for n, t in given.items() if n in ("x", "weight", "bias") and t.requires_grad]


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2) if x.dim() > 1 else x


def _defer_logits(
    x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str, compute_dtype: torch.dtype, dtype: torch.dtype,
    epilogue_after_cast: bool = False, seal_x: bool = False,
) -> Tensor:  # fmt: skip
    parse(epilogue)
    given = {name: t for name, t in (("x", x), ("weight", weight), ("bias", bias)) if t is not None}
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in given.values())
    inner = {name: t.detach() for name, t in given.items()}
    # x is cast here, in the graph, which fuses that into what computes x; the weight where it is read.
    inner["x"] = inner["x"].to(compute_dtype)
    alike = {n: t for n, t in given.items() if t.dtype == inner[n].dtype}
    owners = {f"{n}_owner": t._base.detach() for n, t in alike.items() if t._base is not None}
    seals = {f"{n}_seal": seal(t) for n, t in inner.items() if n != "x"}
    if seal_x and x.dtype == compute_dtype:
        seals["x_seal"] = seal(_rows(owners.get("x_owner", inner["x"])))
    spec = Spec(epilogue, epilogue_after_cast, compute_dtype, (dtype,), needs_grad)
    return _with_barrier(DeferredLogits(inner | owners | seals, spec), given)


_lib = torch.library.Library("lce_inductor", "FRAGMENT")
_lib.define(
    "defer_logits(Tensor x, Tensor weight, Tensor? bias, str epilogue, ScalarType compute_dtype, ScalarType dtype, "
    "bool epilogue_after_cast=False, bool seal_x=False) -> Tensor"
)
_lib.impl("defer_logits", _defer_logits, "CompositeImplicitAutograd")

defer_logits = torch.ops.lce_inductor.defer_logits.default
"""(x [..., H], weight [V, H], bias [V] or None, epilogue, compute_dtype, dtype, epilogue_after_cast, seal_x) ->
DeferredLogits.

x, weight and bias are cast to compute_dtype, the linear layer is applied, then the epilogue (see spec/epilogue.py),
then the cast to dtype; or with epilogue_after_cast the cast, then the epilogue in that dtype. seal_x: others can see
the memory of x, and may write to it in ways that torch does not count.
"""


# Collectives that write to their inputs; their schemas do not say so.
_WRITING_COLLECTIVES = {"allreduce_", "allreduce_coalesced_", "broadcast_", "reduce_", "recv_", "recv_any_source_"}


def _refuse_writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    written = [named.get(a.name) for a in func._schema.arguments if a.is_write]
    if func.namespace == "c10d" and func._schema.name.split("::")[1] in _WRITING_COLLECTIVES:
        written = list(args)
    found = next((t for t in tree_iter(written) if isinstance(t, DeferredLogits)), None)
    if found is not None:
        raise RuntimeError(
            f"{found._start}, and {func} cannot write to them: write to a copy (logits.clone()), {found._remedy}"
        )
