"""The steps of programs that fused.py can follow, one small function each."""

from __future__ import annotations

from typing import Any

import torch

from . import algebra
from .algebra import Poly
from .aten_ops import FMA
from .fused import (
    ONE,
    Class,
    Count,
    Cut,
    Elem,
    Equal,
    Evaluate,
    Index,
    NotFused,
    Several,
    Wide,
    is_wide,
    plus,
    ratio,
    scaled,
    step,
    times,
)

aten = torch.ops.aten
prims = torch.ops.prims


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return float(value)
    return value.as_number() if isinstance(value, Poly) else None


def _poly(value: Any) -> Poly:
    if isinstance(value, Poly):
        return value
    number = _number(value)
    if number is None:
        raise NotFused("not a row value")
    return Poly.number(number)


@step(prims.convert_element_type.default)
def convert(e: Evaluate, args: list[Any], kwargs: dict[str, Any]) -> Any:
    value, dtype = args[:2]
    if dtype == torch.float64 and not e.double:
        raise NotFused("a cast to fp64")
    if not dtype.is_floating_point and not isinstance(value, (Index, Equal)):
        raise NotFused("a cast to integers")
    return value


@step(aten.add.Tensor, aten.add.Scalar)
def add(e: Evaluate, args: list[Any], kwargs: dict[str, Any]) -> Any:
    return _sum(e, args[0], args[1], kwargs.get("alpha", 1))


def _sum(e: Evaluate, p: Any, q: Any, factor: float) -> Any:
    if isinstance(p, Elem) or isinstance(q, Elem):
        number = _number(q) if isinstance(p, Elem) else _number(p)
        elem = p if isinstance(p, Elem) else q
        if isinstance(p, Elem) and isinstance(q, Elem):
            return Elem(None, ("add", p.tree, q.tree, factor))
        if number is not None and isinstance(p, Elem):
            shift = number * factor
            new = elem if shift == 0 else elem.unary("add", shift)
            return Elem(new.steps, ("add", elem.tree, number, factor))
        if number is not None:
            return Elem(None, ("add", number, elem.tree, factor))
        other = q if isinstance(p, Elem) else p
        if (
            isinstance(other, Class)
            and elem.tree == ("z",)
            and factor == other.factor == 1
            and e.bias in (None, other.index)
        ):
            e.bias = other.index  # from here on, z is what has it
            return elem
    if not is_wide(p) and not is_wide(q):
        return _poly(p) + _poly(q).times(factor)
    return plus(e.y(p), e.y(q), factor)


@step(aten.sub.Tensor, aten.sub.Scalar)
def sub(e: Evaluate, args: list[Any], kwargs: dict[str, Any]) -> Any:
    return _sum(e, args[0], args[1], -kwargs.get("alpha", 1))


@step(aten.neg.default)
def neg(e: Evaluate, args: list[Any], kwargs: dict[str, Any]) -> Any:
    return mul(e, [args[0], -1.0], {})


@step(aten.mul.Tensor, aten.mul.Scalar)
def mul(e: Evaluate, args: list[Any], kwargs: dict[str, Any]) -> Any:
    p, q = args[:2]
    if not is_wide(p) and not is_wide(q):
        return algebra.simplified(_poly(p) * _poly(q))
    if isinstance(q, Elem) and not isinstance(p, Elem):
        p, q = q, p
    if isinstance(p, Elem):
        number = _number(q)
        if number is not None:
            new = p if number == 1 else p.unary("mul", number)
            return Elem(new.steps, ("mul", p.tree, number))
        if isinstance(q, Elem):
            return Elem(None, ("mul", p.tree, q.tree))
        if isinstance(q, Wide) and not _is_y(e, p):
            return Wide(q.terms, (*q.slopes, p.tree))
    if isinstance(p, Class) and _number(q) is not None:
        return Class(p.index, p.factor * float(_number(q) or 0))
    if isinstance(q, Class) and _number(p) is not None:
        return Class(q.index, q.factor * float(_number(p) or 0))
    if isinstance(p, Poly | int | float):
        return scaled(e.y(q), _poly(p))
    if isinstance(q, Poly | int | float):
        return scaled(e.y(p), _poly(q))
    return times(e, e.y(p), e.y(q))


def _is_y(e: Evaluate, p: Elem) -> bool:
    """Is this y, perhaps times a number, and not the slope of an epilogue?"""
    return p.steps is not None and (e.epilogue is None or ratio(p.steps, e.epilogue) is not None)


@step(aten.div.Tensor, aten.div.Scalar)
def div(e: Evaluate, args: list[Any], kwargs: dict[str, Any]) -> Any:
    p, q = args[:2]
    number = _number(q)
    if isinstance(p, Elem) and number is not None:
        return Elem(p.unary("div", number).steps, ("div", p.tree, number))
    if isinstance(p, Elem) and isinstance(q, Elem):
        return Elem(None, ("div", p.tree, q.tree))
    if is_wide(q):
        raise NotFused("a division by a wide value")
    if not is_wide(p):
        return algebra.simplified(algebra.divided(_poly(p), _poly(q)))
    return scaled(e.y(p), algebra.divided(ONE, _poly(q)))


