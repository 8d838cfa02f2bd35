"""Do the fused kernels compute a region? They know a head by a few statistics of each row and by one form of gradient:

    y = epilogue(x W^T + b)      lse, the logits at targets, a weighted sum, sum p log p, maximum, its index
    dy = p (a + b y) + onehot(target) t + c s         with row values a, b, t, s, and p = softmax(y)

A program is evaluated with symbols: a wide value is a sum of row values times one of y, p, p*y, onehot, class vectors
and one; a narrow one is a polynomial of statistics (see algebra.py). What leaves this language leaves the kernels to
the region's own program. What is found is compared with the program in numbers before it is believed (see check.py).
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch

from ..spec.program import Program, Ref, Rows, resolve
from . import algebra
from .algebra import Poly

aten = torch.ops.aten
prims = torch.ops.prims
ONE = Poly.number(1.0)


class NotFused(Exception):
    """Something that the kernels do not compute."""


@dataclasses.dataclass(frozen=True)
class Elem:
    """A function of each logit alone: steps of an epilogue, or (steps None) one that only its numbers describe."""

    steps: tuple[Any, ...] | None
    tree: Any  # ("z",) or (op, *arguments), for its numbers

    def unary(self, name: str, *constants: float) -> Elem:
        steps = None if self.steps is None else (*self.steps, (name, *constants))
        return Elem(steps, self.tree)


@dataclasses.dataclass
class Wide:
    """A sum of row values times basis functions of the classes, all times `slopes`.

    basis: "Y", "1", "P", "PY", ("onehot", column), ("class", index of a whole input).
    """

    terms: dict[Any, Poly]
    slopes: tuple[Any, ...] = ()

    def key(self) -> Any:
        return self.slopes


@dataclasses.dataclass
class Cut:
    """A gradient of some of the classes, put among zeros for the others."""

    inner: Any


@dataclasses.dataclass
class Class:
    """A vector over classes that the program is given, times a number."""

    index: int
    factor: float = 1.0


@dataclasses.dataclass
class Index:
    """One class for each row: a row input of integers."""

    index: int


@dataclasses.dataclass
class Count:
    """0, 1, 2, ... over the classes: a whole input that is one."""


@dataclasses.dataclass
class Equal:
    """Where the class is the index of the row."""

    index: int


@dataclasses.dataclass
class Several:
    """The results of an op that has several."""

    items: list[Any]


class Evaluate:
    """Evaluates one program with symbols.

    classes: V. double: are the logits fp64? given: what stands for each row input and each whole input (an Index,
    Count, Class or Poly). epilogue: the one that is known from the forward already, or None.
    """

    def __init__(
        self, program: Program, classes: Any, double: bool, given: dict[str, list[Any]], epilogue: Any = None
    ) -> None:
        self.program, self.classes, self.all_classes, self.double = program, classes, classes, double
        self.given, self.epilogue = given, epilogue
        self.env: list[Any] = []
        self.bias: int | None = None  # a whole input that is added to the logits
        self.cut: tuple[int, int] | None = None  # the classes that are left, where others are cut off

    def run(self) -> list[Any]:
        """The values of the results; where one can't be followed, the NotFused that says why."""
        places = {"rows": 0, "whole": 0, "logits": 0}
        for kind in self.program.inputs:
            k = places[kind]
            places[kind] += 1
            if kind == "logits":
                if k:
                    raise NotFused("several heads")
                self.env.append(Elem((), ("z",)))
            else:
                self.env.append(self.given[kind][k])
        for step in self.program.steps:
            try:
                args = [self._arg(a) for a in step.args]
                kwargs = {k: self._arg(v) for k, v in step.kwargs.items()}
                self.env.append(self._step(resolve(step.op), args, kwargs))
            except NotFused as why:
                self.env.append(why)
        return [self.env[r.value.index] for r in self.program.results]

    def _arg(self, value: Any) -> Any:
        if isinstance(value, Ref):
            if isinstance(self.env[value.index], NotFused):
                raise self.env[value.index]
            return self.env[value.index]
        if isinstance(value, (tuple, list)) and not isinstance(value, Rows):
            return [self._arg(v) for v in value]
        return value

    # -- one step

    def _step(self, op: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if op is operator.getitem:
            if not isinstance(args[0], Several):
                raise NotFused("an item")
            return args[0].items[args[1]]
        rule = _STEPS.get(op)
        if rule is None:
            raise NotFused(f"no rule for {op}")
        return rule(self, args, kwargs)

    def y(self, value: Any) -> Wide:
        """A wide value in terms of y, which this decides if it has not been decided."""
        if isinstance(value, Wide):
            return value
        if isinstance(value, Class):
            return Wide({("class", value.index): Poly.number(value.factor)})
        if isinstance(value, Equal):
            return Wide({("onehot", value.index): ONE})
        if isinstance(value, Poly):
            return Wide({"1": value})
        if isinstance(value, (int, float)):
            return Wide({"1": Poly.number(float(value))})
        if isinstance(value, Elem):
            if value.steps is None:
                raise NotFused("a function of logits that is no epilogue")
            if self.epilogue is None:
                self.epilogue = value.steps
            if value.steps == self.epilogue:
                return Wide({"Y": ONE})
            factor = ratio(value.steps, self.epilogue)
            if factor is not None:
                return Wide({"Y": Poly.number(factor)})
        raise NotFused("logits of another epilogue")

    def sum(self, w: Wide) -> Poly:
        """The sum over all classes."""
        if w.slopes:
            raise NotFused("a sum behind the epilogue")
        total = Poly({})
        for basis, coefficient in w.terms.items():
            total = total + coefficient * self._total(basis)
        return total

    def _total(self, basis: Any) -> Poly:
        if basis == "Y":
            return Poly.atom("stat", "sum", None)
        if basis == "1":
            if not isinstance(self.classes, int):
                raise NotFused("a number of classes that is a symbol")
            return Poly.number(self.classes)
        if basis == "P":
            return ONE
        if basis == "PY":  # sum p y = sum p log p + lse
            return Poly.atom("stat", "neg_entropy") + Poly.atom("stat", "lse")
        if basis[0] == "onehot":
            return ONE
        if basis[0] == "class":
            return Poly.atom("in", "total", basis[1])
        if basis[0] == "classY":
            return Poly.atom("stat", "sum", basis[1])
        raise NotFused(f"a sum of {basis}")

    def at(self, w: Wide, column: int) -> Poly:
        """The value at the class of a row."""
        if w.slopes:
            raise NotFused("a value behind the epilogue")
        target, lse = Poly.atom("stat", "target", column), Poly.atom("stat", "lse")
        total = Poly({})
        for basis, coefficient in w.terms.items():
            if basis == "Y":
                value = target
            elif basis == "1":
                value = ONE
            elif basis == "P":
                value = algebra.exp(target - lse)
            elif basis == "PY":
                value = algebra.exp(target - lse) * target
            elif basis[0] == "onehot" and basis[1] == column:
                value = ONE
            elif basis[0] == "class":
                value = Poly.atom("in", "picked", basis[1], column)
            elif basis[0] == "classY":
                value = Poly.atom("in", "picked", basis[1], column) * target
            else:
                raise NotFused(f"{basis} at a class")
            total = total + coefficient * value
        return total


def ratio(steps: tuple[Any, ...], other: tuple[Any, ...]) -> float | None:
    """The number that one epilogue is of another, where they differ by factors at their ends."""

    def split(s: tuple[Any, ...]) -> tuple[tuple[Any, ...], float]:
        factor, rest = 1.0, list(s)
        while rest and rest[-1][0] in ("mul", "div"):
            name, c = rest.pop()
            factor = factor * c if name == "mul" else factor / c
        return tuple(rest), factor

    (a, p), (b, q) = split(steps), split(other)
    return p / q if a == b and q else None


def plus(p: Wide, q: Wide, sign: float = 1.0) -> Wide:
    if p.slopes != q.slopes:
        if not p.terms:
            return Wide({k: v.times(sign) for k, v in q.terms.items()}, q.slopes)
        if not q.terms:
            return p
        raise NotFused("gradients before and behind the epilogue are added")
    terms = dict(p.terms)
    for basis, c in q.terms.items():
        terms[basis] = terms.get(basis, Poly({})) + c.times(sign)
    return Wide({k: v for k, v in terms.items() if v.terms}, p.slopes)


def times(e: Evaluate, p: Wide, q: Wide) -> Wide:
    out: dict[Any, Poly] = {}
    for a, c in p.terms.items():
        for b, d in q.terms.items():
            if isinstance(b, tuple) and b[0] == "onehot":
                a, b, c, d = b, a, d, c
            if isinstance(a, tuple) and a[0] == "onehot" and b != "1":  # what is there at the class
                basis, value = a, c * e.at(Wide({b: d}), a[1])
            else:
                basis, value = _product(a, b), c * d
            out[basis] = out.get(basis, Poly({})) + value
    return Wide({k: algebra.simplified(v) for k, v in out.items() if v.terms}, p.slopes + q.slopes)


def _product(a: Any, b: Any) -> Any:
    if a == "1":
        return b
    if b == "1":
        return a
    if {a, b} == {"P", "Y"}:
        return "PY"
    for p, q in ((a, b), (b, a)):
        if isinstance(p, tuple) and p[0] == "class" and q == "Y":
            return ("classY", p[1])
    raise NotFused(f"{a} times {b}")


def scaled(w: Wide, factor: Poly) -> Wide:
    return Wide({k: algebra.simplified(v * factor) for k, v in w.terms.items()}, w.slopes)


def is_wide(value: Any) -> bool:
    return isinstance(value, (Wide, Elem, Class, Equal))


Rule = Callable[[Evaluate, list[Any], dict[str, Any]], Any]
_STEPS: dict[Any, Rule] = {}


def step(*targets: Any) -> Callable[[Rule], Rule]:
    def register(fn: Rule) -> Rule:
        for t in targets:
            _STEPS[t] = fn
        return fn

    return register


from . import fused_steps  # noqa: E402, F401  (registers the steps)
