"""From labelled nodes to a program: what a result needs, step by step, down to logits, rows and classes."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from ..graph.values import is_given, lifted, size_hint
from ..spec.program import Program, Ref, Result, Step, mapped, name_of, only
from .aten_ops import VIEWS, Crossing, at, bound, filled_with, operand_tags, stacked
from .labels import Labels
from .program_steps import Steps
from .spaces import Space, reached
from .tags import (
    LOCAL,
    ONE,
    ROW,
    is_one,
    local_sizes,
    position,
    shape_of,
    tags_of_broadcast,
    through_view,
)

aten = torch.ops.aten

# How far back the making of an input is looked at, to find values of the size of the logits in it.
_FAR = 64


class Emitter(Steps):
    """Builds the program of one set of rows.

    stop: says of a narrow labelled node whether it is an input; called with the node.
    """

    def __init__(self, labels: Labels, space: Space, stop: Callable[[Node], bool]) -> None:
        super().__init__()
        self.labels, self.space, self.stop = labels, space.find(), stop
        self.matrices: list[tuple[Node, bool]] = []  # and whether they are turned: [H, V]
        self.results: list[Result] = []
        self.of: dict[Any, Any] = {}
        self._reaches: dict[Any, bool] = {}

    # -- what comes out

    def row(self, node: Node) -> None:
        """The values of a narrow node."""
        label = self.labels.of[node]
        ref = self.value(node, label.tags, label.space)
        self.results.append(Result("row", ref, node.meta["val"].dtype, self._local(label.tags, node)))

    def total(self, node: Node, wide: Node) -> None:
        """A sum over rows and classes: its part of each row; the sum over rows stays in the graph."""
        label = self.labels.of[wide]
        ref = self.value(wide, label.tags, label.space)
        dtype = node.meta["val"].dtype
        dims = [position(label.tags, d) for d, t in enumerate(label.tags) if t != ROW]
        ref = self._step(aten.sum.dim_IntList, (ref, dims), {"dtype": dtype})
        self.results.append(Result("row", ref, dtype, ()))

    def sum(self, node: Node, wide: Node) -> None:
        """A sum over rows of a wide node."""
        label, value = self.labels.of[wide], node.meta["val"]
        ref = self.value(wide, label.tags, label.space)
        over: Any = node.args[1]
        dims = [d % len(label.tags) for d in over]
        here = [position(label.tags, d) for d in dims if label.tags[d] != ROW]
        if here:
            ref = self._step(aten.sum.dim_IntList, (ref, here), {"dtype": value.dtype})
        kept = [d for d, t in enumerate(label.tags) if t != ROW and d not in dims]
        shape = shape_of(wide) or ()
        self.results.append(Result("sum", ref, value.dtype, tuple(self._size(shape[d]) for d in kept)))

    def dx(self, node: Node, wide: Node) -> None:
        """dz @ matrix [V, H]."""
        value = node.meta["val"]
        ref = self._matrix(wide)
        turned = node.args[0] is not wide
        other: Any = node.args[0 if turned else 1]
        if (other, turned) not in self.matrices:
            self.matrices.append((other, turned))
        width, index = (shape_of(other) or ())[-2 if turned else -1], self.matrices.index((other, turned))
        self.results.append(Result("dx", ref, value.dtype, (self._size(width),), index))

    def dw(self, node: Node, wide: Node) -> None:
        """dz^T @ rows."""
        label, value = self.labels.of[wide], node.meta["val"]
        ref = self._matrix(wide)
        left, right = node.args
        other: Any = right if left is wide else left
        sizes = shape_of(other) or ()
        x_tags = ROW * (len(sizes) - 2) + (ROW + LOCAL if left is wide else LOCAL + ROW)
        rows = self._input("rows", other, x_tags, label.space)
        index = self._index_of(rows)
        V = (shape_of(wide) or ())[label.tags.rindex(LOCAL)]
        width = sizes[x_tags.rindex(LOCAL)]
        self.results.append(Result("dw", ref, value.dtype, (self._size(V), self._size(width)), index))

    def _matrix(self, wide: Node) -> Ref:
        """A wide node as a factor of a product."""
        label = self.labels.of[wide]
        ref = self.value(wide, label.tags, label.space)
        own = local_sizes(label.tags, shape_of(wide) or ())
        return ref if len(own) == 1 else self._reshaped(ref, label.tags, own[-1:] if is_one(own[0]) else own[:1])

    def program(self) -> Program:
        """The finished program: inputs first, then the steps that results need."""
        count = len(self.kinds)

        def final(ref: Ref) -> Ref:
            return Ref(count - ref.index - 1) if ref.index < 0 else ref

        steps = tuple(
            Step(op, mapped(args, final), {k: mapped(v, final) for k, v in kwargs.items()})
            for op, args, kwargs in self.steps
        )
        results = tuple(r._replace(value=final(r.value)) for r in self.results)
        found = only(Program(tuple(self.kinds), steps, results), range(len(results)))
        named = (s._replace(op=_named(s.op)) for s in found.steps)
        return dataclasses.replace(found, steps=tuple(named))

    # -- values

    def value(self, node: Node, tags: str, home: Space) -> Any:
        """A node's value in the rows of this program, or None where it is zero in all of them."""
        key = (node, tags, home.find())
        if key not in self.of:
            self.of[key] = self._value(node, tags, home.find())
        return self.of[key]

    def _value(self, node: Node, tags: str, home: Space) -> Any:
        labels = self.labels
        label = labels.of.get(node)
        if label is None:
            return self._unlabelled(node, tags, home)
        if label.tags != tags and label.tags.replace(ONE, "") != tags.replace(ONE, ""):
            raise Crossing(f"rows are other rows at {node}")
        if node in labels.sources:
            return self._source(node, home)
        if label.parts is not None and self.space not in {p.find() for p in label.parts}:
            return None
        if node in labels.reduced or (self.stop(node) and not labels.wide(node)):
            return self._input("rows", node, tags, label.space)
        if node in labels.passes:
            return self._passed(node, tags)
        return self._computed(node, label.tags, label.space)

    def _passed(self, node: Node, tags: str) -> Any:
        """Rows selected, or put back: in the rows of this program nothing is done."""
        for source in self.labels.passes[node]:
            label = self.labels.of[source]
            here = {p.find() for p in label.parts} if label.parts is not None else reached(label.space)
            if self.space not in here:
                continue
            ref = self.value(source, label.tags, label.space)
            before, after = label.tags.replace(ROW, ""), tags.replace(ROW, "")
            if node.target in (aten.permute.default, aten.transpose.int, aten.t.default):
                return self._permuted(node, ref, label.tags)
            if before == after or ref is None:
                return ref
            return self._reshaped(ref, tags, local_sizes(tags, shape_of(node) or ()))
        return None

    def _source(self, node: Node, home: Space) -> Ref:
        key = ("logits", node)
        if key not in self._inputs:
            ref = self._new_input("logits", (node, home))
            tags, shape = self.labels.of[node].tags, shape_of(node) or ()
            own = local_sizes(tags, shape)  # of bmm, a batch of one
            self._inputs[key] = ref if len(own) == 1 else self._reshaped(ref, tags, own)
        return self._inputs[key]

    def _unlabelled(self, node: Node, tags: str, home: Space) -> Any:
        if ROW not in tags:
            if node.target in (aten.full.default, aten.scalar_tensor.default) and node.op == "call_function":
                return self._computed(node, tags, home)
            if (number := lifted(node)) is not None:  # on whatever device it is
                return self._filled(node, tags, number)
            return self._input("whole", node, tags, home)
        if self._reaches_wide(node, tags, home, _FAR):
            return self._computed(node, tags, home)
        if self._is_wide(node, tags, home) and not is_given(node):
            self._operands(node, tags)  # says why it can't be computed row by row
            raise Crossing("values of the size of the logits would have to exist")
        return self._input("rows", node, tags, home)

    def _reaches_wide(self, node: Node, tags: str, home: Space, far: int) -> bool:
        """Is something of the size of the logits computed on the way to this node, that need not be?"""
        key = (node, tags)
        if key not in self._reaches:
            self._reaches[key] = False  # while we look
            self._reaches[key] = self._look(node, tags, home, far)
        return self._reaches[key]

    def _look(self, node: Node, tags: str, home: Space, far: int) -> bool:
        if node in self.labels.of:
            return self.labels.wide(node) or node in self.labels.behind
        if node.op != "call_function" or far == 0 or ROW not in tags:
            return False
        if node.target is operator.getitem and is_given(node):  # a chunk of an input
            return False
        try:
            wanted = self._operands(node, tags)
        except Crossing:
            return False
        if self._is_wide(node, tags, home):
            return True
        return any(self._reaches_wide(a, t, home, far - 1) for a, t in wanted)

    def _is_wide(self, node: Node, tags: str, home: Space) -> bool:
        value, count = node.meta.get("val"), 1
        if isinstance(value, (tuple, list)):
            value = value[0]
        if not isinstance(value, torch.Tensor):
            return False
        for s, t in zip(value.shape, tags):
            count *= size_hint(s) if t == LOCAL else 1
        return count * 4 > self.labels.classes(home)

    def _operands(self, node: Node, tags: str) -> list[tuple[Node, str]]:
        """Operands with their tags, where a node has these."""
        found = self.labels.fact(node)
        if found.kind == "view":
            before = through_view(tags, shape_of(node) or (), shape_of(node.args[0]) or ())
            if before is None:
                raise Crossing("rows and classes are mixed by a view")
            return [(node.args[0], before)]  # type: ignore[list-item]
        if found.kind == "getitem":
            source: Any = node.args[0]
            if len(shape_of(source) or ()) != len(tags):
                raise Crossing("an item of another rank")
            if source.target is aten.unbind.int:
                x, dim = _unbound(source)
                return [(x, tags[:dim] + LOCAL + tags[dim:])]
            return [(source, tags)]
        wanted = operand_tags(node, found, tags)
        for (arg, here), (_, dims) in zip(wanted, found.operands):
            order = [dims[d] for d, t in enumerate(here) if t == ROW]
            if order != sorted(order):  # type: ignore[type-var]
                raise Crossing("rows in another order")
            if 0 < len(order) < tags.count(ROW) and arg in self.labels.of:
                raise Crossing("rows are broadcast to rows")
        return wanted

    # -- steps

    def _computed(self, node: Node, tags: str, home: Space) -> Any:
        if node.op != "call_function":
            raise Crossing(f"{node} is no call")
        found = self.labels.fact(node)
        wanted = self._operands(node, tags)
        if found.kind == "view":
            ((source, before),) = wanted
            ref = self.value(source, before, home)
            return ref if ref is None else self._local_view(ref, before, shape_of(source), tags, shape_of(node))
        if found.kind == "getitem":
            given: Any = node.args[0]
            ((source, before),) = wanted
            ref = self.value(source, before, home)
            if ref is not None and given.target is aten.unbind.int:
                place = position(before, _unbound(given)[1])
                return self._step(aten.select.int, (ref, place, node.args[1]), {})
            return None if ref is None else self._step(operator.getitem, (ref, node.args[1]), {})
        refs: list[Any] = []
        apart = self.space is not home.find() and node in self.labels.of and self._has_native_part(node)
        for i, (arg, here) in enumerate(wanted):
            if apart and node.target in (aten.add.Tensor, aten.sub.Tensor) and self._native(arg):
                refs.append(None)  # the gradient of all rows is not that of these
            elif 0 < here.count(ROW) < tags.count(ROW):  # values of some of the row dimensions, broadcast to the others
                wanted[i] = (arg, tags_of_broadcast(here, found.operands[i][1], tags))
                refs.append(self._broadcast(node, arg, found, i, tags, wanted[i][1], home))
            else:
                ref = self.value(arg, here, self._home(arg, home))
                if found.kind in ("pick", "put") and i == 1 and ref is not None:
                    ref = self._wrapped(ref, (shape_of(wanted[0][0]) or ())[1])
                refs.append(ref)
        if any(r is None for r in refs):
            return self._with_zeros(node, wanted, refs)
        if found.kind == "stack":
            tensors, dim = stacked(node)  # type: ignore[misc]
            new = position(tags, dim)
            each = {a: self._step(aten.unsqueeze.default, (r, new), {}) for (a, _), r in zip(wanted, refs)}
            return self._step(aten.cat.default, ([each[t] for t in tensors], new), {})
        if found.kind == "full":
            return self._filled(node, tags, filled_with(node))
        if found.kind == "new":
            fill = bound(node).get("fill_value", 0) if node.target is aten.new_full.default else 0
            return self._filled(node, tags, fill)
        if found.kind == "permute":
            return self._permuted(node, refs[0], wanted[0][1])
        if found.kind == "reshape":
            return self._local_view(refs[0], wanted[0][1], shape_of(wanted[0][0]), tags, shape_of(node))
        if found.kind == "expand":
            return self._expanded(node, refs[0], wanted[0][1], tags)
        if found.kind == "pick":
            column = self._step(aten.unsqueeze.default, (refs[1], 1), {})
            picked = self._step(aten.gather.default, (refs[0], 1, column), {})
            return self._step(aten.squeeze.dim, (picked, 1), {})
        if found.kind == "put":
            return self._put(node, refs)
        if found.kind == "masked":
            base, mask, value = refs
            value = self._step(aten.add.Tensor, (base, value), {}) if bound(node)["accumulate"] else value
            return self._step(aten.where.self, (mask, value, base), {})
        if found.kind == "index":
            return self._index(node, refs, wanted)
        if found.kind == "index_put":
            indices: list[Any] = [None] * position(wanted[0][1], self._indexed(node)) + [refs[1]]
            return self._step(node.target, (refs[0], indices, refs[2], *node.args[3:4]), {})
        if found.kind == "pad":
            return self._padded(node, refs[0], wanted[0][1])
        return self._op(node, found, wanted, refs, tags)

    def _has_native_part(self, node: Node) -> bool:
        label = self.labels.of[node]
        return label.parts is not None and label.space.find() in {p.find() for p in label.parts}

    def _native(self, arg: Node) -> bool:
        """Does a gradient belong to all rows, and not to some that were selected?"""
        return arg not in self.labels.of or self.labels.of[arg].parts is None

    def _broadcast(self, node: Node, arg: Node, found: Any, i: int, tags: str, here: str, home: Space) -> Ref:
        if found.dims or found.kind not in ("op", "expand"):
            raise Crossing("rows are broadcast to rows")
        sizes, shape = [1] * len(tags), shape_of(node) or ()
        for d, k in enumerate(found.operands[i][1]):
            sizes[k] = (shape_of(arg) or ())[d]
        sizes = [shape[k] if t == ROW else s for k, (s, t) in enumerate(zip(sizes, tags))]
        return self._input("rows", arg, here, home, tuple(sizes))

    def _home(self, arg: Node, home: Space) -> Space:
        label = self.labels.of.get(arg)
        return home if label is None else label.space

    def _with_zeros(self, node: Node, wanted: list[tuple[Node, str]], refs: list[Any]) -> Any:
        """Of a sum of gradients of several selections, the part of this one."""
        if node.target in VIEWS:
            raise Crossing("gradients of several selections are stacked")
        if node.target not in (aten.add.Tensor, aten.sub.Tensor):
            return None
        if all(r is None for r in refs):
            return None
        (ref,) = (r for r in refs if r is not None)
        alpha = node.kwargs.get("alpha", 1)
        factor = 1 if refs[0] is not None else alpha if node.target is aten.add.Tensor else -alpha  # type: ignore[operator]
        return ref if factor == 1 else self._step(aten.mul.Tensor, (ref, factor), {})


def _unbound(node: Node) -> tuple[Node, int]:
    x, dim = bound(node).values()
    return x, at(dim, len(shape_of(x) or ()))


def _named(op: Any) -> str:
    """An op as programs name it."""
    return "getitem" if op is operator.getitem else name_of(op)
