"""Where a form starts: the products that may be heads.

linear(x, W, b)   x @ W.T   matmul / mm / addmm(b, x, W.T)   einsum("bth,vh->btv", x, W)   bmm(x[None], W.T[None])
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch.fx import Node

from ..graph.values import Info, info, same, same_shape
from ..reasons import Refusal, refuse
from .canon import Attr, Call, canonical, tensor_attr
from .forms import ClassMap, Head, Ref

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def head_of(call: Call) -> tuple[Head, ClassMap | None, Refusal | None] | None:
    """A product that may be a head, the form of its result, and what is wrong with it; None for anything else."""
    found = {"linear": _linear, "matmul": _matmul, "addmm": _addmm, "einsum": _einsum}.get(call.name)
    if found is None:
        return None
    node, out = call.node, info(call.node)
    if out is None:
        if call.name != "linear" or not isinstance(call.get("input"), Node):
            return None
        bare = Head(node, call.get("input"), call.get("weight"), False, None, torch.float32, 0)
        return bare, None, refuse("no-shapes", node)
    if len(out.shape) < 1 or not out.dtype.is_floating_point:
        return None
    parts = found(call, out)
    if parts is None:
        return None
    x, weight, transposed, bias = parts
    weight, transposed = _peel_transpose(weight, transposed)
    class_dim = _class_dim(call, len(out.shape))
    head = Head(node, x, weight, transposed, bias, out.dtype, out.shape[class_dim])
    refusal = None
    if not out.plain or not all(_plain(node, ref) for ref in (x, weight, bias) if ref is not None):
        refusal = refuse("layout", node)
    elif out.dtype not in DTYPES:
        refusal = refuse("dtype", node, str(out.dtype))
    return head, ClassMap(head, (), class_dim, len(out.shape), out.dtype), refusal


_Parts = tuple[Ref, Ref, bool, "Ref | None"]


def ref_info(node: Node, ref: Ref) -> Info | None:
    """info() for a node or a module's parameter."""
    if isinstance(ref, Attr):
        value = tensor_attr(node.graph, ref)
        return None if value is None else Info(tuple(value.shape), value.dtype, None, value.requires_grad, True)
    return info(ref)


def _plain(node: Node, ref: Ref) -> bool:
    known = ref_info(node, ref)
    return known is not None and known.plain


def _is_ref(value: Any) -> bool:
    return isinstance(value, (Node, Attr))


def _linear(call: Call, out: Info) -> _Parts | None:
    x, weight, bias = call.get("input"), call.get("weight"), call.get("bias")
    known = ref_info(call.node, weight) if _is_ref(weight) else None
    if not isinstance(x, Node) or known is None or len(known.shape) != 2 or not (bias is None or _is_ref(bias)):
        return None
    return x, weight, False, bias


def _matmul(call: Call, out: Info) -> _Parts | None:
    x, weight = call.get("input"), call.get("other")
    a, b = info(x), info(weight)
    if call.get("out") is not None or a is None or b is None or len(a.shape) < 2:
        return None
    if len(b.shape) == 2:
        return x, weight, True, None
    flat = _one_matrix(weight) if len(a.shape) == len(b.shape) == 3 and same(a.shape[0], 1) else None
    return None if flat is None else (x, flat[0], flat[1], None)


def _one_matrix(weight: Node) -> tuple[Node, bool] | None:
    """The matrix behind a batch of one, [1, H, V], and whether it is [H, V]: what einsum makes of its operands."""
    traced = _dims(weight)
    if traced is None or traced[1] not in ([None, 0, 1], [None, 1, 0]):
        return None
    return traced[0], traced[1] == [None, 0, 1]


def _dims(node: Any) -> tuple[Node, list[int | None]] | None:
    """A matrix and which of its dimensions each of the node's own is; None for those of size one put around them."""
    known, call = info(node), canonical(node) if isinstance(node, Node) else None
    if known is None:
        return None
    if len(known.shape) == 2:
        return node, [0, 1]
    inner = _dims(call.get("input")) if call is not None else None
    if call is None or inner is None:
        return None
    base, dims = inner
    if call.name == "unsqueeze":
        at = call.get("dim") % len(known.shape)
        return base, [*dims[:at], None, *dims[at:]]
    if call.name == "permute":
        return base, [dims[d] for d in call.get("dims")]
    if call.name == "reshape" and all(isinstance(s, int) for s in known.shape):
        rest = [d for d in dims if d is not None]
        wide = [s for s in known.shape if s != 1]
        matrix = info(base)
        if matrix is not None and len(wide) == 2 and all(same(matrix.shape[d], s) for d, s in zip(rest, wide)):
            return base, [None if s == 1 else rest.pop(0) for s in known.shape]
    return None


def _addmm(call: Call, out: Info) -> _Parts | None:
    bias, x, weight = call.get("bias"), call.get("input"), call.get("other")
    known = info(bias)
    if call.get("beta", 1) != 1 or call.get("alpha", 1) != 1 or call.get("out") is not None or known is None:
        return None
    if info(x) is None or info(weight) is None or not same_shape(known.shape, out.shape[-1:]):
        return None
    return x, weight, True, bias


def _einsum(call: Call, out: Info) -> _Parts | None:
    """'bth,vh->btv' and '...h,hv->...v': rows in order, hidden last in x, classes anywhere in the result."""
    operands = call.get("operands", ())
    equation = re.sub(r"\s", "", call.get("equation") or "").replace("...", ".")
    match = re.fullmatch(r"([a-zA-Z.]+),([a-zA-Z]{2})->([a-zA-Z.]+)", equation)
    if match is None or len(operands) != 2 or info(operands[1]) is None:
        return None
    first, second, result = match.groups()
    hidden = first[-1]
    classes = second.replace(hidden, "", 1)
    if hidden == "." or hidden not in second or len(set(first)) != len(first) or classes in first:
        return None
    if result.replace(classes, "", 1) != first[:-1] or result.count(classes) != 1:
        return None
    return operands[0], operands[1], second[0] == hidden, None


def _class_dim(call: Call, ndim: int) -> int:
    """Where the classes are in the result; last for everything but an einsum that says otherwise."""
    if call.name != "einsum":
        return ndim - 1
    left, result = re.sub(r"\s", "", call.get("equation")).replace("...", ".").split("->")
    classes = next(c for c in left.split(",")[1] if c in result)
    after = result[result.index(classes) + 1 :]
    # What stands for "..." is before the classes or after them; the rest counts one each.
    if "." in after:
        return result.index(classes)
    return ndim - 1 - len(after)


def _peel_transpose(weight: Ref, transposed: bool) -> tuple[Ref, bool]:
    """Use the [V, H] parameter itself where the graph only transposes it for the product."""
    call = canonical(weight) if isinstance(weight, Node) else None
    if not transposed or call is None:
        return weight, transposed
    base = call.get("input")
    known = info(base)
    if known is None or len(known.shape) != 2:
        return weight, transposed
    dims = {d % 2 for d in (call.get("dim0"), call.get("dim1")) if isinstance(d, int)}
    swapped = (
        call.name in ("t", "mT")
        or (call.name == "transpose" and dims == {0, 1})
        or (call.name == "permute" and [d % 2 for d in call.get("dims", ()) if isinstance(d, int)] == [1, 0])
    )
    return (base, False) if swapped else (weight, transposed)
