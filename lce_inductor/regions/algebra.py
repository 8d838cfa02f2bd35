"""Row values as polynomials of atoms, so that what cancels does.

    log(sum(exp(y - max))) + max  =  (lse - max) + max  =  lse

An atom is a statistic ("stat", name[, key]), a tensor of one number a row that the program is given ("in", index), or a
function of such values ("call", name, arguments). A polynomial maps products of atoms, sorted, to their coefficient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Atom = tuple[Any, ...]
Monomial = tuple[Atom, ...]


class Poly:
    """A value of each row."""

    __slots__ = ("terms",)

    def __init__(self, terms: Mapping[Monomial, float]) -> None:
        self.terms = {m: c for m, c in terms.items() if c != 0}

    @staticmethod
    def number(value: float) -> Poly:
        return Poly({(): float(value)})

    @staticmethod
    def atom(*parts: Any) -> Poly:
        return Poly({(parts,): 1.0})

    def __add__(self, other: Poly) -> Poly:
        out = dict(self.terms)
        for m, c in other.terms.items():
            out[m] = out.get(m, 0.0) + c
        return Poly(out)

    def __neg__(self) -> Poly:
        return self.times(-1.0)

    def __sub__(self, other: Poly) -> Poly:
        return self + (-other)

    def __mul__(self, other: Poly) -> Poly:
        out: dict[Monomial, float] = {}
        for m, c in self.terms.items():
            for n, d in other.terms.items():
                both = tuple(sorted((*m, *n), key=repr))
                out[both] = out.get(both, 0.0) + c * d
        return Poly(out)

    def times(self, factor: float) -> Poly:
        return Poly({m: c * factor for m, c in self.terms.items()})

    def as_number(self) -> float | None:
        """Its value, if it is the same for every row."""
        if not self.terms:
            return 0.0
        return self.terms.get((), None) if set(self.terms) == {()} else None

    def key(self) -> tuple[Any, ...]:
        return tuple(sorted(self.terms.items(), key=repr))

    def atoms(self) -> set[Atom]:
        """All atoms, also those inside of calls."""
        found: set[Atom] = set()
        todo = [a for m in self.terms for a in m]
        while todo:
            atom = todo.pop()
            if atom in found:
                continue
            found.add(atom)
            if atom[0] == "call":
                todo += [a for key in atom[2:] if isinstance(key, tuple) for m, _ in key for a in m]
        return found


def call(name: str, *args: Poly) -> Poly:
    """A function of row values that has no normal form here."""
    return Poly.atom("call", name, *(a.key() for a in args))


def exp(p: Poly) -> Poly:
    number = p.as_number()
    return Poly.number(1.0) if number == 0.0 else call("exp", p)


def divided(p: Poly, q: Poly) -> Poly:
    number = q.as_number()
    if number is not None and number != 0:
        return p.times(1.0 / number)
    # exp(a) / exp(b): what a softmax written by hand divides by
    if len(q.terms) == 1:
        ((monomial, c),) = q.terms.items()
        if len(monomial) == 1 and monomial[0][:2] == ("call", "exp"):
            return (p * exp(-Poly(dict(monomial[0][2])))).times(1.0 / c)
    return p * call("reciprocal", q)


def simplified(p: Poly) -> Poly:
    """Products of exponentials as exponentials of sums."""
    out = Poly({})
    for monomial, c in p.terms.items():
        inside, rest = Poly({}), []
        for atom in monomial:
            if atom[:2] == ("call", "exp"):
                inside = inside + Poly(dict(atom[2]))
            else:
                rest.append(atom)
        term = Poly({tuple(rest): c})
        out = out + (term * exp(inside) if inside.terms else term)
    return out


def exponent(p: Poly, atom: Atom) -> tuple[Poly, Poly] | None:
    """q, c of p = q exp(atom - c), if all terms of p have such a factor: with the c of the first."""
    rest, first = Poly({}), None
    for monomial, coefficient in simplified(p).terms.items():
        exps = [a for a in monomial if a[:2] == ("call", "exp") and dict(a[2]).get((atom,)) == 1.0]
        if len(exps) != 1:
            return None
        inside = Poly(dict(exps[0][2]))
        first = first or inside
        others = Poly({tuple(a for a in monomial if a is not exps[0]): coefficient})
        rest = rest + others * exp(inside - first)
    return None if first is None else (simplified(rest), Poly.atom(*atom) - first)
