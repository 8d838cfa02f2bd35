"""Tags of dimensions, checked on real tensors that know which row and which class each of their elements is."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lce_inductor.regions.tags import LOCAL, ONE, ROW, aligned, local_sizes, position, same_size, through_view


def numbered(tags: str, shape: tuple[int, ...], kind: str) -> Tensor:
    """Each element's row (or its place among the local ones), counted in the order of the dimensions of that kind."""
    sizes = [s if t == kind else 1 for s, t in zip(shape, tags)]
    return torch.arange(math.prod(sizes)).reshape(sizes).expand(shape).contiguous()


def fits(tags: str, new: tuple[int, ...], rows: Tensor, locals_: Tensor) -> bool:
    return torch.equal(rows, numbered(tags, new, ROW)) and torch.equal(locals_, numbered(tags, new, LOCAL))


@st.composite
def views(draw):
    """Tags, a shape and another of as many elements, of factors that may be put together differently."""
    factors = draw(st.lists(st.sampled_from([2, 2, 3, 4]), min_size=1, max_size=5))
    kinds = draw(st.lists(st.sampled_from([ROW, LOCAL]), min_size=len(factors), max_size=len(factors)))

    def grouped(values):
        out = [1]
        for v in values:
            if out[-1] != 1 and draw(st.booleans()):
                out[-1] *= v
            else:
                out.append(v)
        return out[1:]

    old, tags = [], ""
    for kind, part in itertools.groupby(zip(kinds, factors), key=lambda p: p[0]):
        sizes = grouped([f for _, f in part])
        old += sizes
        tags += kind * len(sizes)
    order = draw(st.permutations(factors)) if draw(st.booleans()) else factors
    new = grouped(order)
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(old)))
        old.insert(at, 1)
        tags = tags[:at] + ONE + tags[at:]
        new.insert(draw(st.integers(0, len(new))), 1)
    return tags, tuple(old), tuple(new)


@settings(max_examples=400, deadline=None)
@given(views())
def test_through_view(case):
    """Rows stay rows, in order, and what is None has no tags at all."""
    tags, old, new = case
    rows, locals_ = (numbered(tags, old, kind).reshape(new) for kind in (ROW, LOCAL))
    found = through_view(tags, old, new)
    if found is not None:
        assert all((t == ONE) == (s == 1) for t, s in zip(found, new)) and fits(found, new, rows, locals_)
        return
    several = [i for i, s in enumerate(new) if s != 1]
    for choice in itertools.product(ROW + LOCAL, repeat=len(several)):
        other = "".join(dict(zip(several, choice)).get(i, ONE) for i in range(len(new)))
        assert not fits(other, new, rows, locals_), other


@pytest.mark.parametrize(
    "tags, old, new, expected",
    [
        ("rrl", (4, 6, 37), (24, 37), "rl"),
        ("rl", (24, 37), (4, 6, 37), "rrl"),
        ("rl", (24, 36), (24, 4, 9), "rll"),
        ("rl", (24, 36), (48, 18), None),
        ("rl", (37, 37), (37, 37), "rl"),
        ("lr", (37, 37), (37, 37), "lr"),
        ("rl", (6, 6), (36,), None),
        ("r.", (24, 1), (24,), "r"),
        ("r.", (24, 1), (4, 6), "rr"),
        (".l", (1, 37), (37,), "l"),
        ("r", (0,), (0,), None),
        ("", (), (), ""),
        ("..", (1, 1), (1,), "."),
    ],
)
def test_views_by_hand(tags, old, new, expected):
    assert through_view(tags, old, new) == expected


def test_where_a_dimension_stands_in_a_program():
    """Rows are the first, all others follow in their order."""
    assert [position("lrlr.", d) for d in (0, 2, 4)] == [1, 2, 3]
    assert [position("l.", d) for d in (0, 1)] == [0, 1]
    assert local_sizes("lrl", (3, 24, 37)) == [3, 37] and aligned("rl", 4) == "..rl"


def test_symbols_are_compared_as_expressions():
    import sympy

    s, t = sympy.symbols("s t", positive=True, integer=True)
    assert same_size(s * t, t * s) and not same_size(s, t) and not same_size(s, 4)
    assert through_view("rrl", (s, t, 37), (s * t, 37)) == "rl"
    assert through_view("rl", (s * t, 37), (s, t, 37)) == "rrl"
    assert through_view("rl", (s, 37), (t, 37)) is None
