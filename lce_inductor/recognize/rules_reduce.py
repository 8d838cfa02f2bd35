"""Rules for what turns a row of logits into a few numbers.

logsumexp(z, -1)   softmax / log_softmax   gather(z, -1, index)   z[arange(N), index]   z.max(-1)   z.argmax(-1)
z.sum(-1)   exp(z - m).sum(-1)   (p * log_p).sum(-1)   (one_hot(y, V) * log_p).sum(-1)
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from torch.fx import Node

from ..graph.values import Info, info, same_shape
from ..ops.types import ARGMAX, LSE, MAX, NEG_ENTROPY, SUM, TARGET
from ..reasons import refuse
from .canon import Call, canonical
from .emit import Emitter
from .forms import ClassMap, OneHotProduct, Outcome, Product, Spread, Terminal, Want, rule

if TYPE_CHECKING:
    from .walk import Walk

_MAX_COLUMNS = 8


def over_classes(form: ClassMap, dim: Any) -> bool:
    """Is `dim` (a number or a list of one) the class dimension?"""
    if isinstance(dim, (tuple, list)):
        dim = dim[0] if len(dim) == 1 else None
    return isinstance(dim, int) and not isinstance(dim, bool) and dim % form.ndim == form.class_dim


@rule("log_softmax", "softmax")
def softmax(walk: Walk, call: Call, form: Any) -> Outcome:
    out = info(call.node)
    if not isinstance(form, ClassMap) or out is None or form.exp or form.coef != 1.0:
        return None
    if not over_classes(form, call.get("dim")):
        return refuse("class-dim", call.node)
    return cancel(form).with_(normalized=True, exp=call.name == "softmax", dtype=out.dtype)


def cancel(form: ClassMap) -> ClassMap:
    """form without its offsets, where what follows does not see them."""
    trained = (o.node for o in form.offset if not o.detached and (known := info(o.node)) and known.requires_grad)
    return form.with_(offset=(), cancelled=(*form.cancelled, *(n for n in trained if not _follows(n, form.head.node))))


def _follows(node: Node, head: Node) -> bool:
    """Is node computed from the logits, as their maximum is? What they get their gradient by, it need not repeat."""
    seen, stack = {node}, [node]
    while stack:
        for each in stack.pop().all_input_nodes:
            if each is head:
                return True
            if each not in seen:
                seen.add(each)
                stack.append(each)
    return False


def _terminal(call: Call, form: ClassMap, wants: list[Want], write: Any) -> Outcome:
    """A terminal of one result; `write(emitter)` gives its value row by row, class dimension of size 1 kept."""
    out = info(call.node)
    if out is None:
        return None
    if form.normalized:
        wants.append(Want(LSE))

    def emit(e: Emitter) -> Node:
        return e.finish(write(e), out.dtype)

    return Terminal(call.node, form, tuple(dict.fromkeys(wants)), emit)


def _shift(e: Emitter, form: ClassMap) -> Node | None:
    """What a form adds to every logit of a row, class dimension of size 1; None for nothing."""
    value = e.unary("neg", e.rows(e.stat(Want(LSE)))) if form.normalized else None
    for offset in form.offset:
        ref = e.unary("detach", e.ref(offset.node)) if offset.detached else e.ref(offset.node)
        ref = e.unary("log", ref) if offset.log else ref
        if value is None:
            value = ref if offset.sign > 0 else e.unary("neg", ref)
        else:
            value = e.plus(value, ref, offset.sign)
    return value


def _at(e: Emitter, form: ClassMap, stat: Node) -> Node:
    """The form's value where its edited logit is `stat` (class dimension of size 1)."""
    shift = _shift(e, form)
    value = stat if shift is None else e.plus(stat, shift)
    if form.exp:
        return e.unary("exp", value)
    return value if form.coef == 1.0 else e.times(value, form.coef)


@rule("logsumexp")
def logsumexp(walk: Walk, call: Call, form: Any) -> Outcome:
    if not isinstance(form, ClassMap) or form.exp or form.coef != 1.0:
        return None
    if not over_classes(form, call.get("dim")):
        return refuse("class-dim", call.node)
    keepdim = bool(call.get("keepdim", False))
    if form.plain and (form.detached or not walk.effects.grad_off(call.node)):
        walk.logsumexps[call.node] = form
    return _terminal(call, form, [Want(LSE)], lambda e: e.keep(_at(e, form, e.rows(e.stat(Want(LSE)))), keepdim))


