"""What becomes of a function that is called with pending logits.

It asks for what every tensor knows: answered. It takes rows of them, or puts them in another order: a linear layer
works row by row, so that is done to x. It acts on each logit by itself, or takes a range of classes: a step, which
waits. It is the loss itself: compiled. Anything else reads the logits.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map_only

from ..deferred_logits.seals import traced
from ..deferred_logits.tensor import DeferredLogits
from ..deferred_logits.tensor import Spec as DeferredSpec
from ..reporting.history import deferred_read
from .logits import COPY, REMEDY, START, Memory, PendingLogits, is_functional, keep, kept, of_parts, parts, real
from .loss import cross_entropy, of_rows
from .steps import STEPS, Step, View, compute_classes

T = torch.Tensor


# -- steps, which wait


def _wait(
    z: PendingLogits, name: str, *args: Any, dtype: torch.dtype | None = None, size: Any = None, stride: Any = None
) -> PendingLogits:
    """size: of a view."""
    spec = dataclasses.replace(z.spec, steps=(*z.spec.steps, Step(name, args)), dtype=dtype or z.dtype)
    shape, memory = (z.shape, Memory(z.memory.head)) if size is None else (size, z.memory)
    return of_parts(*parts(z), spec, shape, memory, stride)


def _cast(z: PendingLogits, dtype: torch.dtype) -> Any:
    if not dtype.is_floating_point:
        return NotImplemented
    return z if dtype == z.dtype else _wait(z, "to", dtype, dtype=dtype)


def _to(z: PendingLogits, *args: Any, **kwargs: Any) -> Any:
    named = (*args, kwargs.get("device"), kwargs.get("other"))
    places = [a.device if isinstance(a, Tensor) else _device(a, z) for a in named
              if isinstance(a, str | torch.device | int | Tensor) and not isinstance(a, bool)]  # fmt: skip
    if any(place != z.device for place in places):
        return _value(z).to(*args, **kwargs)
    if kwargs.pop("copy", False) or kwargs.pop("memory_format", torch.preserve_format) is not torch.preserve_format:
        return NotImplemented
    kwargs.pop("non_blocking", None)
    if len(args) + len(kwargs) == 1 and isinstance(args[0] if args else kwargs.get("other"), Tensor):
        return _cast(z, (args[0] if args else kwargs["other"]).dtype)
    kwargs.pop("device", None)
    dtypes = [a for a in (*args, kwargs.pop("dtype", None)) if isinstance(a, torch.dtype)]
    return NotImplemented if kwargs else _cast(z, dtypes[0] if dtypes else z.dtype)


def _device(named: Any, z: PendingLogits) -> torch.device:
    device = torch.device(named)
    return z.device if device.type == z.device.type and device.index is None else device


def _scale(name: str) -> Callable[..., Any]:
    def rule(z: PendingLogits, other: Any, **kwargs: Any) -> Any:
        return _wait(z, name, other) if type(other) in (int, float) and not kwargs else NotImplemented

    return rule


def _scale_in_place(name: str) -> Callable[..., Any]:
    def rule(z: PendingLogits, other: Any, **kwargs: Any) -> Any:
        if type(other) not in (int, float) or kwargs or not z.is_contiguous():
            return NotImplemented
        if z.requires_grad and not torch.is_grad_enabled():
            raise RuntimeError(
                f"{START}: under no_grad they can't be scaled in place, which autograd would not see: {COPY}"
            )
        z.write(Step(name, (other,)))
        return z

    return rule


def _softmax(name: str) -> Callable[..., Any]:
    def rule(z: PendingLogits, dim: Any = None, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
        given = [a for a in (*args, dtype) if isinstance(a, torch.dtype)]
        if dim not in (-1, z.dim() - 1) or kwargs.keys() - {"_stacklevel"}:
            return NotImplemented
        # Autocast may have a dtype of its own for it.
        one = torch.empty(1, dtype=z.dtype, device=z.device)
        dtype = getattr(torch, name)(one, -1, dtype=given[0] if given else None).dtype
        return _wait(z, name, dtype, dtype=dtype)

    return rule


# -- rows, which are x's


def _of_rows(z: PendingLogits, select: Callable[[Tensor], Any]) -> Any:
    """Logits of rows of x. `select` changes dimensions of rows and leaves the last one."""
    x, weight, bias = parts(z)
    found = select(x)

    def one(x: Tensor) -> PendingLogits:
        return of_parts(x, weight, bias, z.spec, (*x.shape[:-1], z.shape[-1]), z.memory)

    return one(found) if isinstance(found, Tensor) else tuple(map(one, found))


def _view(z: PendingLogits, *size: Any) -> Any:
    size = tuple(size[0]) if len(size) == 1 and isinstance(size[0], Sequence) else size
    if not size or not all(isinstance(s, int) for s in size) or not z.numel():
        return NotImplemented
    *rows, last = size
    keeps = last == z.shape[-1] or (last == -1 and math.prod(rows) * z.shape[-1] == z.numel())
    return _of_rows(z, lambda x: x.reshape([*rows, x.shape[-1]])) if keeps else NotImplemented


def _rows(
    positions: tuple[int, ...], more: int = 0, default: int | None = None, func: Any = None
) -> Callable[..., Any]:
    """A function of x along dimensions of rows: those arguments, in a tensor of `more` dimensions more."""

    def rule(z: PendingLogits, *args: Any, **kwargs: Any) -> Any:
        given = [args[p] if p < len(args) else kwargs.get("dim", default) for p in positions]
        ndim = z.dim() + more
        if not all(type(d) is int and -ndim <= d < ndim and d % ndim != ndim - 1 for d in given):
            return NotImplemented
        return _of_rows(z, lambda x: func(x, *args, **kwargs))

    return rule


def _flatten(z: PendingLogits, start_dim: int = 0, end_dim: int = -1) -> Any:
    inside = -z.dim() <= end_dim < z.dim() and end_dim % z.dim() != z.dim() - 1
    return _of_rows(z, lambda x: x.flatten(start_dim, end_dim)) if inside else NotImplemented


def _permute(z: PendingLogits, *dims: Any) -> Any:
    """Where the classes move, for a loss of [B, V, T], the product stays as it is and that waits."""
    dims = tuple(dims[0]) if len(dims) == 1 and isinstance(dims[0], Sequence) else dims
    if not all(type(d) is int for d in dims) or sorted(d % z.dim() for d in dims) != list(range(z.dim())):
        return NotImplemented
    dims = tuple(d % z.dim() for d in dims)
    if dims[-1] == z.dim() - 1 and not z.spec.moved:
        return _of_rows(z, lambda x: x.permute(dims))
    return _wait(z, "permute", dims, size=tuple(z.shape[d] for d in dims))


def _transpose(z: PendingLogits, dim0: int, dim1: int) -> Any:
    if not all(type(d) is int and -z.dim() <= d < z.dim() for d in (dim0, dim1)):
        return NotImplemented
    dims = list(range(z.dim()))
    dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
    return _permute(z, *dims)


def _index(z: PendingLogits, index: Any) -> Any:
    index = list(index) if isinstance(index, tuple) else [index]
    known = slice, int, Tensor, type(None), type(Ellipsis)
    if any(not isinstance(i, known) or isinstance(i, bool | PendingLogits) for i in index):
        return NotImplemented
    used = sum(_dims_of(i) for i in index)
    gaps = [n for n, i in enumerate(index) if i is Ellipsis] or [len(index)]
    if used > z.dim() or len(gaps) > 1:
        return NotImplemented  # eager's error
    index[gaps[0] : gaps[0] + 1] = [slice(None)] * (z.dim() - used)
    *rows, classes = index or [None]
    # What is a tensor takes part in an index of several dimensions, and where its result stands is eager's to know.
    if not isinstance(classes, slice) or classes.step not in (None, 1):
        return NotImplemented
    found = z if all(_is_all(i) for i in rows) else _of_rows(z, lambda x: x[(*rows, slice(None))])
    start, stop, _ = classes.indices(z.shape[-1])
    if (start, stop) == (0, z.shape[-1]):
        return found
    return _wait(found, "classes", start, stop, size=(*found.shape[:-1], max(stop - start, 0)))


def _dims_of(i: Any) -> int:
    """Dimensions that an entry of an index takes."""
    if i is None or i is Ellipsis:
        return 0
    return i.dim() if isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) else 1


def _is_all(i: Any) -> bool:
    return isinstance(i, slice) and i == slice(None)


# -- numbers of each row


def _of_softmax(name: str) -> Callable[..., Any]:
    """Without a softmax these need no logits, and their gradient is as large as they: so it would be if compiled."""
    rule = of_rows(name)
    return lambda z, *args, **kwargs: rule(z, *args, **kwargs) if z.spec.normalized else NotImplemented


def _gather(z: PendingLogits, dim: Any = None, index: Any = None, **kwargs: Any) -> Any:
    """The logit of a class is the product of two rows, one of x and one of the weight."""
    if z.spec.normalized:
        return of_rows("gather")(z, dim, index, **kwargs)
    x, weight, bias = parts(z)
    plain = not kwargs and z.spec.elementwise and dim in (-1, z.dim() - 1)
    if not plain or not isinstance(index, Tensor) or index.dtype != torch.long or index.shape[:-1] != z.shape[:-1]:
        return NotImplemented
    if index.shape[-1] * x.shape[-1] > z.shape[-1]:
        return NotImplemented  # these rows of the weight would take more than the logits
    try:
        return compute_classes(x, weight, bias, index, z.spec)
    except IndexError:  # a class that is none: the error is to be eager's
        return NotImplemented


def _argmax(z: PendingLogits, *args: Any, **kwargs: Any) -> Any:
    """It has no gradient: answered by chunks of rows where the logits have no other steps than casts."""
    found = _detach(z)
    return NotImplemented if isinstance(found, PendingLogits) else found.argmax(*args, **kwargs)


def _contiguous(z: PendingLogits, memory_format: Any = torch.contiguous_format) -> Any:
    return z if memory_format is torch.contiguous_format else NotImplemented


def _clone(z: PendingLogits, **kwargs: Any) -> Any:
    """A copy is how a user makes the logits real. But where DDP looks for unused parameters, or has a static graph, it
    clones every output of every step, inside a Function of its own that hooks the backward: that copy stays pending."""
    frame = sys._getframe() if z.requires_grad and not torch.is_grad_enabled() and not kwargs else None
    while frame is not None and frame.f_code is not _SINK:
        frame = frame.f_back
    return NotImplemented if frame is None else z.alias()


_SINK = getattr(getattr(getattr(nn.parallel.distributed, "_DDPSink", None), "forward", None), "__code__", object())


def _detach(z: PendingLogits) -> Any:
    """Without a gradient these are the deferred logits that a compiled model returns: metrics are answered by rows."""
    z.check()
    if all(step.name == "to" for step in z.spec.steps):
        dtypes = (z.spec.compute_dtype, *(step.args[0] for step in z.spec.steps))
        return DeferredLogits(
            dict(z.tensors), DeferredSpec("", False, z.spec.compute_dtype, dtypes, False, pending=True)
        )
    return z.alias()


def _named(*names: str) -> list[Any]:
    """Functions and methods of these names, torch's own objects."""
    return [found for n in names for home in (T, torch) if (found := getattr(home, n, None)) is not None]


