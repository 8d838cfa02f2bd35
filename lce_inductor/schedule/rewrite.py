"""Plan -> joint graph, one head at a time."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from ..graph import second_derivative as second
from ..graph.write import Writer, can_size, fake_mode
from ..lower.plan import planned
from ..spec.statistics import STATISTICS, RowGrads
from .needed import Literal, Needed, Where, sizes_of, unavailable
from .request import request_of
from .tangents import HEAD_ARGS, ROW_GRADIENTS, RowGradients

aten = torch.ops.aten
prims = torch.ops.prims
ops = torch.ops.lce_inductor


def describe(forward: Node) -> str:
    """A head by its sizes, for log lines."""
    x, weight = (forward.args[i].meta["val"] for i in (0, 1))  # type: ignore[union-attr]
    return f"head {forward.name} {list(x.shape)} x {list(weight.shape)}"


def merge(graph: Graph, forward: Node, backward: Node, found: RowGradients) -> Node:
    """Replace row_stats and row_stats_backward by one row_stats_with_grad, scaled by the tangent in the backward."""
    epilogue, stats, chunk_tokens, workspace_bytes = forward.args[HEAD_ARGS:]
    mask = backward.args[-1]
    x = forward.args[0].meta["val"]  # type: ignore[union-attr]
    grads: list[Node | None] = [found.grads[g].const if g in found.grads else None for g in ROW_GRADIENTS]
    slope = found.grads["g_lse"].slope if "g_lse" in found.grads else None
    writer = _Writer(graph, forward)
    scale = None
    if x.dtype == torch.float16:
        *grads, slope, scale = writer.normalize([*grads, slope])
    of = {"g_lse_slope": slope, **dict(zip(ROW_GRADIENTS, grads))}
    args = [*(of[f"g_{name}"] for name in RowGrads._fields), epilogue, stats, chunk_tokens, workspace_bytes, mask]
    # No guard comes of it: either form is right at any size.
    if planned(request_of(forward, backward), x.device).wide:
        args.append(True)
    merged = writer.call(ops.row_stats_with_grad.default, *forward.args[:HEAD_ARGS], *args, **forward.kwargs)
    # Inside a checkpointed region everything else may be recomputed; this op's gradients are what is kept.
    must_save(merged, forward)
    forward.replace_all_uses_with(merged)
    graph.erase_node(forward)
    for result in merged.users:
        must_save(result, merged)

    tangent = _named(graph, backward, found.tangent, merged.args)
    # dW before dX: each exists twice while it is scaled, and the larger one shall be alone.
    users = [(int(user.args[1]), user) for user in backward.users]  # type: ignore[arg-type]
    for index, user in sorted(users, key=lambda pair: -pair[0]):
        with graph.inserting_before(backward):
            gradient = graph.call_function(operator.getitem, (merged, len(STATISTICS) + index))
            gradient.meta["val"] = merged.meta["val"][len(STATISTICS) + index]
            must_save(gradient, merged)
            wide, out = _scaled(graph, gradient, tangent, scale, user)
        user.replace_all_uses_with(out)
        graph.erase_node(user)
        _skip_rounding(out, wide)
    graph.erase_node(backward)
    return merged


def recompute(graph: Graph, forward: Node, backward: Node) -> None:
    """Leave the gradients to the backward. What it saves may be made from the inputs, and is not the inputs then."""
    position = next((i for i in ROW_GRADIENTS.values() if isinstance(backward.args[i], Node)), None)
    if position is not None:
        gradient = backward.args[position]
        backward.update_arg(position, _named(graph, backward, gradient, (*forward.args, *backward.args)))  # type: ignore[arg-type]


def restrict(graph: Graph, op: Node, needed: Needed) -> bool:
    """Tell a head which rows are needed, and make risky values zero where they are not; False where that can't be said
    before the head. The graph is not in order afterwards."""
    x, late = op.args[0], unavailable(graph, op)
    literals = {literal for where in (needed.rows, *needed.risky.values()) for part in where for literal in part}
    if any(literal.node.meta["val"].device != x.meta["val"].device for literal in literals):  # type: ignore[union-attr]
        return False
    if not all(can_size(graph, size, late) for literal in literals for size in literal.shape):
        return False
    formula = _Formula(graph, op, late)
    op.update_kwarg("needed", formula(needed.rows, sizes_of(x)[:1]))  # type: ignore[arg-type]
    for value, where in needed.risky.items():
        like = value.meta["val"]
        writer = Writer(graph, value.next, value, late)
        zero = writer.call(aten.full.default, [], 0, dtype=like.dtype, device=like.device)
        kept = writer.call(aten.where.self, formula(where, sizes_of(value)), value, zero)
        for user in [u for u in value.users if u is not kept]:
            user.replace_input_with(value, kept)
    return True


class _Formula:
    """Writes a Where as a bool tensor of some shape, before a head."""

    def __init__(self, graph: Graph, op: Node, late: set[Node]) -> None:
        self.call = Writer(graph, op, op, late).call
        # The order of a set's elements is another in each process, and a graph is a key of caches.
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.known: dict[Any, Node] = {}

    def __call__(self, where: Where, shape: tuple[Any, ...]) -> Node:
        if (where, shape) not in self.known:
            parts = sorted(sorted(map(self._key, part)) for part in where)
            every = [self._joined(aten.logical_and, [self._literal(key[-1], shape) for key in part]) for part in parts]
            self.known[where, shape] = self._joined(aten.logical_or, every)
        return self.known[where, shape]

    def _key(self, literal: Literal) -> tuple[Any, ...]:
        return self.order[literal.node], str(literal.shape), literal.nonzero, literal

    def _joined(self, op: Any, values: list[Node]) -> Node:
        return functools.reduce(lambda a, b: self.call(op.default, a, b), values)

    def _literal(self, literal: Literal, shape: tuple[Any, ...]) -> Node:
        out = literal.node
        if out.meta["val"].dtype != torch.bool or not literal.nonzero:
            out = self.call(aten.ne.Scalar if literal.nonzero else aten.eq.Scalar, out, 0)
        if sizes_of(out) != literal.shape:
            out = self.call(aten.expand.default, out, list(literal.shape))
        return out if literal.shape == shape else self.call(aten.reshape.default, out, list(shape))


def _named(graph: Graph, point: Node, value: Node, sources: Iterable[Any]) -> Node:
    """The value, which the backward has anyway, naming the inputs behind `sources` to it (see second_derivative.py)."""
    inputs = second.inputs_of(sources)
    if not inputs:
        return value
    second.register_lowering()
    with graph.inserting_before(point):
        return _Writer(graph, None).call(ops.once.default, value, inputs)


def must_save(node: Node, source: Node) -> None:
    if "recompute" in source.meta:
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        if "ac_graph_id" in source.meta:
            node.meta["ac_graph_id"] = source.meta["ac_graph_id"]


def _scaled(graph: Graph, gradient: Node, tangent: Node, scale: Node | None, user: Node) -> tuple[Node, Node]:
    """The gradient times the real tangent, in fp32 or wider and in the dtype that the backward op gave."""
    writer = _Writer(graph, None)
    if tangent.meta["val"].dim() > 0:
        tangent = writer.call(aten.reshape.default, tangent, [])
    factor = tangent if scale is None else writer.call(aten.mul.Tensor, tangent, scale)
    wanted = user.meta["val"].dtype
    if gradient.meta["val"].dtype in (torch.float16, torch.bfloat16):
        gradient = writer.call(prims.convert_element_type.default, gradient, torch.float32)
    wide = out = writer.call(aten.mul.Tensor, gradient, factor)
    if out.meta["val"].dtype != wanted:
        out = writer.call(prims.convert_element_type.default, out, wanted)
    out.meta |= {k: v for k, v in user.meta.items() if k not in ("val", "recompute", "ac_graph_id")}
    return wide, out


_SHAPE_ONLY = (aten.view.default, aten.reshape.default, aten.permute.default, aten.t.default, aten.unsqueeze.default)


def _skip_rounding(narrow: Node, wide: Node) -> None:
    """Where the gradient is only widened again (the cast that autocast made), don't round it in between: the product
    with the tangent is a rounding that the unfused backward doesn't have."""
    if narrow is wide:
        return
    for user in list(narrow.users):
        if user.target is prims.convert_element_type.default:
            user.replace_input_with(narrow, wide)
        elif user.target in _SHAPE_ONLY and user.args[0] is narrow:
            with narrow.graph.inserting_before(user):
                copy = _Writer(narrow.graph, None).call(user.target, wide, *user.args[1:])
            _skip_rounding(user, copy)
            if not copy.users:
                narrow.graph.erase_node(copy)