@step(aten.exp.default)
def exp(e: Evaluate, args: list[Any], kwargs: dict[str, Any]) -> Any:
    (p,) = args
    if not is_wide(p):
        return algebra.exp(_poly(p))
    w = e.y(p)
    if w.slopes or not set(w.terms) <= {"Y", "1"} or w.terms.get("Y", Poly({})).as_number() != 1.0:
        raise NotFused("an exponential of something else than y")
    return Wide({"P": algebra.exp(w.terms.get("1", Poly({})) + Poly.atom("stat", "lse"))})


@step(aten.log.default)
def log(e: Evaluate, args: list[Any], kwargs: dict[str, Any]) -> Any:
    p = _poly(args[0]) if not is_wide(args[0]) else None
    if p is None:
        w = e.y(args[0])
        if set(w.terms) == {"P"} and not w.slopes and w.terms["P"].as_number() == 1.0:
            return Wide({"Y": ONE, "1": -Poly.atom("stat", "lse")})
        raise NotFused("a logarithm of something else than a softmax")
    if len(p.terms) == 1:
        ((monomial, c),) = p.terms.items()
        if c == 1.0 and len(monomial) == 1 and monomial[0][:2] == ("call", "exp"):
            return Poly(dict(monomial[0][2]))
    return algebra.call("log", p)


def _squash(name: str) -> Any:
    def rule(e: Evaluate, args: list[Any], kwargs: dict[str, Any]) -> Any:
        (p,) = args
        if not isinstance(p, Elem):
            raise NotFused("a function of something else than logits")
        return Elem(p.unary(name).steps, (name, p.tree))

    return rule


step(aten.tanh.default)(_squash("tanh"))
step(aten.sigmoid.default)(_squash("sigmoid"))


@step(aten.rsub.Scalar)
def rsub(e: Evaluate, args: list[Any], kwargs: dict[str, Any]) -> Any:
    return _sum(e, args[1], args[0], -kwargs.get("alpha", 1))


@step(aten.pow.Tensor_Scalar)
def power(e: Evaluate, args: list[Any], kwargs: dict[str, Any]) -> Any:
    p, n = args
    if isinstance(p, Elem) and n == 2:
        return Elem(None, ("mul", p.tree, p.tree))
    if isinstance(p, Poly) and n == 2:
        return p * p
    if n == 1:
        return p
    raise NotFused("a power")


@step(aten.amax.default)
def top(e: Evaluate, args: list[Any], kwargs: dict[str, Any]) -> Any:
    return _top(e, args[0], "max")


def _top(e: Evaluate, p: Any, name: str) -> Any:
    w = e.y(p)
    factor = w.terms.get("Y", Poly({})).as_number()
    if w.slopes or not set(w.terms) <= {"Y", "1"} or factor is None or factor <= 0:
        raise NotFused("a maximum of something else than y")
    if name == "argmax":
        return Poly.atom("stat", "argmax")
    return Poly.atom("stat", "max").times(factor) + w.terms.get("1", Poly({}))


step(aten.argmax.default)(lambda e, args, kwargs: _top(e, args[0], "argmax"))
step(aten.max.dim)(lambda e, args, kwargs: Several([_top(e, args[0], "max"), _top(e, args[0], "argmax")]))


