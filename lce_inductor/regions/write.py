"""Region -> graph: the only module of this stage that changes a graph.

z = mm(x, w); ...; loss_rows = sub(...)          out = row_region([x], [w], ..., program)
dz = ...; dx = mm(dz, w.t()); dw = mm(dz.t(), x)  loss_rows, dx1, dw1 = out[0], out[1], out[2]
                                                 dx, dw = dx1 * tangent, dw1 * tangent
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from ..config import Config
from ..graph import second_derivative as second
from ..graph.values import device_type
from ..graph.write import Writer
from ..lower import region_values
from ..lower.plan import policy_of
from ..ops.row_region import cut_by_hints, dry_run
from ..spec.program import Program
from .aten_ops import Crossing
from .heads import Head, tangents_of
from .labels import Labels
from .program_steps import Given
from .region import Part, Region
from .spaces import Move, Space, adjoint, apply
from .tags import ROW, local_sizes, product, shape_of

aten = torch.ops.aten
prims = torch.ops.prims


def write(graph: Graph, labels: Labels, region: Region, config: Config) -> list[Node]:
    """Replace a region's nodes. Returns the nodes of the ops that now compute them."""
    behind = behind_heads(graph, labels)
    writer = Writer(graph, before_writes(graph), region.heads[0], unsized(graph, labels))
    made: list[Node] = []
    values: dict[Node, Node] = {}
    copies = Copies(writer, labels, region, behind)
    for parts, phase in ((region.forward, "forward"), (region.backward, "backward")):
        for space, part in parts.items():
            op = _call(writer, labels, part, space, config, copies, values, phase == "forward")
            made.append(op)
            for i, (node, kind) in enumerate(part.nodes):
                result = writer.call(operator.getitem, op, i)
                value = _value(writer, labels, part, space, node, kind, result)
                if copies.tangent is not None and node in labels.on_tangent:
                    value = _scaled(writer, value, copies.tangent, node)
                values[node] = value if node not in values else writer.call(aten.add.Tensor, values[node], value)
        done = {n for part in parts.values() for n, _ in part.nodes}
        for node in done:
            replace(node, values[node])
            for other in values:  # what reads a replaced node reads its replacement from now on
                if values[other] is node:
                    values[other] = values[node]
    for node in list(graph.nodes):  # sizes read off what is not there any more
        if node.target is aten.sym_size.int and node.args[0] in labels.of and labels.wide(node.args[0]) and node.users:
            node.replace_all_uses_with(Writer.size(writer, node.meta["val"].node.expr))
    return made


def behind_heads(graph: Graph, labels: Labels) -> set[Node]:
    """Nodes that can't be there before the heads are: a size that is read off such a node counts, too."""
    return _reached(graph, set(labels.sources))


def unsized(graph: Graph, labels: Labels) -> set[Node]:
    """Nodes that no size is read off: those behind the heads, and incoming gradients, which no forward may touch."""
    return _reached(graph, {*labels.sources, *tangents_of(graph)})


def _reached(graph: Graph, found: set[Node]) -> set[Node]:
    for node in graph.nodes:
        if any(a in found for a in node.all_input_nodes):
            found.add(node)
    return found


def before_writes(graph: Graph) -> Node:
    """Where new nodes may stand: before what changes inputs in place, which AOTAutograd puts at the end."""
    node: Node
    for node in graph.nodes:
        target = node.target
        if node.op == "output" or (isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable):
            return node
    raise AssertionError("a graph without an output")


def replace(node: Node, value: Node) -> None:
    value.meta |= {k: v for k, v in node.meta.items() if k not in ("val", "recompute", "ac_graph_id")}
    node.replace_all_uses_with(value)


