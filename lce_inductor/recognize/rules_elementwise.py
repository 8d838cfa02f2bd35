"""Rules for arithmetic on the logits.

logits * c   logits / t   logits + bias   30 * tanh(logits / 30)   logits - row   exp(...)   -log_probs
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from ..graph.values import info, same
from ..reasons import refuse
from .canon import Call, canonical
from .edits import fold, hides, number
from .forms import ClassMap, Edit, Head, Offset, OneHot, OneHotProduct, Outcome, Product, Squared, rule
from .rules_head import DTYPES

if TYPE_CHECKING:
    from .walk import Walk


def edited(form: ClassMap, edit: Edit, call: Call) -> ClassMap | None:
    """form after one more edit of its logits, if that can be computed."""
    out = info(call.node)
    if not form.plain or out is None or out.dtype not in DTYPES:
        return None
    edits = (*form.edits, edit)
    return None if fold(edits) is None else form.with_(edits=edits, dtype=out.dtype)


def scaled(form: ClassMap, factor: float, call: Call) -> ClassMap | None:
    """form times a number: an edit of plain logits, an outer factor of everything else."""
    out = info(call.node)
    if form.exp or out is None or out.dtype not in DTYPES or factor == 0.0:
        return None
    if form.plain:
        return edited(form, Edit("mul", (factor,)), call)
    return form.with_(coef=form.coef * factor, dtype=out.dtype)


def _extent(form: ClassMap, other: Node) -> str:
    """How a tensor varies against the logits: "number" (0-dim), "class", "row", "all", or "" for anything else."""
    known, like = info(other), info(form.head.node)
    if known is None or like is None or not known.plain:
        return ""
    if all(isinstance(s, int) and s == 1 for s in known.shape):
        return "number"
    class_dim = form.class_dim - form.ndim  # counted from the end, as broadcasting does
    if len(known.shape) > form.ndim:
        return ""
    sizes = [(i - len(known.shape), s) for i, s in enumerate(known.shape)]
    wide = [i for i, s in sizes if not (isinstance(s, int) and s == 1)]
    if wide == [class_dim]:
        return "class"
    if class_dim not in wide:
        return "row"
    return "all"


@rule("mul")
def mul(walk: Walk, call: Call, form: Any) -> Outcome:
    left, right = call.get("input"), call.get("other")
    a, b = walk.form(left), walk.form(right)
    if a is not None and b is not None:
        return _product(call, a, b)
    form, other = (a, right) if a is not None else (b, left)
    c, out, known = number(other), info(call.node), info(other)
    if isinstance(form, (Product, OneHotProduct)):
        return None if c is None or out is None else dataclasses.replace(form, coef=form.coef * c, dtype=out.dtype)
    if isinstance(form, OneHot):
        return None if c is None else dataclasses.replace(form, coef=form.coef * c, shift=form.shift * c)
    if not isinstance(form, ClassMap):
        return None
    if c is not None:
        return scaled(form, c, call)
    if not isinstance(other, Node):
        return None
    hot = one_hot(other, form)
    if hot is not None and out is not None:
        return OneHotProduct(form, hot, 1.0, out.dtype)
    extent = _extent(form, other)
    if extent == "all" and _floating(other):
        return refuse("soft-targets", call.node)
    if extent == "class" and not form.plain and out is not None:
        constant = known is not None and not known.requires_grad
        return OneHotProduct(form, OneHot(form, shift=1.0, weight=other), 1.0, out.dtype) if constant else None
    name = {"number": "scale", "class": "class_scale"}.get(extent)
    return edited(form, Edit(name, (other,)), call) if name and _floating(other) else None


def _floating(node: Node) -> bool:
    known = info(node)
    return known is not None and known.dtype.is_floating_point


def _product(call: Call, a: Any, b: Any) -> Outcome:
    out = info(call.node)
    if out is None:
        return None
    if isinstance(b, Squared):
        a, b = b, a
    if isinstance(a, Squared) and isinstance(b, ClassMap):
        return _rsqrt_cap(call, a, b)
    if isinstance(b, OneHot):
        a, b = b, a
    if isinstance(a, OneHot) and isinstance(b, ClassMap) and a.like.rows == b.rows and a.head is b.head:
        return OneHotProduct(b, a, 1.0, out.dtype)
    if not isinstance(a, ClassMap) or not isinstance(b, ClassMap):
        return None
    if a.head is not b.head:
        return refuse("two-heads", call.node)
    if a is b and a.plain:
        return Squared(a)
    if a.source != b.source or a.offset or b.offset or a.class_dim != b.class_dim:
        return None
    if a.exp and a.normalized and not b.exp:
        return Product(a, b, 1.0, out.dtype)
    if b.exp and b.normalized and not a.exp:
        return Product(b, a, 1.0, out.dtype)
    return None


def _rsqrt_cap(call: Call, squared: Squared, value: ClassMap) -> Outcome:
    """a*z * rsqrt(z*z + k), z the logits and a*z a scaled copy of them."""
    base = squared.base
    if not squared.rsqrt or value.head is not base.head or value.rows != base.rows or not value.plain:
        return None
    extra = value.edits[len(base.edits) :]
    if value.edits[: len(base.edits)] != base.edits or len(extra) > 1 or (extra and extra[0].name != "mul"):
        return None
    amplitude = extra[0].args[0] if extra else 1.0
    return edited(base, Edit("rsqrt_cap", (amplitude, squared.shift)), call)


@rule("div")
def div(walk: Walk, call: Call, form: Any) -> Outcome:
    value, other = walk.form(call.get("input")), call.get("other")
    if not isinstance(value, ClassMap) or walk.form(other) is not None or call.get("rounding_mode") is not None:
        return None
    c, out = number(other), info(call.node)
    if value.exp and isinstance(other, Node) and out is not None and _extent(value, other) == "row":
        shifted = _shifted(value, -1, other, True, call)
        return shifted
    if c is not None and c != 0.0:
        return edited(value, Edit("div", (c,)), call) if value.plain else scaled(value, 1.0 / c, call)
    if isinstance(other, Node) and _extent(value, other) == "number" and _floating(other):
        return edited(value, Edit("inverse_scale", (other,)), call)
    return None


@rule("add", "sub", "rsub")
def add(walk: Walk, call: Call, form: Any) -> Outcome:
    left, right = call.get("input"), call.get("other")
    if call.get("alpha", 1) != 1:
        return None
    sign = 1 if call.name == "add" else -1
    if call.name == "rsub":
        left, right = right, left
    a, b = walk.form(left), walk.form(right)
    if a is not None and b is not None:
        if a.head is not b.head:
            return refuse("lora" if _adapter(a.head, b.head) else "two-heads", call.node)
        return refuse("margin" if isinstance(a, OneHot) or isinstance(b, OneHot) else "escape", call.node)
    form, other = (a, right) if a is not None else (b, left)
    c = number(other)
    if isinstance(form, Squared):
        return Squared(form.base, form.shift + c) if c is not None and sign > 0 and not form.rsqrt else None
    if isinstance(form, OneHot):
        return None if c is None or a is None else dataclasses.replace(form, shift=form.shift + sign * c)
    if not isinstance(form, ClassMap) or (sign < 0 and a is None):
        return None  # c - logits: nobody writes it
    if c is not None:
        return edited(form, Edit("add", (sign * c,)), call)
    extent = _extent(form, other) if isinstance(other, Node) else ""
    if extent == "class" and _floating(other):
        return edited(form, Edit("bias", (other,) if sign > 0 else (other, -1)), call)
    if extent == "row" and not form.exp and form.coef == 1.0:
        shifted, lse_of = _shifted(form, sign, other, False, call), walk.logsumexps.get(other)
        if shifted is not None and lse_of is not None and form.plain and sign < 0 and _alike(form, lse_of):
            return form.with_(normalized=True, dtype=shifted.dtype)  # as log_softmax, which rounds once
        return shifted
    if extent == "all":
        return refuse(_full_addend(other), call.node)
    return None


def _alike(a: ClassMap, b: ClassMap) -> bool:
    """The same logits, with or without their gradient both."""
    return a.source == b.source and a.class_dim == b.class_dim and a.detached == b.detached


def _adapter(a: Head, b: Head) -> bool:
    """Is one of two linears that are added the second half of a low-rank product?"""
    inner = [known.shape[-1] for h in (a, b) if (known := info(h.x)) is not None]
    return len(inner) == 2 and all(isinstance(s, int) for s in inner) and 2 * min(inner) <= max(inner)


def _shifted(form: ClassMap, sign: int, other: Node, log: bool, call: Call) -> ClassMap | None:
    """form with a number per row added (or, under an exp, its rows divided by one)."""
    known, out = info(other), info(call.node)
    if known is None or out is None or not known.dtype.is_floating_point or len(known.shape) != form.ndim:
        return None
    if known.shape[form.class_dim] != 1 or not same(out.shape[form.class_dim], num_classes(form)):
        return None
    return form.with_(offset=(*form.offset, Offset(sign, other, log)), dtype=out.dtype)


def _full_addend(node: Any) -> str:
    """A full-sized addend: an adapter's product, a margin at the targets, or something else."""
    seen = 0
    while isinstance(node, Node) and seen < 6:
        call = canonical(node)
        if call is None:
            break
        if call.name in ("linear", "matmul", "einsum", "addmm"):
            return "lora"
        if call.name.rstrip("_") in ("one_hot", "scatter", "scatter_add"):
            return "margin"
        node, seen = next((a for a in (call.get("input"), call.get("other")) if isinstance(a, Node)), None), seen + 1
    return "escape"


