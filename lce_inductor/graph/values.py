"""What is known of a node's value without running it: shape, dtype, storage, user's source line."""

from __future__ import annotations

import linecache
import operator
import os
import re
import sys
import sysconfig
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node
from torch.utils._python_dispatch import _disable_current_modes

# Hint for a size that has none (data-dependent): large, as a loss over selected rows usually is.
_UNKNOWN_SIZE = 8192


class Info(NamedTuple):
    """A tensor value: shape may hold SymInts; storage identifies the memory it lives in, None if unknown."""

    shape: tuple[Any, ...]
    dtype: torch.dtype
    storage: int | None
    requires_grad: bool
    plain: bool


def info(node: Any) -> Info | None:
    """Shape and dtype of a node's tensor value from example_value (Dynamo), val (aten) or tensor_meta (ShapeProp)."""
    if not isinstance(node, Node):
        return None
    value = node.meta.get("example_value", node.meta.get("val"))
    if isinstance(value, torch.Tensor):
        strided = value.layout is torch.strided and not value.is_quantized and not value.is_nested
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor(value)  # under vmap, grad, ...
        plain = strided and not wrapped and not torch.utils._python_dispatch.is_traceable_wrapper_subclass(value)
        storage = value.untyped_storage()._cdata if plain else None
        return Info(tuple(value.shape), value.dtype, storage, value.requires_grad, plain)
    meta = node.meta.get("tensor_meta")
    if value is None and isinstance(meta, tuple) and hasattr(meta, "shape") and hasattr(meta, "dtype"):
        return Info(tuple(meta.shape), meta.dtype, None, bool(getattr(meta, "requires_grad", False)), True)
    return None


def device_type(node: Node) -> str:
    """Where a node's tensor value lives; "cpu" if unknown."""
    value = node.meta.get("example_value", node.meta.get("val"))
    return str(getattr(getattr(value, "device", None), "type", "cpu"))


def same(a: Any, b: Any) -> bool:
    """Are two sizes the same? Never compares SymInts as values: that would add a guard to the user's graph."""
    # A SymInt may stand for a number; a ragged one has no expression.
    a, b = (getattr(s.node, "expr", s.node) if isinstance(s, torch.SymInt) else s for s in (a, b))
    return bool(a == b)


def same_shape(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return len(a) == len(b) and all(same(p, q) for p, q in zip(a, b))


def roots(a: Any, b: Any) -> tuple[Any, Any]:
    """The symbols that two sizes are the same function of, where they are: of a third of the rows each, all the rows. A
    guard that these are equal lets torch see it of whatever is computed from them."""
    if not (isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt)):
        return a, b
    from torch.fx.experimental.sym_node import SymNode  # brings sympy along

    p, q, env = a.node.expr, b.node.expr, a.node.shape_env
    mine, others = p.free_symbols - q.free_symbols, q.free_symbols - p.free_symbols
    if len(mine) != 1 or len(others) != 1 or p.xreplace(dict(zip(mine, others))) != q:
        return a, b
    first, second = (torch.SymInt(SymNode(s, env, int, None)) for s in (*mine, *others))
    return first, second


def has_hint(size: Any) -> bool:
    """Is it known how large a size was when the graph was traced?"""
    return isinstance(size, int) or bool(getattr(size.node, "has_hint", bool)())


def size_hint(size: Any) -> int:
    """A size for policy only (is the rewrite worth it?), never for legality."""
    if isinstance(size, int):
        return size
    try:  # data-dependent and ragged sizes have no hint, and asking may raise
        return int(size.node.hint)
    except Exception:
        return _UNKNOWN_SIZE


def numel_hint(shape: tuple[Any, ...]) -> int:
    total = 1
    for size in shape:
        total *= size_hint(size)
    return total


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>.+)\n(?: {4}(?P<code>.+))?')


def is_zero(node: Any) -> bool:
    """A tensor of zeros, or the number."""
    if not isinstance(node, Node):
        return bool(node == 0)
    if node.target in (aten.full.default, aten.scalar_tensor.default, aten.full_like.default):
        return bool(node.args[-1] == 0)
    if node.target in (aten.zeros.default, aten.zeros_like.default):
        return True
    kept = (aten.expand.default, aten.view.default, aten.alias.default, aten.clone.default)
    return node.target in kept and is_zero(node.args[0])


WRAPPERS: set[str] = set()
"""Files of this package whose functions are compiled where a user calls torch's."""


def source(node: Node | None) -> str:
    """The user's `file:line: code` for a node, or an empty string."""
    frames = list(_FRAME.finditer((node.meta.get("stack_trace") if node is not None else None) or ""))
    if not frames:
        return ""
    users = [frame for frame in frames if frame["file"] not in WRAPPERS]
    return _line(*users[-1].group("file", "line", "code")) if users else _called_from()


