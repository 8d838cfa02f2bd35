"""Forms: what the abstract interpretation knows a node to be, and the registry of rules that move between forms."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Union

import torch
from torch.fx import Node

from ..reasons import Refusal
from .canon import Attr, Call

if TYPE_CHECKING:
    from .emit import Emitter
    from .walk import Walk

Ref = Union[Node, Attr]


class _Classes:
    """Stands for the size of the class dimension in a row operation: H when replayed on x, 1 on a statistic."""

    def __repr__(self) -> str:
        return "CLASSES"


CLASSES = _Classes()


@dataclasses.dataclass(frozen=True, eq=False)
class Head:
    """A linear whose output may be logits: x [..., H] times weight [V, H] (or [H, V]), plus bias [V]."""

    node: Node
    x: Ref
    weight: Ref
    transposed: bool
    bias: Ref | None
    dtype: torch.dtype
    num_classes: Any


@dataclasses.dataclass(frozen=True)
class RowOp:
    """An operation on rows, written for a tensor whose last dimension is the class dimension.

    A linear acts row by row, so the same operation can be applied to x, or to a statistic with a class
    dimension of size 1. `selects` tells that the set or order of rows changes, not only their shape.
    """

    name: str
    args: tuple[Any, ...]
    selects: bool = False


@dataclasses.dataclass(frozen=True)
class Edit:
    """A change of every logit, in the order in which the graph makes them (see edits.fold):

    number steps of an epilogue   ("mul", 0.5) ("div", 30.0) ("add", 5.0) ("tanh",) ("sigmoid",) ("rsqrt_cap", A, K)
    a tensor for every class      ("bias", ref [V])  ("class_scale", ref [V])  ("mask", ref [V] bool -> fill)
    a tensor for all classes      ("scale", ref [])  ("inverse_scale", ref [])
    classes that are kept         ("classes", start, stop)
    classes set to a number       ("fill", start, stop, value)
    """

    name: str
    args: tuple[Any, ...] = ()


class Offset(NamedTuple):
    """A number per row that a form adds: `sign * node`, or of its logarithm; a tensor with class dimension 1.

    detached: the sum was detached after it was added, so no gradient reaches the tensor this way either.
    """

    sign: int
    node: Node
    log: bool = False
    detached: bool = False


@dataclasses.dataclass(frozen=True)
class ClassMap:
    """A tensor that follows class by class from the logits of some rows:

        value = coef * (y - [normalized] lse(y) + offset)          y = edits(Z[rows])
        value = exp(y - [normalized] lse(y) + offset)              if exp

    class_dim: where the class dimension is in the node's own shape.
    detached: no gradient flows through it. early_cast: a cast came before the first edit. cancelled: offsets that the
    normalisation took away again; their gradient is zero, not missing.
    """

    head: Head
    rows: tuple[RowOp, ...]
    class_dim: int
    ndim: int
    dtype: torch.dtype
    edits: tuple[Edit, ...] = ()
    coef: float = 1.0
    normalized: bool = False
    offset: tuple[Offset, ...] = ()
    exp: bool = False
    detached: bool = False
    early_cast: bool = False
    cancelled: tuple[Node, ...] = ()

    def with_(self, **changes: Any) -> ClassMap:
        return dataclasses.replace(self, **changes)

    def detach(self) -> ClassMap:
        return self.with_(detached=True, offset=tuple(o._replace(detached=True) for o in self.offset))

    @property
    def class_last(self) -> bool:
        return self.class_dim == self.ndim - 1

    @property
    def plain(self) -> bool:
        """The logits themselves, edits apart."""
        return not (self.exp or self.normalized or self.offset) and self.coef == 1.0

    @property
    def source(self) -> Any:
        """Equal for two forms that see the same logits of the same rows."""
        return (self.head, self.rows, self.edits)


@dataclasses.dataclass(frozen=True)
class Product:
    """Elementwise product of two forms of the same logits, waiting for its sum: probabilities times (log-)logits."""

    probs: ClassMap
    values: ClassMap
    coef: float
    dtype: torch.dtype

    @property
    def head(self) -> Head:
        return self.values.head


@dataclasses.dataclass(frozen=True)
class OneHot:
    """`coef * one_hot(index) + shift`, shaped like `like`: soft targets made of class indices. Without an index it
    is the constant `shift`, times `weight` [V] if there is one."""

    like: ClassMap
    index: Node | None = None
    column: tuple[int, int] | None = None
    coef: float = 0.0
    shift: float = 0.0
    weight: Node | None = None

    @property
    def head(self) -> Head:
        return self.like.head


@dataclasses.dataclass(frozen=True)
class OneHotProduct:
    """A form times a OneHot, waiting for its sum."""

    values: ClassMap
    hot: OneHot
    coef: float
    dtype: torch.dtype

    @property
    def head(self) -> Head:
        return self.values.head


@dataclasses.dataclass(frozen=True)
class Squared:
    """z * z, + shift, and its rsqrt: the inside of `a * z * rsqrt(z * z + k)`."""

    base: ClassMap
    shift: float = 0.0
    rsqrt: bool = False

    @property
    def head(self) -> Head:
        return self.base.head


@dataclasses.dataclass(frozen=True)
class Spread:
    """`index`, a number per row with class dimension 1, broadcast against `like`; `narrow` once that is taken back."""

    like: ClassMap
    index: Node
    narrow: bool = False

    @property
    def head(self) -> Head:
        return self.like.head


@dataclasses.dataclass(frozen=True)
class Parts:
    """Several forms in one value: the tuple of a split, or a stack along a new dimension `dim`."""

    items: tuple[Any, ...]
    dim: int | None

    @property
    def head(self) -> Head:
        return self.items[0].head


Form = Union[ClassMap, Product, OneHot, OneHotProduct, Squared, Spread, Parts]


def captured(form: Any) -> list[Any]:
    """What a form reads beside the logits: offsets, biases, scales, masks, indices."""
    if isinstance(form, ClassMap):
        return [*(o.node for o in form.offset), *form.cancelled, *(a for e in form.edits for a in e.args)]
    parts: dict[type, Callable[[Any], list[Any]]] = {
        Product: lambda f: [*captured(f.probs), *captured(f.values)],
        OneHot: lambda f: [f.index, f.weight],
        OneHotProduct: lambda f: [*captured(f.values), *captured(f.hot)],
        Squared: lambda f: captured(f.base),
        Spread: lambda f: [f.index],
        Parts: lambda f: [ref for item in f.items for ref in captured(item)],
    }
    return parts[type(form)](form)


@dataclasses.dataclass(frozen=True)
class Want:
    """A statistic that a terminal needs: a bit of ops.types; for TARGET the index per row and the value of it
    that means "no target", for SUM the class weights. `column`: which of several indices along the class dim."""

    bit: int
    operand: Ref | None = None
    ignore_index: int | None = None
    column: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Terminal:
    """A node that can be computed from row statistics: what it needs, and how to write it.

    `emit` gets an Emitter placed before the node and returns the replacement, or a tuple of replacements
    for a node with several results.
    """

    node: Node
    form: ClassMap
    wants: tuple[Want, ...]
    emit: Callable[[Emitter], Any]


Outcome = Union[ClassMap, Product, OneHot, OneHotProduct, Squared, Spread, Parts, Terminal, Refusal, None]
Rule = Callable[["Walk", Call, Any], Outcome]

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for canonical operations.

    A rule sees a call of which at least one argument has a form, and that form. It returns the form of the
    result, a Terminal, a Refusal, or None: it doesn't apply, and the logits escape.
    """

    def register(function: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise ValueError(f"two rules for {name}")
            RULES[name] = function
        return function

    return register
