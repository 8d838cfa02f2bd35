"""Rules for operations that leave every logit as it is: casts, copies, and moving rows about.

logits.float()   logits.view(-1, V)   logits.flatten(0, 1)   logits[..., :-1, :]   logits.permute(0, 2, 1)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.fx import Node

from ..reasons import refuse
from .canon import Call
from .forms import CLASSES, ClassMap, Outcome, RowOp, rule
from .rules_head import DTYPES
from .values import info, same

if TYPE_CHECKING:
    from .walk import Walk


@rule("cast")
def cast(walk: Walk, call: Call, form: ClassMap) -> Outcome:
    out = info(call.node)
    if out is None or out.dtype not in DTYPES:
        return None
    return form.with_(dtype=out.dtype)


@rule("same")
def same_values(walk: Walk, call: Call, form: ClassMap) -> Outcome:
    return form


@rule("detach")
def detach(walk: Walk, call: Call, form: ClassMap) -> Outcome:
    return form.with_(detached=True)


def _append(call: Call, form: ClassMap, op: RowOp, class_dim: int | None = None) -> ClassMap | None:
    out = info(call.node)
    if out is None:
        return None
    ndim = len(out.shape)
    where = ndim - 1 if class_dim is None else class_dim
    if not same(out.shape[where], form.head.num_classes):
        return None
    return form.with_(rows=(*form.rows, op), ndim=ndim, class_dim=where)


@rule("reshape")
def reshape(walk: Walk, call: Call, form: ClassMap) -> Outcome:
    """Row-major order is kept, so rows stay whole exactly when the last dimension still is the class dimension."""
    sizes = call.get("shape")
    if not form.class_last or not sizes or any(not _size(s) for s in sizes):
        return refuse("class-dim", call.node) if not form.class_last else None
    return _append(call, form, RowOp("reshape", (*sizes[:-1], CLASSES)))


def _size(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, Node) and info(value) is None)


@rule("flatten")
def flatten(walk: Walk, call: Call, form: ClassMap) -> Outcome:
    start = call.get("start_dim", 0) % form.ndim
    end = call.get("end_dim", -1) % form.ndim
    if not form.class_last or end >= form.class_dim:
        return None
    return _append(call, form, RowOp("flatten", (start, end)))


@rule("unsqueeze")
def unsqueeze(walk: Walk, call: Call, form: ClassMap) -> Outcome:
    dim = call.get("dim")
    dim = dim % (form.ndim + 1)
    if not form.class_last or dim > form.class_dim:
        return None
    return _append(call, form, RowOp("unsqueeze", (dim,)))


@rule("squeeze")
def squeeze(walk: Walk, call: Call, form: ClassMap) -> Outcome:
    dim, before = call.get("dim"), info(call.get("input"))
    if not isinstance(dim, int) or before is None or not form.class_last or dim % form.ndim == form.class_dim:
        return None
    return _append(call, form, RowOp("squeeze", (dim % form.ndim,)))


@rule("permute", "transpose", "t")
def permute(walk: Walk, call: Call, form: ClassMap) -> Outcome:
    """Split a permutation into one of the rows and a move of the class dimension."""
    order = list(range(form.ndim))
    if call.name == "permute":
        dims = call.get("dims")
        if len(dims) != form.ndim or any(not isinstance(d, int) for d in dims):
            return None
        order = [d % form.ndim for d in dims]
    elif call.name == "t":
        if form.ndim != 2:
            return None
        order.reverse()
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


@rule("getitem")
def getitem(walk: Walk, call: Call, form: ClassMap) -> Outcome:
    """Row slices and indices; the class dimension has to stay whole."""
    key = call.get("key")
    key = key if isinstance(key, tuple) else (key,)
    if not form.class_last or any(not _index(k) for k in key):
        return None
    if Ellipsis in key:
        at = key.index(Ellipsis)
        missing = form.ndim - (len(key) - 1)
        if missing < 0 or None in key or Ellipsis in key[at + 1 :]:
            return None
        key = (*key[:at], *[slice(None)] * missing, *key[at + 1 :])
    if None in key or len(key) > form.ndim:
        return None
    if len(key) == form.ndim:
        if key[-1] != slice(None):
            return None
        key = key[:-1]
    if all(k == slice(None) for k in key):
        return form
    return _append(call, form, RowOp("getitem", (tuple(key),), selects=True))


def _index(value: Any) -> bool:
    if isinstance(value, slice):
        return all(v is None or isinstance(v, int) or _size(v) for v in (value.start, value.stop, value.step))
    return value is Ellipsis or (isinstance(value, int) and not isinstance(value, bool))


@rule("slice")
def slice_dim(walk: Walk, call: Call, form: ClassMap) -> Outcome:
    dim = call.get("dim", 0) % form.ndim
    bounds = slice(call.get("start"), call.get("end"), call.get("step", 1))
    if not form.class_last or dim == form.class_dim or not _index(bounds):
        return None
    return _append(call, form, RowOp("getitem", ((*[slice(None)] * dim, bounds),), selects=True))


@rule("select")
def select(walk: Walk, call: Call, form: ClassMap) -> Outcome:
    dim, index = call.get("dim"), call.get("index")
    if not form.class_last or not isinstance(dim, int) or dim % form.ndim == form.class_dim or not _size(index):
        return None
    return _append(call, form, RowOp("getitem", ((*[slice(None)] * (dim % form.ndim), index),), selects=True))