def num_classes(form: ClassMap) -> Any:
    """Number of classes that a form still has."""
    folded = fold(form.edits)
    return form.head.num_classes if folded is None or folded.classes is None else folded.classes


@rule("neg")
def neg(walk: Walk, call: Call, form: Any) -> Outcome:
    if isinstance(form, (Product, OneHotProduct)):
        return dataclasses.replace(form, coef=-form.coef)
    return scaled(form, -1.0, call) if isinstance(form, ClassMap) else None


@rule("tanh", "sigmoid")
def nonlinear(walk: Walk, call: Call, form: Any) -> Outcome:
    return edited(form, Edit(call.name), call) if isinstance(form, ClassMap) else None


@rule("square", "pow")
def square(walk: Walk, call: Call, form: Any) -> Outcome:
    exponent = call.get("exponent", 2)
    return Squared(form) if isinstance(form, ClassMap) and form.plain and exponent == 2 else None


@rule("rsqrt")
def rsqrt(walk: Walk, call: Call, form: Any) -> Outcome:
    return Squared(form.base, form.shift, True) if isinstance(form, Squared) and not form.rsqrt else None


@rule("exp")
def exp(walk: Walk, call: Call, form: Any) -> Outcome:
    out = info(call.node)
    if not isinstance(form, ClassMap) or form.exp or form.coef != 1.0 or out is None:
        return None
    return form.with_(exp=True, dtype=out.dtype)


