"""Effects of a graph that is not functional: in-place changes, grad mode, and what may be moved past them."""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from ..graph.values import info

_IN_PLACE_OPERATORS = {
    operator.setitem, operator.delitem, operator.iadd, operator.isub, operator.imul, operator.itruediv,
    operator.ifloordiv, operator.imod, operator.ipow, operator.imatmul, operator.iand, operator.ior,
    operator.ixor, operator.ilshift, operator.irshift,
}  # fmt: skip

_RANDOM = ("rand", "bernoulli", "multinomial", "normal", "dropout", "exponential", "uniform", "poisson")


def written(node: Node) -> list[Node] | None:
    """The arguments that a node changes in place, or None if it changes none."""
    found: list[Any] = []
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    if node.op not in ("call_method", "call_function", "call_module"):
        return None
    if isinstance(node.target, torch._ops.OpOverload):
        for i, argument in enumerate(node.target._schema.arguments):
            if argument.is_write:
                found.append(node.args[i] if i < len(node.args) else node.kwargs.get(argument.name))
    elif isinstance(node.target, torch._ops.HigherOrderOperator):
        if "mutation" in name:
            found.extend(node.all_input_nodes)
    elif node.op == "call_module":
        module = node.graph.owning_module.get_submodule(str(node.target)) if node.graph.owning_module else None
        if getattr(module, "inplace", False):
            found.extend(node.args[:1])
    else:
        dunder = name.startswith("__") and name.endswith("__")
        in_place_method = (name.endswith("_") and not dunder) or (dunder and name in _IN_PLACE_DUNDERS)
        if node.target in _IN_PLACE_OPERATORS or in_place_method or _inplace_flag(node):
            found.extend(node.args[:1])
        found.append(node.kwargs.get("out"))
    nodes = [n for f in found for n in (f if isinstance(f, (list, tuple)) else (f,)) if isinstance(n, Node)]
    return [n for n in nodes if info(n) is not None] or None


_IN_PLACE_DUNDERS = {f"__{op.__name__}__" for op in _IN_PLACE_OPERATORS}


def _inplace_flag(node: Node) -> bool:
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


class Effects:
    """In-place changes and grad mode of each place in a graph, and the legality of moving values."""

    def __init__(self, graph: Graph) -> None:
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.writes: dict[Node, list[Node]] = {}
        self._grad_off: dict[Node, bool] = {}
        self._autocast: dict[Node, bool] = {}
        off, regions = False, 0
        for node in graph.nodes:
            changed = written(node)
            if changed is not None:
                self.writes[node] = changed
            if getattr(node.target, "__name__", "") == "_set_grad_enabled" and node.op == "call_function":
                off = node.args[0] is False
            elif getattr(node.target, "__name__", "") == "_enter_inference_mode":
                off = node.args[0] is True
            elif getattr(node.target, "__name__", "") == "_exit_inference_mode":
                off = False
            elif getattr(node.target, "__name__", "") == "_enter_autocast":
                regions += 1
            elif getattr(node.target, "__name__", "") == "_exit_autocast":
                regions -= 1
            self._grad_off[node] = off
            self._autocast[node] = regions > 0

    def grad_off(self, node: Node) -> bool:
        """Is the node inside a no_grad block of this graph? (The mode around the graph is nobody's change.)"""
        return self._grad_off[node]

    def autocast(self, node: Node) -> bool:
        """May autocast have chosen the dtype of the node's result? In this graph, or around it."""
        value = node.meta.get("example_value", node.meta.get("val"))
        kind = value.device.type if isinstance(value, torch.Tensor) else "cpu"
        return self._autocast[node] or torch.is_autocast_enabled(kind)

    def may_write(self, write: Node, value: Node) -> bool:
        """May this in-place node change the memory of `value`? Unknown memory counts as yes."""
        known = info(value)
        if known is None:
            return False
        for target in self.writes[write]:
            changed = info(target)
            if target is value or changed is None or changed.storage is None or known.storage is None:
                return True
            if changed.storage == known.storage:
                return True
        return False

    def same_memory(self, a: Node, b: Node) -> bool:
        """Do two values certainly live in the same memory?"""
        first, second = info(a), info(b)
        return a is b or (
            first is not None and second is not None and first.storage is not None and first.storage == second.storage
        )

    def changed_between(self, value: Node, after: Node, before: Node) -> Node | None:
        """The first in-place change of `value` strictly between two nodes."""
        low, high = self.order[after], self.order[before]
        for write in self.writes:
            if low < self.order[write] < high and self.may_write(write, value):
                return write
        return None

    def movable_up(self, uses: list[tuple[Node, Node]], anchor: Node) -> list[Node] | None:
        """Nodes to move (in order) so that each value of `uses`, as its user sees it, is there right after `anchor`.

        uses: pairs (value, user). None if something in between is impure, depends on the anchor, or is
        changed in place on the way.
        """
        moved: set[Node] = set()
        stack = list(uses)
        while stack:
            node, user = stack.pop()
            if self.order[node] <= self.order[anchor]:
                if node is anchor or self.changed_between(node, anchor, user) is not None:
                    return None
            elif node not in moved:
                other_mode = self._grad_off[node] != self._grad_off[anchor] and _differentiable(node)
                if node in self.writes or other_mode or not _pure(node):
                    return None
                if any(self.may_write(w, node) for w in self.writes if self.order[w] > self.order[anchor]):
                    return None
                moved.add(node)
                stack.extend((arg, node) for arg in node.all_input_nodes)
        return sorted(moved, key=self.order.__getitem__)

    def readable_at(self, uses: list[tuple[Node, Node]], point: Node) -> bool:
        """Does each value of `uses` = (value, user) mean the same right before `point` as at its user?"""
        for node, user in uses:
            if self.order[node] >= self.order[point]:
                return False
            first, last = sorted((user, point), key=self.order.__getitem__)
            if self.changed_between(node, first, last) is not None:
                return False
        return True


def _differentiable(node: Node) -> bool:
    known = info(node)
    return known is not None and known.dtype.is_floating_point


def _pure(node: Node) -> bool:
    """May this node be executed earlier without anyone noticing?"""
    if node.op == "get_attr":
        return True
    if node.op not in ("call_method", "call_function") or isinstance(node.target, torch._ops.HigherOrderOperator):
        return False
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    if name.startswith(("_enter", "_exit", "_set_")) or any(r in name for r in _RANDOM):
        return False
    if node.op == "call_method" or isinstance(node.target, torch._ops.OpOverload):
        return True
    module = getattr(node.target, "__module__", None) or ""
    return module.split(".")[0] in ("torch", "_operator", "builtins", "math") or type(node.target).__name__ in (
        "builtin_function_or_method",
        "method_descriptor",
    )
