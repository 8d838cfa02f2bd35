"""What a backward reads of inputs is what stood there when the forward read it, or an error says so.

Autograd saves what its own formulas read, and looks at its version before it is read again. A backward that computes
the logits again reads more, a bias for one; and what is saved as a view of an input has a version of its own, so that a
write to the input, legal or not, would go unnoticed. So of what such a backward reads

- vectors, and what depends on an input that the graph writes to, are saved as they are in the forward, which reads them
  itself: what a forward needs, and must not be computed again, the partitioner saves. What AOTAutograd copies into an
  input once the graph has run is such a write, too:

      s = linear(x, w, b)         kept = kept(b)                             saved
      b.add_(1)                   lse, ... = row_stats(x, w, kept, y)
                                  copy_(b, b + 1)
      ...                         dx, ... = row_stats_backward(..., kept)

- views of inputs are taken of the input itself, in the backward: so the input is saved, and autograd looks at it.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from ..graph import second_derivative as second
from ..graph.values import dependents, same, written_inputs
from ..graph.write import Writer
from .one_weight import on_tangents

aten = torch.ops.aten
ops = torch.ops.lce_inductor
_COPIES = (aten.clone.default, ops.once.default)
_HEADS = (
    ops.row_stats.default, ops.row_stats_backward.default, ops.row_stats_with_grad.default, ops.row_region.default,
)  # fmt: skip


def hold_inputs(graph: Graph) -> None:
    """Save what the heads' backwards read of inputs, or let them read the inputs."""
    late, changed = on_tangents(graph), dependents(graph, written_inputs(graph))
    heads = [n for n in graph.nodes if n.target in _HEADS]
    saved: dict[Node, Node] = {}
    for op in [n for n in heads if n in late]:
        for value in op.all_input_nodes:
            if value in late or not isinstance(value.meta.get("val"), torch.Tensor):
                continue
            if value in changed or _is_vector(value):
                saved[value] = saved.get(value) or _saved(graph, value)
            elif value.op != "placeholder" and (views := _views(value)):
                _read_again(graph, op, value, views, late)
    for op in heads:
        for value in op.all_input_nodes:
            if value in saved:
                op.replace_input_with(value, saved[value])


def _is_vector(value: Node) -> bool:
    """As large as there are rows, or classes, and not both."""
    return sum(not same(s, 1) for s in value.meta["val"].shape) <= 1


def _saved(graph: Graph, value: Node) -> Node:
    """What is saved, and not computed again: the value itself, or a copy of what may be written over."""
    if _shares_memory(value):
        after = value.next
        while after.op == "placeholder":
            after = after.next
        value = Writer(graph, after, value).call(ops.kept.default, value)
    value.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    return value


def _shares_memory(value: Node) -> bool:
    """With an input: is it one, a view of one, or a copy that Inductor leaves out?"""
    while value.target in _COPIES or _is_view(value):
        value = value.all_input_nodes[0]
    return value.op == "placeholder"


def _views(value: Node) -> list[Node]:
    """From an input to the value, views only; [] if there is another way to it."""
    found = []
    while _is_view(value):
        found.append(value)
        value = value.all_input_nodes[0]
    return found[::-1] if value.op == "placeholder" else []


def _is_view(node: Node) -> bool:
    if node.target is operator.getitem:
        return _is_view(node.all_input_nodes[0])
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.returns:
        return False
    shared = node.target._schema.returns[0].alias_info
    return shared is not None and not shared.is_write


def _read_again(graph: Graph, op: Node, value: Node, views: list[Node], late: set[Node]) -> None:
    """The same views of the input in the backward, where it is tied to what the op reads of the tangents."""
    second.register_lowering()
    write = Writer(graph, op, op).call
    of: dict[Node, Node] = {}
    source = views[0].all_input_nodes[0]
    of[source] = write(ops.once.default, source, [next(a for a in op.all_input_nodes if a in late)])
    for view in views:
        args, kwargs = torch.fx.map_arg((view.args, view.kwargs), lambda n: of.get(n, n))
        of[view] = write(view.target, *args, **kwargs)
    op.replace_input_with(value, of[value])
