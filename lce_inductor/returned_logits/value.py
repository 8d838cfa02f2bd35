"""What a deferred value is, read off the traced graph: a linear layer, an epilogue, a cast."""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.fx import Node

from ..regions.aten_ops import at, bound
from ..regions.labels import Labels
from ..regions.tags import LOCAL, is_one, shape_of
from ..spec.epilogue import unparse
from .products import attribute
from .tail import NotDeferred

aten = torch.ops.aten
prims = torch.ops.prims

_CASTS = {prims.convert_element_type.default, aten._to_copy.default}
_SAME = {aten.alias.default, aten.detach.default, aten.clone.default, aten.lift_fresh_copy.default}
_VIEWS = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.default,
    aten.squeeze.dim, aten.squeeze.dims,
}  # fmt: skip
_TURNS = {aten.permute.default, aten.transpose.int, aten.t.default}
_ARITHMETIC: dict[Any, str] = {
    aten.mul.Tensor: "mul", aten.mul.Scalar: "mul", aten.div.Tensor: "div", aten.div.Scalar: "div",
    aten.add.Tensor: "add", aten.add.Scalar: "add", aten.sub.Tensor: "sub", aten.sub.Scalar: "sub",
}  # fmt: skip
# What may set some classes to a number.
FILLS = {
    aten.where.self, aten.masked_fill.Scalar, aten.slice_scatter.default, aten.index_put.default,
    aten._unsafe_index_put.default,
}  # fmt: skip
# A number that stays what it is when logits are added to it.
_HUGE = 1e20
_UNARY = {aten.tanh.default: "tanh", aten.sigmoid.default: "sigmoid"}


@dataclasses.dataclass
class Value:
    """f(linear(x, weight, bias)) of the product `source`.

    scales: (tensor of one element, is divided by?) that x and bias are multiplied by. biases: (tensor [V], factor) that
    are added to the bias; where it is a node that sets some classes to a number, (that node, the number). classes:
    (start, end) of those that are kept, one cut after the other; the k-th bias belongs to the classes that the first
    `cuts[k]` of them leave.
    """

    source: Node
    scales: list[tuple[Node, bool]] = dataclasses.field(default_factory=list)
    biases: list[tuple[Node, float]] = dataclasses.field(default_factory=list)
    cuts: list[int] = dataclasses.field(default_factory=list)
    classes: list[tuple[Any, Any]] = dataclasses.field(default_factory=list)
    steps: list[tuple[Any, ...]] = dataclasses.field(default_factory=list)
    dtypes: list[torch.dtype] = dataclasses.field(default_factory=list)
    cast_at: int = 0  # how many steps come before the cast

    @property
    def epilogue(self) -> str:
        return unparse(tuple(self.steps))

    @property
    def after_cast(self) -> bool:
        return bool(self.steps) and self.cast_at == 0 and len(self.dtypes) > 1


def read(labels: Labels, node: Node) -> Value:
    """The value of a labelled node. Raises NotDeferred where it is none of this kind."""
    chain = _chain(labels, node)
    value = Value(chain[0])
    value.dtypes.append(chain[0].meta["val"].dtype)
    for before, after in itertools.pairwise(chain):
        _follow(labels, value, before, after)
    if not value.steps or value.cast_at == 0 or value.cast_at == len(value.steps):
        return value
    raise NotDeferred("a cast in the middle of what follows the linear layer")


def _chain(labels: Labels, node: Node) -> list[Node]:
    """From the product to the node."""
    chain = [node]
    while node not in labels.sources:
        label = labels.of.get(node)
        if label is None or label.parts is not None or label.tags.count(LOCAL) != 1:
            raise NotDeferred(f"not logits of its own row, or not in one dimension: {node.name}")
        mine = labels.passes.get(node) or [a for a in node.all_input_nodes if a in labels.of and constant(a) is None]
        if len(mine) != 1:
            raise NotDeferred(f"made of several values of the size of logits: {node.name}")
        (node,) = mine
        chain.append(node)
    return chain[::-1]


def _follow(labels: Labels, value: Value, before: Node, node: Node) -> None:
    target = node.target
    if node in labels.passes or target in _SAME or target in _VIEWS or target in _TURNS or target is operator.getitem:
        return
    if target in _CASTS or (target is aten.copy.default and _copies(before, node)):
        _cast(value, node.meta["val"].dtype)
    elif target in _UNARY:
        value.steps.append((_UNARY[target],))
    elif target is aten.neg.default:
        value.steps.append(("mul", -1.0))
    elif target is aten.slice.Tensor:
        _slice(labels, value, before, node)
    elif target in FILLS:
        _fill(labels, value, before, node)
    elif target in _ARITHMETIC:
        _arithmetic(labels, value, before, node)
    else:
        raise NotDeferred(f"no part of an epilogue: {node.format_node() or node.name}")
    casts = target in _CASTS or target is aten.copy.default
    if not casts and node.meta["val"].dtype != before.meta["val"].dtype:
        raise NotDeferred(f"another dtype than its operand: {node.name}")


def _copies(before: Node, node: Node) -> bool:
    """Is this written over all of another tensor?"""
    return node.args[1] is before and shape_of(before) == shape_of(node)