class _Writer:
    """Writes nodes with their fake values, before `point` or at the graph's own insertion point."""

    def __init__(self, graph: Graph, point: Node | None) -> None:
        self.graph, self.point = graph, point

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        if self.point is None:
            node = self.graph.call_function(target, args, kwargs)
        else:
            with self.graph.inserting_before(self.point):
                node = self.graph.call_function(target, args, kwargs)
            keep = ("stack_trace", "nn_module_stack", "source_fn_stack", "original_aten", "custom")
            node.meta = {k: v for k, v in self.point.meta.items() if k in keep}
        values = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with fake_mode(values):
            node.meta["val"] = target(*values[0], **values[1])
        return node

    def normalize(self, grads: list[Node | None]) -> list[Node | None]:
        """Row gradients divided by a power of two so that their maximum is about one, and that power.

        fp16 has no room for the 1/N of a mean: with a loss scale it would have come with the tangent.
        """
        flat = [self.call(aten.reshape.default, self.call(aten.abs.default, g), [-1]) for g in grads if g is not None]
        first = flat[0].meta["val"]
        # One zero more: a maximum over no rows is an error.
        flat.append(self.call(aten.full.default, [1], 0, dtype=first.dtype, device=first.device))
        top = self.call(aten.amax.default, self.call(aten.cat.default, flat))
        power = self.call(aten.exp2.default, self.call(aten.ceil.default, self.call(aten.log2.default, top)))
        one = self.call(aten.full.default, [], 1, dtype=first.dtype, device=first.device)
        scale = self.call(aten.where.self, self.call(aten.eq.Scalar, top, 0), one, power)
        return [*(None if g is None else self.call(aten.div.Tensor, g, scale) for g in grads), scale]
