"""Sets of rows, and how one follows from another.

The rows of a head are those of its x. `logits[:, :-1]` are others: a *move* leads from the first set to the second. A
linear layer works row by row, so the move is made with x instead, and a gradient goes back by the move's adjoint:

    linear(x)[move] = linear(x[move])         dx = adjoint(dx of the moved rows)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from ..graph.write import rebind
from .aten_ops import at, bound
from .tags import ROW, Size, product, same_size, shape_of

aten = torch.ops.aten
prims = torch.ops.prims


class Space:
    """A set of rows. Two sets that meet element by element turn out to be one."""

    def __init__(self, count: Size) -> None:
        self.count = count
        self._same: Space | None = None
        self.moves: list[Move] = []  # from here
        self.sources: list[Node] = []
        self.found_from: list[Move] = []  # to here

    def find(self) -> Space:
        space = self
        while space._same is not None:
            space = space._same
        return space

    def join(self, other: Space) -> Space:
        a, b = self.find(), other.find()
        if a is not b:
            b._same = a
            a.moves += b.moves
            a.found_from += b.found_from
            a.sources += b.sources
        return a


@dataclasses.dataclass(eq=False)
class Move:
    """Rows of `before` in the shape `rows`, then `target` with `args` behind the tensor: dimensions count rows only."""

    before: Space
    after: Space
    target: Any
    args: tuple[Any, ...]
    rows: tuple[Any, ...]  # sizes as a graph may use them: numbers or SymInt values
    rows_after: tuple[Any, ...]
    node: Node

    @property
    def reorders(self) -> bool:
        """Every row is there once: what is done to the moved rows may be done to all, in another order."""
        return self.target in (aten.permute.default, aten.flip.default)

    def range(self) -> tuple[Size, Size] | None:
        """First and last row that are selected, where those are neighbours in the order of all."""
        inner = product(self.rows[1:])
        if self.target is aten.select.int and self.args[0] == 0:
            return self.args[1] * inner, (self.args[1] + 1) * inner
        if self.target is aten.slice.Tensor and self.args[0] == 0 and self.args[3] == 1:
            return self.args[1] * inner, self.args[2] * inner
        return None

    def same_as(self, target: Any, args: tuple[Any, ...], rows: tuple[Size, ...]) -> bool:
        return self.target is target and _alike(self.args, args) and len(rows) == len(self.rows) and all(
            map(same_size, rows, self.rows)
        )  # fmt: skip


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, Node) and isinstance(b, Node):
        return a is b or (_size_of(a) is not None and _size_of(a) == _size_of(b))
    return bool(type(a) is type(b) and not isinstance(a, Node) and a == b)


def _size_of(node: Node) -> Any:
    value = node.meta.get("val")
    return value.node.expr if isinstance(value, torch.SymInt) else None


def related(a: Space, b: Space) -> bool:
    """Would there be two ways from some rows to others if these were one set?

    Then the second way picks other rows: z[:-1] is not z[1:], though both have as many rows and the same source.
    """
    return any(reached(p) & reached(q) for s, q in ((a, b), (b, a)) for p in (s, *ancestors(s)))


def reached(space: Space) -> set[Space]:
    """These rows and all that follow from them."""
    found, todo = {space.find()}, [space.find()]
    while todo:
        for after in (move.after.find() for move in todo.pop().moves):
            if after not in found:
                found.add(after)
                todo.append(after)
    return found


def ancestors(space: Space) -> list[Space]:
    found, todo = [], [space.find()]
    while todo:
        for move in todo.pop().found_from:
            before = move.before.find()
            if before not in found:
                found.append(before)
                todo.append(before)
    return found


def row_sizes(tags: str, shape: tuple[Size, ...]) -> tuple[Size, ...]:
    return tuple(s for s, t in zip(shape, tags) if t == ROW)


def nth_row(tags: str, dim: int) -> int:
    """Which of the row dimensions this is."""
    return tags[:dim].count(ROW)


def forward_move(node: Node, tags: str) -> tuple[Any, tuple[Any, ...], str] | None:
    """target and arguments of the move that a node makes with an operand of these tags, and the tags behind it."""
    target = node.target
    if target is aten.slice.Tensor:
        a = bound(node)
        dim = at(a["dim"], len(tags))
        if tags[dim] != ROW:
            return None
        size = (shape_of(a["self"]) or ())[dim]
        start, end, step = _bounds(a["start"], a["end"], a["step"], size)
        return target, (nth_row(tags, dim), start, end, step), tags
    if target is aten.select.int:
        dim = at(node.args[1], len(tags))
        if tags[dim] != ROW:
            return None
        size = (shape_of(node.args[0]) or ())[dim]
        i = node.args[2]
        i = i + size if isinstance(i, int) and isinstance(size, int) and i < 0 else i
        return target, (nth_row(tags, dim), i), tags[:dim] + tags[dim + 1 :]
    if target in (aten.index.Tensor, aten._unsafe_index.Tensor):
        return _indexed(node, tags)
    if target is aten.index_select.default:
        dim = at(node.args[1], len(tags))
        return (target, (nth_row(tags, dim), node.args[2]), tags) if tags[dim] == ROW else None
    if target in (aten.flip.default, prims.rev.default):
        dims = [at(d, len(tags)) for d in node.args[1]]  # type: ignore[union-attr]
        if any(tags[d] != ROW for d in dims):
            return None
        return aten.flip.default, ([nth_row(tags, d) for d in dims],), tags
    if target in (aten.permute.default, aten.transpose.int, aten.t.default):
        order = permutation(node, len(tags))
        rows = [nth_row(tags, d) for d in order if tags[d] == ROW]
        if rows == sorted(rows):
            return None
        return aten.permute.default, (rows,), "".join(tags[d] for d in order)
    return None


def permutation(node: Node, rank: int) -> list[int]:
    if node.target is aten.permute.default:
        return [at(d, rank) for d in node.args[1]]  # type: ignore[union-attr]
    order = list(range(rank))
    if node.target is aten.t.default:
        return order[::-1]
    p, q = at(node.args[1], rank), at(node.args[2], rank)
    order[p], order[q] = order[q], order[p]
    return order


def _bounds(start: Any, end: Any, step: Any, size: Size) -> tuple[Any, Any, Any]:
    """Bounds of a slice, written one way where they are numbers."""
    start, step = 0 if start is None else start, 1 if step is None else step
    if isinstance(size, int):
        if isinstance(start, int):
            start = max(0, min(start + size if start < 0 else start, size))
        end = size if end is None else end
        if isinstance(end, int):
            end = max(0, min(end + size if end < 0 else end, size))
    elif end is None or (isinstance(end, int) and end >= 2**62):
        end = 2**63 - 1
    return start, end, step


def _indexed(node: Node, tags: str) -> tuple[Any, tuple[Any, ...], str] | None:
    """One index tensor over one row dimension, or several over row dimensions that lie side by side."""
    indices = list(node.args[1]) + [None] * (len(tags) - len(node.args[1]))  # type: ignore[arg-type]
    given = [d for d, i in enumerate(indices) if i is not None]
    if any(tags[d] != ROW for d in given) or given != list(range(given[0], given[0] + len(given))):
        return None
    tensors = [indices[d] for d in given]
    if any(not isinstance(i, Node) for i in tensors):
        return None
    ranks = {len(shape_of(i) or ()) for i in tensors}
    masks = [i for i in tensors if i.meta["val"].dtype in (torch.bool, torch.uint8)]
    if masks and (len(tensors) != 1 or len(shape_of(masks[0]) or ()) < 1):
        return None
    if masks:  # a mask over one or several dimensions
        covered = len(shape_of(masks[0]) or ())
        if any(t != ROW for t in tags[given[0] : given[0] + covered]):
            return None
        return aten.index.Tensor, (nth_row(tags, given[0]), covered, tuple(tensors)), (
            tags[: given[0]] + ROW + tags[given[0] + covered :]
        )  # fmt: skip
    new = max(ranks)
    behind = tags[: given[0]] + ROW * new + tags[given[-1] + 1 :]
    return aten.index.Tensor, (nth_row(tags, given[0]), len(given), tuple(tensors)), behind


def backward_move(node: Node, moved: str) -> tuple[Any, tuple[Any, ...]] | None:
    """target and arguments of the move that a scatter into zeros is the adjoint of; `moved`: tags of what is scattered,
    with the dimension where rows are put back marked as rows, too."""
    target = node.target
    if target is aten.slice_scatter.default:
        a = bound(node)
        dim = at(a["dim"], len(moved))
        size = (shape_of(node) or ())[dim]
        return aten.slice.Tensor, (nth_row(moved, dim), *_bounds(a["start"], a["end"], a["step"], size))
    if target is aten.select_scatter.default:
        a = bound(node)
        dim = at(a["dim"], len(moved))
        size, i = (shape_of(node) or ())[dim], a["index"]
        i = i + size if isinstance(i, int) and isinstance(size, int) and i < 0 else i
        return aten.select.int, (nth_row(moved, dim), i)
    return None


def apply(move: Move, call: Callable[..., Any], value: Any, locals_: list[Any]) -> Any:
    """The move with a tensor [rows of before, *locals_], written by `call`; the result is [rows of after, *locals_]."""
    x = call(aten.reshape.default, value, [*move.rows, *locals_])
    if move.target is aten.index.Tensor:
        first, _, tensors = move.args
        x = call(aten.index.Tensor, x, [None] * first + list(tensors))
        if isinstance(x, Node) and any(t.meta["val"].dtype in (torch.bool, torch.uint8) for t in tensors):
            rebind(x, [*move.rows_after, *locals_])
    elif move.target is aten.permute.default:
        order = move.args[0]
        x = call(aten.permute.default, x, [*order, *range(len(order), len(order) + len(locals_))])
    else:
        x = call(move.target, x, *move.args)
    return x if len(move.rows_after) == 1 else call(aten.reshape.default, x, [move.after.find().count, *locals_])


def adjoint(move: Move, call: Callable[..., Any], value: Any, locals_: list[Any]) -> Any:
    """The adjoint with a tensor [rows of after, *locals_]: zeros where no row came from."""
    v, count = value.meta["val"], move.before.find().count
    rows = list(move.rows)
    if move.target is aten.permute.default:
        order = move.args[0]
        back = [order.index(i) for i in range(len(order))]
        x = call(aten.reshape.default, value, [*move.rows_after, *locals_])
        x = call(aten.permute.default, x, [*back, *range(len(order), len(order) + len(locals_))])
        return call(aten.reshape.default, x, [count, *locals_])
    if move.target is aten.flip.default:
        x = call(aten.reshape.default, value, [*move.rows_after, *locals_])
        return call(aten.reshape.default, call(aten.flip.default, x, *move.args), [count, *locals_])
    zeros = call(aten.full.default, [*rows, *locals_], 0, dtype=v.dtype, device=v.device)
    x = call(aten.reshape.default, value, [*move.rows_after, *locals_])
    if move.target is aten.slice.Tensor:
        x = call(aten.slice_scatter.default, zeros, x, *move.args)
    elif move.target is aten.select.int:
        x = call(aten.select_scatter.default, zeros, x, *move.args)
    elif move.target is aten.index_select.default:
        dim, index = move.args
        x = call(aten.index_put.default, zeros, [None] * dim + [index], x, True)
    else:
        first, _, tensors = move.args
        x = call(aten.index_put.default, zeros, [None] * first + list(tensors), x, True)
    return call(aten.reshape.default, x, [count, *locals_])
