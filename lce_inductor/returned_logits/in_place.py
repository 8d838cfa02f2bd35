"""What a graph that is not functional changes in place."""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from ..graph.values import info

_OPERATORS = {
    operator.setitem, operator.delitem, operator.iadd, operator.isub, operator.imul, operator.itruediv,
    operator.ifloordiv, operator.imod, operator.ipow, operator.imatmul, operator.iand, operator.ior, operator.ixor,
    operator.ilshift, operator.irshift,
}  # fmt: skip
_DUNDERS = {f"__{op.__name__}__" for op in _OPERATORS}


def written(node: Node) -> list[Node]:
    """The tensors that a node changes in place. Where that can't be told, one too many."""
    if node.op not in ("call_method", "call_function", "call_module"):
        return []
    return [n for n in _nodes(_written(node)) if info(n) is not None]


def _written(node: Node) -> list[Any]:
    if isinstance(node.target, torch._ops.OpOverload):
        found = []
        for i, argument in enumerate(node.target._schema.arguments):
            if argument.is_write:
                found.append(node.args[i] if i < len(node.args) else node.kwargs.get(argument.name))
        return found
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return list(node.all_input_nodes) if "mutation" in node.target.name() else []
    if node.op == "call_module":
        module = node.graph.owning_module.get_submodule(str(node.target)) if node.graph.owning_module else None
        return list(node.args[:1]) if getattr(module, "inplace", False) else []
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    dunder = name.startswith("__") and name.endswith("__")
    method = name in _DUNDERS if dunder else name.endswith("_")
    first = node.target in _OPERATORS or method or _flag(node)
    return [*(node.args[:1] if first else ()), node.kwargs.get("out")]


def _flag(node: Node) -> bool:
    """F.relu(x, inplace=True) and its like."""
    if node.kwargs.get("inplace") is True:
        return True
    if node.op != "call_function" or not any(a is True for a in node.args):
        return False
    try:
        bound = inspect.signature(node.target).bind_partial(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return bound.arguments.get("inplace") is True


def _nodes(values: list[Any]) -> list[Node]:
    flat = [n for v in values for n in (v if isinstance(v, (list, tuple)) else (v,))]
    return [n for n in flat if isinstance(n, Node)]


def same_memory(a: Node, b: Node) -> bool:
    """May two values share memory? Unknown memory counts as yes."""
    first, second = info(a), info(b)
    if a is b:
        return True
    if first is None or second is None:
        return False
    return first.storage is None or second.storage is None or first.storage == second.storage


def all_writes(graph: Graph) -> dict[Node, list[Node]]:
    found = {node: written(node) for node in graph.nodes}
    return {node: targets for node, targets in found.items() if targets}