# Those of rows need the classes in the last dimension.
_ROW_RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_named("view", "reshape"), lambda z, *a: _view(z, *a)),
    **dict.fromkeys(_named("flatten"), _flatten),
    **{f: _rows((0,), func=f) for f in _named("select", "narrow", "index_select", "squeeze")},
    **{f: _rows((0,), more=1, func=f) for f in _named("unsqueeze")},
    **{f: _rows((0,), default=0, func=f) for f in _named("unbind")},
    **{f: _rows((1,), default=0, func=f) for f in _named("split", "chunk", "tensor_split", "split_with_sizes")},
    T.__getitem__: _index,
    **dict.fromkeys((F.log_softmax, *_named("log_softmax")), _softmax("log_softmax")),
    **dict.fromkeys((F.softmax, *_named("softmax")), _softmax("softmax")),
    **dict.fromkeys(_named("logsumexp"), of_rows("logsumexp")),
    **dict.fromkeys(_named("sum"), _of_softmax("sum")),
    **dict.fromkeys(_named("mean"), _of_softmax("mean")),
    **dict.fromkeys(_named("gather"), _gather),
}

_RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_named("permute"), _permute),
    **dict.fromkeys(_named("transpose", "swapaxes", "swapdims"), _transpose),
    **dict.fromkeys(_named("contiguous"), _contiguous),
    **dict.fromkeys([*_named("detach"), T.data.__get__], _detach),  # type: ignore[attr-defined]
    **dict.fromkeys(_named("argmax"), _argmax),
    **dict.fromkeys(_named("clone"), _clone),
    T.float: lambda z: _cast(z, torch.float32),
    T.double: lambda z: _cast(z, torch.float64),
    T.half: lambda z: _cast(z, torch.float16),
    T.bfloat16: lambda z: _cast(z, torch.bfloat16),
    T.to: _to,
    T.cpu: lambda z, **kwargs: _to(z, "cpu", **kwargs),
    **dict.fromkeys(_named("mul", "multiply", "__mul__", "__rmul__"), _scale("mul")),
    **dict.fromkeys(_named("div", "divide", "true_divide", "__truediv__"), _scale("div")),
    **dict.fromkeys(_named("mul_", "multiply_", "__imul__"), _scale_in_place("mul")),
    **dict.fromkeys(_named("div_", "divide_", "true_divide_", "__itruediv__"), _scale_in_place("div")),
    **dict.fromkeys(_named("tanh"), lambda z: _wait(z, "tanh")),
    **dict.fromkeys(_named("neg", "negative", "__neg__"), lambda z: _wait(z, "neg")),
    F.cross_entropy: cross_entropy,
}