def _line(file: str, line: Any, code: str | None) -> str:
    code = (code or "").strip()
    return f"{file}:{line}" + (f": {code}" if code else "")


def _called_from() -> str:
    """The user's line whose call is being compiled: outside of the wrapper, the innermost frame that is the user's."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename not in WRAPPERS:  # a backend may be the user's, too
        frame = frame.f_back
    while frame is not None and not _is_users(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return ""
    return _line(frame.f_code.co_filename, frame.f_lineno, linecache.getline(frame.f_code.co_filename, frame.f_lineno))


_PACKAGE, _TORCH = (str(Path(file).parent) + os.sep for file in (Path(__file__).parent, torch.__file__))
_STDLIB = sysconfig.get_path("stdlib") + os.sep


def _is_users(file: str) -> bool:
    if file.startswith(("<frozen", "<eval_with_key", _PACKAGE, _TORCH)):
        return False
    return not file.startswith(_STDLIB) or "-packages" + os.sep in file


aten = torch.ops.aten
_VIEWS = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.alias.default, aten.detach.default,
    aten.permute.default, aten.transpose.int, aten.t.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.slice.Tensor, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int,
    operator.getitem,
)  # fmt: skip


def is_given(node: Node) -> bool:
    """Is this an input of the graph, however viewed? Torch.compile alone need not hold what the graph computes."""
    while node.op == "call_function" and node.target in _VIEWS:
        node = node.args[0]  # type: ignore[assignment]
    return node.op != "call_function"


def lifted(node: Node) -> Any:
    """The number of torch.tensor(number) in the user's code: a copy of a tensor that the graph holds."""
    if node.target is not aten.lift_fresh_copy.default:
        return None
    with _disable_current_modes():  # it is a real tensor
        value = getattr(node.graph.owning_module, str(node.args[0].target), None)  # type: ignore[union-attr]
        plain = type(value) is torch.Tensor and value.dim() == 0 and value.device.type == "cpu"
        return value.item() if plain else None  # type: ignore[union-attr]


_COLLECTIVES = ("_c10d_functional", "_c10d_functional_autograd", "c10d_functional", "c10d")


def is_collective(node: Node) -> bool:
    """An exchange between processes, or the wait for one."""
    return getattr(node.target, "namespace", "") in _COLLECTIVES


def collectives(graph: Graph) -> list[Node]:
    """In order. Each process must come to the same ones in the same order, or all wait forever."""
    return [n for n in graph.nodes if is_collective(n)]


def dependents(graph: Graph, roots: set[Node], sizes: bool = False) -> set[Node]:
    """Nodes that depend on these; without `sizes`, a size says nothing about the values of what it is the size of."""
    found = set(roots)
    for node in graph.nodes:
        counts = sizes or not isinstance(node.meta.get("val"), (int, torch.SymInt))
        if counts and any(a in found for a in node.all_input_nodes):
            found.add(node)
    return found


def equal_values(a: Any, b: Any) -> bool:
    """Do two arguments of nodes stand for the same value, because they are the same node or made in the same way?"""
    todo, seen = [(a, b)], set()
    while todo:
        a, b = todo.pop()
        if a is b or (isinstance(a, Node) and isinstance(b, Node) and (a, b) in seen):
            continue
        if isinstance(a, Node) and isinstance(b, Node):
            seen.add((a, b))
            sizes = [v for v in (a.meta.get("val"), b.meta.get("val")) if isinstance(v, (int, torch.SymInt))]
            if len(sizes) == 2 and same(*sizes):
                continue
            if a.op != "call_function" or a.target is not b.target or not _repeats(a.target):
                return False
            todo += [(a.args, b.args), (tuple(sorted(a.kwargs.items())), tuple(sorted(b.kwargs.items())))]
        elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
            todo += zip(a, b)
        elif type(a) is not type(b) or a != b:
            return False
    return True


def _repeats(target: Any) -> bool:
    """Does a call of it with the same arguments give the same value, whenever it runs?"""
    if not isinstance(target, torch._ops.OpOverload):
        return target is operator.getitem
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def written_inputs(graph: Graph) -> set[Node]:
    """Inputs that are written to: by the graph, or by AOTAutograd of what the graph returns."""
    aten, inputs = torch.ops.aten, graph.find_nodes(op="placeholder")
    found = {n for n in inputs if any(u.target is aten.copy_.default and u.args[0] is n for u in n.users)}
    later = [d.mutated_input for d in graph.output_node().meta.get("desc") or () if hasattr(d, "mutated_input")]
    return found | {n for n in inputs if n.meta.get("desc") is not None and n.meta["desc"] in later}


def alive(graph: Graph) -> set[Node]:
    """Nodes that the output, or an effect, depends on."""
    todo = [n for n in graph.nodes if n.op == "output" or n.is_impure()]
    found = set(todo)
    while todo:
        for node in todo.pop().all_input_nodes:
            if node not in found:
                found.add(node)
                todo.append(node)
    return found
