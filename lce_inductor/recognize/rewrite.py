"""Plan -> graph: the only module of this stage that changes a graph.

Before:                                              After:
    z = linear(h, w)                                     stats = head_stats(h, w, None, [y], ...)
    f = z.float().view(-1, V)                            lse, target_logit = stats[0], stats[1][..., 0]
    loss = cross_entropy(f, y)                           loss = cross_entropy(lse, target_logit, None, y, ...)
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from ..config import Config
from ..ops.types import ARGMAX, LSE, MAX, MEAN, NO_TARGET, SUM, TARGET
from ..reasons import Refusal, refuse
from .canon import Attr
from .forms import CLASSES, Ref, RowOp, Terminal, Want
from .rules_head import ref_info
from .walk import HeadPlan, Walk

_STAT_INDEX = {LSE: 0, TARGET: 1, SUM: 2, MEAN: 3, MAX: 4, ARGMAX: 5}
aten = torch.ops.aten


class Backup:
    """A copy of a graph to go back to when a rewrite fails half-way."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.copy = Graph()
        self.out = self.copy.graph_copy(graph, {})
        self.out_meta = next(n for n in reversed(graph.nodes) if n.op == "output").meta

    def restore(self) -> None:
        for node in reversed(list(self.graph.nodes)):
            self.graph.erase_node(node)
        env: dict[Node, Node] = {}
        self.graph.graph_copy(self.copy, env)
        end = self.graph.output(torch.fx.map_arg(self.out, env.__getitem__))
        end.meta = dict(self.out_meta)


@dataclasses.dataclass
class Group:
    """Terminals of one head that read the same rows: one head_stats serves them all."""

    rows: tuple[RowOp, ...]
    class_weight: Ref | None
    terminals: list[Terminal]
    anchor: Node | None = None
    moved: list[Node] = dataclasses.field(default_factory=list)


def selecting(rows: tuple[RowOp, ...]) -> tuple[RowOp, ...]:
    """The row operations up to the last one that changes which rows there are."""
    last = max((i for i, op in enumerate(rows) if op.selects), default=-1)
    return rows[: last + 1]


def place(walk: Walk, plan: HeadPlan) -> list[Group] | Refusal:
    """Group a head's terminals and find where their statistics can be computed.

    Right after the linear is best: x and the weight have the values, and the grad mode is the one, that the
    linear saw. If a target can't be brought there, right before the first loss, where everything is at hand.
    """
    groups: dict[Any, Group] = {}
    for terminal in plan.terminals:
        weights = [w.operand for w in terminal.wants if w.bit == SUM]
        key = (selecting(terminal.form.rows), weights[0] if weights else None)
        groups.setdefault(key, Group(*key, [])).terminals.append(terminal)
    head, effects = plan.head, walk.effects
    for group in groups.values():
        uses = [(ref, t.node) for t in group.terminals for ref in _operands(group, t) if isinstance(ref, Node)]
        moved = effects.movable_up(uses, head.node)
        if moved is not None:
            group.moved = moved
            continue
        first = min((t.node for t in group.terminals), key=effects.order.__getitem__)
        uses += [(ref, head.node) for ref in (head.x, head.weight, head.bias) if isinstance(ref, Node)]
        if effects.grad_off(first) != effects.grad_off(head.node) or not effects.readable_at(uses, first):
            return refuse("order", first)
        group.anchor = first
    return list(groups.values())


def _operands(group: Group, terminal: Terminal) -> list[Any]:
    wanted = [w.operand for w in terminal.wants if w.operand is not None]
    row_args: list[Node] = []
    for op in group.rows:
        torch.fx.map_arg(op.args, row_args.append)
    return wanted + row_args


def apply(walk: Walk, plan: HeadPlan, groups: list[Group], config: Config, replaced: dict[Node, Node]) -> list[Node]:
    """Rewrite one head. Returns the nodes that now compute its statistics; `replaced` learns old -> new."""
    graph, made = walk.graph, []
    cursor = plan.head.node
    for group in groups:
        if group.anchor is None:
            for node in group.moved:
                cursor.append(node)
                cursor = node
            point = cursor.next
        else:
            point = group.anchor
        with graph.inserting_before(point):
            stats, columns = _write_stats(graph, plan, group, config, replaced)
        made.append(stats)
        if group.anchor is None:
            cursor = point.prev
        for terminal in group.terminals:
            with graph.inserting_before(terminal.node):
                emitter = Emitter(graph, terminal, columns, _num_classes(graph, plan), replaced)
                _replace(terminal.node, terminal.emit(emitter), replaced)
    erase_cone(walk, plan)
    return made


def _replace(node: Node, new: Any, replaced: dict[Node, Node]) -> None:
    graph = node.graph
    if isinstance(new, tuple):
        for user in list(node.users):
            assert user.target is operator.getitem
            _replace(user, new[user.args[1]], replaced)  # type: ignore[index]
    else:
        node.replace_all_uses_with(new)
        replaced[node] = new
    graph.erase_node(node)