_AS = {T.view_as: T.view, T.reshape_as: T.reshape}

# -- what every tensor knows

_KNOWN = {
    *_named(
        "size", "stride", "dim", "ndimension", "numel", "nelement", "element_size", "is_contiguous", "storage_offset",
        "get_device", "is_floating_point", "is_complex", "is_conj", "is_neg", "is_inference", "is_signed", "is_pinned",
        "is_same_size", "dim_order", "has_names", "requires_grad_", "register_hook", "backward", "_is_view",
        "untyped_storage", "is_shared", "_is_zerotensor", "__len__", "__hash__", "_version", "_dimI", "_dimV",
        "is_distributed", "register_post_accumulate_grad_hook",
    ),
    torch.autograd.backward, torch.autograd.grad,
}  # fmt: skip
_OTHER_TENSORS = {"T", "mT", "H", "mH", "real", "imag", "data"}


def _asks(func: Any) -> bool:
    if func in _KNOWN:
        return True
    return _is_attribute(func) and getattr(func.__self__, "__name__", "") not in _OTHER_TENSORS


def _is_attribute(func: Any) -> bool:
    return getattr(func, "__name__", "") == "__get__" and hasattr(func, "__self__")


def call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func in _AS and len(args) == 2 and not kwargs:  # of the other tensor only the shape is read
        func, args = _AS[func], (args[0], tuple(args[1].shape))
    first = args[0] if args and isinstance(args[0], PendingLogits) else None
    given = [a for a in tree_iter((args, kwargs)) if isinstance(a, PendingLogits)]
    if not given:
        return func(*args, **kwargs)
    leaf = func is T.requires_grad_ and (args[1] if len(args) > 1 else kwargs.get("requires_grad", True))
    if leaf and not (given[0].requires_grad or traced(given[0].tensors["x"])):
        raise RuntimeError(
            f"{START}: made without a gradient, they can't be made to require one, which would be of their size; "
            "logits.clone().requires_grad_() can"
        )
    if _asks(func) or (func in (T.detach, torch.detach) and traced(given[0].tensors["x"])):
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    if func in (T.retain_grad, T.share_memory_, T.data_ptr):
        raise RuntimeError(f"{START}: they have no memory and no gradient of their own; {REMEDY}")
    if traced(given[0].tensors["x"]) and not is_functional(given[0]):
        with torch._C.DisableTorchFunctionSubclass():  # Dynamo asks for shapes alone
            return func(*args, **kwargs)
    # Log-probabilities that were read once are there, and a number of a row costs no product any more.
    if not is_functional(given[0]) and first is not None and len(given) == 1 and kept(first) is None:
        rule = _RULES.get(func) or (None if first.spec.moved else _ROW_RULES.get(func))
        out = NotImplemented if rule is None else rule(first, *args[1:], **kwargs)
        if out is not NotImplemented:
            return out
    _refuse_writes(func, first, kwargs)
    if not is_functional(given[0]) and first is not None and len(given) == 1:
        views = _view_later(first, func, args[1:], kwargs)
        if views is not NotImplemented:
            return views
    return func(*_read(args), **_read(kwargs))


