"""Where a head's statistics are computed, and which terminals share them. Pure: nothing is changed."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Node

from ..graph.values import info
from ..ops.types import SUM, TARGET
from ..reasons import Refusal, refuse
from .forms import Edit, Ref, RowOp, Terminal, Want
from .walk import HeadPlan, Walk


@dataclasses.dataclass
class Group:
    """Terminals of one head served by one head_stats call.

    rows: what is applied to x first; every terminal's form starts with it. anchor: the node before which the
    call stands, or None for right after the linear, with `moved` brought up before it.
    """

    rows: tuple[RowOp, ...]
    edits: tuple[Edit, ...]
    class_weight: Ref | None
    terminals: list[Terminal]
    anchor: Node | None = None
    moved: list[Node] = dataclasses.field(default_factory=list)

    def rest(self, terminal: Terminal) -> tuple[RowOp, ...]:
        """Row operations of a terminal that are still to do on its statistics."""
        return terminal.form.rows[len(self.rows) :]

    def target_columns(self) -> dict[Want, int]:
        """Column of the op's target for each index that is wanted. Disjoint rows share a column."""
        columns: list[list[tuple[Want, tuple[RowOp, ...]]]] = []
        found: dict[Want, int] = {}
        for terminal in self.terminals:
            rows = selecting(self.rest(terminal))
            for want in terminal.wants:
                if want.bit != TARGET or want in found:
                    continue
                shared = (i for i, c in enumerate(columns) if rows and all(_disjoint(rows, other) for _, other in c))
                found[want] = next(shared, len(columns))
                if found[want] == len(columns):
                    columns.append([])
                columns[found[want]].append((want, rows))
        return found


def selecting(rows: tuple[RowOp, ...]) -> tuple[RowOp, ...]:
    """The row operations up to the last one that changes which rows there are."""
    last = max((i for i, op in enumerate(rows) if op.selects), default=-1)
    return rows[: last + 1]


def place(walk: Walk, plan: HeadPlan, replaced: dict[Node, Node]) -> list[Group] | Refusal:
    """Group a head's terminals and find where their statistics can be computed.

    Right after the linear is best: x and the weight have the values, and the grad mode is the one, that the
    linear saw. If a target can't be brought there, right before the first loss, where everything is at hand.
    replaced: nodes of heads that were rewritten before, and what stands for them now.
    """
    head, effects = plan.head, walk.effects

    # The backward reads x and the weight again; a graph that changes them afterwards had its own reasons to be right.
    def now(node: Node) -> Node:
        while node in replaced:
            node = replaced[node]
        return node

    own = [now(ref) for ref in (head.x, head.weight, head.bias) if isinstance(ref, Node)]
    late = [w for w in effects.writes if effects.order[w] > effects.order[head.node]]
    changed = next((w for w in late for ref in own if effects.may_write(w, ref)), None)
    if changed is not None:
        return refuse("mutated", changed)
    groups = _groups(plan)
    for group in groups:
        uses = [(now(ref), t.node) for t in group.terminals for ref in _operands(group, t)]
        moved = effects.movable_up(uses, head.node)
        if moved is not None:
            group.moved = moved
            continue
        first = min((t.node for t in group.terminals), key=effects.order.__getitem__)
        uses += [(ref, head.node) for ref in own]
        if effects.grad_off(first) != effects.grad_off(head.node) or not effects.readable_at(uses, first):
            return refuse("order", first)
        group.anchor = first
    return groups


def _groups(plan: HeadPlan) -> list[Group]:
    """One group for all terminals with the same edits and class weights if their rows allow it, else one for
    each selection of rows."""
    alike: dict[Any, list[Terminal]] = {}
    for terminal in plan.terminals:
        alike.setdefault(terminal.form.edits, []).append(terminal)
    groups = []
    for edits, terminals in alike.items():
        by_weight: dict[Any, list[Terminal]] = {}
        for terminal in terminals:
            weights = [w.operand for w in terminal.wants if w.bit == SUM]
            by_weight.setdefault(weights[0] if weights else None, []).append(terminal)
        if len(by_weight) > 1 and None in by_weight and not _sums(by_weight[None]):
            rest = by_weight.pop(None)  # these need no sum: they may join any
            next(iter(by_weight.values())).extend(rest)
        for weight, members in by_weight.items():
            rows = [selecting(t.form.rows) for t in members]
            prefix = _common_prefix(rows)
            if all(_view(r[len(prefix) :]) for r in rows):
                groups.append(Group(prefix, edits, weight, members))
                continue
            by_rows: list[Group] = []  # compared, not hashed: slices have no hash before Python 3.12
            for terminal, r in zip(members, rows):
                group = next((g for g in by_rows if g.rows == r), None)
                if group is None:
                    by_rows.append(group := Group(r, edits, weight, []))
                group.terminals.append(terminal)
            groups.extend(by_rows)
    return groups


def _sums(terminals: list[Terminal]) -> bool:
    return any(w.bit == SUM for t in terminals for w in t.wants)


def _common_prefix(rows: list[tuple[RowOp, ...]]) -> tuple[RowOp, ...]:
    prefix = rows[0]
    for other in rows[1:]:
        same = 0
        while same < min(len(prefix), len(other)) and prefix[same] == other[same]:
            same += 1
        prefix = prefix[:same]
    return prefix


def _view(rows: tuple[RowOp, ...]) -> bool:
    """Does replaying these on a fresh tensor give a view of it, so that targets can be written through it?"""
    selected = False
    for op in rows:
        if selected and op.name in ("reshape", "flatten"):
            return False
        if op.name == "getitem" and any(isinstance(k, Node) and info(k) is not None for k in op.args[0]):
            return False
        selected = selected or op.selects
    return True


def _disjoint(a: tuple[RowOp, ...], b: tuple[RowOp, ...]) -> bool:
    """Do two selections that differ in their last step certainly have no row in common?"""
    if not a or not b or len(a) != len(b) or a[:-1] != b[:-1] or a[-1].name != "getitem" or b[-1].name != "getitem":
        return False
    for p, q in zip(a[-1].args[0], b[-1].args[0]):
        first, second = _range(p), _range(q)
        if first is not None and second is not None and (first[1] <= second[0] or second[1] <= first[0]):
            return True
    return False


def _range(key: Any) -> tuple[float, float] | None:
    """[start, stop) of an index or slice with plain non-negative numbers."""
    if isinstance(key, int):
        return (key, key + 1) if key >= 0 else None
    if not isinstance(key, slice) or key.step not in (None, 1):
        return None
    start, stop = key.start or 0, float("inf") if key.stop is None else key.stop
    if not isinstance(start, int) or not isinstance(stop, (int, float)) or start < 0 or stop < 0:
        return None
    return start, stop


def _operands(group: Group, terminal: Terminal) -> list[Node]:
    """Nodes that the statistics of a terminal are computed from, besides the head's own."""
    found: list[Any] = [w.operand for w in terminal.wants if w.operand is not None]
    torch.fx.map_arg([op.args for op in group.rows], found.append)
    if any(w.bit == TARGET for w in terminal.wants):
        torch.fx.map_arg([op.args for op in group.rest(terminal)], found.append)
    found.extend(a for e in group.edits for a in e.args)
    return [f for f in found if isinstance(f, Node)]
