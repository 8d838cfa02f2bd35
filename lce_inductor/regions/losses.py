"""Losses, found by what they do: a softmax over classes whose logarithm is taken, or of which classes are picked.

What a head is, is decided by what reads it. A softmax that another product reads is attention or routing, and a wide
product that nothing of this kind reads is a layer, an adapter or a projection, however wide.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from ..graph.values import numel_hint, size_hint
from .aten_ops import bound
from .heads import factors, is_product
from .labels import PRODUCTS
from .tags import is_one

aten = torch.ops.aten
prims = torch.ops.prims

_WHOLE = (aten._log_softmax.default, aten._softmax.default, aten._safe_softmax.default, aten.logsumexp.default)
_LOGARITHMS = (aten.log.default, aten.log2.default, aten.log1p.default, aten.log10.default)
_PICKS = (aten.gather.default, aten.index.Tensor, aten.nll_loss_forward.default, aten.nll_loss2d_forward.default)
_CASTS = (
    prims.convert_element_type.default,
    aten._to_copy.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
)
_VIEWS = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.permute.default, aten.transpose.int,
    aten.t.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.unsqueeze.default,
    aten.slice.Tensor, aten.index.Tensor, aten.index_select.default, aten.select.int, aten.constant_pad_nd.default,
)  # fmt: skip
# What an epilogue of logits is made of, beside a bias and numbers: a temperature, a softcap.
_EPILOGUE = (
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar,
    aten.tanh.default,
)  # fmt: skip
_NORMS = (
    aten.mean.dim, aten.var_mean.correction, aten.var.correction, aten.rsqrt.default, aten.sqrt.default,
    operator.getitem,
    aten.pow.Tensor_Scalar, aten.sum.dim_IntList, aten.reciprocal.default, *_EPILOGUE[:-1],
)  # fmt: skip
# A returned product is told of as logits where there are so many classes for each hidden value.
_CLASSES_PER_HIDDEN, _MANY_CLASSES = 5, 32000


class Loss(NamedTuple):
    """node: the softmax; logits: what it is of, over `classes`; origins: what made them, products or else."""

    node: Node
    logits: Node
    classes: Any
    origins: tuple[Node, ...]


def losses(graph: Graph, on_tangent: set[Node]) -> list[Loss]:
    """The losses of a graph's forward, in order."""
    found = []
    for node in graph.nodes:
        if node.op != "call_function" or node in on_tangent:
            continue
        read = _softmax_of(node, on_tangent)
        if read is not None and not is_one(read[1]) and _is_loss(node, read[0], on_tangent):
            found.append(Loss(node, *read, origins(read[0])))
    return found


def _value(node: Any) -> Any:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value if isinstance(value, torch.Tensor) else None


def _numel(node: Node) -> int:
    value = _value(node)
    return 0 if value is None else numel_hint(value.shape)


def _softmax_of(node: Node, on_tangent: set[Node]) -> tuple[Node, Any] | None:
    """The logits and the number of classes, if this is where a softmax begins: one operation, or exp(z - max) that is
    summed over a dimension."""
    logits: Any
    if node.target in _WHOLE:
        a = bound(node)
        logits, dims = a["self"], a["dim"]
    elif node.target in (aten.exp.default, aten.exp2.default):
        total = _summed(node, on_tangent)
        if total is None or _divides_others(node, total, on_tangent):
            return None
        logits, dims = node.args[0], total.args[1]
        while isinstance(logits, Node) and logits.target in (*_CASTS, aten.mul.Scalar):
            logits = logits.args[0]
        if isinstance(logits, Node) and logits.target is aten.sub.Tensor and _numel(logits.args[1]) < _numel(logits):  # type: ignore[arg-type]
            logits = logits.args[0]  # the largest is taken off
    else:
        return None
    value = _value(logits)
    dims = dims if isinstance(dims, (list, tuple)) else [dims]
    if value is None or value.dim() < 1 or len(dims) != 1:
        return None
    return logits, value.shape[dims[0]]


def _summed(node: Node, on_tangent: set[Node]) -> Node | None:
    """The sum over one dimension of these values, perhaps cast or masked before."""
    todo, seen = [node], {node}
    while todo:
        for user in todo.pop().users:
            if user in seen or user in on_tangent:
                continue
            seen.add(user)
            if user.target is aten.sum.dim_IntList and len(user.args[1]) == 1:  # type: ignore[arg-type]
                return user
            if user.target in (*_CASTS, aten.where.self, aten.mul.Tensor) and _numel(user) == _numel(node):
                todo.append(user)
    return None


def _divides_others(node: Node, total: Node, on_tangent: set[Node]) -> bool:
    """Is a sum of exponentials read by nothing but quotients of other values, as a temperature is?"""
    todo, mine, others = [total], {node, *_behind(node, on_tangent)}, False
    for value in todo:
        for user in (u for u in value.users if u not in on_tangent):
            if user.target in (*_CASTS, *_VIEWS, aten.expand.default):
                todo.append(user)
            elif user.target is aten.div.Tensor and user.args[1] is value and user.args[0] not in mine:
                others = True
            else:
                return False
    return others


def _is_loss(node: Node, logits: Node, on_tangent: set[Node]) -> bool:
    follows = _behind(node, on_tangent)
    picked = any(n.target in _PICKS and not _chosen_by(n, logits, on_tangent) for n in follows)
    if picked:
        return True
    logged = node.target in (aten._log_softmax.default, aten.logsumexp.default) or any(
        n.target in _LOGARITHMS for n in follows
    )
    return logged and not any(is_product(n) for n in _behind(logits, on_tangent))