def _view_later(z: PendingLogits, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A view of all logits waits: a write to it has to be refused, and would be lost in one of values read for it."""
    if any(isinstance(a, Tensor) for a in tree_iter((args, kwargs))):
        return NotImplemented
    try:
        with torch._C.DisableTorchFunction(), _disable_current_modes():  # nobody's business
            shapes = torch.empty_strided(z.shape, z.stride(), dtype=z.dtype, device="meta")
            found = func(shapes, *args, **kwargs)
    except Exception:  # eager's error, or values that nobody has
        return NotImplemented
    several = isinstance(found, tuple | list)
    outs = list(found) if several else [found]
    if not outs or not all(isinstance(o, Tensor) and o.dtype == z.dtype and _shares(o, shapes) for o in outs):
        return NotImplemented
    if not several and (before := _unshaped(z)) is not None and found.is_contiguous() and found.numel() == z.numel():
        return before if found.shape == before.shape else call(T.view, (before, tuple(found.shape)), {})
    if _is_attribute(func):
        func, args = func.__self__.__name__, ()
    views = [View(func, args, kwargs, n if several else None) for n in range(len(outs))]
    strides = [o.stride() if o.numel() > z.numel() else None for o in outs]  # as compute() leaves them
    made = [_wait(z, "view", view, size=o.shape, stride=s) for view, o, s in zip(views, outs, strides)]
    if kept(z) is not None:
        values = real(z)
        for one, view in zip(made, views):
            keep(one, view(values))
    return type(found)(made) if several else made[0]


def _unshaped(z: PendingLogits) -> PendingLogits | None:
    """These numbers in the shape that they had before the last view, if that did no more than give them another."""
    *steps, last = z.spec.steps or (None,)
    if last is None or last.name != "view" or kept(z) is not None or traced(z.tensors["x"]):
        return None
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        size = (*z.tensors["x"].shape[:-1], z.tensors["weight"].shape[0])
        shapes = torch.empty(size, device="meta", dtype=z.dtype)
        for step in steps:
            shapes = STEPS[step.name](shapes, *step.args).contiguous()
        viewed = last.args[0](shapes)
    if not viewed.is_contiguous() or viewed.numel() != shapes.numel() or shapes.numel() > math.prod(size):
        return None
    return of_parts(*parts(z), dataclasses.replace(z.spec, steps=tuple(steps)), tuple(shapes.shape), z.memory)


def _shares(a: Tensor, b: Tensor) -> bool:
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)


def _read(values: Any) -> Any:
    return tree_map_only(PendingLogits, _value, values)


def _value(z: PendingLogits) -> Tensor:
    """The logits themselves. AOTAutograd's graph gets one product of each, and what is written to it stays."""
    z.check()
    if is_functional(z) or kept(z) is not None:
        return real(z)
    x = z.tensors["x"]
    rows = x.shape[:-1].numel()
    deferred_read(rows, rows, z.tensors["weight"].shape[0], z.spec.dtype.itemsize, pending=True)
    return real(z)


def _refuse_writes(func: Any, first: PendingLogits | None, kwargs: dict[str, Any]) -> None:
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    in_place = in_place or name in _WRITES or (name == "__set__" and first is not None)
    if (in_place and first is not None) or isinstance(kwargs.get("out"), PendingLogits):
        raise RuntimeError(f"{START}, and {name} cannot write to them: {COPY}")


_WRITES = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__ipow__", "__ifloordiv__"}