@step(aten.sum.dim_IntList)
def total(e: Evaluate, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if not is_wide(args[0]):
        raise NotFused("a sum of row values")
    return algebra.simplified(e.sum(e.y(args[0])))


@step(aten.mean.dim)
def mean(e: Evaluate, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if not isinstance(e.classes, int) or not is_wide(args[0]):
        raise NotFused("a mean over a symbol of classes")
    return e.sum(e.y(args[0])).times(1.0 / e.classes)


@step(aten.gather.default)
def gather(e: Evaluate, args: list[Any], kwargs: dict[str, Any]) -> Any:
    source, _, index = args[:3]
    if not isinstance(index, Index):
        raise NotFused("an index that is computed")
    return algebra.simplified(e.at(e.y(source), index.index))


@step(aten.full.default)
def full(e: Evaluate, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if not isinstance(args[1], (int, float)):
        raise NotFused("a tensor of something else than a number")
    return Poly.number(float(args[1]))


@step(aten.scatter.value)
def scatter(e: Evaluate, args: list[Any], kwargs: dict[str, Any]) -> Any:
    base, _, index, value = args[:4]
    if not isinstance(index, Index) or kwargs or _number(base) != 0.0 or not isinstance(value, (int, float)):
        raise NotFused("a scatter into something else than zeros")
    return Wide({("onehot", index.index): Poly.number(float(value))})


@step(aten.scatter.src)
def scatter_src(e: Evaluate, args: list[Any], kwargs: dict[str, Any]) -> Any:
    base, _, index, values = args[:4]
    if not isinstance(index, Index) or is_wide(values):
        raise NotFused("a scatter of something else than a value of each row")
    there = Poly({}) if _number(base) == 0.0 else e.at(e.y(base), index.index)
    return _put(e, base, index.index, _poly(values) - algebra.simplified(there))


@step(aten.copy.default)
def copy(e: Evaluate, args: list[Any], kwargs: dict[str, Any]) -> Any:
    return args[1]


@step(aten.scatter_add.default)
def scatter_add(e: Evaluate, args: list[Any], kwargs: dict[str, Any]) -> Any:
    base, _, index, values = args[:4]
    if not isinstance(index, Index) or is_wide(values):
        raise NotFused("a scatter of something else than a value of each row")
    return _put(e, base, index.index, _poly(values))


def _put(e: Evaluate, base: Any, column: int, values: Poly) -> Wide:
    """Values added at the class of each row."""
    one = Wide({("onehot", column): values})
    return one if _number(base) == 0.0 else plus(e.y(base), one)


@step(aten.eq.Tensor)
def equal(e: Evaluate, args: list[Any], kwargs: dict[str, Any]) -> Any:
    pair = {type(a): a for a in args}
    if set(pair) != {Index, Count}:
        raise NotFused("a comparison")
    return Equal(pair[Index].index)


@step(aten.where.self)
def where(e: Evaluate, args: list[Any], kwargs: dict[str, Any]) -> Any:
    condition, p, q = args
    if isinstance(condition, Equal):
        at, other = e.y(p), e.y(q)
        if at.slopes or other.slopes:
            raise NotFused("a selection behind the epilogue")
        column = condition.index
        difference = e.at(at, column) - e.at(other, column) if other.terms else e.at(at, column)
        return plus(Wide({("onehot", column): difference}), other)
    if isinstance(condition, Poly) and is_wide(p) and _number(q) == 0.0:  # rows that do not count
        return scaled(e.y(p), algebra.call("where", condition, ONE, Poly({})))
    if isinstance(condition, Poly) and not is_wide(p) and not is_wide(q):
        return algebra.call("where", condition, _poly(p), _poly(q))
    raise NotFused("a selection of logits")


@step(aten.slice.Tensor)
def cut(e: Evaluate, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Classes cut off: of the logits themselves, before anything is done with them."""
    source, _, start, end, *more = [*args, None, None][: max(len(args), 4)]
    if not isinstance(source, Elem) or source.tree != ("z",) or e.bias is not None or more not in ([], [1]):
        raise NotFused("a slice of something else than logits")
    here = _range(e, start, end)
    if e.cut not in (None, here):
        raise NotFused("several slices of classes")
    e.cut, e.classes = here, here[1] - here[0]
    return source


def _range(e: Evaluate, start: Any, end: Any) -> tuple[int, int]:
    if not isinstance(e.all_classes, int) or not all(isinstance(x, (int, type(None))) for x in (start, end)):
        raise NotFused("a slice by symbols")
    first, last, _ = slice(start, end).indices(e.all_classes)
    return first, last


@step(aten.slice_scatter.default)
def put_back(e: Evaluate, args: list[Any], kwargs: dict[str, Any]) -> Any:
    base, value, _, start, end, *more = [*args, None, None][: max(len(args), 5)]
    if kwargs or _number(base) != 0.0 or more not in ([], [1]) or _range(e, start, end) != e.cut:
        raise NotFused("a gradient put where the logits did not come from")
    return Cut(e.y(value))


@step(aten.abs.default)
def absolute(e: Evaluate, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if is_wide(args[0]):
        raise NotFused("an absolute value of logits")
    return algebra.call("abs", _poly(args[0]))


@step(aten.eq.Scalar)
def equal_number(e: Evaluate, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if is_wide(args[0]) or isinstance(args[0], Index):
        raise NotFused("a comparison")
    return algebra.call("eq", _poly(args[0]), Poly.number(float(args[1])))


@step(aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default)
def shape_only(e: Evaluate, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if isinstance(args[0], Count | Class):
        return args[0]
    return args[0]  # a row value, or a wide one with a dimension of one: numbers decide, see check.py


@step(aten.permute.default)
def permute(e: Evaluate, args: list[Any], kwargs: dict[str, Any]) -> Any:
    return args[0]  # of a batch of one


@step(*filter(None, [FMA]))
def fma(e: Evaluate, args: list[Any], kwargs: dict[str, Any]) -> Any:
    return _sum(e, mul(e, args[:2], {}), args[2], 1)