def _behind(node: Node, on_tangent: set[Node]) -> set[Node]:
    """What the forward makes of a value, up to the next products."""
    found: set[Node] = set()
    todo = [node]
    while todo:
        for user in todo.pop().users:
            if user in found or user in on_tangent:
                continue
            found.add(user)
            if not is_product(user):
                todo.append(user)
    return found


def _chosen_by(pick: Node, logits: Node, on_tangent: set[Node]) -> bool:
    """Does the index follow from the logits themselves, as a router's experts do? A loss's labels come from outside."""
    index = pick.args[2] if pick.target is aten.gather.default else pick.args[1]
    indices = [i for i in (index if isinstance(index, (list, tuple)) else [index]) if isinstance(i, Node)]
    known = _behind(logits, on_tangent)
    return (pick.target is aten.index.Tensor and len(indices) < 2) or any(i in known for i in indices)


def origins(logits: Node) -> tuple[Node, ...]:
    """What made these values: products, inputs of the graph, or operations that make them of something smaller."""
    found: dict[Node, None] = {}
    todo, seen = [logits], {logits}
    while todo:
        node = todo.pop()
        if (
            node.op != "call_function"
            or is_product(node)
            or is_product_by_shape(node)
            or node.target is aten.embedding.default
        ):
            found[node] = None
            continue
        pieces = node.target in (aten.cat.default, aten.stack.default, operator.getitem)
        parents = [a for a in node.all_input_nodes if _is_float(a) and (pieces or 2 * _numel(a) >= _numel(node))]
        if node.target in (*_VIEWS, *_CASTS) and isinstance(node.args[0], Node):
            parents = [node.args[0]]  # also of a number of rows that nobody knows
        if not parents:
            found[node] = None
        for parent in parents:
            if parent not in seen:
                seen.add(parent)
                todo.append(parent)
    return tuple(found)


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    value = value[0] if isinstance(value, (tuple, list)) and value else value
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point


def is_product_by_shape(node: Node) -> bool:
    """An operation of somebody else's that sums over a size of two inputs and keeps another of each: a product."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace in ("aten", "prims"):
        return False
    out = _value(node)
    shapes = [_sizes(a) for a in node.all_input_nodes if _value(a) is not None]
    if out is None or out.dim() < 2:
        return False
    result = _sizes(node)
    for i, a in enumerate(shapes):
        for b in shapes[i + 1 :]:
            for x, w in ((a, b), (b, a)):
                inner = (set(x) & set(w)) - set(result)
                if inner and result[-1] in w and result[-1] not in x:
                    return True
    return False


def _sizes(node: Node) -> tuple[int, ...]:
    value = _value(node)
    return () if value is None else tuple(map(size_hint, value.shape))


# -- what a loss outside could read


def looks_like_logits(node: Node, on_tangent: set[Node]) -> bool:
    """Is this product returned as logits are: wide, itself or with a bias, a temperature or a softcap, no sum of
    layers, and not the second of two products that make a narrow one?"""
    hidden, classes = size_hint(_value(factors(node)[0]).shape[-1]), size_hint(_value(node).shape[-1])
    if classes < _MANY_CLASSES and classes <= _CLASSES_PER_HIDDEN * hidden:
        return False
    return _is_returned(node, on_tangent) and not _is_low_rank(node, hidden)


def _is_returned(node: Node, on_tangent: set[Node]) -> bool:
    todo, seen = [node], {node}
    while todo:
        now = todo.pop()
        for user in now.users:
            if user.op == "output":
                return True
            if user in seen or user in on_tangent:
                continue
            seen.add(user)
            others = [a for a in user.all_input_nodes if a is not now and 2 * _numel(a) > _numel(now) and _is_float(a)]
            if user.target in (*_CASTS, *_VIEWS) or (user.target in _EPILOGUE and not others):
                todo.append(user)
    return False


def _is_low_rank(node: Node, hidden: int) -> bool:
    """Is the input a product of more values, with no layer's activation and nothing else added in between?"""
    now: Any = factors(node)[0]
    while isinstance(now, Node) and not is_product(now):
        if now.target not in (*_CASTS, *_VIEWS, *_NORMS):
            return False
        large = [a for a in now.all_input_nodes if _is_float(a) and 2 * _numel(a) >= _numel(now)]
        made = {o for a in large for o in origins(a)}
        if len(made) != 1:
            return False
        now = made.pop()
    if not isinstance(now, Node) or now.target not in PRODUCTS:
        return False
    return size_hint(_value(factors(now)[0]).shape[-1]) > hidden


# -- what else is told of a product


def products_of_gradient(node: Node, on_tangent: set[Node]) -> list[Node]:
    """Products of the backward that read the head's weight or input, for a result with as many classes or rows: their
    other factor is the gradient of the logits."""
    (x, weight), shape, found = factors(node), _sizes(node), []
    for operand, other in ((x, shape[-1]), (weight, shape[-2])):
        todo, seen = [operand], {operand}
        while todo:
            for user in todo.pop().users:
                if user in seen:
                    continue
                seen.add(user)
                if user in on_tangent and is_product(user) and other in _sizes(user):
                    found.append(user)
                elif user.target in (*_VIEWS, *_CASTS) and not is_product(user):
                    todo.append(user)
    return found


def read_by_products(node: Node, on_tangent: set[Node]) -> Node | None:
    """A product of the forward that reads what follows from this one."""
    found = _behind(node, on_tangent)
    return next((n for n in node.graph.nodes if n in found and is_product(n)), None)


def like(node: Node, logits: Node) -> bool:
    """A gradient of the logits, as far as sizes tell."""
    return node.op == "call_function" and _sizes(node) == _sizes(logits)
