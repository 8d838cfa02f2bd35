"""Inputs that the graph writes to: what a backward reads of them is what stood there before.

Autograd saves what its own formulas read, and forbids writes to that. It saves no bias, and no x of a frozen weight; a
backward that computes the logits again reads them. Saved as they are they would be the new values, and what is
recomputed would be of those. What AOTAutograd copies into an input once the graph has run is such a write, too:

s = linear(x, w, b)         lse, ... = row_stats(x, w, b, y)       kept = kept(b)                      saved
b.add_(1)                   copy_(b, b + 1)                        copy_(b, b + 1)
...                         dx, ... = row_stats_backward(..., b)   dx, ... = row_stats_backward(..., kept)
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from ..graph.values import dependents, written_inputs
from ..graph.write import Writer
from .one_weight import on_tangents

aten = torch.ops.aten
ops = torch.ops.lce_inductor
_COPIES = (aten.clone.default, ops.once.default)


def keep_what_stood_there(graph: Graph) -> None:
    """Save what the backward's ops read of inputs that are written to, as it is before the write."""
    changed = dependents(graph, written_inputs(graph))
    if not changed:
        return
    late, kept = on_tangents(graph), dict[Node, Node]()
    targets = (ops.row_stats_backward.default, ops.row_stats_with_grad.default, ops.row_region.default)
    for op in [n for n in graph.nodes if n.target in targets and n in late]:
        for value in op.all_input_nodes:
            if value in changed and value not in late and isinstance(value.meta.get("val"), torch.Tensor):
                kept[value] = kept.get(value) or _kept(graph, value)
                op.replace_input_with(value, kept[value])


def _kept(graph: Graph, value: Node) -> Node:
    """What is saved, and not computed again: the value itself, or a copy of what will be written over."""
    if _shares_memory(value):
        after = value.next
        while after.op == "placeholder":
            after = after.next
        value = Writer(graph, after, value).call(ops.kept.default, value)
    value.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    return value


def _shares_memory(value: Node) -> bool:
    """With an input: is it one, a view of one, or a copy that Inductor leaves out?"""
    while isinstance(value.target, torch._ops.OpOverload):
        returned = value.target._schema.returns[0].alias_info
        if value.target not in _COPIES and (returned is None or returned.is_write):
            return False
        value = value.all_input_nodes[0]
    return value.op == "placeholder"
