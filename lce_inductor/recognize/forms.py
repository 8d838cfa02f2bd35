"""Forms: what the abstract interpretation knows a node to be, and the registry of rules that move between forms."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Union

import torch
from torch.fx import Node

from ..reasons import Refusal
from .canon import Attr, Call

if TYPE_CHECKING:
    from .rewrite import Emitter
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
class ClassMap:
    """A tensor that is `f(rows(linear(x)))` class by class, up to an offset per row:

        value = epilogue(Z[rows])                  kind "logits"
        value = epilogue(Z[rows]) - lse            kind "log_probs"

    class_dim: where the class dimension is in the node's own shape. `detached`: no gradient flows through it.
    """

    head: Head
    rows: tuple[RowOp, ...]
    class_dim: int
    ndim: int
    dtype: torch.dtype
    kind: str = "logits"
    detached: bool = False

    def with_(self, **changes: Any) -> ClassMap:
        return dataclasses.replace(self, **changes)

    @property
    def class_last(self) -> bool:
        return self.class_dim == self.ndim - 1


@dataclasses.dataclass(frozen=True)
class Want:
    """A statistic that a terminal needs: a bit of ops.schema; for TARGET the index per row and the value of it
    that means "no target", for SUM the class weights."""

    bit: int
    operand: Ref | None = None
    ignore_index: int | None = None


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


Outcome = Union[ClassMap, Terminal, Refusal, None]
Rule = Callable[["Walk", Call, ClassMap], Outcome]

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
