"""Heads of one weight: which of them are one head of all their rows, and which dW's may wait for the backward?

A loss that is cut into chunks by hand is a head of each chunk. Each would keep a dW [V, H] of its own until the
backward adds them up, where torch.compile alone keeps logits [n, V]: more, if a chunk has fewer rows than H. So calls
that ask for the same, and whose dW's go through the same linear operations into the same sum, become one call:

before                                                      after
lse1, ..., dx1, dw1 = row_stats_with_grad(x1, w, y1, ...)   lse, ..., dx, dw = row_stats_with_grad(cat(x1, x2), w, ...)
lse2, ..., dx2, dw2 = row_stats_with_grad(x2, w, y2, ...)   lse1, lse2 = split(lse); dx1, dx2 = split(dx)
dw = dw1 * tangent + dw2 * tangent                          dw = dw * tangent

Of those that remain, one dW of each sum is kept: it is what the backward ends with in any case. Another one is kept
only where the logits that it is made of would take as much; else the backward computes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from ..graph.cuts import uncut
from ..graph.values import alive, dependents, equal_values, is_collective, is_zero, numel_hint, same
from ..ops import row_region as _ops  # noqa: F401  (registers the op)
from ..spec.program import parse
from ..spec.statistics import STATISTICS, RowGrads
from .tangents import LINEAR, SCATTER

aten = torch.ops.aten
prims = torch.ops.prims
ops = torch.ops.lce_inductor

HEAD, REGION = ops.row_stats_with_grad.default, ops.row_region.default
# Arguments that have a value for each row, but for `needed`. What else a call is given must be the same for calls that
# become one ...
ROWS: dict[Any, tuple[str, ...]] = {
    HEAD: ("x", "target", *(f"g_{name}" for name in RowGrads._fields)),
    REGION: ("xs", "rows"),
}
# ... but for these.
_FREE = ("N", "wide", "needed")


class Way(NamedTuple):
    """How a gradient gets into a sum of several.

    leaf: what is added. sums: the additions from there on. steps: the linear operations up to the leaf, as (operation,
    arguments, keyword arguments), without those that change no number; of the other factors, `named` are `once` nodes.
    """

    leaf: Node
    sums: tuple[Node, ...]
    steps: list[tuple[Any, ...]]
    named: list[Node]


class Call(NamedTuple):
    """A call that computes gradients before the backward.

    given: arguments by name. read: results that are read, by place. early: places of those that the forward needs.
    sums: of those that are added up over rows, the way into a sum, if there is one.
    """

    node: Node
    given: dict[str, Any]
    read: dict[int, list[Node]]
    early: set[int]
    sums: dict[int, Way | None]

    def waiting(self) -> list[int]:
        """Places of the dW's, and db's, that wait for the backward."""
        return [i for i in self.sums if i not in self.early]

    def logits_bytes(self) -> int:
        """Of all its heads' logits, by hint: what torch.compile alone would keep."""
        if self.node.target is HEAD:
            pairs, classes = [(self.given["x"], self.given["weight"])], 0
        else:
            pairs, classes = list(zip(self.given["xs"], self.given["weights"])), 1
        values = [(x.meta["val"], w.meta["val"]) for x, w in pairs]
        return sum(numel_hint((x.shape[0], w.shape[classes])) * x.dtype.itemsize for x, w in values)

    def rows(self) -> list[Node | None]:
        """Values that there are one of for each row."""
        given = [self.given[name] for name in ROWS[self.node.target]]
        return [r for value in given for r in (value if isinstance(value, (list, tuple)) else [value])]


def calls_of(graph: Graph) -> list[Call]:
    """Calls whose dW's wait for the backward."""
    late, living = on_tangents(graph), alive(graph)
    found = [_call(n, living, late) for n in graph.nodes if n.target in ROWS and n in living and n not in late]
    return [c for c in found if c.waiting()]


def on_tangents(graph: Graph) -> set[Node]:
    return dependents(graph, {n for n in graph.find_nodes(op="placeholder") if "tangents" in str(n.target)})


