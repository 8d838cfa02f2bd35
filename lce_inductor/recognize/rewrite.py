"""Plan -> graph: the only module of this stage that changes a graph.

Before:                                              After:
    z = linear(h, w)                                     stats = head_stats(h, w, None, [y], ...)
    f = z.float().view(-1, V)                            lse, target_logit = stats[0], stats[1][..., 0]
    loss = cross_entropy(f, y)                           loss = cross_entropy(lse, target_logit, None, y, ...)
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from .. import deferred  # noqa: F401  (registers defer_logits)
from ..config import Config
from ..graph.values import info
from ..ops.types import ARGMAX, LSE, MAX, NEG_ENTROPY, NO_TARGET, SUM, TARGET
from .edits import fold
from .emit import PROVENANCE, VALUES, Emitter, materialize, replay
from .forms import ClassMap, Edit, Ref, Want
from .place import Group, selecting
from .rules_elementwise import num_classes
from .rules_head import ref_info
from .rules_reduce import item
from .walk import HeadPlan, Walk

_STAT_INDEX = {LSE: 0, TARGET: 1, SUM: 2, NEG_ENTROPY: 3, MAX: 4, ARGMAX: 5}
aten = torch.ops.aten
ops = torch.ops.lce_inductor


def apply(walk: Walk, plan: HeadPlan, groups: list[Group], config: Config, replaced: dict[Node, Node]) -> list[Node]:
    """Rewrite one head. Returns the nodes that now compute its statistics; `replaced` learns old -> new."""
    graph, made = walk.graph, []
    cursor = plan.head.node
    moved: set[Node] = set()
    for group in groups:
        if group.anchor is None:
            for node in group.moved:
                if node not in moved:  # an earlier group of this head may have needed it, too
                    cursor.append(node)
                    cursor = node
                    moved.add(node)
            point = cursor.next
        else:
            point = group.anchor
        with graph.inserting_before(point):
            writer = _Head(graph, plan, group.edits, replaced)
            stats, columns = _write_stats(writer, group, config)
        made.append(stats)
        if group.anchor is None:
            cursor = point.prev
        for terminal in group.terminals:
            with graph.inserting_before(terminal.node):
                classes = _num_classes(writer, terminal.form)
                emitter = Emitter(graph, terminal, columns, len(group.rows), classes, replaced)
                _replace(terminal.node, emitter.with_zeros(terminal.emit(emitter)), replaced)
    if config.returned_logits == "defer":
        _defer(walk, plan, replaced)
    erase_cone(walk, plan)
    return made


def _replace(node: Node, new: Any, replaced: dict[Node, Node]) -> None:
    if isinstance(new, tuple):
        for user in list(node.users):
            index = item(user)
            assert index is not None
            _replace(user, new[index], replaced)
    else:
        node.replace_all_uses_with(new)
        replaced[node] = new
    node.graph.erase_node(node)


def erase_cone(walk: Walk, plan: HeadPlan) -> None:
    """Erase what nobody reads any more of the head's own nodes, and only those: in-place calls without users,
    which graph.eliminate_dead_code() would drop, have to stay unless it was the logits that they wrote to."""
    kept = any(walk.form(arg) is not None for n in walk.graph.nodes if n.op == "output" for arg in n.all_input_nodes)
    mine = [n for n, f in walk.forms.items() if f.head is plan.head] + ([] if kept else plan.writes)
    for node in sorted(mine, key=walk.effects.order.__getitem__, reverse=True):
        if not node.users and not node._erased and not (kept and node in plan.writes):
            walk.graph.erase_node(node)
            walk.forms.pop(node, None)
    weight = plan.head.weight
    if isinstance(weight, Node) and not weight.users and weight.op == "call_function":
        walk.graph.erase_node(weight)


class _Head:
    """Writes x, weight and bias of a head after the edits that go into them, at the graph's insertion point."""

    def __init__(self, graph: Graph, plan: HeadPlan, edits: tuple[Edit, ...], replaced: dict[Node, Node]) -> None:
        self.graph, self.plan, self.replaced = graph, plan, replaced
        head = plan.head
        folded = fold(edits)
        assert folded is not None
        self.steps = folded.steps
        self.x, self.weight, self.bias = self._own(head.x), self._own(head.weight, head.transposed), None
        if head.bias is not None:
            self.bias = self._own(head.bias)
        self.classes = head.num_classes
        self.masked: Node | None = None  # [V], the masked classes
        self.masked_value = folded.hidden
        for edit, factor in folded.inputs:
            self._edit(edit, factor)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta = {k: v for k, v in self.plan.head.node.meta.items() if k in PROVENANCE}
        return node

    def ref(self, value: Any) -> Any:
        return materialize(self.graph, value, self.replaced)

    def _own(self, ref: Ref, transpose: bool = False) -> Node:
        """x, weight or bias in the dtype in which the linear ran: under autocast that is not their own."""
        node = self.ref(ref)
        known = ref_info(self.plan.head.node, ref)
        if transpose:
            node = self.call(aten.t.default, node)
        if known is not None and known.dtype != self.plan.head.dtype:
            node = self.call(aten.to.dtype, node, self.plan.head.dtype)
        return node

    def _edit(self, edit: Edit, factor: float) -> None:
        value = self.ref(edit.args[0]) if edit.name != "fill" else None
        if edit.name == "bias":
            added = self.call(aten.reshape.default, value, [-1])
            if factor != 1.0:
                added = self.call(aten.div.Tensor, added, factor)
            self._add_bias(added, edit.args[1] if len(edit.args) > 1 else 1)
        elif edit.name == "mask":
            mask = self.call(aten.reshape.default, value, [-1])
            self._hide(mask)
        elif edit.name == "fill":
            start, stop, _ = edit.args
            classes = self.call(aten.arange.default, self.num_classes(), device=self._device())
            low, high = self.call(aten.ge.Scalar, classes, start), self.call(aten.lt.Scalar, classes, stop)
            self._hide(self.call(aten.logical_and.default, low, high))
        elif edit.name == "classes":
            start, stop = edit.args
            self.classes = stop - start
            self.weight = self.call(aten.slice.Tensor, self.weight, 0, start, stop)
            if self.bias is not None:
                self.bias = self.call(aten.slice.Tensor, self.bias, 0, start, stop)
            if self.masked is not None:
                self.masked = self.call(aten.slice.Tensor, self.masked, 0, start, stop)
        elif edit.name == "class_scale":
            scale = self.call(aten.reshape.default, value, [-1])
            self.weight = self._times(self.weight, self.call(aten.unsqueeze.default, scale, 1))
            self.bias = None if self.bias is None else self._times(self.bias, scale)
        else:
            scale = self.call(aten.reshape.default, value, [])
            if edit.name == "inverse_scale":
                scale = self.call(aten.reciprocal.default, scale)
            self.x = self._times(self.x, scale)
            self.bias = None if self.bias is None else self._times(self.bias, scale)

    def _times(self, node: Node, scale: Node) -> Node:
        """The product, back in the dtype of the linear."""
        return self.call(aten.to.dtype, self.call(aten.mul.Tensor, node, scale), self.plan.head.dtype)

    def _hide(self, mask: Node) -> None:
        low = self.call(aten.full.default, [], float("-inf"), device=self._device())
        self._add_bias(self.call(aten.where.ScalarOther, mask, low, 0.0))
        self.masked = mask if self.masked is None else self.call(aten.logical_or.default, self.masked, mask)

    def unhide(self, stat: Node, target: Node) -> Node:
        """The logits at `target`, a masked one what it was set to: nothing but the mask has a gradient there."""
        if self.masked is None:
            return stat
        inside = self.call(
            aten.logical_and.default,
            self.call(aten.ge.Scalar, target, 0),
            self.call(aten.lt.Scalar, target, self.num_classes()),
        )
        index = self.call(aten.where.ScalarOther, inside, target, 0)  # an ignored label may lie anywhere
        masked = self.call(aten.logical_and.default, self.call(aten.index.Tensor, self.masked, [index]), inside)
        return self.call(
            aten.masked_fill.Scalar, stat, self.call(aten.view_as.default, masked, stat), self.masked_value
        )

    def _add_bias(self, added: Node, sign: int = 1) -> None:
        if self.bias is None:
            self.bias = added if sign > 0 else self.call(aten.neg.default, added)
        else:
            self.bias = self.call(aten.add.Tensor if sign > 0 else aten.sub.Tensor, self.bias, added)

    def _device(self) -> Any:
        value = self.plan.head.node.meta.get("example_value", self.plan.head.node.meta.get("val"))
        return getattr(value, "device", None)

    def hidden(self) -> Any:
        known = ref_info(self.plan.head.node, self.plan.head.x)
        size = known.shape[-1] if known is not None else None
        return size if isinstance(size, int) else self.call(aten.sym_size.int, self.x, -1)

    def num_classes(self) -> Any:
        return self.classes if isinstance(self.classes, int) else self.call(aten.sym_size.int, self.weight, 0)