def _call(
    writer: Writer,
    labels: Labels,
    part: Part,
    space: Space,
    config: Config,
    copies: Copies,
    values: dict[Node, Node],
    forward: bool,
) -> Node:
    emitter = part.emitter

    def now(node: Node) -> Node:
        """What stands for a node where this op reads it. The backward's op may read what the forward's one gave."""
        return values[node] if node in values else copies(node) if forward else node

    xs, weights, biases = [], [], []
    for node, _ in emitter.given["logits"]:
        x, weight, bias = Head.of(node)
        x_moved = moved(writer, two(writer, now(x)), labels.of[node].space, space, list((shape_of(x) or ())[-1:]))
        xs.append(x_moved)
        weights.append(two(writer, now(weight)))
        if bias is not None:  # of one element, or [1, V]: [V]
            flat = writer.call(aten.reshape.default, now(bias), [-1])
            bias = writer.call(aten.expand.default, flat, [node.meta["val"].shape[-1]])
        biases.append(bias)
    given = [
        _naming_inputs(writer, labels, what, forward, values, rows(writer, what, space, now))
        for what in emitter.given["rows"]
    ]
    whole = [now(what[0]) for what in emitter.given["whole"]]
    matrices = [two(writer, now(m)) for m, _ in emitter.matrices]
    turned = [t for _, t in emitter.matrices]
    matrices = [writer.call(aten.permute.default, m, [1, 0]) if t else m for m, t in zip(matrices, turned)]
    program = emitter.program()

    def args(program: Program) -> Any:
        return writer.sized((
            space.find().count, xs, weights, [b for b in biases if b is not None], [b is not None for b in biases],
            given, whole, matrices, list(emitter.sizes), program.text(), config.chunk_tokens or 0,
            config.workspace_bytes,
        ))  # fmt: skip

    if copies.tangent is not None and policy_of(device_type(copies.tangent)).sums_are_scaled:
        cut = cut_by_hints(*torch.fx.map_arg(args(program), lambda n: n.meta["val"]))
        if cut is not None and cut.chunks.count > 1:
            program = _with_sums(program, [node in labels.on_tangent for node, _ in part.nodes])
    op = writer.call(torch.ops.lce_inductor.row_region.default, *args(program))
    dry_run(*torch.fx.map_arg(op.args, lambda n: n.meta["val"]))
    return op


def _with_sums(program: Program, scaled: list[bool]) -> Program:
    """dW as the sums over chunks that it is, in fp32, where it is multiplied by the tangent: a pass over dW less, and a
    rounding less."""
    results = list(program.results)
    for i, mine in enumerate(scaled):
        if mine and results[i].kind == "dw":
            results[i] = results[i]._replace(dtype=region_values.wide(results[i].dtype))
    return dataclasses.replace(program, results=tuple(results))


def two(writer: Writer, node: Node) -> Node:
    """A matrix, without a batch of one."""
    return writer.call(aten.squeeze.dim, node, 0) if len(shape_of(node) or ()) == 3 else node


def _naming_inputs(
    writer: Writer, labels: Labels, what: Any, forward: bool, values: dict[Node, Node], value: Node
) -> Node:
    """What a backward reads of the tangent names the inputs behind the head: see graph/second_derivative.py."""
    if forward or what[0] not in labels.on_tangent or not (inputs := second.inputs_of([*labels.sources, value])):
        return value
    second.register_lowering()
    return writer.call(torch.ops.lce_inductor.once.default, value, inputs)


def rows(writer: Writer, what: Given, space: Space, now: Callable[[Node], Node]) -> Node:
    node, tags, home, expanded, classes = what
    value = now(node)
    if classes is not None:
        last = writer.call(aten.add.Tensor, value, classes)
        value = writer.call(aten.where.self, writer.call(aten.lt.Scalar, value, 0), last, value)
    shape = shape_of(node) or ()
    if expanded is not None:
        value = writer.call(aten.expand.default, value, list(expanded))
        shape = expanded
    order = [d for d, t in enumerate(tags) if t == ROW] + [d for d, t in enumerate(tags) if t != ROW]
    if order != sorted(order):
        value = writer.call(aten.permute.default, value, order)
    locals_ = local_sizes(tags, shape)
    value = writer.call(aten.reshape.default, value, [home.find().count, *locals_])
    return moved(writer, value, home, space, locals_)


def moved(writer: Writer, value: Node, home: Space, space: Space, locals_: list[Any]) -> Node:
    for move in path(home, space):
        value = apply(move, writer.call, value, locals_)
    return value


def path(home: Space, space: Space) -> list[Move]:
    """Moves from one set of rows to another."""
    start, goal = home.find(), space.find()
    todo: list[tuple[Space, list[Move]]] = [(start, [])]
    seen = {start}
    while todo:
        here, way = todo.pop(0)
        if here is goal:
            return way
        for move in here.moves:
            after = move.after.find()
            if after not in seen:
                seen.add(after)
                todo.append((after, [*way, move]))
    raise Crossing("rows that do not follow from each other")