def _call(node: Node, living: set[Node], late: set[Node]) -> Call:
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    given = {a.name: a.default_value for a in arguments} | node.kwargs
    given |= {a.name: value for a, value in zip(arguments, node.args)}
    read: dict[int, list[Node]] = {}
    for user in node.users:
        if any(u in living for u in user.users):
            read.setdefault(user.args[1], []).append(user)  # type: ignore[arg-type]
    summed = [len(STATISTICS) + 1, len(STATISTICS) + 2]
    if node.target is REGION:
        summed = [i for i, r in enumerate(parse(given["program"]).results) if r.kind in ("dw", "sum")]
    early = {i for i, values in read.items() if is_early(values, late)}
    sums = {i: None if i in early else _way(read[i], living) for i in summed if i in read}
    return Call(node, given, read, early, sums)


def is_early(values: list[Node], late: set[Node]) -> bool:
    """Does something that the forward returns, or does, depend on these?"""
    todo, seen = list(values), set[Node]()
    while todo:
        for user in todo.pop().users:
            if user.op == "output" or user.is_impure():
                return True
            if user not in late and user not in seen:
                seen.add(user)
                todo.append(user)
    return False


# -- the way into a sum

_HERE = "the value before"
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.alias.default, aten.clone.default)
_TURNS = (aten.permute.default, aten.t.default, aten.transpose.int)
_CASTS = (prims.convert_element_type.default, aten._to_copy.default)


def _way(values: list[Node], living: set[Node]) -> Way | None:
    """The only way that a result takes, or None: another reader needs it as it is."""
    if len(values) != 1:
        return None
    value, chain = values[0], list[tuple[Node, Node]]()
    while True:
        users = [u for u in value.users if u in living]
        if len(users) != 1:
            return None
        if is_sum(users[0]):
            return Way(value, tuple(_sums(users[0], living)), *_steps(chain))
        if not _is_linear(users[0], value):
            return None
        chain.append((value, users[0]))
        value = users[0]


def is_sum(node: Node) -> bool:
    """Are two values of one shape and dtype added?"""
    if node.target is not aten.add.Tensor or node.kwargs or node.args[0] is node.args[1]:
        return False
    first, *others = (a.meta.get("val") for a in (node, *node.args) if isinstance(a, Node))
    if len(others) != 2 or not isinstance(first, torch.Tensor):
        return False
    return all(isinstance(v, torch.Tensor) and v.dtype == first.dtype and _same_shape(v, first) for v in others)


def _same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dim() == b.dim() and all(map(same, a.shape, b.shape))


def _sums(node: Node, living: set[Node]) -> Iterator[Node]:
    """An addition, and those that its value goes into, as long as nothing else reads it."""
    while True:
        yield node
        users = [u for u in node.users if u in living]
        if len(users) != 1 or not is_sum(users[0]):
            return
        node = users[0]


def _is_linear(node: Node, value: Node) -> bool:
    """Linear in one operand, this one, and nothing else reads it there."""
    others = [a for a in node.all_input_nodes if a is not value]
    if node.target in (aten.mul.Tensor, aten.mul.Scalar):
        return node.args[0] is not node.args[1]
    if node.target in SCATTER:
        return node.args[1] is value and is_zero(node.args[0])
    first = node.target in LINEAR or node.target in (aten.div.Tensor, aten.div.Scalar)
    return first and node.args[0] is value and value not in others


def _steps(chain: list[tuple[Node, Node]]) -> tuple[list[tuple[Any, ...]], list[Node]]:
    steps: list[tuple[Any, ...]] = []
    named: list[Node] = []
    for before, node in chain:
        old, new = before.meta["val"], node.meta["val"]
        if node.target in _CASTS and torch.promote_types(old.dtype, new.dtype) == new.dtype:
            continue
        if node.target in _VIEWS and _same_shape(old, new):
            continue
        if node.target in _TURNS:
            order = _order(node)
            if steps and steps[-1][0] is _TURNS:
                before_it = steps.pop()[1]
                order = [before_it[d] for d in order]
            if order != sorted(order):
                steps.append((_TURNS, order, ()))
            continue
        args = []
        for a in node.args:
            while isinstance(a, Node) and a.target is ops.once.default:
                named.append(a)
                a = a.args[0]
            args.append(_HERE if a is before else a)
        steps.append((node.target, args, sorted(node.kwargs.items())))
    return steps, named


def _order(node: Node) -> list[int]:
    rank = node.meta["val"].dim()
    order = list(range(rank))
    if node.target is aten.permute.default:
        return [d % rank for d in node.args[1]]  # type: ignore[union-attr]
    a, b = (0, rank - 1) if node.target is aten.t.default else (d % rank for d in node.args[1:])
    order[a], order[b] = order[b], order[a]
    return order


# -- calls that become one