def _num_classes(writer: _Head, form: ClassMap) -> Any:
    size = num_classes(form)
    return size if isinstance(size, int) else writer.num_classes()


def _write_stats(writer: _Head, group: Group, config: Config) -> tuple[Node, dict[Want, Node]]:
    """The head_stats call of a group, and the node of each wanted statistic."""
    graph = writer.graph
    x = writer.x
    for op in group.rows:
        x = replay(graph, op, x, writer.hidden())
    where = group.target_columns()
    count = max(where.values(), default=-1) + 1
    targets: list[Any] = [None] * count
    ignored = [NO_TARGET] * count
    for terminal in group.terminals:
        rest = selecting(group.rest(terminal))
        for want in dict.fromkeys(w for w in terminal.wants if w.bit == TARGET):
            column = where[want]
            target = _target(writer, want)
            if not rest:
                targets[column] = target
                ignored[column] = NO_TARGET if want.ignore_index is None else want.ignore_index
                continue
            if targets[column] is None:
                row = writer.call(aten.select.int, x, -1, 0)
                # Contiguous whatever the rows' strides: the views below have to share its memory.
                targets[column] = writer.call(
                    aten.full_like.default, row, NO_TARGET, dtype=torch.int64, memory_format=torch.contiguous_format
                )
            _write_through(writer, targets[column], rest, target, want)
    wants = list(dict.fromkeys(w for t in group.terminals for w in t.wants))
    bits = 0
    for want in wants:
        bits |= want.bit
    # A maximum is differentiated as the logit at its index.
    bits |= ARGMAX if bits & MAX else 0
    stats = writer.call(
        ops.head_stats.default, x, writer.weight, writer.bias, targets, ignored, _class_weight(writer, group),
        writer.steps, bits, config.chunk_tokens or 0, config.workspace_bytes,
    )  # fmt: skip
    parts: dict[int, Node] = {}
    columns: dict[Want, Node] = {}
    for want in wants:
        part = parts.get(want.bit)
        if part is None:
            part = parts[want.bit] = writer.call(operator.getitem, stats, _STAT_INDEX[want.bit])
        columns[want] = part
        if want.bit == TARGET:
            column = where[want]
            columns[want] = writer.unhide(writer.call(aten.select.int, part, -1, column), targets[column])
    return stats, columns