@rule("log")
def log(walk: Walk, call: Call, form: Any) -> Outcome:
    out = info(call.node)
    return form.with_(exp=False, dtype=out.dtype) if isinstance(form, ClassMap) and form.exp and out else None


@rule("masked_fill")
def masked_fill(walk: Walk, call: Call, form: Any) -> Outcome:
    """Classes masked; a mask that differs by row is no business of a head."""
    mask, value = call.get("mask"), call.get("value")
    if not isinstance(form, ClassMap) or not hides(value) or not isinstance(mask, Node):
        return None
    return edited(form, Edit("mask", (mask, float(value))), call) if _extent(form, mask) == "class" else None


def one_hot(node: Node, form: ClassMap) -> OneHot | None:
    """Soft targets made outside of the head: `one_hot(index, V) * a + b`, cast or not."""
    call, coef, shift = canonical(node), 1.0, 0.0
    while call is not None and call.name in ("cast", "mul", "add"):
        c = 1.0 if call.name == "cast" else number(call.get("other"))
        if c is None or not isinstance(call.get("input"), Node):
            return None
        if call.name == "add":
            shift += coef * c
        else:
            coef *= c
        call = canonical(call.get("input"))
    if call is None or call.name != "one_hot":
        return None
    index, out = call.get("input"), info(node)
    if info(index) is None or out is None or len(out.shape) != form.ndim or not form.class_last:
        return None
    return OneHot(form, index, None, coef, shift) if same(out.shape[-1], num_classes(form)) else None


@rule("zeros_like", "ones_like", "full_like")
def constant_like(walk: Walk, call: Call, form: Any) -> Outcome:
    """A constant of the logits' shape: only a base for soft targets, gone with them."""
    value = {"zeros_like": 0.0, "ones_like": 1.0}.get(call.name, number((call.get("rest") or (None,))[0]))
    value = number(call.get("fill_value")) if value is None else value
    return OneHot(form, shift=value) if isinstance(form, ClassMap) and value is not None else None


@rule("scatter")
def scatter(walk: Walk, call: Call, form: Any) -> Outcome:
    """`constant.scatter(-1, index[..., None], a)`; into logits it is a margin."""
    if isinstance(form, ClassMap):
        return refuse("margin", call.node)
    index, value, known = call.get("index"), number(call.get("src", call.get("value"))), info(call.get("index"))
    if not isinstance(form, OneHot) or form.index is not None or value is None or known is None:
        return None
    like, dim = form.like, call.get("dim")
    if not isinstance(dim, int) or dim % like.ndim != like.class_dim or len(known.shape) != like.ndim:
        return None
    if known.shape[like.class_dim] != 1:
        return None
    return OneHot(like, index, (like.class_dim, 0), value - form.shift, form.shift)


@rule("kl_div")
def kl_div(walk: Walk, call: Call, form: Any) -> Outcome:
    """A divergence from another head's distribution, or from probabilities that came from outside."""
    heads = {f.head for a in call.node.all_input_nodes if (f := walk.form(a)) is not None}
    return refuse("two-heads" if len(heads) > 1 else "soft-targets", call.node)


@rule("clamp", "clip", "arccos", "acos")
def margin(walk: Walk, call: Call, form: Any) -> Outcome:
    """Cosines are clamped on their way to a margin; a clamp at the lowest number does nothing to finite logits."""
    head = form.head
    if call.name == "clamp" and isinstance(form, ClassMap) and call.get("max") is None:
        finite = head.bias is None and not any(e.name in ("bias", "mask", "fill") for e in form.edits)
        lowest = number(call.get("min"))
        if finite and lowest is not None and lowest <= torch.finfo(form.dtype).min:
            return form
    normalized = [canonical(ref) for ref in (head.x, head.weight) if isinstance(ref, Node)]
    cosine = all(c is not None and c.name == "normalize" for c in normalized) and normalized
    return refuse("margin" if cosine else "escape", call.node)
