"""In-place spellings whose meaning is certain: all of the logits change, and every name for them sees it.

logits.div_(t)   logits.mul_(c)   logits += bias   logits[..., V:] = -inf   logits.masked_fill_(mask, -inf)
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from ..graph.values import info
from ..reasons import Refusal
from .canon import Call, canonical
from .edits import fold, hides
from .forms import RULES, ClassMap, Edit, OneHot
from .rules_shape import class_range, full_key

if TYPE_CHECKING:
    from .walk import Walk

_OUT_OF_PLACE = {
    "div_": "div", "mul_": "mul", "add_": "add", "sub_": "sub", "neg_": "neg", "tanh_": "tanh",
    "sigmoid_": "sigmoid", "masked_fill_": "masked_fill", "true_divide_": "div", "divide_": "div", "multiply_": "mul",
    "iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div",
}  # fmt: skip


def in_place(walk: Walk, node: Node, target: Node, aliases: list[Node]) -> dict[Node, ClassMap | OneHot] | None:
    """New forms of `target` and of every other name for its memory after an in-place node; None if uncertain.

    Certain means: each alias has the same rows (views among them do not matter) and the same edits, so the
    change reaches them all alike.
    """
    form = walk.form(target)
    call = canonical(node)
    if isinstance(form, OneHot) and call is not None and aliases == [target]:
        plain = call._replace(name=call.name.rstrip("_"))
        outcome = RULES[plain.name](walk, plain, form) if plain.name in ("scatter", "mul", "add", "sub") else None
        return {target: outcome} if isinstance(outcome, OneHot) else None
    if not isinstance(form, ClassMap) or call is None:
        return None
    forms = [walk.form(a) for a in aliases]
    if any(not isinstance(f, ClassMap) or _memory(f) != _memory(form) for f in forms):
        return None
    changed = _after(walk, call, form)
    if changed is None or fold(changed.edits) is None:
        return None
    return {a: f.with_(edits=changed.edits) for a, f in zip(aliases, forms) if isinstance(f, ClassMap)}


def _memory(form: ClassMap) -> Any:
    selecting = tuple(op for op in form.rows if op.selects)
    return (form.head, selecting, form.edits, form.plain, form.detached, form.dtype)


def _after(walk: Walk, call: Call, form: ClassMap) -> ClassMap | None:
    if call.node.target in (operator.setitem,) or call.name == "__setitem__":
        return _set_classes(call, form)
    name = _OUT_OF_PLACE.get(call.name)
    if name is None or walk.form(call.get("input")) is not form or call.node.kwargs.get("out") is not None:
        return None
    # The rule of the out-of-place operation says what happens to the logits.
    outcome = RULES[name](walk, call._replace(name=name), form)
    return outcome if isinstance(outcome, ClassMap) and not isinstance(outcome, Refusal) and outcome.plain else None


def _set_classes(call: Call, form: ClassMap) -> ClassMap | None:
    """logits[..., a:b] = -inf for all rows, or logits[..., mask]."""
    if len(call.node.args) != 3 or not hides(call.node.args[2]) or not form.class_last:
        return None
    key, value = call.node.args[1:]
    full = full_key(key if isinstance(key, tuple) else (key,), form.ndim)
    if full is None or len(full) != form.ndim or any(k != slice(None) for k in full[:-1]):
        return None
    mask = info(full[-1])
    if mask is not None and mask.dtype == torch.bool and len(mask.shape) == 1:
        return form.with_(edits=(*form.edits, Edit("mask", (full[-1], value))))
    kept = class_range(form, full[-1])
    if kept is None:
        return None
    return form.with_(edits=(*form.edits, Edit("fill", (*kept, value))))