def back(writer: Writer, value: Node, home: Space, space: Space, locals_: list[Any]) -> Node:
    for move in reversed(path(home, space)):
        value = adjoint(move, writer.call, value, locals_)
    return value


def _value(writer: Writer, labels: Labels, part: Part, space: Space, node: Node, kind: str, result: Node) -> Node:
    """What stands for a node, of an op's result."""
    shape = list(shape_of(node) or ())
    if kind == "row":
        label = labels.of[node]
        locals_ = local_sizes(label.tags, tuple(shape))
        result = back(writer, result, label.space, space, locals_)
        order = [d for d, t in enumerate(label.tags) if t == ROW] + [d for d, t in enumerate(label.tags) if t != ROW]
        result = writer.call(aten.reshape.default, result, [shape[d] for d in order])
        if order != sorted(order):
            result = writer.call(aten.permute.default, result, [order.index(d) for d in range(len(order))])
        return result
    if kind == "total":
        wide = next(a for a in node.all_input_nodes if a in labels.of)
        total = writer.call(aten.sum.default, result, dtype=node.meta["val"].dtype)
        if node.target is aten.mean.default:
            total = writer.call(aten.div.Tensor, total, _count(writer, shape_of(wide) or ()))
        return writer.call(aten.reshape.default, total, shape) if shape else total
    if kind == "sum":
        return writer.call(aten.reshape.default, result, shape)
    wide = next(a for a in node.args if a in labels.of)  # type: ignore[assignment]
    turned = node.args[0] is not wide
    if kind == "dx":
        result = back(writer, result, labels.of[wide].space, space, [shape[-1 if not turned else -2]])
    if turned:
        result = writer.call(aten.permute.default, result, [1, 0])
    return writer.call(aten.reshape.default, result, shape) if len(shape) == 3 else result


def _count(writer: Writer, shape: Any) -> Any:
    size = writer.size(product(shape)) if not isinstance(product(shape), int) else product(shape)
    return size


def _scaled(writer: Writer, value: Node, tangent: Node, node: Node) -> Node:
    """A gradient times the real tangent, in fp32 or wider."""
    wanted = node.meta["val"].dtype
    if value.meta["val"].dtype in (torch.float16, torch.bfloat16):
        value = writer.call(prims.convert_element_type.default, value, torch.float32)
    value = writer.call(aten.mul.Tensor, value, tangent)
    if value.meta["val"].dtype != wanted:
        value = writer.call(prims.convert_element_type.default, value, wanted)
    return value


class Copies:
    """Copies of what an op reads, where that depends on the tangent (which is one in the copy, for a merged region), or
    reads a size off something that is not there yet. Other uses stay as they are."""

    def __init__(self, writer: Writer, labels: Labels, region: Region | None, behind: set[Node]) -> None:
        self.writer, self.labels, self.behind = writer, labels, behind
        self.tangent: Node | None = None
        self.of: dict[Node, Any] = {}
        self.merged = region is not None and region.merged
        if region is not None and region.tangent is not None:
            (root,) = region.tangent.roots
            value = root.meta["val"]
            self.tangent = root if value.dim() == 0 else writer.call(aten.reshape.default, root, [])
            if inputs := second.inputs_of(region.heads):
                second.register_lowering()
                self.tangent = writer.call(torch.ops.lce_inductor.once.default, self.tangent, inputs)
            self.of[root] = writer.call(aten.full.default, list(value.shape), 1, dtype=value.dtype, device=value.device)

    def _stays(self, node: Node) -> bool:
        return node not in self.behind and not (self.merged and node in self.labels.on_tangent)

    def __call__(self, node: Node) -> Any:
        todo = [node]
        while todo:
            now = todo[-1]
            if now in self.of or self._stays(now):
                todo.pop()
                continue
            value = now.meta.get("val")
            if isinstance(value, torch.SymInt):
                self.of[now] = self.writer.size(value.node.expr)
                todo.pop()
                continue
            missing = [a for a in now.all_input_nodes if a not in self.of and not self._stays(a)]
            if missing:
                todo += missing
                continue
            args, kwargs = torch.fx.map_arg((now.args, now.kwargs), lambda n: self.of.get(n, n))
            self.of[now] = self.writer.call(now.target, *args, **kwargs)
            todo.pop()
        return self.of.get(node, node)