@rule("max", "amax", "argmax")
def maximum(walk: Walk, call: Call, form: Any) -> Outcome:
    """The largest logit and where it is. A positive outer factor, an offset or an exp don't move it."""
    if not isinstance(form, ClassMap) or form.coef <= 0.0 or not over_classes(form, call.get("dim")):
        return None
    keepdim = bool(call.get("keepdim", False))

    def value(e: Emitter) -> Node:
        return e.keep(_at(e, form, e.rows(e.stat(Want(MAX)))), keepdim)

    def index(e: Emitter) -> Node:
        return e.own(e.keep(e.rows(e.stat(Want(ARGMAX))), keepdim))

    if call.name == "amax":
        return _terminal(call, form, [Want(MAX)], value)
    if call.name == "argmax":
        return Terminal(call.node, form, (Want(ARGMAX),), index)
    users = list(call.node.users)
    if any(item(u) not in (0, 1) for u in users):
        return None
    values = next((u for u in users if item(u) == 0), None)
    wants = [Want(ARGMAX)] if values is None else [Want(MAX), Want(ARGMAX)]
    if form.normalized and values is not None:
        wants.append(Want(LSE))
    known = info(values) if values is not None else None

    def both(e: Emitter) -> Any:
        found = None if known is None else e.finish(value(e), known.dtype)
        return (found, index(e))

    return Terminal(call.node, form, tuple(wants), both)


def item(user: Node) -> int | None:
    """Which result of `values, indices = z.max(-1)` a user takes."""
    call = canonical(user)
    if call is not None and call.name == "getitem" and call.get("key") in (0, 1):
        return int(call.get("key"))
    if call is not None and call.name == "attribute" and user.args[1] in ("values", "indices"):
        return ("values", "indices").index(str(user.args[1]))
    return None


@rule("sum")
def total(walk: Walk, call: Call, form: Any) -> Outcome:
    if isinstance(form, Product):
        return _expectation(call, form)
    if isinstance(form, OneHotProduct):
        return _picked_by_one_hot(call, form)
    if not isinstance(form, ClassMap) or not over_classes(form, call.get("dim")):
        return None
    keepdim = bool(call.get("keepdim", False))
    if form.exp:
        return _terminal(call, form, [Want(LSE)], lambda e: e.keep(_at(e, form, e.rows(e.stat(Want(LSE)))), keepdim))

    return _terminal(call, form, [Want(SUM)], lambda e: e.keep(_total(e, form), keepdim))


def _total(e: Emitter, form: ClassMap, weight: Node | None = None) -> Node:
    """The sum over classes, weighted if asked, of a form without exp."""
    value, shift = e.rows(e.stat(Want(SUM, weight))), _shift(e, form)
    if shift is not None:
        count = e.num_classes if weight is None else e.unary("sum", e.ref(weight))
        value = e.plus(value, e.times(shift, count))
    return value if form.coef == 1.0 else e.times(value, form.coef)


@rule("mean")
def mean(walk: Walk, call: Call, form: Any) -> Outcome:
    """The mean over classes; over everything it is not a row statistic."""
    if not isinstance(form, ClassMap) or form.exp or not over_classes(form, call.get("dim")):
        return None
    keepdim = bool(call.get("keepdim", False))

    def write(e: Emitter) -> Node:
        value = e.divided(e.rows(e.stat(Want(SUM))), e.num_classes)
        return e.keep(_at(e, form, value), keepdim)

    return _terminal(call, form, [Want(SUM)], write)


def _expectation(call: Call, form: Product) -> Outcome:
    """sum p * values: the expectation of (log-)logits, without offsets, under the row's softmax."""
    values = form.values
    if not over_classes(values, call.get("dim")):
        return None
    keepdim = bool(call.get("keepdim", False))

    def write(e: Emitter) -> Node:
        value = e.rows(e.stat(Want(NEG_ENTROPY)))
        if not values.normalized:
            value = e.plus(value, e.rows(e.stat(Want(LSE))))
        coef = form.coef * values.coef
        return e.keep(value if coef == 1.0 else e.times(value, coef), keepdim)

    both = dataclasses.replace(values, detached=values.detached and form.probs.detached)
    if values.detached != form.probs.detached:
        return None  # one of two gradients
    return _terminal(call, both, [Want(NEG_ENTROPY), Want(LSE)], write)


