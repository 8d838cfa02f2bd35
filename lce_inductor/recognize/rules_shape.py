"""Rules for operations that leave every logit as it is: casts, copies, and moving rows about.

logits.float()   logits.view(-1, V)   logits.flatten(0, 1)   logits[..., :-1, :]   logits.permute(0, 2, 1)
logits[..., :V]   logits[mask]   logits.split(n)   torch.stack([logits_0, logits_1], 1)[:, 0]
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from ..graph.values import Info, info, same, same_shape
from ..reasons import refuse
from .canon import Call
from .edits import fold
from .forms import CLASSES, ClassMap, Edit, OneHot, OneHotProduct, Outcome, Parts, Product, RowOp, Spread, rule
from .rules_elementwise import num_classes
from .rules_head import DTYPES
from .rules_reduce import index_rows

if TYPE_CHECKING:
    from .walk import Walk


@rule("cast")
def cast(walk: Walk, call: Call, form: Any) -> Outcome:
    out = info(call.node)
    if out is None or out.dtype not in DTYPES:
        return None
    if isinstance(form, OneHot):
        return form
    if not isinstance(form, (ClassMap, Product, OneHotProduct)):
        return None
    if isinstance(form, ClassMap) and not form.edits and out.dtype != form.dtype:
        form = form.with_(early_cast=True)
    if isinstance(form, ClassMap) and any(
        e.name in ("mask", "fill") and -math.inf < e.args[-1] < _lowest(out) for e in form.edits
    ):
        return None  # what masked classes were set to becomes -inf
    return dataclasses.replace(form, dtype=out.dtype)


@rule("same")
def same_values(walk: Walk, call: Call, form: Any) -> Outcome:
    return form


@rule("expand")
def expand(walk: Walk, call: Call, form: Any) -> Outcome:
    """To the shape that it has."""
    known, out = info(call.get("input")), info(call.node)
    return form if known is not None and out is not None and same_shape(known.shape, out.shape) else None


@rule("detach")
def detach(walk: Walk, call: Call, form: Any) -> Outcome:
    return form.detach() if isinstance(form, ClassMap) else None


def _lowest(out: Info) -> float:
    return float(torch.finfo(out.dtype).min)


def _append(call: Call, form: Any, op: RowOp) -> ClassMap | None:
    """form with its rows moved by op; the class dimension stays last."""
    out = info(call.node)
    if out is None or not isinstance(form, ClassMap) or form.offset or not form.class_last:
        return None
    ndim = len(out.shape)
    if ndim == 0 or not same(out.shape[-1], num_classes(form)):
        return None
    return form.with_(rows=(*form.rows, op), ndim=ndim, class_dim=ndim - 1)


@rule("reshape")
def reshape(walk: Walk, call: Call, form: Any) -> Outcome:
    """Row-major order is kept, so rows stay whole exactly when the last dimension still is the class dimension."""
    sizes = call.get("shape")
    if isinstance(form, ClassMap) and not form.class_last:
        return _reshape_around(call, form) or refuse("class-dim", call.node)
    if not sizes or any(not _size(s) for s in sizes):
        return None
    moved = _append(call, form, RowOp("reshape", (*sizes[:-1], CLASSES)))
    mixed = moved is None and isinstance(form, ClassMap) and not form.offset
    return refuse("class-dim", call.node) if mixed else moved


def _reshape_around(call: Call, form: ClassMap) -> ClassMap | None:
    """[B, V, T] -> [B, V, 1, T]: the dimensions before the classes and the classes stay, rows behind them regroup."""
    known, out, at = info(call.get("input")), info(call.node), form.class_dim
    if known is None or out is None or form.offset or not same_shape(known.shape[: at + 1], out.shape[: at + 1]):
        return None
    sizes = call.get("shape")
    if not sizes or any(not _size(s) for s in sizes):
        return None
    rows = (*sizes[:at], *sizes[at + 1 :], CLASSES)
    return form.with_(rows=(*form.rows, RowOp("reshape", rows)), ndim=len(out.shape))


def _size(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, Node) and info(value) is None)


@rule("flatten")
def flatten(walk: Walk, call: Call, form: Any) -> Outcome:
    if not isinstance(form, ClassMap):
        return None
    start = call.get("start_dim", 0) % form.ndim
    end = call.get("end_dim", -1) % form.ndim
    return _append(call, form, RowOp("flatten", (start, end))) if end < form.class_dim else None


@rule("unsqueeze")
def unsqueeze(walk: Walk, call: Call, form: Any) -> Outcome:
    if not isinstance(form, ClassMap):
        return None
    dim = call.get("dim") % (form.ndim + 1)
    return _append(call, form, RowOp("unsqueeze", (dim,))) if dim <= form.class_dim else None


@rule("squeeze")
def squeeze(walk: Walk, call: Call, form: Any) -> Outcome:
    dim = call.get("dim")
    if not isinstance(form, ClassMap) or not isinstance(dim, int) or dim % form.ndim == form.class_dim:
        return None
    return _append(call, form, RowOp("squeeze", (dim % form.ndim,)))


@rule("permute", "transpose", "t", "mT", "movedim")
def permute(walk: Walk, call: Call, form: Any) -> Outcome:
    """Split a permutation into one of the rows and a move of the class dimension."""
    if not isinstance(form, ClassMap) or form.offset:
        return None
    order = list(range(form.ndim))
    if call.name == "permute":
        dims = call.get("dims")
        if len(dims) != form.ndim or any(not isinstance(d, int) for d in dims):
            return None
        order = [d % form.ndim for d in dims]
    elif call.name in ("t", "mT"):  # .T and t() of more than two dimensions are errors, or reverse them all
        if form.ndim < 2 or (form.ndim > 2 and call.name == "t"):
            return None
        order[-2:] = order[:-3:-1]
    elif call.name == "movedim":
        source, destination = call.get("source"), call.get("destination")
        if not isinstance(source, int) or not isinstance(destination, int):
            return None
        order.insert(destination % form.ndim, order.pop(source % form.ndim))
    else:
        a, b = call.get("dim0") % form.ndim, call.get("dim1") % form.ndim
        order[a], order[b] = order[b], order[a]
    class_dim = order.index(form.class_dim)
    # The same permutation with the class dimension taken out, in the numbering of the row dimensions.
    rows = [d - (d > form.class_dim) for d in order if d != form.class_dim]
    moved = form.with_(class_dim=class_dim)
    if rows == sorted(rows):
        return moved
    return moved.with_(rows=(*form.rows, RowOp("permute", (*rows, form.ndim - 1), selects=True)))


@rule("broadcast_tensors")
def broadcast(walk: Walk, call: Call, form: Any) -> Outcome:
    """Labels against the logits they are gathered from, as torch.distributions does it."""
    items = [walk.form(t) or t for t in call.get("tensors")]
    out = call.node.meta.get("example_value", call.node.meta.get("val"))
    if not isinstance(form, ClassMap) or len(items) != 2 or not isinstance(out, (tuple, list)):
        return None
    index = next((t for t in items if isinstance(t, Node)), None)
    known, like = info(index), tuple(out[0].shape)
    if index is None or known is None or len(known.shape) != form.ndim or not same(known.shape[form.class_dim], 1):
        return None
    own = info(call.get("tensors")[items.index(form)])
    row = (*known.shape[: form.class_dim], like[form.class_dim], *known.shape[form.class_dim + 1 :])
    if own is None or not same_shape(own.shape, like) or not same_shape(row, like):
        return None
    return Parts(tuple(form if t is form else Spread(form, index) for t in items), None)


def _narrowed(form: Spread, key: Any) -> Spread | None:
    """[..., :1] of labels that were broadcast along the classes."""
    full = full_key(key if isinstance(key, tuple) else (key,), form.like.ndim)
    if full is None or len(full) != form.like.ndim or not form.like.class_last:
        return None
    return (
        dataclasses.replace(form, narrow=True) if full == (*[slice(None)] * (len(full) - 1), slice(None, 1)) else None
    )


@rule("getitem")
def getitem(walk: Walk, call: Call, form: Any) -> Outcome:
    """Slices and indices of rows, slices of classes, one class per row, and members of a stack or split."""
    key = call.get("key")
    if isinstance(form, Parts):
        return _member(call, form, key)
    if isinstance(form, Spread):
        return _narrowed(form, key)
    if not isinstance(form, ClassMap):
        return None
    key = key if isinstance(key, tuple) else (key,)
    if len(key) == 2 == form.ndim and all(info(k) is not None for k in key):
        return index_rows(walk, call, form, key)
    key = full_key(key, form.ndim)
    if key is None or not form.class_last:
        return None
    return take(call, form, key)


def full_key(key: tuple[Any, ...], ndim: int) -> tuple[Any, ...] | None:
    """key without Ellipsis, None where it holds something that is no plain slice or index."""
    if any(not _index(k) for k in key):
        return None
    at = [i for i, k in enumerate(key) if k is Ellipsis]
    if len(at) > 1 or len(key) - len(at) > ndim:
        return None
    if at:
        key = (*key[: at[0]], *[slice(None)] * (ndim - len(key) + 1), *key[at[0] + 1 :])
    return key


def _index(value: Any) -> bool:
    if isinstance(value, slice):
        return all(v is None or _size(v) for v in (value.start, value.stop, value.step))
    return value is Ellipsis or _size(value) or _row_index(value)


def _row_index(value: Any) -> bool:
    """A tensor of row numbers or a mask of rows."""
    known = info(value)
    return known is not None and known.dtype in (torch.int64, torch.int32, torch.bool, torch.uint8)


def take(call: Call, form: ClassMap, key: tuple[Any, ...]) -> Outcome:
    """form[key] for a key of slices and indices, the class dimension last."""
    tensors = [known for k in key if (known := info(k)) is not None]
    masked = any(t.dtype in (torch.bool, torch.uint8) for t in tensors)
    if tensors:
        first = [info(k) is not None for k in key[: len(tensors)]]
        if not all(first) or any(k != slice(None) for k in key[len(tensors) :]) or (masked and len(tensors) > 1):
            return None
        # A mask takes as many dimensions as it has itself.
        taken = len(tensors[0].shape) if masked else len(tensors)
        if taken + len(key) - len(tensors) > form.ndim or taken >= form.ndim:
            return None
    if not masked and len(key) == form.ndim:
        classes, key = key[-1], key[:-1]
        if not isinstance(classes, slice):
            return None
        if classes != slice(None):
            kept = class_range(form, classes)
            if kept is None:
                return None
            edits = (*form.edits, Edit("classes", kept))
            if form.normalized or form.offset or fold(edits) is None:
                return None
            form = form.with_(edits=edits)
    while key and key[-1] == slice(None):
        key = key[:-1]
    return _append(call, form, RowOp("getitem", (tuple(key),), selects=True)) if key else form


def class_range(form: ClassMap, key: Any) -> tuple[int, int] | None:
    """The classes [start, stop) that a slice keeps, if that can be told and leaves any."""
    size = num_classes(form)
    if isinstance(key, int) and isinstance(size, int) and -size <= key < size:
        return key % size, key % size + 1
    if not isinstance(key, slice) or not isinstance(size, int):
        return None
    if any(not (v is None or isinstance(v, int)) for v in (key.start, key.stop, key.step)):
        return None
    start, stop, step = key.indices(size)
    return (start, stop) if step == 1 and start < stop else None


@rule("slice")
def slice_dim(walk: Walk, call: Call, form: Any) -> Outcome:
    dim = call.get("dim", 0)
    bounds = slice(call.get("start"), call.get("end"), call.get("step", 1))
    return _along(call, form, dim, bounds)


@rule("narrow")
def narrow(walk: Walk, call: Call, form: Any) -> Outcome:
    start, length = call.get("start"), call.get("length")
    if start == 0 and _size(length):
        return _along(call, form, call.get("dim"), slice(0, length))
    if not isinstance(start, int) or not isinstance(length, int):
        return None
    return _along(call, form, call.get("dim"), slice(start, start + length))


@rule("select", "index_select")
def select(walk: Walk, call: Call, form: Any) -> Outcome:
    if call.name == "index_select" and call.get("dim") != 0:
        return None
    return _along(call, form, call.get("dim"), call.get("index"))


def _along(call: Call, form: Any, dim: Any, key: Any) -> Outcome:
    if isinstance(form, Parts) and form.dim is not None and isinstance(dim, int) and _index(key):
        return _member(call, form, (*[slice(None)] * (dim % (form.items[0].ndim + 1)), key))
    if not isinstance(form, ClassMap) or not isinstance(dim, int) or not form.class_last or not _index(key):
        return None
    return take(call, form, (*[slice(None)] * (dim % form.ndim), key))


@rule("split", "chunk", "unbind")
def split(walk: Walk, call: Call, form: Any) -> Outcome:
    """A tuple of row ranges."""
    pieces = call.node.meta.get("example_value", call.node.meta.get("val"))
    dim = call.get("dim", 0)
    if not isinstance(form, ClassMap) or not form.class_last or form.offset or not isinstance(pieces, (tuple, list)):
        return None
    dim = dim % form.ndim
    if dim == form.class_dim:
        return _class_split(call, form, pieces)
    keys: list[Any] = list(range(len(pieces)))
    if call.name != "unbind":
        sizes = [p.shape[dim] for p in pieces]
        if any(not isinstance(s, int) for s in sizes[:-1]):
            return None
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        keys = [slice(a, b) for a, b in zip(starts, [*starts[1:], None])]
    ndim = form.ndim - (call.name == "unbind")
    items = []
    for key in keys:
        op = RowOp("getitem", ((*[slice(None)] * dim, key),), selects=True)
        items.append(form.with_(rows=(*form.rows, op), ndim=ndim, class_dim=ndim - 1))
    return Parts(tuple(items), None)


def _class_split(call: Call, form: ClassMap, pieces: Any) -> Outcome:
    """One wide head for several tasks: each piece keeps a range of classes."""
    sizes = [p.shape[-1] for p in pieces] if call.name != "unbind" else []
    if not sizes or any(not isinstance(s, int) for s in sizes) or form.normalized:
        return None
    items = []
    for i, size in enumerate(sizes):
        start = sum(sizes[:i])
        edits = (*form.edits, Edit("classes", (start, start + size)))
        if fold(edits) is None:
            return None
        items.append(form.with_(edits=edits))
    return Parts(tuple(items), None)


@rule("unflatten")
def unflatten(walk: Walk, call: Call, form: Any) -> Outcome:
    dim, sizes = call.get("dim"), call.get("sizes")
    if not isinstance(form, ClassMap) or not isinstance(dim, int) or not sizes or not all(map(_size, sizes)):
        return None
    if dim % form.ndim == form.class_dim:
        return refuse("class-dim", call.node)
    return _append(call, form, RowOp("unflatten", (dim % form.ndim, tuple(sizes))))


@rule("stack")
def stack(walk: Walk, call: Call, form: Any) -> Outcome:
    items = [walk.form(t) for t in call.get("tensors") or ()]
    dim = call.get("dim", 0)
    if not all(isinstance(i, ClassMap) and i.class_last and not i.offset for i in items):
        return None
    dim = dim % (items[0].ndim + 1)  # type: ignore[union-attr]
    return Parts(tuple(items), dim) if dim < items[0].ndim else None  # type: ignore[arg-type,union-attr]


def _member(call: Call, form: Parts, key: Any) -> Outcome:
    """parts[i] of a split; stacked[:, i] and stacked[..., a:b, :] of a stack."""
    if form.dim is None:
        return form.items[key] if isinstance(key, int) else None
    ndim = form.items[0].ndim + 1
    full = full_key(key if isinstance(key, tuple) else (key,), ndim)
    if full is None or any(isinstance(k, Node) for k in full):
        return None
    padded = (*full, *[slice(None)] * (ndim - len(full)))
    chosen, rest = padded[form.dim], (*padded[: form.dim], *padded[form.dim + 1 :])
    if isinstance(chosen, int):
        return take(call, form.items[chosen], rest)
    if chosen != slice(None) or any(isinstance(k, int) for k in rest) or rest[-1] != slice(None):
        return None
    op = RowOp("getitem", (rest[:-1],), selects=True)
    return Parts(tuple(i.with_(rows=(*i.rows, op)) for i in form.items), form.dim)
