"""Moves of rows, compared with the operation itself on real tensors; adjoints with what autograd gives."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph

from lce_inductor.regions.spaces import Move, Space, adjoint, ancestors, apply, forward_move, reached, related
from lce_inductor.regions.tags import ROW

aten = torch.ops.aten


class Value:
    """A tensor that says what a node says of its value."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.meta = tensor, {"val": tensor}


def call(op: Any, *args: Any, **kwargs: Any) -> Value:
    args = torch.utils._pytree.tree_map(lambda a: a.tensor if isinstance(a, Value) else a, args)
    return Value(op(*args, **kwargs))


def program(t: Tensor, tags: str) -> Tensor:
    """As inside a program: rows first, in one dimension."""
    order = [d for d, k in enumerate(tags) if k == ROW] + [d for d, k in enumerate(tags) if k != ROW]
    locals_ = [s for s, k in zip(t.shape, tags) if k != ROW]
    return t.permute(order).reshape(-1, *locals_)


def moved(op: Any, x: Tensor, tags: str, *args: Any) -> tuple[Move, str] | None:
    """The move that a node with this operation makes."""
    graph = Graph()
    holes = []
    for t in (x, *(a for a in torch.utils._pytree.tree_leaves(args) if isinstance(a, Tensor))):
        hole = graph.placeholder(f"p{len(holes)}")
        hole.meta["val"] = t
        holes.append(hole)
    rest = iter(holes[1:])
    args = torch.utils._pytree.tree_map(lambda a: next(rest) if isinstance(a, Tensor) else a, args)
    node = graph.call_function(op, (holes[0], *args))
    node.meta["val"] = out = op(
        x, *torch.utils._pytree.tree_map(lambda a: a.meta["val"] if hasattr(a, "meta") else a, args)
    )
    made = forward_move(node, tags)
    if made is None:
        return None
    target, given, after = made
    given = torch.utils._pytree.tree_map(lambda a: a.meta["val"] if isinstance(a, torch.fx.Node) else a, given)
    sizes = lambda t, tags: tuple(s for s, k in zip(t.shape, tags) if k == ROW)
    before, behind = sizes(x, tags), sizes(out, after)
    count = lambda s: torch.Size(s).numel()
    return Move(Space(count(before)), Space(count(behind)), target, given, before, behind, node), after


PICKS, MORE = torch.tensor([2, 0, 2, 1]), torch.tensor([1, 1, 3, 0])
MASK = torch.tensor([True, False, True, True])
OPERATIONS = {
    "slice": (aten.slice.Tensor, 0, 1, 3),
    "slice from the end": (aten.slice.Tensor, 1, -3, -1),
    "slice with a step": (aten.slice.Tensor, 1, 0, 9, 2),
    "slice of the last": (aten.slice.Tensor, -1, 1, 2**63 - 1),
    "select": (aten.select.int, 1, 2),
    "select the last": (aten.select.int, 0, -1),
    "index": (aten.index.Tensor, [PICKS]),
    "index the second": (aten.index.Tensor, [None, PICKS]),
    "index the third": (aten.index.Tensor, [None, None, PICKS]),
    "index two": (aten.index.Tensor, [PICKS, MORE]),
    "index the last two": (aten.index.Tensor, [None, PICKS, MORE]),
    "index by a matrix": (aten.index.Tensor, [PICKS.reshape(2, 2)]),
    "index broadcast": (aten.index.Tensor, [PICKS[:, None], MORE[None]]),
    "mask": (aten.index.Tensor, [MASK]),
    "mask of the second": (aten.index.Tensor, [None, MASK]),
    "mask of two": (aten.index.Tensor, [torch.rand(4, 4, generator=torch.Generator().manual_seed(0)) > 0.5]),
    "index_select": (aten.index_select.default, 1, PICKS),
    "flip": (aten.flip.default, [0]),
    "flip two": (aten.flip.default, [0, -1]),
    "permute": (aten.permute.default, [2, 0, 1]),
    "permute back": (aten.permute.default, [1, 2, 0]),
    "transpose": (aten.transpose.int, 0, 1),
    "transpose the last": (aten.transpose.int, -1, 1),
}


@pytest.mark.parametrize("tags", ["rrr", "rrl", "rlr", "lrr", "rll", "lrl", "llr"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_move_is_the_operation(name, tags):
    op, *args = OPERATIONS[name]
    x = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    made = moved(op, x, tags, *args)
    if made is None:
        return
    move, after = made
    out = op(x, *args)
    locals_ = [s for s, k in zip(x.shape, tags) if k != ROW]
    found = apply(move, call, Value(program(x, tags)), locals_).tensor
    # the operation may bring the local dimensions into another order, which is no business of the move's
    assert after.count(ROW) == len(move.rows_after)
    wanted = program(out, after)
    orders = itertools.permutations(range(1, wanted.dim()))
    assert any(torch.equal(found, wanted.permute(0, *o)) for o in orders if wanted.permute(0, *o).shape == found.shape)
    # <move(x), g> = <x, adjoint(g)>
    g = torch.randn(found.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    back = adjoint(move, call, Value(g), locals_).tensor
    torch.testing.assert_close((found * g).sum(), (program(x, tags) * back).sum())
    assert back.shape == program(x, tags).shape


def test_every_operation_moves_rows_somewhere():
    x = torch.zeros(4, 4, 4)
    assert all(moved(op, x, "rrr", *args) is not None for op, *args in OPERATIONS.values())


def test_what_leaves_the_rows_alone_is_no_move():
    x = torch.zeros(4, 4, 4)
    assert moved(aten.slice.Tensor, x, "rrl", 2, 1, 3) is None
    assert moved(aten.permute.default, x, "rlr", [0, 2, 1]) is None  # rows keep their order
    assert moved(aten.index.Tensor, x, "rll", [PICKS, MORE]) is None  # of rows and classes together
    assert moved(aten.flip.default, x, "rrl", [0, 2]) is None


def chain(*links: tuple[Space, Space]) -> None:
    for before, after in links:
        move = SimpleNamespace(before=before, after=after)
        before.moves.append(move)
        after.found_from.append(move)


def test_two_ways_from_rows_to_others():
    """Joined, siblings would be one set that two moves lead to; whichever is written, half of it is wrong."""
    a, b, c, d, other, moved_other = (Space(4) for _ in range(6))
    chain((a, b), (a, c), (b, d), (other, moved_other))
    assert related(b, c) and related(c, d) and related(a, b) and related(a, d) and related(d, a)
    assert not related(b, moved_other) and not related(d, other)
    assert reached(a) == {a, b, c, d} and set(ancestors(d)) == {a, b}
    b.join(moved_other)
    assert related(a, other)  # what follows from both is one already
    assert not related(c, Space(4))
