"""Deferred logits in place of returned ones: the only module of this stage that changes a graph."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from ..deferred_logits import tensor as deferred  # noqa: F401  (registers defer_logits)
from ..graph.values import Info, info, same
from ..graph.write import Writer
from ..regions.aten_ops import bound
from ..regions.heads import Head
from ..regions.labels import Labels
from ..regions.spaces import apply
from ..regions.tags import LOCAL, same_size, shape_of, size
from ..regions.write import behind_heads, path
from .in_place import same_memory
from .tail import SET_GRAD, NotDeferred, Tail
from .trace import Joint, quietly, value_of
from .value import _CASTS, _SAME, _TURNS, _VIEWS, FILLS, Value, constant

aten = torch.ops.aten
prims = torch.ops.prims
defer_logits = torch.ops.lce_inductor.defer_logits.default

_PROVENANCE = ("stack_trace", "nn_module_stack", "source_fn_stack")
# More than this is not computed a second time for x, weight or bias.
_MANY = 24


class Parts:
    """x, weight and bias of a deferred value, as nodes of the traced graph."""

    def __init__(self, joint: Joint, labels: Labels, value: Value, node: Node) -> None:
        (end,) = joint.graph.find_nodes(op="output")
        self.behind = behind_heads(joint.graph, labels)
        self.writer = Writer(joint.graph, end, avoid=self.behind)
        self.dtype = value.source.meta["val"].dtype
        shape, label = shape_of(node) or (), labels.of[node]
        if not label.tags.endswith(LOCAL) or label.tags.count(LOCAL) != 1:
            raise NotDeferred("the classes are not the last dimension")
        x, weight, bias = Head.of(value.source)
        self.x = self._x(x, labels, value, node, list(shape[:-1]))
        self.weight = self._weight(weight)
        self.bias = None if bias is None else self._flat(bias)
        self._scale(value)
        for i in range(len(value.classes) + 1):
            for (other, sign), cuts in zip(value.biases, value.cuts):
                if cuts == i and other.target in FILLS and other in labels.of:
                    self._add_bias(self._filled(other, sign, labels), 1)
                elif cuts == i:
                    self._add_bias(self._flat(other), sign)
            if i < len(value.classes):
                self._cut(*value.classes[i])

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Writes a node, unless it is a view to the same shape."""
        if target is aten.reshape.default and _same_sizes(shape_of(args[0]) or (), args[1]):
            same: Node = args[0]
            return same
        return self.writer.call(target, *args, **kwargs)

    def _x(self, x: Node, labels: Labels, value: Value, node: Node, rows: list[Any]) -> Node:
        hidden = (shape_of(x) or ())[-1]
        x = self._stripped(x, hidden)
        for move in path(labels.of[value.source].space, labels.of[node].space):
            x = apply(move, self.call, x, [hidden])
        return self.call(aten.reshape.default, self._stripped(x, hidden), [*rows, hidden])

    def _stripped(self, node: Node, last: Any = None) -> Node:
        """Without what the op does itself: the cast to the dtype of the linear layer, and views of rows."""
        while node.op == "call_function" and isinstance(source := node.args[0], Node):
            casts = node.target in _CASTS and node.meta["val"].dtype == self.dtype
            casts = casts and source.meta["val"].dtype.is_floating_point
            views = last is not None and node.target in _VIEWS and same_size((shape_of(source) or (0,))[-1], last)
            if not (casts or views or node.target in _SAME):
                break
            node = source
        return node

    def _weight(self, weight: Node) -> Node:
        """[V, H] of the product's [H, V]: the parameter itself, where the product reads its transpose."""
        weight = self._stripped(weight)
        if len(shape_of(weight) or ()) == 3:
            weight = self.call(aten.squeeze.dim, weight, 0)
        if weight.target in _TURNS and weight.op == "call_function":
            return self._stripped(weight.args[0])  # type: ignore[arg-type]
        return self.call(aten.permute.default, weight, [1, 0])

    def _flat(self, bias: Node) -> Node:
        bias = self._stripped(bias)
        sizes = [s for s in shape_of(bias) or () if s != 1]
        if len(sizes) != 1:
            raise NotDeferred("a bias that is no vector")
        return self.call(aten.reshape.default, bias, sizes)

    def _scale(self, value: Value) -> None:
        for scale, divides in value.scales:
            scale = self.call(aten.reshape.default, scale, [])
            op = aten.div.Tensor if divides else aten.mul.Tensor
            self.x = self.call(op, self.x, scale)
            self.bias = None if self.bias is None else self.call(op, self.bias, scale)

    def _filled(self, node: Node, number: float, labels: Labels) -> Node:
        """[V], the number where the node puts it, else zero."""
        a = bound(node)
        classes = (shape_of(node) or ())[labels.of[node].tags.index(LOCAL)]
        like = {"dtype": self.dtype, "device": node.meta["val"].device}
        zeros = self.call(aten.full.default, [classes], 0.0, **like)
        if node.target is aten.slice_scatter.default:
            cut = (0, a["start"], a["end"], a["step"])
            some = self.call(aten.full_like.default, self.call(aten.slice.Tensor, zeros, *cut), number)
            return self.call(aten.slice_scatter.default, zeros, some, *cut)
        full = self.call(aten.full.default, [], number, **like)
        if node.target is aten.where.self:
            mask = self.call(aten.reshape.default, a["condition"], [classes])
            kept_first = constant(a["self"]) is None
            return self.call(aten.where.self, mask, *((zeros, full) if kept_first else (full, zeros)))
        if node.target is aten.masked_fill.Scalar:
            return self.call(
                aten.masked_fill.Scalar, zeros, self.call(aten.reshape.default, a["mask"], [classes]), number
            )
        index = next(i for i in a["indices"] if i is not None)
        return self.call(aten.index_put.default, zeros, [index], full)

    def _add_bias(self, bias: Node, sign: float) -> None:
        if self.bias is not None:
            self.bias = self.call(aten.add.Tensor if sign > 0 else aten.sub.Tensor, self.bias, bias)
        else:
            self.bias = bias if sign > 0 else self.call(aten.neg.default, bias)

    def _cut(self, start: Any, end: Any) -> None:
        self.weight = self.call(aten.slice.Tensor, self.weight, 0, start, end)
        self.bias = None if self.bias is None else self.call(aten.slice.Tensor, self.bias, 0, start, end)


