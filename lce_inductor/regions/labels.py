"""Which nodes of a joint graph depend on a head's logits row by row, and which read several rows at once.

One walk over the graph, from the products that make logits. A node that depends on them is

    labelled   it has tags (see tags.py) and belongs to a set of rows (see spaces.py)
    beyond     rows are added up, or it is no longer known how it depends on them: a loss, dW, what is made of them

A labelled node that is *wide*, like a head's logits (see widths.py), must never exist as a whole. One that is read by
anything but labelled nodes, sums over rows and the products of the backward is a problem of its heads, which are then
left alone.
"""

from __future__ import annotations

import itertools
import operator
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from ..graph.values import alive, dependents, is_collective, is_zero
from . import collectives, index_ops  # noqa: F401  (register their facts)
from .aten_ops import Crossing, Fact, at, bound, fact, result_tags, stack, stacked
from .spaces import Move, Space, backward_move, forward_move, nth_row, related, row_sizes
from .tags import LOCAL, ONE, ROW, is_one, product, same_size, shape_of, size, through_view
from .widths import Widths
from .zeros import keeps_zeros

aten = torch.ops.aten

PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)
SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int)


class Label(NamedTuple):
    """tags and rows of a node. parts: the rows on which a gradient may differ from zero, where it was scattered from
    them (an adjoint of moves); None for a value of all rows of `space`."""

    tags: str
    space: Space
    parts: tuple[Space, ...] | None = None


class Sink(NamedTuple):
    """A node that takes wide values out of the region. kind: "dx", "dw" (see emit.py), "sum" over rows, or "total"."""

    node: Node
    kind: str
    wide: Node


class Problem(NamedTuple):
    code: str
    node: Node
    why: str