def next_to_join(graph: Graph) -> list[Call]:
    """Calls that ask for the same, add into the same sums, need nothing of each other and are worth what they cost, in
    the order of their rows; [] where there are none."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    classes: list[list[Call]] = []
    for call in sorted(calls_of(graph), key=lambda c: order[next(filter(None, c.rows()))]):
        if all(call.sums.values()):
            mine = next((c for c in classes if _alike(c[0], call)), None)
            if mine is None:
                classes.append([call])
            else:
                mine.append(call)
    found = (_independent(graph, calls) for calls in classes if len(calls) > 1)
    return next((calls for calls in found if len(calls) > 1 and _copied(calls) <= _saved(calls)), [])


def _independent(graph: Graph, calls: list[Call]) -> list[Call]:
    """Those that read nothing of the others, nor of a collective that comes behind one: these keep their order."""
    ours, behind = {c.node for c in calls}, set[Node]()
    for node in graph.nodes:
        ends = node in ours or (behind and is_collective(node))
        if ends or any(a in behind for a in node.all_input_nodes):
            behind.add(node)
    return [c for c in calls if not any(a in behind for a in c.node.all_input_nodes)]


def _copied(calls: list[Call]) -> int:
    """Bytes, by hint, of the rows that have to be copied to be side by side: x, and what else there is of each row."""
    together = zip(*(c.rows() for c in calls))
    return sum(sum(map(_bytes, parts)) for parts in together if None not in parts and uncut(parts) is None)


def _saved(calls: list[Call]) -> int:
    """Bytes, by hint, of the dW's that are not there any more."""
    return sum(_bytes(c.read[i][0]) for c in calls[1:] for i in c.sums)


def _bytes(node: Any) -> int:
    value = node.meta["val"]
    return numel_hint(value.shape) * int(value.dtype.itemsize)


def _alike(a: Call, b: Call) -> bool:
    if a.node.target is not b.node.target or a.sums.keys() != b.sums.keys():
        return False
    if not all(map(_same_way, a.sums.values(), b.sums.values())):
        return False
    fixed = [k for k in a.given if k not in ROWS[a.node.target] and k not in _FREE]
    if not all(equal_values(a.given[k], b.given[k]) for k in fixed):
        return False
    return len(a.rows()) == len(b.rows()) and all(map(_same_kind, a.rows(), b.rows()))


def _same_way(a: Way | None, b: Way | None) -> bool:
    assert a is not None and b is not None
    return a.sums[-1] is b.sums[-1] and equal_values(a.steps, b.steps) and len(a.named) == len(b.named)


def _same_kind(a: Node | None, b: Node | None) -> bool:
    """Row values that can stand in one tensor."""
    if a is None or b is None:
        return a is b
    p, q = a.meta["val"], b.meta["val"]
    return (p.dtype, p.device, p.dim()) == (q.dtype, q.device, q.dim()) and all(map(same, p.shape[1:], q.shape[1:]))


# -- calls whose gradients had better wait


def too_many(graph: Graph) -> list[Call]:
    """Calls that would keep more for the backward than their logits: dW's that find no room in the sum that they are
    parts of. One always does."""
    living, used, found = alive(graph), dict[Node, int](), []
    for call in sorted(calls_of(graph), key=Call.logits_bytes, reverse=True):
        mine: dict[Node, list[int]] = {}
        for i in call.waiting():
            for whole in _wholes(call.read[i], living):
                mine.setdefault(whole, []).append(_bytes(call.read[i][0]))
        more = 0
        for whole, own in mine.items():
            room = max(_bytes(whole), used.get(whole) or max(own))
            more += max(used.get(whole, 0) + sum(own) - room, 0)
        if more > call.logits_bytes():
            found.append(call)
        else:
            used |= {whole: used.get(whole, 0) + sum(own) for whole, own in mine.items()}
    return found


def _wholes(values: list[Node], living: set[Node]) -> set[Node]:
    """The sums that values end up in, whatever else reads them."""
    ends, seen = set[Node](), set[Node]()
    todo: list[tuple[Node, Node | None]] = [(v, None) for v in values]
    while todo:
        value, last = todo.pop()
        readers = [u for u in value.users if u in living and (is_sum(u) or _is_linear(u, value))]
        if not readers and last is not None:
            ends.add(last)
        for user in readers:
            if user not in seen:
                seen.add(user)
                todo.append((user, user if is_sum(user) else last))
    return ends
