"""The end of a graph: all that depends on its last matrix products, with what that needs of the rest as inputs."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch._functorch.predispatch
from torch.autograd import grad_mode
from torch.fx import Graph, Node

from ..graph.values import info
from .in_place import all_writes
from .products import is_product

autocast_mode = torch.amp.autocast_mode

SET_GRAD: Any = torch._C._set_grad_enabled
ENTER: Any
EXIT: Any
ENTER, EXIT = autocast_mode._enter_autocast, autocast_mode._exit_autocast
MODES: set[Any] = {SET_GRAD, ENTER, EXIT}


class NotDeferred(Exception):
    """Why logits stay as they are."""


def _levels() -> set[Any]:
    """What opens and closes levels of vmap, grad and their like, or inference mode: no tail is cut out of these."""
    places = (torch._C._functorch, torch._functorch.predispatch)
    found = {f for place in places for f in vars(place).values() if callable(f) and not isinstance(f, type)}
    names = ("_enter_inference_mode", "_exit_inference_mode")
    return found | {getattr(grad_mode, name) for name in names if hasattr(grad_mode, name)}


LEVELS = _levels()


@dataclasses.dataclass
class Tail:
    """nodes: in order, and among them all that change grad mode or autocast. first: the first that is not of those.

    changed: inputs of the graph that the tail changes in place.
    """

    nodes: list[Node]
    inputs: list[Node]
    outputs: list[Node]
    changed: list[Node]
    first: Node
    writes: dict[Node, list[Node]]


def cut(graph: Graph, products: list[Node]) -> Tail:
    """The tail that starts with these products. Raises NotDeferred where it can't be looked at alone."""
    writes = all_writes(graph)
    members = set(products)
    while True:
        _close(graph, members)
        more = _memory(graph, members, writes)
        if more <= members:
            break
        members |= more
    first = next(n for n in graph.nodes if n in members)
    nodes: list[Node] = []
    inputs: dict[Node, None] = {}
    late = False
    for node in graph.nodes:
        late = late or node is first
        if late and node.target in LEVELS:
            raise NotDeferred(f"the head is inside a level of functorch, or of inference mode: {node.name}")
        if node in members:
            if is_product(node) and node not in products:
                raise NotDeferred(f"a matrix product depends on the logits: {node.name}")
        elif node.op != "call_function" or node.target not in MODES:
            continue
        nodes.append(node)
        inputs.update({a: None for a in node.all_input_nodes if a not in members and a.target not in MODES})
    (output,) = graph.find_nodes(op="output")
    changed = [t for n in nodes for t in writes.get(n, ()) if t not in members]
    return Tail(
        nodes,
        list(inputs),
        [a for a in output.all_input_nodes if a in members],
        list(dict.fromkeys(changed)),
        first,
        writes,
    )


def _close(graph: Graph, members: set[Node]) -> None:
    for node in graph.nodes:
        if node.op != "output" and any(a in members for a in node.all_input_nodes):
            members.add(node)


def _memory(graph: Graph, members: set[Node], writes: dict[Node, list[Node]]) -> set[Node]:
    """What shares memory with a value that the tail writes to: by that, too, a value may depend on the logits."""
    storages = set()
    for node in members:
        for target in writes.get(node, ()) if node not in MODES else ():
            known = info(target)
            if known is None or known.storage is None:
                raise NotDeferred(f"something of unknown memory is changed in place: {node.name}")
            if target not in members:
                storages.add(known.storage)
    if not storages:
        return set()
    found: set[Node] = set()
    outside: set[Node] = set()
    for node in graph.nodes:
        known = info(node)
        if known is not None and known.storage in storages:
            (outside if node.op in ("placeholder", "get_attr") else found).add(node)
    owners = [info(n).storage for n in outside]  # type: ignore[union-attr]
    if len(owners) != len(set(owners)):
        raise NotDeferred("two inputs of the graph share memory that is changed in place")
    return found
