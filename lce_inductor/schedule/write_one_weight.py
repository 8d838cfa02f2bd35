"""Calls of heads of one weight -> one call; and gradients that had better wait -> a call in the backward."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from ..graph import second_derivative as second
from ..graph.cuts import uncut
from ..graph.values import dependents, size_hint
from ..graph.write import Writer
from ..spec.program import only, parse
from .one_weight import HEAD, REGION, ROWS, Call, is_sum, on_tangents
from .rewrite import must_save

aten = torch.ops.aten
ops = torch.ops.lce_inductor


def join(graph: Graph, calls: list[Call]) -> Node:
    """One call of all rows in place of several. The graph is not in order afterwards."""
    first, late = calls[0], dependents(graph, {*(c.node for c in calls), *on_tangents(graph)}, sizes=True)
    call = Writer(graph, first.node, first.node, late).call
    sizes, args = list(map(_count, calls)), dict(first.given)
    for name in ROWS[first.node.target]:
        parts = [c.given[name] for c in calls]
        lists = isinstance(parts[0], (list, tuple))
        args[name] = [_together(call, p) for p in zip(*parts)] if lists else _together(call, parts)
    if any(c.given.get("needed") is not None for c in calls):
        all_of = {"dtype": torch.bool, "device": args["x"].meta["val"].device}
        needed = [c.given["needed"] for c in calls]
        full = [call(aten.full.default, [n], True, **all_of) if r is None else r for r, n in zip(needed, sizes)]
        args["needed"] = _together(call, full)
    if "N" in args:
        args["N"] = sum(sizes)
    if "wide" in args:  # on the way of a dW that is in fp32 already, a cast to it does nothing
        args["wide"] = any(c.given["wide"] for c in calls)
    if any("recompute" in n.meta for n in graph.nodes):  # torch.compile alone may hold the logits of one call at a time
        args["chunk_tokens"] = args["chunk_tokens"] or max(map(size_hint, sizes))
    node = _call(call, first.node.target, args)
    for c in calls:
        must_save(node, c.node)
    for i in sorted({i for c in calls for i in c.read}):
        result = call(operator.getitem, node, i)
        must_save(result, node)
        if i in first.sums:
            _one_sum(result, i, calls)
            continue
        cut = call(aten.split_with_sizes.default, result, sizes)
        for k, c in enumerate(calls):
            for old in c.read.get(i, ()):
                old.replace_all_uses_with(call(operator.getitem, cut, k))
    return node


def _call(write: Any, target: Any, given: dict[str, Any]) -> Node:
    """A call of an op, of whose arguments others may be given, too."""
    arguments = target._schema.arguments
    named = {a.name: given[a.name] for a in arguments if a.kwarg_only}
    return write(target, *(given[a.name] for a in arguments if not a.kwarg_only), **named)  # type: ignore[no-any-return]


def _count(call: Call) -> Any:
    """N, as Writer takes it."""
    n = call.given["N"] if "N" in call.given else call.given["x"].meta["val"].shape[0]
    return n.meta["val"] if isinstance(n, Node) else n


def _together(call: Any, parts: Sequence[Node | None]) -> Node | None:
    """Values of rows side by side."""
    if parts[0] is None:
        return None
    whole = uncut(parts)  # type: ignore[arg-type]
    if whole is None:
        return call(aten.cat.default, list(parts))  # type: ignore[no-any-return]
    rest = parts[0].meta["val"].shape[1:]
    flat = whole.meta["val"].dim() == len(rest) + 1
    return whole if flat else call(aten.reshape.default, whole, [-1, *rest])


def _one_sum(result: Node, i: int, calls: list[Call]) -> None:
    """The first call's way for the result of all; the others leave the sum."""
    ways = [c.sums[i] for c in calls]
    for way in ways[1:]:
        assert way is not None
        add = next(u for u in way.leaf.users if u.users and is_sum(u))
        add.replace_all_uses_with(next(a for a in add.all_input_nodes if a is not way.leaf))
    for old in calls[0].read[i]:
        old.replace_all_uses_with(result)
    assert ways[0] is not None
    for k, tangent in enumerate(ways[0].named):  # it stands for the tangents of all, and names all their inputs
        inputs = [n for way in ways for n in way.named[k].args[1]]  # type: ignore[union-attr]
        tangent.update_arg(1, list(dict.fromkeys(inputs)))


def postpone(graph: Graph, call: Call) -> tuple[Node, Node]:
    """Compute gradients in the backward, by a call of its own. Its x is tied to the tangent, so that it belongs there.

    Returns the calls of forward and backward. The graph is not in order afterwards.
    """
    late = on_tangents(graph)
    write = Writer(graph, call.node, call.node, dependents(graph, {call.node, *late}, sizes=True)).call
    tangent = _tangent(call, late)
    second.register_lowering()
    given, early = dict(call.given), sorted(call.early)
    others = [i for i in call.read if i not in call.early]
    if call.node.target is HEAD:
        forward = _call(write, ops.row_stats.default, given)
        places = {i: i for i in call.read}
        given["x"] = write(ops.once.default, given["x"], [tangent])
    else:
        program = parse(given["program"])
        forward = _call(write, REGION, given | {"program": only(program, early).text()})
        places = {i: k for part in (early, others) for k, i in enumerate(part)}
        given["program"] = only(program, others).text()
        given["xs"] = [write(ops.once.default, x, [tangent]) for x in given["xs"]]
    backward = _call(write, call.node.target, given)
    for i, values in call.read.items():
        result = write(operator.getitem, forward if i in call.early else backward, places[i])
        for old in values:
            old.replace_all_uses_with(result)
    return forward, backward


def _tangent(call: Call, late: set[Node]) -> Node:
    """An incoming gradient that multiplies the call's."""
    todo = [old for i in call.waiting() for old in call.read[i]]
    for value in todo:
        for user in value.users:
            found = next((a for a in user.all_input_nodes if a is not value and a in late), None)
            if found is not None:
                return found
            todo.append(user)
    raise AssertionError("gradients that no tangent is multiplied by")
