"""What was written to a slice is what is read back from it.

AOTAutograd writes `part = z[:, :-1]; part.div_(t)` as a slice, its quotient, a slice_scatter of that into all of z, and
the same slice again of the result, for each read. No row of z but those of the slice is read, and yet all seem to be.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from .values import same

aten = torch.ops.aten

_READS = {aten.slice.Tensor: aten.slice_scatter.default, aten.select.int: aten.select_scatter.default}
_WRITES = set(_READS.values())
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def writes_to_slices(graph: Graph) -> bool:
    return any(graph.find_nodes(op="call_function", target=target) for target in _WRITES)


def simplify(graph: Graph) -> bool:
    """Read what was written, and write over what will be written over. Exact; nodes that nobody reads stay."""
    changed = False
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in _READS:
            written = _origin(node.args[0])
            if _same_place(written, node, _READS[node.target]) and _stands_for(written.args[1], node):
                node.replace_all_uses_with(written.args[1])
                changed = True
        elif node.target is aten.copy.default:
            returned = any(user.op == "output" for user in node.users)  # its strides may count
            if _stands_for(node.args[1], node) and not returned:
                node.replace_all_uses_with(node.args[1])
                changed = True
        elif node.target in _WRITES:
            before = _origin(node.args[0])
            if _same_place(before, node, node.target) and _alike(before.args[0], node):
                node.update_arg(0, before.args[0])
                changed = True
    return changed


def _same_place(written: Any, node: Node, target: Any) -> bool:
    """Is that a write to the very place that the node reads, or writes to?"""
    if not isinstance(written, Node) or written.op != "call_function" or written.target is not target:
        return False
    if not _alike(written, node.args[0]):
        return False
    theirs, ours = _place(written), _place(node)
    return len(theirs) == len(ours) and all(map(_equal, theirs, ours))


def _place(node: Node) -> list[Any]:
    """Dimension, and index or start, end and step."""
    schema = node.target._schema  # type: ignore[union-attr]
    given = dict(zip((a.name for a in schema.arguments), node.args)) | node.kwargs
    names = ("dim", "index") if "select" in str(schema.name) else ("dim", "start", "end", "step")
    defaults = {a.name: a.default_value for a in schema.arguments}
    dim, *rest = (given.get(name, defaults[name]) for name in names)
    rank = node.meta["val"].dim() + (node.target is aten.select.int)
    found = [dim % rank, *rest]
    if len(found) == 4:
        found[1] = found[1] or 0
    return found


def _equal(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, int) and isinstance(b, int) and a == b)


def _alike(a: Any, b: Any) -> bool:
    """Of the same shape and dtype."""
    left, right = (n.meta.get("val") if isinstance(n, Node) else None for n in (a, b))
    if not isinstance(left, torch.Tensor) or not isinstance(right, torch.Tensor):
        return False
    return left.dtype == right.dtype and left.dim() == right.dim() and all(map(same, left.shape, right.shape))


def _stands_for(value: Any, node: Node) -> bool:
    """Alike, and a view that is legal of the node is legal of the value: it has the same strides, or the plain ones."""
    if not _alike(value, node):
        return False
    ours, theirs = value.meta["val"], node.meta["val"]
    plain: list[Any] = [1]
    for size in reversed(ours.shape[1:]):
        plain.insert(0, plain[0] * size)
    return any(all(map(same, ours.stride(), strides)) for strides in (theirs.stride(), plain))


def _origin(node: Any) -> Any:
    """The same values, before they were copied, aliased or viewed there and back."""
    now, found = node, node
    while isinstance(now, Node) and now.op == "call_function":
        if now.target is aten.copy.default and _alike(now, now.args[1]):
            now = now.args[1]
        elif now.target in (*_VIEWS, aten.alias.default, aten.detach.default):
            now = now.args[0]
        else:
            break
        if _alike(now, node):
            found = now
    return found
