"""Polynomials of row values, compared with the numbers that they stand for."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lce_inductor.regions import algebra
from lce_inductor.regions.algebra import Poly

ATOMS = {("stat", "lse"): 1.25, ("stat", "max"): -0.5, ("in", "rows", "r"): 2.0}
CALLS = {"exp": math.exp, "log": math.log, "abs": abs, "reciprocal": lambda v: 1 / v}


def value(p: Poly) -> float:
    total = 0.0
    for monomial, c in p.terms.items():
        for atom in monomial:
            c *= CALLS[atom[1]](*(value(Poly(dict(k))) for k in atom[2:])) if atom[0] == "call" else ATOMS[atom]
        total += c
    return total


leaves = st.one_of(
    st.sampled_from(sorted(ATOMS)).map(lambda a: (Poly.atom(*a), ATOMS[a])),
    st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0]).map(lambda c: (Poly.number(c), c)),
)


def combined(inner):
    pairs = st.tuples(inner, inner)
    small = inner.filter(lambda p: abs(p[1]) < 5)
    return st.one_of(
        pairs.map(lambda p: (p[0][0] + p[1][0], p[0][1] + p[1][1])),
        pairs.map(lambda p: (p[0][0] - p[1][0], p[0][1] - p[1][1])),
        pairs.map(lambda p: (p[0][0] * p[1][0], p[0][1] * p[1][1])),
        inner.map(lambda p: (-p[0], -p[1])),
        small.map(lambda p: (algebra.exp(p[0]), math.exp(p[1]))),
        pairs.filter(lambda p: abs(p[1][1]) > 0.05).map(
            lambda p: (algebra.divided(p[0][0], p[1][0]), p[0][1] / p[1][1])
        ),
    )


@settings(max_examples=400, deadline=None)
@given(st.recursive(leaves, combined, max_leaves=8))
def test_polynomials_are_the_numbers(case):
    p, number = case
    close = pytest.approx(number, rel=1e-6, abs=1e-6)
    try:
        assert value(p) == close and value(algebra.simplified(p)) == close and value(Poly(dict(p.key()))) == close
    except OverflowError:
        return
    if p.as_number() is not None:
        assert p.as_number() == close


def test_what_cancels_is_gone():
    lse, top = Poly.atom("stat", "lse"), Poly.atom("stat", "max")
    assert ((lse - top) + top).key() == lse.key()
    assert (lse - lse).as_number() == 0.0 and not (lse - lse).terms
    product = algebra.simplified(algebra.exp(lse - top) * algebra.exp(top - lse))
    assert product.as_number() == 1.0
    assert (
        algebra.divided(algebra.exp(lse), algebra.exp(lse)).terms
        and algebra.simplified(algebra.divided(algebra.exp(lse), algebra.exp(lse))).as_number() == 1.0
    )


def test_a_row_value_is_no_number():
    assert Poly.atom("stat", "lse").as_number() is None
    assert (Poly.atom("stat", "lse") + Poly.number(1)).as_number() is None
    assert Poly.number(0).as_number() == 0.0


def test_atoms_inside_of_calls_count():
    p = algebra.call("where", Poly.atom("in", "rows", "m"), algebra.exp(Poly.atom("stat", "lse")), Poly.number(0))
    assert {("in", "rows", "m"), ("stat", "lse")} <= p.atoms()
