"""Second derivatives stay an error, as they are with torch.compile alone.

AOTAutograd raises where a second differentiation comes back to a compiled backward, and only an input of the graph
that this backward has saved leads there. Gradients that are computed in the forward need none of the inputs: the
answer would be None, as if there were nothing to find. So the backward of a head names the inputs that the head
depends on, in `once`, an op that returns its first argument; no kernel is left of it. What it names is held until the
backward: mostly parameters, and what the linear layer's own backward would save. It must not be written to before, but
for what nothing reads there (schedule/held_inputs.py).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Graph, Node

from ..ops import schema  # noqa: F401  (registers the ops)
from .values import written_inputs

once = torch.ops.lce_inductor.once
log = logging.getLogger(__name__)


def inputs_of(nodes: Iterable[Any]) -> list[Node]:
    """The differentiated inputs of the joint graph that any of the nodes is computed from, in the graph's order."""
    seen = dict.fromkeys(n for n in nodes if isinstance(n, Node))
    todo = list(seen)
    for node in todo:
        todo += [n for n in dict.fromkeys(node.all_input_nodes) if n not in seen]
        seen |= dict.fromkeys(node.all_input_nodes)
    if not todo:
        return []
    return [n for n in _differentiated(todo[0].graph) if n in seen]


def _differentiated(graph: Graph) -> list[Node]:
    """Inputs that the graph has gradients of, but for those it writes to: the backward would see them changed."""
    holes = graph.find_nodes(op="placeholder")
    written = written_inputs(graph)
    # A tensor subclass of unknown sizes is taken apart into tensors and those sizes.
    inputs = [n for n in holes if isinstance(n.meta.get("val"), torch.Tensor) and n not in written]
    gradients = {_base(getattr(_base(d), "grad_of", None)) for d in graph.output_node().meta.get("desc") or ()}
    found = [n for n in inputs if n.meta.get("desc") is not None and _base(n.meta["desc"]) in gradients]
    # Without descriptions of what is what: all that could be.
    values = [(n, n.meta["val"]) for n in inputs if str(n.target).startswith("primals")]
    return found or [n for n, value in values if value.is_floating_point()]


def _base(description: Any) -> Any:
    """Of the tensor subclass that something is a part of."""
    while hasattr(description, "base"):
        description = description.base
    return description


def register_lowering() -> None:
    """Inductor's code for `once`: its first argument. Without it the op is called, and copies that."""
    try:
        from torch._inductor.lowering import lowerings, register_lowering
    except ImportError as error:  # private to torch
        log.debug("once stays an op: %s", error)
        return
    if once.default not in lowerings:
        register_lowering(once.default, type_promotion_kind=None)(lambda value, inputs: value)
