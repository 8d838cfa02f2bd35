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

What is only named, so that second derivatives are an error (graph/second_derivative.py), is not read: whether it was
changed does not matter. That autograd does not look is right only for what nothing in the backward can read, whatever
the partitioner computes again; so that is said of vectors alone, all of whose readers are saved.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch._dynamo import compiled_autograd
from torch._dynamo import config as dynamo_config
from torch._functorch import config as functorch_config
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from ..graph import second_derivative as second
from ..graph.values import alive, dependents, equal_values, same, written_inputs
from ..graph.write import Writer
from .one_weight import is_early, on_tangents

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
    read = dict.fromkeys(v for n in heads if n not in late for v in n.all_input_nodes)
    saved: dict[Node, Node] = {}
    for op in [n for n in heads if n in late]:
        for value in op.all_input_nodes:
            if value in late or not isinstance(value.meta.get("val"), torch.Tensor):
                continue
            if value in changed or _is_vector(value):
                first = next((v for v in read if equal_values(v, value)), value)
                saved[first] = saved.get(first) or _saved(graph, first)
                op.replace_input_with(value, saved[first])
            elif value.op != "placeholder" and (views := _views(value)):
                _read_again(graph, op, value, views, late)
    for op in heads:
        for value in op.all_input_nodes:
            if value in saved:
                op.replace_input_with(value, saved[value])
    if keeps_to_marks() and not any("memory_budget" in n.meta for n in graph.nodes):
        _hold_unchecked(graph, late)


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


def _hold_unchecked(graph: Graph, late: set[Node]) -> None:
    """Inputs that a backward only names are held without a look at their version."""
    living, names = alive(graph), graph.find_nodes(op="call_function", target=ops.once.default)
    for value in dict.fromkeys(n for once in names for n in once.args[1]):
        if value.op != "placeholder" or value in late or not _is_vector(value):
            continue
        readers = [n for n in _readers(value) if n in living and (n not in names or n.args[0] is value)]
        if all(_can_save(n) and n not in late and is_early([n], late) for n in readers):
            for reader in readers:
                reader.meta["recompute"] = CheckpointPolicy.MUST_SAVE
            value.meta["saved_tensor_with_no_vc_check"] = True


def _readers(value: Node) -> Iterator[Node]:
    """Of the value, or of a view of it."""
    for user in value.users:
        if _is_view(user):
            yield from _readers(user)
        else:
            yield user


def _can_save(node: Node) -> bool:
    """Is the result saved anyway where the backward needs it, or no more than a vector?"""
    if node.meta.get("recompute", CheckpointPolicy.MUST_SAVE) != CheckpointPolicy.MUST_SAVE:
        return False
    saved = node.target in (*_HEADS, ops.kept.default, aten.addmm.default)
    return saved or (isinstance(node.meta.get("val"), torch.Tensor) and _is_vector(node))


def keeps_to_marks() -> bool:
    """Does the partitioner save all that must be, and does the backward get what autograd does not look at? Compiled
    autograd forgets it."""
    if dynamo_config.compiled_autograd or getattr(compiled_autograd, "compiled_autograd_enabled", True):
        return False
    return bool(getattr(functorch_config, "activation_memory_budget", 0) == 1)