def _picked_by_one_hot(call: Call, form: OneHotProduct) -> Outcome:
    values = form.values
    if not over_classes(values, call.get("dim")):
        return None
    hot = form.hot
    if not values.exp and any(e.name in ("mask", "fill") and e.args[-1] == -math.inf for e in values.edits):
        return refuse("escape", call.node, "zero times what classes were masked with is NaN")
    keepdim = bool(call.get("keepdim", False))
    want = Want(TARGET, hot.index, None, hot.column)
    wants = [want] if hot.index is not None else []
    if hot.shift != 0.0:
        wants.append(Want(SUM, hot.weight))
    if not wants or (values.exp and hot.shift != 0.0):
        return None

    def write(e: Emitter) -> Node:
        value = None
        if hot.index is not None:
            value = e.times(_at(e, values, e.rows(e.stat(want))), form.coef * hot.coef)
        if hot.shift != 0.0:
            spread = e.times(_total(e, values, hot.weight), form.coef * hot.shift)
            value = spread if value is None else e.plus(value, spread)
        assert value is not None
        return e.keep(value, keepdim)

    return _terminal(call, values, wants, write)


@rule("gather", "take_along_dim")
def gather(walk: Walk, call: Call, form: Any) -> Outcome:
    """One or a few classes per row, by an index with a class dimension of that size."""
    index, dim, form = call.get("index"), call.get("dim"), walk.form(call.get("input"))
    spread = walk.form(index)
    if isinstance(spread, Spread) and spread.narrow:
        index = spread.index
    if not isinstance(form, ClassMap) or walk.form(index) is not None or call.get("sparse_grad"):
        return None
    known, like = info(index), info(call.get("input"))
    if known is None or like is None or not over_classes(form, dim) or len(known.shape) != form.ndim:
        return None
    columns = known.shape[form.class_dim]
    if not isinstance(columns, int) or not 0 < columns <= _MAX_COLUMNS:
        return None
    where = form.class_dim
    rows = [(*shape[:where], *shape[where + 1 :]) for shape in (known.shape, like.shape)]
    if not same_shape(*rows):
        return None
    return _pick(call, form, index, known, [Want(TARGET, index, None, (where, k)) for k in range(columns)])


def _pick(call: Call, form: ClassMap, index: Node, known: Info, wants: list[Want]) -> Outcome:
    def write(e: Emitter) -> Node:
        picked = [_at(e, form, e.rows(e.stat(w))) for w in wants]
        return picked[0] if len(picked) == 1 else e.cat(picked, form.class_dim)

    return _terminal(call, form, list(wants), write)


def index_rows(walk: Walk, call: Call, form: ClassMap, key: tuple[Any, ...]) -> Outcome:
    """z[arange(N), index]: one class per row of [N, V]."""
    if form.ndim != 2 or len(key) != 2 or not form.class_last or not all(isinstance(k, Node) for k in key):
        return None
    rows, index = key
    call_rows, known, like = canonical(rows), info(index), info(call.get("input"))
    if call_rows is None or call_rows.name != "arange" or known is None or like is None:
        return None
    arange, is_range = info(rows), _plain_range(call_rows)
    if arange is None or not is_range or not same_shape(arange.shape, like.shape[:1]):
        return None
    if known.dtype.is_floating_point or str(known.dtype) == "torch.bool" or not same_shape(known.shape, like.shape[:1]):
        return None
    want = Want(TARGET, index, None, (-1, -1))
    return _terminal(call, form, [want], lambda e: e.keep(_at(e, form, e.rows(e.stat(want))), False))


def _plain_range(call: Call) -> bool:
    """arange(n) or arange(0, n): without another start or step."""
    args = list(call.node.args)
    return len(args) == 1 or (len(args) == 2 and bool(args[0] == 0))
