"""Writing nodes with their fake values, sizes as the graph knows them, and the order of a graph that was written to."""

from __future__ import annotations

import contextlib
import functools
import operator
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import sympy
import torch
from torch._inductor.pattern_matcher import stable_topological_sort
from torch.fx import Graph, Node
from torch.fx.experimental import _config as shape_config

from .values import collectives

aten = torch.ops.aten


class Writer:
    """Writes nodes before `point`; symbolic sizes among the arguments become nodes of the graph."""

    def __init__(self, graph: Graph, point: Node, like: Node | None = None, avoid: set[Node] | None = None) -> None:
        """avoid: nodes that no size is read off."""
        self.graph, self.point, self.like, self.avoid = graph, point, like, avoid or set()
        self.new: list[Node] = []
        self._sizes: dict[Any, Node] = {}
        # What is made of numbers alone is fake, too: in the mode of the graph's own values.
        self._known = next((v for n in graph.nodes if isinstance(v := n.meta.get("val"), torch.Tensor)), None)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        args, kwargs = self.sized(args), self.sized(kwargs)
        with self.graph.inserting_before(self.point):
            node = self.graph.call_function(target, args, kwargs)
        values = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with fake_mode((values, self._known)) as mode, no_symbols(mode):
            node.meta["val"] = _evaluated(target, *values)
        if self.like is not None:
            keep = ("stack_trace", "nn_module_stack", "source_fn_stack", "original_aten", "custom")
            node.meta.update({k: v for k, v in self.like.meta.items() if k in keep})
        self.new.append(node)
        return node

    def sized(self, value: Any) -> Any:
        """Arguments with nodes for their symbolic sizes."""
        if isinstance(value, (list, tuple)):
            return type(value)(self.sized(v) for v in value)
        if isinstance(value, dict):
            return {k: self.sized(v) for k, v in value.items()}
        if isinstance(value, torch.SymInt):
            value = value.node.expr
        return self.size(value) if isinstance(value, sympy.Basic) else value

    def size(self, expr: Any) -> Any:
        """A node for a symbolic size, or the number."""
        if isinstance(expr, (int, sympy.Integer)):
            return int(expr)
        if expr not in self._sizes:
            self._sizes[expr] = self._find(expr)
        return self._sizes[expr]

    def _find(self, expr: Any) -> Node:
        known = find_size(self.graph, expr, self.avoid)
        if isinstance(known, Node):
            return known
        if known is not None:
            node, dim = known
            return self._size_node(aten.sym_size.int, (node, dim), node.meta["val"].shape[dim])
        return self._made(expr)

    def _made(self, expr: Any) -> Node:
        ops, parts = _operators(), factors(expr)
        if type(expr) not in ops and len(parts) < 2:
            raise ValueError(f"no node of the graph has the size {expr}")
        first, *rest = expr.args if type(expr) in ops else parts
        out: Node = self.size(first)
        for other in rest:
            right = self.size(other)
            values = [v.meta["val"] if isinstance(v, Node) else v for v in (out, right)]
            op = ops.get(type(expr), operator.mul)
            out = self._size_node(op, (out, right), op(*values))
        return out

    def _size_node(self, target: Any, args: Any, value: Any) -> Node:
        with self.graph.inserting_before(self.point):
            node = self.graph.call_function(target, args)
        node.meta["val"] = value
        self.new.append(node)
        return node


def find_size(graph: Graph, expr: Any, avoid: set[Node]) -> Node | tuple[Node, int] | None:
    """A node that is this size, or a tensor and its dimension of this size."""
    node: Node
    for node in graph.nodes:
        value = node.meta.get("val")
        if node not in avoid and isinstance(value, torch.SymInt) and value.node.expr == expr:
            return node
    for node in graph.nodes:
        value = node.meta.get("val")
        if node not in avoid and isinstance(value, torch.Tensor):
            for dim, s in enumerate(value.shape):
                if isinstance(s, torch.SymInt) and s.node.expr == expr:
                    return node, dim
    return None


@functools.cache
def _operators() -> dict[Any, Any]:
    """What sizes are made by, of sizes."""
    from torch.utils._sympy import functions

    found = {sympy.Mul: operator.mul, sympy.Add: operator.add}
    return found | {
        functions.FloorDiv: operator.floordiv,
        functions.PythonMod: operator.mod,
        functions.Mod: operator.mod,
    }


