"""A program in fewer passes over its values [n, V]: what is done there though it could be done for the row alone.

Autograd's derivatives spread numbers of rows over the classes first and compute with them then, and add up over the
classes what is known to add up to one. Here

    numbers of rows meet before they are spread, and meet values [n, V] as they are, [n, 1]
    g - softmax * sum(g), the gradient of a log_softmax, is made of the softmaxes and one-hots that g consists of: each
        of them adds up to one, and a one-hot is one element of each row
    a class is picked before numbers of rows are taken off
    the exponentials that were added up for a softmax become it by a product with a number of the row
    a product and a sum behind it are one step, and so are two factors of which one is a number

The first is exact, the others are right to a rounding. Where a factor of a row is not finite, neither way gives a
gradient that is.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..spec.program import Program, Ref, Result, Rows, Step, mapped, name_of, only, parse, resolve
from .region_values import Meta, call, propagate, refs

log = logging.getLogger(__name__)
aten = torch.ops.aten

_TIMES = (aten.mul.Tensor, aten.mul.Scalar)
_BY = (aten.div.Tensor, aten.div.Scalar)
_SUMS = (aten.add.Tensor, aten.sub.Tensor)
_PUT = (aten.scatter.value, aten.scatter.src, aten.scatter_add.default)
# Rows of the fakes by which shapes are told apart: no other dimension is likely to be as long.
_N = 1009
# Numbers that may meet another factor first: neither overflow nor underflow comes near.
_MILD = 2.0**20


class _Term(NamedTuple):
    """Of a sum: factor * softmax, a value here, or factor * one-hot of an index [n, 1]. factor: a value [n, 1] here, or
    a number."""

    factor: Any
    softmax: Ref | None
    label: Ref | None


@functools.lru_cache(maxsize=256)
def tidied(text: str, inputs: tuple[Meta, ...], sizes: tuple[int, ...], device: torch.device) -> str:
    """The text of a program with the same results, in order, of the same inputs; as it is where there is an error."""
    fakes = propagate(text, _N, inputs, sizes, device)
    try:
        tidy = _Tidy(parse(text), fakes, sizes, device)
        found = tidy.program()
        for old, new in zip(tidy.given.results, tidy.results):
            a, b = fakes[old.value.index], tidy.known[new.value.index]
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                raise RuntimeError(f"a result {a.dtype} {list(a.shape)} became {b.dtype} {list(b.shape)}")
        return found.text()
    except Exception as error:
        log.warning("a region's program runs as it is, in more passes than it might: %s", error, exc_info=True)
        return text


class _Tidy:
    """Values are told apart by their place: `old` of the given program, Ref of the one that is written.

    at: what stands for each old value. known: a fake of each value that is written, for _N rows. spread: values [n, V]
    that are a value [n, 1] or one number, and of which. scaled: values that are another one times a number. shares:
    softmaxes that are exponentials times a value [n, 1]. users: how often an old value is read.
    """

    def __init__(self, program: Program, fakes: list[Any], sizes: tuple[int, ...], device: torch.device) -> None:
        self.given, self.fakes, self.sizes, self.device = program, fakes, sizes, device
        self.steps: list[Step] = []
        self.results: tuple[Result, ...] = ()
        self.at = [Ref(i) for i in range(len(program.inputs))]
        self.known = fakes[: len(program.inputs)]
        self.spread: dict[Ref, tuple[Ref, Any]] = {}
        self.scaled: dict[Ref, tuple[Ref, float]] = {}
        self.shares: dict[Ref, tuple[Ref, Ref]] = {}
        self.users: dict[int, int] = {}
        for step in program.steps:
            for old in (*refs(step.args), *refs(step.kwargs)):
                self.users[old] = self.users.get(old, 0) + 1
        for result in program.results:
            self.users[result.value.index] = self.users.get(result.value.index, 0) + 2

    def program(self) -> Program:
        for old, step in enumerate(self.given.steps, len(self.given.inputs)):
            self.at.append(self._written(old, step))
        self.results = tuple(r._replace(value=self.at[r.value.index]) for r in self.given.results)
        return only(Program(self.given.inputs, tuple(self.steps), self.results), range(len(self.results)))

    def _written(self, old: int, step: Step) -> Ref:
        op = resolve(step.op)
        here = Step(step.op, mapped(step.args, self._now), {k: mapped(v, self._now) for k, v in step.kwargs.items()})
        if self._is_float(old):
            made = None
            if op is aten.sub.Tensor:
                made = self._gradient_of_log_softmax(old)
            elif op is aten.exp.default:
                made = self._share(old)
            elif op is aten.gather.default:
                made = self._picked(old)
            if made is not None:
                return made
            if op is aten.pow.Tensor_Scalar and step.args[1] == 1 and self._alike(old, step.args[0]):
                return here.args[0]  # type: ignore[no-any-return]
            if op in _SUMS and (made := self._sum_with_product(old)) is not None:
                return made
        if isinstance(op, torch._ops.OpOverload) and torch.Tag.pointwise in op.tags:
            return self._pointwise(old, here)
        made = self._step(here)
        if op is aten.expand.default and self._is_narrow(here.args[0]) and self._is_wide(made):
            base = here.args[0]
            if self.known[base.index].dim() < 2:  # without dimensions it would no longer decide the dtype
                base = self._op(aten.reshape.default, base, (1, 1))
            self.spread[made] = base, here.args[1][1]
        return made

    def _now(self, ref: Ref) -> Ref:
        return self.at[ref.index]

    def _step(self, step: Step) -> Ref:
        mode = next(f.fake_mode for f in self.fakes if isinstance(f, torch._subclasses.FakeTensor))
        with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad(), mode:
            self.known.append(call(step, self.known, _N, self.sizes, self.device))
        self.steps.append(step)
        return Ref(len(self.known) - 1)

    def _op(self, op: Any, *args: Any, **kwargs: Any) -> Ref:
        return self._step(Step(name_of(op), args, kwargs))

    # -- what is known of values

    def _is_float(self, old: int) -> bool:
        value = self.fakes[old]
        return isinstance(value, Tensor) and value.dtype in (torch.float32, torch.float64)

    def _is_of_rows(self, ref: Any) -> bool:
        value = self.known[ref.index]
        return isinstance(value, Tensor) and value.shape == (_N, 1)

    def _is_narrow(self, ref: Any) -> bool:
        value = self.known[ref.index]
        return self._is_of_rows(ref) or (isinstance(value, Tensor) and value.numel() == 1 and value.dim() < 3)

    def _is_wide(self, ref: Any) -> bool:
        value = self.known[ref.index]
        return isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] > 2

    def _same_dtype(self, a: Ref, b: Ref) -> bool:
        return bool(self.known[a.index].dtype == self.known[b.index].dtype)

    def _alike(self, old: int, other: Any) -> bool:
        if not isinstance(other, Ref):
            return False
        a, b = self.fakes[old], self.fakes[other.index]
        return isinstance(b, Tensor) and (a.shape, a.dtype) == (b.shape, b.dtype)

    def _of(self, old: Any) -> tuple[Any, tuple[Any, ...]]:
        """The op and arguments of an old value; none of an input, of a number, and of steps with more than that."""
        if not isinstance(old, Ref) or old.index < len(self.given.inputs):
            return None, ()
        step = self.given.steps[old.index - len(self.given.inputs)]
        return (None, ()) if step.kwargs else (resolve(step.op), step.args)

    def _factor(self, what: Any, dtype: torch.dtype) -> Any:
        """What is the same for all classes: a number, or a value [n, 1] or of one element here, of that dtype, in which
        factors meet each other; else None."""
        if isinstance(what, (int, float)):
            return None if isinstance(what, bool) else float(what)
        if not isinstance(what, Ref):
            return None
        now, _ = self.spread.get(self._now(what), (self._now(what), None))
        return now if self._is_narrow(now) and self.known[now.index].dtype == dtype else None

    # -- numbers of rows

    def _pointwise(self, old: int, step: Step) -> Ref:
        """On numbers of rows as they are. What is behind it sees the same shape."""
        op, operands = resolve(step.op), [r for r in step.args if isinstance(r, Ref)]
        spread = [r for r in operands if r in self.spread]
        if spread and not refs(step.kwargs) and len(operands) == len(refs(step.args)):
            others = [r for r in operands if r not in self.spread]
            narrow = step._replace(args=mapped(step.args, lambda r: self.spread[r][0] if r in self.spread else r))
            if any(self.known[r.index].shape == self.fakes[old].shape for r in others):
                step = narrow
            elif all(map(self._is_narrow, others)):
                of_rows, size = self._step(narrow), self.spread[spread[0]][1]
                made = self._op(aten.expand.default, of_rows, (Rows(), size))
                self.spread[made] = of_rows, size
                return made
        if self._is_float(old) and not step.kwargs:
            return self._times_number(op, step)
        return self._step(step)

    def _times_number(self, op: Any, step: Step) -> Ref:
        """A product or a change of sign, with the number by which an operand was multiplied in its other factor."""
        if op is aten.neg.default and step.args[0] in self.scaled:
            of, number = self.scaled[step.args[0]]
            return self._scaled(of, -number)
        if op in _TIMES:
            for a, b in (step.args, step.args[::-1]):
                if isinstance(b, (int, float)) and not isinstance(b, bool) and isinstance(a, Ref):
                    of, number = self.scaled.get(a, (a, 1.0)) if _is_mild(b) else (a, 1.0)
                    return self._scaled(of, number * b) if self._is_wide(a) else self._step(step)
                if a in self.scaled and isinstance(b, Ref) and self._is_narrow(b) and self._same_dtype(a, b):
                    of, number = self.scaled[a]
                    return self._op(aten.mul.Tensor, of, self._op(aten.mul.Tensor, b, number))
        return self._step(step)

    def _scaled(self, of: Ref, number: float) -> Ref:
        made = self._op(aten.mul.Tensor, of, number)
        if _is_mild(number):
            self.scaled[made] = of, number
        return made

    def _sum_with_product(self, old: int) -> Ref | None:
        """a + b * c and a - b * c as one step, where the product is read by nothing else."""
        op, args = self._of(Ref(old))
        shape = self.fakes[old].shape
        if op not in _SUMS or len(shape) != 2 or shape[1] < 3 or not all(self._alike(old, a) for a in args):
            return None
        for a, product in (args, args[::-1]) if op is aten.add.Tensor else (args,):
            times, factors = self._of(product)
            if times is not aten.mul.Tensor or self.users[product.index] > 1 or not all(
                isinstance(f, Ref) and self.fakes[f.index].dtype == self.fakes[old].dtype for f in factors
            ):  # fmt: skip
                continue
            made = self.steps[self._now(product).index - len(self.given.inputs)]
            if resolve(made.op) is aten.mul.Tensor and all(isinstance(f, Ref) for f in made.args):
                more = {} if op is aten.add.Tensor else {"value": -1}
                return self._op(aten.addcmul.default, self._now(a), *made.args, **more)
        return None

    # -- softmaxes

    def _picked(self, old: int) -> Ref | None:
        """gather(a - row) as gather(a) - row."""
        _, args = self._of(Ref(old))
        if len(args) != 3 or args[1] not in (1, -1) or self.fakes[args[2].index].shape != (_N, 1):
            return None
        op, of = self._of(args[0])
        if op is not aten.sub.Tensor or not self._alike(args[0].index, of[0]) or not isinstance(of[1], Ref):
            return None
        row = self._factor(of[1], self.fakes[old].dtype)
        if row is None:
            return None
        return self._op(aten.sub.Tensor, self._op(aten.gather.default, self._now(of[0]), 1, self._now(args[2])), row)

    def _share(self, old: int) -> Ref | None:
        """exp(a - log(s)) as exp(a) / s, where a is at most zero and s = sum(exp(a)) at least one."""
        if not self._is_softmax(Ref(old)):
            return None
        _, (a, log) = self._of(self._of(Ref(old))[1][0])
        op, of = self._of(a)
        top, reads = self._of(of[1]) if op is aten.sub.Tensor else (None, ())
        if top is not aten.amax.default or reads[0] != of[0] or list(reads[1]) not in ([1], [-1]):
            return None
        total = self._of(log)[1][0]
        share = self._now(self._of(total)[1][0]), self._op(aten.reciprocal.default, self._now(total))
        made = self._op(aten.mul.Tensor, *share)
        self.shares[made] = share
        return made

    def _is_softmax(self, old: Any) -> bool:
        """exp(a - log(sum(exp(a)))), or exp(a) / sum(exp(a))."""
        op, args = self._of(old)
        if op is aten.exp.default:
            op, args = self._of(args[0])
            log, of = self._of(args[1]) if op is aten.sub.Tensor else (None, ())
            exp, exponent = self._of(self._added_up(of[0])) if log is aten.log.default else (None, ())
            return exp is aten.exp.default and exponent == args[:1]
        if op is aten.div.Tensor:
            return self._of(args[0])[0] is aten.exp.default and self._added_up(args[1]) == args[0]
        return False

    def _added_up(self, old: Any) -> Ref | None:
        """What a step [n, 1] adds up over all classes."""
        op, args = self._of(old)
        if op is not aten.sum.dim_IntList or len(args) != 3 or list(args[1]) not in ([1], [-1]) or args[2] is not True:
            return None
        of: Ref = args[0]
        return of if self._is_float(of.index) and self.fakes[of.index].dim() == 2 else None

    def _gradient_of_log_softmax(self, old: int) -> Ref | None:
        """g - softmax * sum(g)."""
        _, args = self._of(Ref(old))
        if len(args) != 2 or not all(self._alike(old, a) for a in args):
            return None
        g, product = args
        op, factors = self._of(product)
        if op is not aten.mul.Tensor or not all(isinstance(f, Ref) for f in factors):
            return None
        p, total = factors if self._added_up(factors[1]) == g else factors[::-1]
        terms = self._terms(g) if self._added_up(total) == g and self._alike(old, p) else None
        if not terms or (len(terms) > 1 and self.users[g.index] > 2):  # then g exists anyway
            return None
        total = functools.reduce(self._plus, (t.factor for t in terms))
        dz = self._op(aten.mul.Tensor, *self._weighted(self._now(p), self._times(total, -1.0)))
        for term in terms:
            if term.softmax is not None:
                of, factor = self._weighted(term.softmax, term.factor)
                if isinstance(factor, float):
                    dz = self._op(aten.add.Tensor, dz, of, **({} if factor == 1 else {"alpha": factor}))
                else:
                    dz = self._op(aten.addcmul.default, dz, of, factor)
        for term in terms:
            if term.label is not None:
                column = self._column(term.factor, self.fakes[old].dtype)
                dz = self._op(aten.scatter_add.default, dz, 1, term.label, column)
        return dz

    def _weighted(self, softmax: Ref, factor: Any) -> tuple[Ref, Any]:
        """A value and its factor, of softmax * factor."""
        of, share = self.shares.get(softmax, (softmax, 1.0))
        return of, self._times(share, factor)

    def _column(self, factor: Any, dtype: torch.dtype) -> Ref:
        if not isinstance(factor, Ref):
            return self._op(aten.full.default, (Rows(), 1), factor, dtype=dtype)
        return factor if self._is_of_rows(factor) else self._op(aten.expand.default, factor, (Rows(), 1))

    def _terms(self, old: Any) -> list[_Term] | None:
        """The softmaxes and one-hots that a value is a sum of; None if there is something else in it."""
        if self._is_softmax(old):
            return [_Term(1.0, self._now(old), None)]
        op, args = self._of(old)
        if op is aten.neg.default:
            return self._all_times(self._terms(args[0]), -1.0)
        if op in _SUMS and all(self._alike(old.index, a) for a in args):
            p, q = self._terms(args[0]), self._terms(args[1])
            q = self._all_times(q, -1.0) if op is aten.sub.Tensor else q
            return None if p is None or q is None else p + q
        if op in _TIMES or op in _BY:
            for a, b in (args, args[::-1]) if op in _TIMES else (args,):
                factor = self._factor(b, self.fakes[old.index].dtype) if self._alike(old.index, a) else None
                if factor is not None:
                    return self._all_times(self._terms(a), factor, op in _BY)
            return None
        if op in _PUT and self.fakes[args[2].index].shape == (_N, 1) and args[1] in (1, -1) and self._is_zero(args[0]):
            factor = self._factor(args[3], self.fakes[old.index].dtype)
            return None if factor is None else [_Term(factor, None, self._now(args[2]))]
        return None

    def _is_zero(self, old: Ref) -> bool:
        if old.index < len(self.given.inputs):
            return False
        step = self.given.steps[old.index - len(self.given.inputs)]
        return resolve(step.op) is aten.full.default and step.args[1] == 0

    def _all_times(self, terms: list[_Term] | None, factor: Any, by: bool = False) -> list[_Term] | None:
        return None if terms is None else [t._replace(factor=self._times(t.factor, factor, by)) for t in terms]

    def _times(self, a: Any, b: Any, by: bool = False) -> Any:
        if isinstance(a, float) and isinstance(b, float):
            return a / b if by else a * b
        if by:
            a = self._column(a, self.known[b.index].dtype) if isinstance(a, float) else a
            return self._op(aten.div.Tensor, a, b)
        a, b = (b, a) if isinstance(a, float) else (a, b)
        return a if b == 1 else self._op(aten.mul.Tensor, a, b)

    def _plus(self, a: Any, b: Any) -> Any:
        if isinstance(a, float) and isinstance(b, float):
            return a + b
        return self._op(aten.add.Tensor, *((b, a) if isinstance(a, float) else (a, b)))


def _is_mild(number: float) -> bool:
    return 1 / _MILD <= abs(number) <= _MILD