def _class_weight(writer: _Head, group: Group) -> Any:
    """[V], from whatever shape broadcast against the logits."""
    node = writer.ref(group.class_weight)
    known = info(node)
    return node if known is None or len(known.shape) == 1 else writer.call(aten.reshape.default, node, [-1])


def _target(writer: _Head, want: Want) -> Node:
    """The index of a want, one per row."""
    node = writer.ref(want.operand)
    if want.column is None:
        return node
    dim, column = want.column
    if dim >= 0:
        return writer.call(aten.select.int, node, dim, column)
    # z[arange, index] counts negative indices from the end.
    wrapped = writer.call(aten.add.Tensor, node, writer.num_classes())
    return writer.call(aten.where.self, writer.call(aten.lt.Scalar, node, 0), wrapped, node)


def _write_through(writer: _Head, column: Node, rest: Any, target: Node, want: Want) -> None:
    """Put the targets of some rows into a column that has none elsewhere."""
    view = writer.call(aten.unsqueeze.default, column, -1)
    for op in rest:
        view = replay(writer.graph, op, view, 1)
    view = writer.call(aten.squeeze.dim, view, -1)
    if want.ignore_index is not None:
        none = writer.call(aten.full_like.default, target, NO_TARGET, dtype=torch.int64)
        hidden = writer.call(aten.eq.Scalar, target, want.ignore_index)
        target = writer.call(aten.where.self, hidden, none, target)
    writer.call(aten.copy_.default, view, writer.call(aten.view_as.default, target, view))


def _defer(walk: Walk, plan: HeadPlan, replaced: dict[Node, Node]) -> None:
    """Returned logits become DeferredLogits: they cost nothing until somebody reads them.

    Only where the graph is what the user called (its outputs are the user's values), and only if nothing but the
    output reads them.
    """
    owner = walk.graph.owning_module
    if owner is None or "dynamo_compile_id" not in owner.meta:
        return
    output = next(n for n in reversed(walk.graph.nodes) if n.op == "output")
    for node in dict.fromkeys(plan.returned):
        form = walk.form(node)
        if not isinstance(form, ClassMap) or not form.class_last or any(e.name == "class_scale" for e in form.edits):
            continue
        with walk.graph.inserting_before(output):
            writer = _Head(walk.graph, plan, form.edits, replaced)
            x = writer.x
            for op in form.rows:
                x = replay(walk.graph, op, x, writer.hidden())
            args = (x, writer.weight, writer.bias, writer.steps, plan.head.dtype, form.dtype, form.early_cast)
            deferred = writer.call(ops.defer_logits.default, *args)
        deferred.meta |= {k: v for k, v in node.meta.items() if k in VALUES}
        output.replace_input_with(node, deferred)