class Labels:
    """The result of the walk over one joint graph."""

    def __init__(self, graph: Graph, tangents: set[Node], deferred: frozenset[Node] = frozenset()) -> None:
        """deferred: outputs of the graph that will not be computed, and so do not hold the logits."""
        self.graph, self.deferred = graph, deferred
        self.on_tangent = dependents(graph, tangents)
        self.of: dict[Node, Label] = {}
        self.beyond: set[Node] = set()
        self.late: set[Node] = set()  # beyond, and behind wide nodes of the backward
        self.sinks: list[Sink] = []
        self.outputs: dict[Node, list[Node]] = {}  # narrow labelled nodes that are read outside, and by what
        self.problems: dict[Node, Problem] = {}
        self.sources: list[Node] = []
        self._widths = Widths(self.of)
        self.wide, self.classes = self._widths.wide, self._widths.classes
        self._facts: dict[Node, Fact] = {}
        self.stacks: set[Node] = set()  # cats that are read as what torch.stack gives
        self.passes: dict[Node, list[Node]] = {}  # nodes that select rows, or put them back, and of what
        self.behind: set[Node] = set()  # narrow nodes behind wide ones of the backward
        self.reduced: set[Node] = set()  # row values of all processes together: a program is given them

    # -- heads

    def run(self, sources: list[Node]) -> None:
        living = alive(self.graph)
        for node in filter(living.__contains__, self.graph.nodes):
            if node in sources:
                self._source(node)
            elif node.op == "output":
                self._output(node)
            elif node.op == "call_function":
                self._visit(node)

    def _source(self, node: Node) -> None:
        shape = shape_of(node) or ()
        if any(a in self.of for a in node.all_input_nodes):
            self._visit(node)
            return
        space = Space(product(shape[:-1]))
        space.sources.append(node)
        self.sources.append(node)
        self._widths.add(node, space)
        self.of[node] = Label("".join(ONE if is_one(s) else ROW for s in shape[:-1]) + LOCAL, space)

    def heads_of(self, space: Space) -> list[Node]:
        """Sources that these rows come from."""
        root, found = space.find(), []
        found += root.sources
        for move in root.found_from:
            found += [s for s in self.heads_of(move.before) if s not in found]
        return found

    # -- one node

    def _visit(self, node: Node) -> None:
        if node.target is aten.cat.default and self._is_stack(node):
            self.stacks.add(node)
            return  # its views are what is labelled
        whole = node.args[0] if self._views_stack(node) else node
        args = [a for a in whole.all_input_nodes if a in self.of]  # type: ignore[union-attr]
        if not args:
            if any(a in self.beyond for a in node.all_input_nodes):
                self._beyond(node)
            return
        if isinstance(node.meta.get("val"), (int, torch.SymInt)):
            return  # a size says nothing about values
        try:
            label = self._label(node, args)
        except Crossing as crossing:
            self._leave(node, args, crossing)
            return
        self.of[node] = label
        if is_collective(node):
            self._collective(node, args)
        blamed = [a for a in node.all_input_nodes if a in self.beyond]
        if self.wide(node):
            if blamed and (node not in self.on_tangent or any(a in self.late for a in blamed)):
                self._problem(
                    label.space, "crossing", node, "what several rows were added up to comes back to the rows"
                )
        elif blamed:  # no longer a function of its own row alone
            del self.of[node]
            self._leave(node, args, Crossing("what several rows were added up to comes back to the rows"))
        elif node in self.on_tangent and any(self.wide(a) or a in self.behind for a in args):
            self.behind.add(node)

    def _collective(self, node: Node, args: list[Node]) -> None:
        """It stays in the graph, where it is: as many for each process, whatever that process does with its chunks."""
        for arg in args:
            if self.wide(arg):
                self._problem(self.of[arg].space, "collective", node, "logits of several processes are reduced")
            elif arg not in self.reduced:
                self.outputs.setdefault(arg, []).append(node)
        self.reduced.add(node)

    def _is_stack(self, cat: Node) -> bool:
        """Of several heads, or of one head several times; not of rows that were taken apart and come together again."""
        spaces = {self.of[t].space.find() for t in cat.all_input_nodes if t in self.of}
        apart = any(related(a, b) for a, b in itertools.combinations(spaces, 2))
        return bool(spaces) and not apart and bool(cat.users) and all(map(stacked, cat.users))

    def fact(self, node: Node) -> Fact:
        if node not in self._facts:
            try:
                self._facts[node] = stack(node) if self._views_stack(node) else fact(node)
            except Crossing as crossing:
                crossing.node = crossing.node or node
                raise
        return self._facts[node]

    def _views_stack(self, node: Node) -> bool:
        return bool(node.args) and isinstance(node.args[0], Node) and node.args[0] in self.stacks

    def _beyond(self, node: Node) -> None:
        self.beyond.add(node)
        if any(a in self.late or a in self.behind for a in node.all_input_nodes):
            self.late.add(node)

    def _leave(self, node: Node, args: list[Node], crossing: Crossing) -> None:
        """A node that has no label: rows are added up, or this is the end of what is known."""
        self._beyond(node)
        for arg in args:
            label = self.of[arg]
            if self.wide(arg):
                kind = self._sink(node, arg)
                if kind is None:
                    self._problem(label.space, crossing.code, node, str(crossing))
                    continue
                self.sinks.append(Sink(node, kind, arg))
                if node in self.on_tangent:
                    self.late.add(node)
            else:
                self.outputs.setdefault(arg, []).append(node)

    def _output(self, node: Node) -> None:
        for arg in node.all_input_nodes:
            if arg not in self.of or arg in self.deferred:
                continue
            if self.wide(arg):
                self._problem(self.of[arg].space, "returned", arg, "the logits, or values for each class, are returned")
            else:
                self.outputs.setdefault(arg, []).append(node)

    def _sink(self, node: Node, wide: Node) -> str | None:
        """How a node without a label may take a wide node out of the region."""
        label = self.of[wide]
        if node.target in (aten.mm.default, aten.bmm.default) and node in self.on_tangent:
            left, right = node.args
            tags = label.tags if node.target is aten.mm.default else label.tags[1:]
            if label.tags[: -len(tags)] not in ("", ONE):
                return None
            if left is wide and right not in self.of and tags in ("rl", "lr"):
                return "dx" if tags == "rl" else "dw"
            if right is wide and left not in self.of and tags in ("rl", "lr"):
                return "dw" if tags == "rl" else "dx"
            return None
        if label.parts is None or node in self.on_tangent:
            return self._sum(node, label)
        return None

    def _sum(self, node: Node, label: Label) -> str | None:
        if node.target in (aten.sum.default, aten.mean.default):
            return "total"
        if node.target is aten.sum.dim_IntList:
            over: Any = node.args[1]
            if not over:
                return "total"
            dims = {d % len(label.tags) for d in over}
            if all(d in dims for d, t in enumerate(label.tags) if t == ROW):
                return "total" if all(d in dims for d, t in enumerate(label.tags) if t == LOCAL) else "sum"
        return None

    def _problem(self, space: Space, code: str, node: Node, why: str) -> None:
        for head in self.heads_of(space):
            self.problems.setdefault(head, Problem(code, node, why))

    # -- labels

    def _label(self, node: Node, args: list[Node]) -> Label:
        moved = self._move(node, args)
        if moved is not None:
            return moved
        if node.target in PRODUCTS:
            raise Crossing("a matrix product reads the logits", "product")
        found = self.fact(node)
        if found.kind == "getitem":
            return self._item(node, args[0])
        if node.target in SPLITS and (tags := self.of[args[0]].tags)[at(bound(node)["dim"], len(tags))] == ROW:
            self.passes[node] = [args[0]]  # each item is a move of its own
            return self.of[args[0]]
        if found.kind == "view":
            old, new = shape_of(node.args[0]), shape_of(node)
            seen = through_view(self.of[args[0]].tags, old or (), new or ())
            if seen is None:
                raise Crossing("rows and classes are mixed by a view")
            return self.of[args[0]]._replace(tags=seen)
        if not set(args) <= {a for a, _ in found.operands}:
            raise Crossing("an argument that is not an operand depends on rows", "escape")
        tags = result_tags(node, found, {a: self.of[a].tags for a in args})
        space, parts = self._common(node, args)
        if ROW in tags and not same_size(product(row_sizes(tags, shape_of(node) or ())), space.find().count):
            raise Crossing("each row meets all others")  # s[:, None] - s[None]
        return Label(tags, space, parts)

    def _item(self, node: Node, source: Node) -> Label:
        label = self.of[source]
        if source.target in SPLITS and source in self.passes:
            self.passes[node] = [source]
            dim = at(bound(source)["dim"], len(label.tags))
            return self._moved(node, label, *self._piece(source, node.args[1], label.tags, dim))
        if len(shape_of(node) or ()) != len(label.tags):
            raise Crossing("an item of another rank")
        return label

    def _piece(self, split: Node, i: Any, tags: str, dim: int) -> tuple[Any, tuple[Any, ...], str]:
        nth = nth_row(tags, dim)
        if split.target is aten.unbind.int:
            return aten.select.int, (nth, i), tags[:dim] + tags[dim + 1 :]
        sizes = [size(v.shape[dim]) for v in split.meta["val"]]
        start = sum(sizes[:i])
        return aten.slice.Tensor, (nth, start, start + sizes[i], 1), tags

    def _common(self, node: Node, args: list[Node]) -> tuple[Space, tuple[Space, ...] | None]:
        """The set of rows that the operands have in common."""
        withrows = [a for a in args if ROW in self.of[a].tags]
        if not withrows:
            return self.of[args[0]].space, self.of[args[0]].parts
        space = self.of[withrows[0]].space.find()
        for other in withrows[1:]:
            theirs = self.of[other].space.find()
            if theirs is space:
                continue
            if not same_size(theirs.count, space.count) or related(space, theirs):
                raise Crossing("rows of two selections meet")
            space = space.join(theirs)
        parts = [self.of[a].parts for a in withrows]
        if all(p is None for p in parts):
            return space, None
        return space, self._parts(node, withrows, space)

    def _parts(self, node: Node, args: list[Node], space: Space) -> tuple[Space, ...] | None:
        """Where a gradient made of gradients of parts may differ from zero. Only what is linear in them keeps that."""
        if node.target in (aten.add.Tensor, aten.sub.Tensor):
            others = [a for a in node.args[:2] if a not in self.of and not is_zero(a)]
            parts = [s.find() for a in args for s in self.of[a].parts or (space,)] + [space] * bool(others)
            return tuple(dict.fromkeys(parts))
        scattered = [a for a in args if self.of[a].parts is not None]
        only = {p for a in scattered for p in self.of[a].parts or ()}
        if len(only) == 1 and any(m.reorders and m.before.find() is space for m in next(iter(only)).found_from):
            return tuple(only)
        if len(scattered) == 1 and keeps_zeros(node, scattered[0]):
            return self.of[scattered[0]].parts
        raise Crossing("a gradient of selected rows is changed in a way that is not linear")

    def _move(self, node: Node, args: list[Node]) -> Label | None:
        """Rows that are selected or ordered anew, and gradients that go back."""
        first = node.args[0] if node.args else None
        if isinstance(first, Node) and first in self.of and len(args) == 1:
            label = self.of[first]
            made = forward_move(node, label.tags)
            if made is not None:
                if not self.wide(first) and _by_mask(made[1]):
                    raise Crossing("values of rows are selected by a mask: how many there are is not known before")
                self.passes[node] = [first]
                return self._moved(node, label, *made)
        return self._scattered(node, args)

    def _moved(self, node: Node, label: Label, target: Any, args: tuple[Any, ...], tags: str) -> Label:
        if ROW not in tags:
            # What is only written over is not read.
            read = any(u.target is not aten.copy.default or u.args[0] is not node for u in node.users)
            raise Crossing("a single row of many", "one-row" if read else "crossing")
        shape = shape_of(node) or ()
        whole = shape_of(node.args[0].args[0] if node.target is operator.getitem else node.args[0]) or ()  # type: ignore[union-attr]
        rows = row_sizes(label.tags, whole)
        if target is aten.slice.Tensor and all(map(same_size, shape, whole)):
            return label  # of everything
        space, after = label.space.find(), row_sizes(tags, shape)
        if label.parts is not None:
            for move in space.moves:
                if label.parts == (move.after.find(),) and move.reorders and move.same_as(target, args, rows):
                    return Label(tags, move.after.find())
            raise Crossing("a gradient of selected rows is selected again")
        back = self._inverse(space, target, args, after)
        if back is not None:
            return Label(tags, back.before.find(), (space,))
        for move in space.moves:
            if move.same_as(target, args, rows):
                return Label(tags, move.after.find())
        move = Move(space, Space(product(after)), target, args, rows, after, node)
        space.moves.append(move)
        move.after.found_from.append(move)
        return Label(tags, move.after)

    def _inverse(self, space: Space, target: Any, args: tuple[Any, ...], rows: tuple[Any, ...]) -> Move | None:
        """An order of rows that is taken back: the adjoint of the move that made it."""
        for move in space.found_from:
            if move.target is not target or not all(map(same_size, move.rows, rows)) or len(rows) != len(move.rows):
                continue
            if target is aten.flip.default and move.args == args:
                return move
            if target is aten.permute.default and [move.args[0][i] for i in args[0]] == sorted(args[0]):
                return move
        return None

    def _scattered(self, node: Node, args: list[Node]) -> Label | None:
        if node.target is aten.cat.default:
            return self._cat(node, args)
        if node.target in (aten.slice_scatter.default, aten.select_scatter.default):
            base, source = node.args[0], node.args[1]
        elif node.target in (aten.index_put.default, aten._unsafe_index_put.default):
            base, source = node.args[0], node.args[2]
        else:
            return None
        whole = node.target is aten.slice_scatter.default and source in self.of
        if whole and all(map(same_size, shape_of(node) or (), shape_of(source) or ())):
            self.passes[node] = [source]  # type: ignore[list-item]
            return self.of[source]  # type: ignore[index]
        if args != [source] or not is_zero(base):
            return None
        label, shape = self.of[source], shape_of(node) or ()  # type: ignore[index]
        tags = self._tags_put_back(node, label, shape)
        if tags is None:
            return None
        rows = row_sizes(tags, shape)
        for move in label.space.find().found_from:
            made = self._put_back(node, tags, move)
            if made is not None and move.same_as(*made, rows):
                self.passes[node] = [source]  # type: ignore[list-item]
                return Label(tags, move.before.find(), label.parts or (label.space.find(),))
        if ROW in tags and node.target is aten.slice_scatter.default:
            raise Crossing("rows are put where they did not come from")
        return None

    def _cat(self, node: Node, args: list[Node]) -> Label | None:
        """Gradients of rows that were split, put side by side: each where its rows came from."""
        pieces: list[Node] = list(node.args[0])  # type: ignore[arg-type]
        shape = shape_of(node) or ()
        dim = at(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0), len(shape))
        kinds = {self.of[p].tags[dim] for p in args}
        rest = {self.of[p].tags[:dim] + self.of[p].tags[dim + 1 :] for p in args}
        if len(rest) != 1 or not kinds <= {ROW, ONE} or not all(p in self.of or is_zero(p) for p in pieces):
            return None
        tags = self.of[args[0]].tags
        tags = tags[:dim] + ROW + tags[dim + 1 :]
        first: Space | None = None
        start: Any = 0
        parts: list[Space] = []
        for piece in pieces:
            length = (shape_of(piece) or ())[dim]
            if piece in self.of:
                label, nth, rows = self.of[piece], nth_row(tags, dim), row_sizes(tags, shape)
                cut = ((aten.slice.Tensor, (nth, start, start + length, 1)), (aten.select.int, (nth, start)))
                inner = product(rows[1:])
                flat = (start * inner, (start + length) * inner) if nth == 0 else None
                move_target, move_args = cut[label.tags[dim] == ONE]
                moves = (
                    m
                    for m in label.space.find().found_from
                    if m.same_as(move_target, move_args, rows)
                    or (flat is not None and flat == m.range() and same_size(m.before.find().count, product(rows)))
                )
                move = next((m for m in moves if first is None or m.before.find() is first), None)
                if move is None:
                    return None
                first = move.before.find()
                parts += label.parts or (label.space.find(),)
            start = start + length
        self.passes[node] = args
        return Label(tags, first, tuple(dict.fromkeys(parts)))  # type: ignore[arg-type]

    def _tags_put_back(self, node: Node, label: Label, shape: tuple[Any, ...]) -> str | None:
        """Tags of the tensor into which rows are put, if it is rows that are put there."""
        if node.target is aten.slice_scatter.default:
            over: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
            return label.tags if label.tags[over % len(shape)] == ROW else None
        if node.target is aten.select_scatter.default:
            over = node.args[2]
            dim = over % len(shape)
            tags = label.tags[:dim] + ROW + label.tags[dim:]
            # a class that is selected leaves [rows, ...] too: a move that fits decides
            fits = any(m.target is aten.select.int for m in label.space.find().found_from)
            return tags if fits and (ROW in label.tags or not label.tags) else None
        for move in label.space.find().found_from:
            if move.target in (aten.index.Tensor, aten.index_select.default):
                behind = label.tags.lstrip(ROW + ONE) if ROW in label.tags else label.tags
                ahead = len(shape) - len(behind)
                if ahead == len(move.rows):
                    return ROW * ahead + behind
        return None

    def _put_back(self, node: Node, tags: str, move: Move) -> tuple[Any, tuple[Any, ...]] | None:
        if node.target in (aten.index_put.default, aten._unsafe_index_put.default):
            indices = list(node.args[1])  # type: ignore[arg-type]
            given = [(d, i) for d, i in enumerate(indices) if i is not None]
            adds = bool(node.args[3]) if len(node.args) > 3 else bool(node.kwargs.get("accumulate", False))
            tensors = tuple(i for _, i in given)
            mask = all(i.meta["val"].dtype == torch.bool for i in tensors)
            if not adds and not mask:
                return None
            if move.target is aten.index_select.default and len(given) == 1:
                return aten.index_select.default, (given[0][0], tensors[0])
            return aten.index.Tensor, (given[0][0], move.args[1], tensors)
        return backward_move(node, tags)


def _by_mask(args: tuple[Any, ...]) -> bool:
    """Is this an index by a mask?"""
    found: list[Node] = []
    torch.fx.map_arg(args, found.append)
    return any(isinstance(n.meta.get("val"), torch.Tensor) and n.meta["val"].dtype == torch.bool for n in found)