class Deferral:
    """What is to be written for one returned value: made first, written when all is known to be well."""

    def __init__(self, graph: Graph, tail: Tail, joint: Joint, labels: Labels, value: Value, node: Node) -> None:
        """node: the value in the graph that the tail is of."""
        self.graph, self.tail, self.joint, self.value, self.node = graph, tail, joint, value, node
        known = info(node)
        assert known is not None
        self.known: Info = known
        self.parts = Parts(joint, labels, value, joint.detached[node])
        self.leaves: dict[Node, None] = {}
        self.cone: dict[Node, None] = {}
        for part in (self.parts.x, self.parts.weight, self.parts.bias):
            if part is not None:
                self._collect(part)
        self._check_unchanged()
        if known.requires_grad and not (grad_at_end(graph) and any(value_of(n).requires_grad for n in self._tensors())):
            raise NotDeferred("the graph ends without gradients, and the logits need one")
        if not _in_order(value_of(node)):
            raise NotDeferred("the returned logits are transposed in memory")

    def _tensors(self) -> list[Node]:
        return [n for n in self.leaves if isinstance(value_of(n), Tensor)]

    def _collect(self, part: Node) -> None:
        todo = [part]
        while todo:
            node = todo[-1]
            if node in self.cone or node in self.joint.stands_for:
                todo.pop()
                if node in self.joint.stands_for:
                    self.leaves[self.joint.stands_for[node]] = None
                continue
            missing = [a for a in node.all_input_nodes if a not in self.cone and a not in self.joint.stands_for]
            if missing:
                todo += missing
                continue
            self._check_copyable(node)
            self.leaves.update(
                {self.joint.stands_for[a]: None for a in node.all_input_nodes if a in self.joint.stands_for}
            )
            self.cone[node] = None
            if len(self.cone) > _MANY:
                raise NotDeferred("too much is computed between the rest of the graph and the linear layer")

    def _check_copyable(self, node: Node) -> None:
        target = node.target
        if node.op != "call_function" or node in self.parts.behind:
            raise NotDeferred(f"the linear layer reads what is only known in the end of the graph: {node.name}")
        if isinstance(target, torch._ops.OpOverload):
            if target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags:
                raise NotDeferred(f"the linear layer reads what can't be computed twice: {node.name}")
            if _new_symbols(node):
                raise NotDeferred(f"the linear layer reads rows whose number is known by the run only: {node.name}")
            if target.namespace == "aten" or target is prims.convert_element_type.default:
                return
        elif target in (operator.mul, operator.add, operator.sub, operator.floordiv, operator.getitem):
            return
        raise NotDeferred(f"the linear layer reads what can't be computed twice: {node.name}")

    def _check_unchanged(self) -> None:
        """The op reads its inputs at the end of the graph: nothing may have changed them since the linear layer."""
        late = False
        for node in self.graph.nodes:
            late = late or node is self.tail.first
            for target in self.tail.writes.get(node, ()) if late else ():
                if any(same_memory(target, leaf) for leaf in self.leaves):
                    raise NotDeferred(f"what the linear layer reads is changed in place later: {node.name}")

    def write(self, mode: Any) -> Node:
        """Replaces the returned value."""
        (output,) = self.graph.find_nodes(op="output")
        made: dict[Node, Any] = {}
        with self.graph.inserting_before(output):
            env: dict[Node, Any] = {n: self.joint.stands_for[n] for n in self.joint.stands_for}
            for node in self.cone:
                env[node] = self._copied(node, env, made)
            parts = [None if p is None else env[p] for p in (self.parts.x, self.parts.weight, self.parts.bias)]
            if not self.known.requires_grad:
                parts = [self._detached(p, made) for p in parts]
            v = self.value
            args = (*parts, v.epilogue, v.dtypes[0], v.dtypes[-1], v.after_cast, self._is_seen())
            new = self._new(defer_logits, args, {}, made)
        self._check_values(made, mode)
        new.meta |= {k: v for k, v in self.node.meta.items() if k in ("example_value", "val", "tensor_meta")}
        output.replace_input_with(self.node, new)
        return new

    def _is_seen(self) -> bool:
        """Can who calls the graph see the memory of the hidden states: does it lie in an input, or in an output?"""
        x = self.parts.x
        while x not in self.joint.stands_for:
            if x.target not in (*_CASTS, *_SAME, *_TURNS, *_VIEWS) or not isinstance(x.args[0], Node):
                return False  # memory of its own
            x = x.args[0]
        (output,) = self.graph.find_nodes(op="output")
        inputs = [n for n in self.graph.nodes if n.op in ("placeholder", "get_attr")]
        leaf = self.joint.stands_for[x]
        return any(same_memory(leaf, n) for n in (*inputs, *output.all_input_nodes))

    def _new(self, target: Any, args: Any, kwargs: Any, made: dict[Node, Any]) -> Node:
        node = self.graph.call_function(target, tuple(args), kwargs)
        node.meta = {k: v for k, v in self.node.meta.items() if k in _PROVENANCE}
        made[node] = None
        return node

    def _copied(self, node: Node, env: dict[Node, Any], made: dict[Node, Any]) -> Node:
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), env.__getitem__)
        # prims have no derivatives, and eager's conversion is a view where there is nothing to convert
        target = aten.to.dtype if node.target is prims.convert_element_type.default else node.target
        return self._new(target, args, kwargs, made)

    def _detached(self, node: Node | None, made: dict[Node, Any]) -> Node | None:
        known = info(node)
        if node is None or (known is not None and not known.requires_grad):
            return node
        return self._new(aten.detach.default, (node,), {}, made)

    def _check_values(self, made: dict[Node, Any], mode: Any) -> None:
        """Runs the new nodes on fake values, and compares the last with the value that it replaces."""
        with quietly(mode), torch.set_grad_enabled(grad_at_end(self.graph)):
            for node in made:
                args, kwargs = torch.fx.map_arg(
                    (node.args, node.kwargs), lambda n: made[n] if n in made else value_of(n)
                )
                made[node] = value = node.target(*args, **kwargs)  # type: ignore[operator]
                node.meta["example_value"] = value
        old = value_of(self.node)
        if len(value.shape) != len(old.shape) or not all(map(same, value.shape, old.shape)):
            raise AssertionError(f"{tuple(value.shape)} instead of {tuple(old.shape)}")
        if value.dtype != old.dtype or value.device != old.device:
            raise AssertionError(f"{value.dtype} on {value.device} instead of {old.dtype} on {old.device}")
        if value.spec.requires_grad != old.requires_grad:
            raise AssertionError(f"requires_grad={value.spec.requires_grad} instead of {old.requires_grad}")


def _new_symbols(node: Node) -> bool:
    """Is this of a size that nothing but its own values tell? A second time it would be another size."""
    known = set().union(*(free_unbacked_symbols(a.meta.get("val")) for a in node.all_input_nodes))
    return bool(free_unbacked_symbols(node.meta.get("val")) - known)


def grad_at_end(graph: Graph) -> bool:
    now = torch.is_grad_enabled()
    for node in graph.nodes:
        if node.op == "call_function" and node.target is SET_GRAD:
            now = bool(node.args[0])
    return now


def _in_order(t: Tensor) -> bool:
    """Are strides those of rows side by side, but for gaps?"""
    strides = [size(st) for s, st in zip(t.shape, t.stride()) if size(s) != 1]
    for left, right in itertools.pairwise(strides):
        if isinstance(left, int) and isinstance(right, int):
            if left < right:
                return False
        elif not isinstance(right, int) and (isinstance(left, int) or not (left / right).is_integer):
            return False
    return not strides or strides[-1] == 1


def _same_sizes(a: tuple[Any, ...], b: Any) -> bool:
    return len(a) == len(b) and all(same_size(p, size(q)) for p, q in zip(a, b))
