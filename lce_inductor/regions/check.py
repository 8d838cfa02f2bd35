"""Comparing what the kernels would compute with the region's own program: a few rows of random numbers, fp64, CPU.

Nothing here comes from the rules by which a match was found: the program is the user's own arithmetic, and the kernels
are described by their definition (spec/epilogue.py and the formula in fused.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph
from torch.utils._python_dispatch import _disable_current_modes

from ..graph.values import size_hint
from ..lower.region_values import evaluate
from ..spec.epilogue import STEPS, apply, apply_with_slope
from ..spec.program import Program, Step
from .algebra import Poly
from .fused import Count, Elem, NotFused, Wide
from .match import Match, same_rows
from .tags import LOCAL, ROW, shape_of

_ROWS = 2
_TOLERANCE = 1e-8


def check(match: Match, slopes: tuple[Any, ...], classes: int) -> float:
    """Raises NotFused if the programs and the kernels differ; returns the number by which row gradients are divided.

    classes: V, by hint.
    """
    with _disable_current_modes():  # the pass runs under a fake mode
        try:
            return _check(match, slopes, classes)
        except (RuntimeError, IndexError, ValueError, TypeError) as error:  # an index of something else than classes
            raise NotFused(f"the region can't be run on numbers: {error}") from error


def _check(match: Match, slopes: tuple[Any, ...], classes: int) -> float:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(_ROWS, classes, generator=generator, dtype=torch.float64)
    numbers = _Numbers(match, z, generator)
    numbers.logits(match)
    factor = _slope_factor(match.epilogue, slopes)
    for program, emitter, expected in match.programs:
        sizes = [hint(emitter.labels.graph, s) for s in emitter.sizes]
        got = evaluate(_in_double(program), numbers.inputs(program, emitter), _ROWS, sizes)
        for value, want in zip(got, expected):
            if want is None:
                continue
            ours = numbers.wide(want, factor) if isinstance(want, Wide) else numbers.row(want)
            _compare(value, ours)
    return factor


def _compare(value: Tensor, ours: Tensor) -> None:
    theirs = value.to(torch.float64)
    ours = ours.to(torch.float64)
    if ours.numel() not in (1, theirs.numel()):
        raise NotFused("values of another shape")
    ours = ours.reshape(theirs.shape) if ours.numel() == theirs.numel() else ours.expand_as(theirs)
    scale = max(theirs.abs().max().item(), 1e-3) if theirs.numel() else 1.0
    error = (theirs - ours).abs().max().item() if theirs.numel() else 0.0
    if not error <= _TOLERANCE * scale:
        raise NotFused(f"disagrees: the kernels differ from the region by {error:.3g} at a size of {scale:.3g}")


def _in_double(program: Program) -> Program:
    """The same with every floating dtype fp64."""

    def wide(value: Any) -> Any:
        if isinstance(value, torch.dtype) and value.is_floating_point:
            return torch.float64
        if type(value) in (tuple, list):
            return tuple(wide(v) for v in value)
        return value

    steps = tuple(Step(s.op, wide(s.args), {k: wide(v) for k, v in s.kwargs.items()}) for s in program.steps)
    return Program(program.inputs, steps, program.results)


def hint(graph: Graph, expr: Any) -> int:
    """A number for a symbolic size: the hint of what has that size in the graph."""
    if isinstance(expr, int):
        return expr
    for node in graph.nodes:
        value = node.meta.get("val")
        for s in value.shape if isinstance(value, torch.Tensor) else [value]:
            if isinstance(s, torch.SymInt) and s.node.expr == expr:
                return size_hint(s)
    raise NotFused(f"a size without a hint: {expr}")


def _slope_factor(epilogue: tuple[Any, ...], slopes: tuple[Any, ...]) -> float:
    """The number by which the program's own slopes are short of the epilogue's derivative."""
    z = torch.linspace(-3.1, 2.9, 17, dtype=torch.float64)
    _, slope = apply_with_slope(epilogue, z)
    wanted = torch.ones_like(z) if slope is None else torch.as_tensor(slope, dtype=torch.float64).expand_as(z)
    own = torch.ones_like(z)
    for tree in slopes:
        own = own * _elementwise(tree, z)
    ratio = wanted / own
    if not (ratio - ratio[0]).abs().max().item() <= 1e-9 * ratio[0].abs().item():
        raise NotFused("a gradient by another derivative than the epilogue's")
    return float(ratio[0])


def _elementwise(tree: Any, z: Tensor) -> Any:
    if not isinstance(tree, tuple):
        return tree
    name, *args = tree
    if name == "z":
        return z
    values = [_elementwise(a, z) for a in args]
    if name == "add":
        return values[0] + values[1] * values[2]
    return STEPS[name].value(*values)


class _Numbers:
    """Random numbers for what a match reads, the same wherever it is read, and the values of the kernels for them."""

    def __init__(self, match: Match, z: Tensor, generator: torch.Generator) -> None:
        self.match, self.z, self.generator = match, z, generator
        self.of: dict[Any, Tensor] = {}

    def logits(self, match: Match) -> None:
        """What the kernels see of z: fewer classes, and a bias that is added."""
        self.seen = self.z if match.cut is None else self.z[:, slice(*match.cut)]
        if match.bias is not None:
            self.seen = self.seen + self._whole(match.bias).to(torch.float64).reshape(-1)
        self.y = apply(match.epilogue, self.seen)
        self.lse = self.y.logsumexp(1)

    def inputs(self, program: Program, emitter: Any) -> list[Tensor]:
        rows, whole = iter(emitter.given["rows"]), iter(emitter.given["whole"])
        pick = {
            "logits": lambda: self.z,
            "rows": lambda: self._row(next(rows)),
            "whole": lambda: self._whole(next(whole)),
        }
        return [pick[kind]() for kind in program.inputs]

    def _row(self, what: Any) -> Tensor:
        node, tags, _, expanded, classes = what
        key = _key(node, classes)
        value = node.meta["val"]
        locals_ = [size_hint(s) for s, t in zip(expanded or value.shape, tags) if t != ROW]
        if any(t == LOCAL for t in tags):  # x, for dW: no value of it is read by the program
            return torch.zeros(_ROWS, *locals_, dtype=torch.float64)
        return self._new(key, [_ROWS], value).reshape(_ROWS, *locals_)

    def _whole(self, what: Any) -> Tensor:
        node = what[0]
        value = node.meta["val"]
        shape = [size_hint(s) for s in value.shape]
        if isinstance(self._kind(node), Count):
            return torch.arange(max(shape)).reshape(shape)
        return self._new(("whole", node.name), shape, value)

    def _kind(self, node: Any) -> Any:
        from .match import _counts

        return Count() if len(shape_of(node) or ()) and _counts(node) else None

    def _new(self, key: Any, shape: list[int], like: Tensor) -> Tensor:
        if key not in self.of:
            if like.dtype == torch.bool:
                made = torch.rand(shape, generator=self.generator) < 0.5
            elif not like.dtype.is_floating_point:
                made = torch.randint(0, self.classes(), shape, generator=self.generator)
            else:
                made = torch.rand(shape, generator=self.generator, dtype=torch.float64) + 0.5
            self.of[key] = made
        return self.of[key]

    def classes(self) -> int:
        return self.z.shape[1] if self.match.cut is None else self.match.cut[1] - self.match.cut[0]

    def target(self, column: int) -> Tensor:
        what = self.match.columns[column]
        return self._new(_key(what.node, what.classes), [_ROWS], what.node.meta["val"])

    def row(self, p: Poly) -> Tensor:
        total = torch.zeros(_ROWS, dtype=torch.float64)
        for monomial, c in p.terms.items():
            term = torch.full((_ROWS,), c, dtype=torch.float64)
            for atom in monomial:
                term = term * self._atom(atom)
            total = total + term
        return total

    def _atom(self, atom: Any) -> Tensor:
        kind, name, *rest = atom
        if kind == "stat":
            return self._stat(name, rest)
        if kind == "call":
            return _CALLS[name](*(self.row(Poly(dict(a))) for a in rest))
        if name == "rows":
            return self.of[("rows", rest[0])].to(torch.float64)
        if name == "whole":
            return self.of[("whole", rest[0])].to(torch.float64).reshape(1)
        vector = self._vector(rest[0])
        return vector.sum().reshape(1) if name == "total" else vector[self.target(rest[1])]

    def _vector(self, index: int) -> Tensor:
        what = self.match.atoms[("in", "total", index)]
        return self._whole(what).to(torch.float64).reshape(-1)

    def _stat(self, name: str, rest: Any) -> Tensor:
        y = self.y
        if name == "lse":
            return self.lse
        if name == "target":
            return y.gather(1, self.target(rest[0])[:, None])[:, 0]
        if name == "sum":
            return y.sum(1) if rest[0] is None else y @ self._vector(rest[0])
        if name == "max":
            return y.amax(1)
        if name == "argmax":
            return y.argmax(1).to(torch.float64)
        log_p = y - self.lse[:, None]
        return (log_p.exp() * log_p).sum(1)

    def wide(self, w: Wide, factor: float) -> Tensor:
        """dz by the kernels' formula: dy, with its factors of epilogues divided out, times the epilogue's slope."""
        p = (self.y - self.lse[:, None]).exp()
        d = torch.zeros_like(self.y)
        for basis, c in w.terms.items():
            value = self.row(c)[:, None] / factor
            if basis == "P":
                d += value * p
            elif basis == "PY":
                d += value * p * self.y
            elif basis == "1":
                d += value
            elif basis[0] == "onehot":
                d.scatter_add_(1, self.target(basis[1])[:, None], value)
            else:
                d += value * self._vector(basis[1])
        _, slope = apply_with_slope(self.match.epilogue, self.seen)
        d = d if slope is None else d * slope
        if self.match.cut is None:
            return d
        whole = torch.zeros_like(self.z)
        whole[:, slice(*self.match.cut)] = d
        return whole


_CALLS: dict[str, Callable[..., Tensor]] = {
    "exp": torch.exp,
    "log": torch.log,
    "abs": torch.abs,
    "reciprocal": torch.reciprocal,
    "eq": lambda a, b: (a == b).to(torch.float64),
    "where": lambda c, a, b: torch.where(c != 0, a, b),
}

__all__ = ["Elem", "check"]


def _key(node: Any, classes: Any) -> tuple[Any, ...]:
    """Of the values of rows; indices that count from the end are others than the same that don't."""
    return ("rows", same_rows(node), *(() if classes is None else (classes,)))