def erase_cone(walk: Walk, plan: HeadPlan) -> None:
    """Erase what nobody reads any more of the head's own nodes, and only those: in-place calls without users,
    which graph.eliminate_dead_code() would drop, have to stay."""
    mine = [n for n, f in walk.forms.items() if f.head is plan.head]
    for node in reversed(mine):
        if not node.users and node.graph is walk.graph and node not in plan.returned:
            walk.graph.erase_node(node)
            del walk.forms[node]
    weight = plan.head.weight
    if isinstance(weight, Node) and not weight.users and weight.op == "call_function":
        walk.graph.erase_node(weight)


def _num_classes(graph: Graph, plan: HeadPlan) -> Any:
    size = plan.head.num_classes
    if isinstance(size, int):
        return size
    return graph.call_function(aten.sym_size.int, (materialize(graph, plan.head.weight), int(plan.head.transposed)))


def _write_stats(
    graph: Graph, plan: HeadPlan, group: Group, config: Config, replaced: dict[Node, Node]
) -> tuple[Node, dict[Want, Node]]:
    """The head_stats call of a group, and the node of each wanted statistic."""
    head = plan.head

    def call(target: Any, *args: Any) -> Node:
        node = graph.call_function(target, args)
        node.meta = {k: v for k, v in head.node.meta.items() if k in _PROVENANCE}
        return node

    def operand(ref: Ref | None, transpose: bool = False) -> Node | None:
        """x, weight or bias in the dtype in which the linear ran: under autocast that is not their own."""
        if ref is None:
            return None
        node = materialize(graph, replaced.get(ref, ref) if isinstance(ref, Node) else ref)
        known = ref_info(head.node, ref)
        if transpose:
            node = call(aten.t.default, node)
        if known is not None and known.dtype != head.dtype:
            node = call(aten.to.dtype, node, head.dtype)
        return node

    x, weight, bias = operand(head.x), operand(head.weight, head.transposed), operand(head.bias)
    assert x is not None
    known_x = ref_info(head.node, head.x)
    hidden = known_x.shape[-1] if known_x is not None else None
    if group.rows and not isinstance(hidden, int):
        hidden = graph.call_function(aten.sym_size.int, (x, -1))
    for op in group.rows:
        x = replay(graph, op, x, hidden)
    wants = list(dict.fromkeys(w for t in group.terminals for w in t.wants))
    bits = 0
    for want in wants:
        bits |= want.bit
    targets = [w for w in wants if w.bit == TARGET]
    stats = call(
        torch.ops.lce_inductor.head_stats.default, x, weight, bias,
        [materialize(graph, replaced.get(w.operand, w.operand)) for w in targets],  # type: ignore[arg-type]
        [NO_TARGET if w.ignore_index is None else w.ignore_index for w in targets],
        materialize(graph, group.class_weight), "", bits, config.chunk_tokens or 0, config.workspace_bytes,
    )  # fmt: skip
    parts: dict[int, Node] = {}
    columns: dict[Want, Node] = {}
    for want in wants:
        part = parts.get(want.bit)
        if part is None:
            part = parts[want.bit] = call(operator.getitem, stats, _STAT_INDEX[want.bit])
        columns[want] = call(aten.select.int, part, -1, targets.index(want)) if want.bit == TARGET else part
    return stats, columns


_PROVENANCE = ("stack_trace", "nn_module_stack", "source_fn_stack", "custom")


class Emitter:
    """Writes the replacement of one terminal, right before it."""

    def __init__(
        self, graph: Graph, terminal: Terminal, columns: dict[Want, Node], num_classes: Any, replaced: dict[Node, Node]
    ) -> None:
        self.graph, self.terminal, self.num_classes = graph, terminal, num_classes
        self._columns, self._replaced = columns, replaced

    def stat(self, want: Want) -> Node:
        node = self._columns[want]
        return self.call(aten.detach.default, node) if self.terminal.form.detached else node

    def ref(self, value: Ref | None) -> Any:
        return materialize(self.graph, self._replaced.get(value, value) if isinstance(value, Node) else value)

    def call(self, target: Any, *args: Any, like: Node | None = None) -> Node:
        node = self.graph.call_function(target, args)
        keep = _PROVENANCE if like is None else (*_PROVENANCE, "example_value", "val", "tensor_meta")
        node.meta = {k: v for k, v in (like or self.terminal.node).meta.items() if k in keep}
        return node

    def op(self, name: str, *args: Any, like: Node | None = None) -> Node:
        return self.call(getattr(torch.ops.lce_inductor, name).default, *args, like=like)


def materialize(graph: Graph, value: Any) -> Any:
    """An Attr becomes a get_attr node; everything else is itself."""
    return graph.get_attr(value.path) if isinstance(value, Attr) else value


def replay(graph: Graph, op: RowOp, value: Node, classes: Any) -> Node:
    """Apply a row operation to a tensor whose last dimension, in the class dimension's place, has size `classes`."""
    if op.name == "getitem":
        return graph.call_function(operator.getitem, (value, op.args[0]))
    args = tuple(classes if a is CLASSES else a for a in op.args)
    if op.name in ("reshape", "permute"):
        return graph.call_function(getattr(aten, op.name).default, (value, list(args)))
    overload = {"flatten": aten.flatten.using_ints, "unsqueeze": aten.unsqueeze.default, "squeeze": aten.squeeze.dim}
    return graph.call_function(overload[op.name], (value, *args))