def factors(expr: Any) -> list[Any]:
    """s, s of s**2."""
    power = isinstance(expr, sympy.Pow) and isinstance(expr.exp, sympy.Integer) and expr.exp > 1
    return [expr.base] * int(expr.exp) if power else [expr]


def can_size(graph: Graph, expr: Any, avoid: set[Node]) -> bool:
    """Can a Writer give this size?"""
    if isinstance(expr, (int, sympy.Integer)) or find_size(graph, expr, avoid) is not None:
        return True
    parts = expr.args if type(expr) in _operators() else factors(expr)
    return len(parts) > 1 and all(can_size(graph, a, avoid) for a in parts)


def no_symbols(mode: Any) -> Any:
    """Sizes that only a run tells are not new ones in here: see `rebind`."""
    env = getattr(mode, "shape_env", None)
    return contextlib.nullcontext() if env is None else env.ignore_fresh_unbacked_symbols()


def rebind(node: Node, shape: Sequence[Any]) -> None:
    """Of a node that selects by values anew what another one selects: its sizes are those of the other.

    shape: with the other's symbols. The node defines them for what reads it, since the other will be gone.
    """
    fresh = {s for s in map(_expression, shape) if isinstance(s, sympy.Symbol)}
    known: dict[Any, Any] = {}
    bindings: dict[Any, Any] = {}
    for other in node.graph.nodes:
        value = other.meta.get("val")
        for s in value.shape if isinstance(value, torch.Tensor) and other is not node else ():
            if isinstance(s, torch.SymInt) and s.node.expr in fresh:
                known.setdefault(s.node.expr, s)
        found = other.meta.get("unbacked_bindings") or {}
        bindings.update({k: v for k, v in found.items() if k in fresh and len(found) == 1})
    value = node.meta["val"]
    with fake_mode(value):
        node.meta["val"] = value.new_empty([known.get(_expression(s), s) for s in shape])
    if bindings:
        node.meta["unbacked_bindings"] = bindings


def _expression(s: Any) -> Any:
    return s.node.expr if isinstance(s, torch.SymInt) else s


def _evaluated(target: Any, args: Any, kwargs: Any) -> Any:
    """The value. Of a scatter into zeros torch asks, with a guard, whether their memory has a size below zero."""
    if target in (aten.slice_scatter.default, aten.select_scatter.default):
        return torch.empty_like(args[0])
    return target(*args, **kwargs)


# In torch 2.11 a setting is that of all threads: two that set it and put it back could leave it set.
_one_at_a_time = threading.RLock()


def _after_fork() -> None:
    global _one_at_a_time
    _one_at_a_time = threading.RLock()  # another thread may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextlib.contextmanager
def fake_mode(values: Any) -> Iterator[Any]:
    """The fake mode of these values, or of the trace under way.

    No size is asked whether it is 0 or 1, which would be a guard: what is written holds for all of them.
    """
    from torch._guards import TracingContext, detect_fake_mode

    flat = torch.utils._pytree.tree_leaves(values)
    mode = detect_fake_mode([v for v in flat if isinstance(v, torch.Tensor)])
    if mode is None:
        context = TracingContext.try_get()
        mode = context.fake_mode if context is not None else None
    asks_nothing = shape_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    with _one_at_a_time, asks_nothing, contextlib.nullcontext() if mode is None else mode:
        yield mode


def sort(graph: Graph) -> None:
    """Values may stand behind what now reads them."""
    if collectives(graph):
        _before_readers(graph)
        return
    stable_topological_sort(graph)
    last = next(iter(reversed(graph.nodes)))
    output = next(iter(graph.find_nodes(op="output")))
    if output is not last:  # the sort may leave nodes behind it that nothing reads
        last.append(output)


def _before_readers(graph: Graph) -> None:
    """What a node reads comes to the node, instead of the node to what it reads, and past others like it: the order of
    collectives is that of other processes, too."""
    nodes, done = list(graph.nodes), set()
    end = nodes[-1]
    for node in sorted(nodes, key=lambda n: n.op == "output"):  # nothing stands behind the output
        todo = [node]
        while todo:
            now = todo[-1]
            missing = [a for a in now.all_input_nodes if a not in done]
            if missing and now not in done:
                todo += missing[::-1]
                continue
            todo.pop()
            if now not in done:
                done.add(now)
                end.append(now)
                end = now