def _cast(value: Value, dtype: torch.dtype) -> None:
    if dtype == value.dtypes[-1]:
        return
    if len(value.dtypes) > 1:
        raise NotDeferred("several casts")
    if not dtype.is_floating_point:
        raise NotDeferred("a cast to integers")
    value.dtypes.append(dtype)
    value.cast_at = len(value.steps)


def _slice(labels: Labels, value: Value, before: Node, node: Node) -> None:
    a = bound(node)
    tags = labels.of[before].tags
    if a["step"] != 1 or tags[at(a["dim"], len(tags))] != LOCAL:
        raise NotDeferred(f"some of the classes, not side by side: {node.name}")
    value.classes.append((a["start"], a["end"]))


def constant(value: Any, far: int = 8) -> float | None:
    """The number that a tensor is filled with, whatever its shape is read off."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, Node) and value.op == "get_attr":
        held = attribute(value)
        if isinstance(held, Tensor) and not isinstance(held, FakeTensor) and held.numel() == 1:
            with unset_fake_temporarily():
                return float(held)
    if not isinstance(value, Node) or value.op != "call_function" or far == 0:
        return None
    if value.target in (
        aten.full.default,
        aten.full_like.default,
        aten.fill.Scalar,
        aten.fill.Tensor,
        aten.copy.default,
    ):
        return constant(value.args[1], far - 1)
    if value.target is aten.scalar_tensor.default or value.target in _SAME | _VIEWS | _CASTS | {aten.expand.default}:
        return constant(value.args[0], far - 1)
    return None


def _fill(labels: Labels, value: Value, before: Node, node: Node) -> None:
    """Classes that are set to minus infinity, or nearly: a bias of that size leaves nothing of the logits."""
    args = list(bound(node).values())
    if node.target is aten.where.self:
        number, mask = constant(args[2] if args[1] is before else args[1]), args[0]
    elif node.target is aten.slice_scatter.default:
        number, mask = constant(args[1]), None
        tags = labels.of[before].tags
        if args[0] is not before or tags[at(args[2], len(tags))] != LOCAL:
            number = None
    elif node.target is aten.masked_fill.Scalar:
        number, mask = constant(args[2]), args[1]
    else:
        given = [(d, i) for d, i in enumerate(args[1]) if i is not None]
        number, mask = constant(args[2]), None
        if args[0] is not before or args[3] or len(given) != 1 or labels.of[before].tags[given[0][0]] != LOCAL:
            number = None
    if isinstance(mask, Node):
        several = [(d, s) for d, s in enumerate(reversed(shape_of(mask) or ())) if not is_one(s)]
        number = number if several == [_class_dim(labels, before)] else None
    exact = value.dtypes[0] == before.meta["val"].dtype or number == -math.inf
    if number is None or value.steps or not exact or not abs(number) > _HUGE:
        raise NotDeferred(f"some classes are set to what no bias can do: {node.name}")
    value.biases.append((node, number))
    value.cuts.append(len(value.classes))


def _arithmetic(labels: Labels, value: Value, before: Node, node: Node) -> None:
    name, a = _ARITHMETIC[node.target], list(bound(node).values())
    turned = a[0] is not before
    other = a[0] if turned else a[1]
    if other is before or bound(node).get("alpha", 1) != 1:
        raise NotDeferred(f"no part of an epilogue: {node.name}")
    if turned and name == "div":
        raise NotDeferred(f"divided by logits: {node.name}")
    if isinstance(other, (int, float)) and not isinstance(other, bool):
        if not math.isfinite(other):
            raise NotDeferred(f"a constant that is not finite: {node.name}")
        if turned and name == "sub":
            value.steps += [("mul", -1.0), ("add", float(other))]
        else:
            value.steps.append((name, float(other)) if name != "sub" else ("add", -float(other)))
    elif isinstance(other, Node) and not value.steps and len(value.dtypes) == 1:
        _tensor(value, name, turned, _class_dim(labels, before), other)
    else:
        raise NotDeferred(f"a tensor in the middle of what follows the linear layer: {node.name}")


def _tensor(value: Value, name: str, turned: bool, classes: tuple[int, Any], other: Node) -> None:
    """A scale or a bias: part of the linear layer."""
    several = [(d, s) for d, s in enumerate(reversed(shape_of(other) or ())) if not is_one(s)]
    if name in ("mul", "div") and not several:
        if value.biases:
            raise NotDeferred("a bias and then a scale")
        value.scales.append((other, name == "div"))
    elif name in ("add", "sub") and len(several) == 1 and not (turned and name == "sub"):
        if several[0] != classes:
            raise NotDeferred(f"a bias of another shape than [V]: {other.name}")
        value.biases.append((other, 1 if name == "add" else -1))
        value.cuts.append(len(value.classes))
    else:
        raise NotDeferred(f"neither a scale nor a bias: {other.name}")


def _class_dim(labels: Labels, node: Node) -> tuple[int, Any]:
    """Where the classes are, counted from the right, and how many."""
    dim = labels.of[node].tags[::-1].index(LOCAL)
    return dim, (shape_of(node) or ())[-1 - dim]
