"""Steps and inputs of a program in the making: in it rows are one dimension, the first, and every other is local."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.fx import Node

from ..spec.program import Ref, Rows, Sym
from .aten_ops import Crossing, bound, moved_dims
from .spaces import Space
from .tags import ROW, aligned, local_sizes, position, shape_of, size

aten = torch.ops.aten

_DROPPED = ("memory_format", "layout", "pin_memory", "device", "non_blocking", "requires_grad")


class Given(NamedTuple):
    """An input of a program: a node of the graph, how it depends on rows, and which rows those are.

    expanded: sizes to which it is broadcast first. classes: it holds indices that count from the end where they are
    negative, of so many.
    """

    node: Node
    tags: str
    home: Space
    expanded: Any = None
    classes: Any = None


class Steps:
    """What has been written so far: the kinds of the inputs and the inputs of each kind, sizes, steps."""

    def __init__(self) -> None:
        self.kinds: list[str] = []
        self.given: dict[str, list[Any]] = {"logits": [], "rows": [], "whole": []}
        self.sizes: list[Any] = []
        self.steps: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        self._inputs: dict[Any, Ref] = {}

    def _op(self, node: Node, found: Any, wanted: list[tuple[Node, str]], refs: list[Any], tags: str) -> Any:
        at_node: dict[Node, Any] = {}
        plain = not found.dims
        for (arg, here), ref in zip(wanted, refs):
            if plain and ROW in here and len(here) < len(tags):  # broadcasting counts dimensions from the right
                padded = aligned(here, len(tags))
                sizes = [1] * (len(tags) - len(here)) + list(shape_of(arg) or ())
                ref = self._reshaped(ref, padded, local_sizes(padded, tuple(sizes)))
            elif plain and ROW not in here:
                ref = self._beside_rows(ref, here, shape_of(arg) or (), tags)
            at_node[arg] = ref
        dims = moved_dims(found, node, wanted)
        args = [dims.get(i, a) for i, a in enumerate(node.args)]
        kwargs = {k: v for k, v in node.kwargs.items() if k not in _DROPPED}
        names = list(bound(node))
        for i, value in dims.items():
            if i >= len(args):
                kwargs[names[i]] = value
        target = node.target
        if target in (aten.lift_fresh_copy.default, aten.alias.default, aten.detach.default, aten.clone.default):
            return refs[0]
        if target is aten._to_copy.default:
            target, kwargs = torch.ops.prims.convert_element_type.default, {}
            args = [args[0], node.meta["val"].dtype]
            if at_node[wanted[0][0]] is None:
                raise Crossing("nothing to cast")
        return self._step(
            target, self._filled_in(args, at_node), {k: self._filled_in(v, at_node) for k, v in kwargs.items()}
        )

    def _filled_in(self, value: Any, at_node: dict[Node, Any]) -> Any:
        if isinstance(value, Node):
            if value in at_node:
                return at_node[value]
            known = value.meta.get("val")
            if isinstance(known, (int, torch.SymInt)):
                return self._size(size(known))
            raise Crossing(f"{value} is neither a tensor nor a size")
        if isinstance(value, (list, tuple)):
            return tuple(self._filled_in(v, at_node) for v in value)
        if isinstance(value, torch.device):
            return None
        return value

    def _filled(self, node: Node, tags: str, fill: Any) -> Ref:
        if isinstance(fill, Node):
            raise Crossing("a tensor filled with a size")
        sizes = ([Rows()] if ROW in tags else []) + [self._size(s) for s in local_sizes(tags, shape_of(node) or ())]
        return self._step(aten.full.default, (sizes, fill), {"dtype": node.meta["val"].dtype})

    def _beside_rows(self, ref: Any, here: str, shape: Any, tags: str) -> Any:
        """What is the same for all rows, as it is broadcast to them: they are one dimension here, and the first."""
        ahead = len(tags) - len(here)
        kept = [s for d, s in enumerate(shape) if tags[ahead + d] != ROW]
        return self._reshaped(ref, here, kept) if len(kept) < len(here) else ref

    def _local_view(self, ref: Ref, before: str, old: Any, after: str, new: Any) -> Ref:
        p, q = local_sizes(before, old or ()), local_sizes(after, new or ())
        return ref if p == q else self._reshaped(ref, after, q)

    def _reshaped(self, ref: Ref, tags: str, sizes: list[Any]) -> Ref:
        rows = [Rows()] if ROW in tags else []
        return self._step(aten.reshape.default, (ref, [*rows, *(self._size(s) for s in sizes)]), {})

    def _permuted(self, node: Node, ref: Any, before: str) -> Any:
        from .spaces import permutation

        order = [d for d in permutation(node, len(before)) if before[d] != ROW]
        if ref is None or order == sorted(order):
            return ref
        here = [position(before, d) for d in order]
        return self._step(aten.permute.default, (ref, [*([0] if ROW in before else []), *here]), {})

    def _expanded(self, node: Node, ref: Ref, before: str, after: str) -> Ref:
        old, new = shape_of(node.args[0]) or (), shape_of(node) or ()
        p, q = local_sizes(aligned(before, len(after)), (1,) * (len(new) - len(old)) + old), local_sizes(after, new)
        if ROW in before and len(before) < len(after):
            ref = self._reshaped(ref, aligned(before, len(after)), p)
        if ROW not in before:
            ref = self._beside_rows(ref, before, old, after)
        if p == q and (ROW in before) == (ROW in after):
            return ref
        rows = [Rows()] if ROW in after else []
        return self._step(aten.expand.default, (ref, [*rows, *(self._size(s) for s in q)]), {})

    def _wrapped(self, index: Ref, classes: Any) -> Ref:
        """Indices of which negative ones count from the end: unlike those of gather."""
        if 0 <= index.index < len(self.kinds) and self.kinds[index.index] == "rows":
            node, tags, home, expanded, _ = self.given["rows"][self._index_of(index)]
            return self._input("rows", node, tags, home, expanded, classes)
        below = self._step(aten.lt.Scalar, (index, 0), {})
        return self._step(
            aten.where.self, (below, self._step(aten.add.Tensor, (index, self._size(classes)), {}), index), {}
        )

    def _put(self, node: Node, refs: list[Any]) -> Ref:
        """index_put(z, [0 1 2 ..., y], values): one position in each row."""
        base, y, values = refs
        column = self._step(aten.unsqueeze.default, (y, 1), {})
        dtype = node.meta["val"].dtype
        if len(shape_of(node.args[2]) or ()) == 0:
            values = self._step(aten.expand.default, (values, [Rows()]), {})
        values = self._step(aten.unsqueeze.default, (values, 1), {})
        values = self._step(torch.ops.prims.convert_element_type.default, (values, dtype), {})
        adds = bool(bound(node)["accumulate"])
        return self._step(aten.scatter_add.default if adds else aten.scatter.src, (base, 1, column, values), {})

    def _indexed(self, node: Node) -> int:
        return next(d for d, i in enumerate(node.args[1]) if i is not None)  # type: ignore[arg-type]

    def _index(self, node: Node, refs: list[Any], wanted: list[tuple[Node, str]]) -> Ref:
        dim, (_, i_tags) = self._indexed(node), wanted[1]
        if ROW in i_tags and (ROW in wanted[0][1] or dim != 0):
            raise Crossing("an index of its own for each row")
        return self._step(aten.index.Tensor, (refs[0], [None] * position(wanted[0][1], dim) + [refs[1]]), {})

    def _padded(self, node: Node, ref: Ref, tags: str) -> Ref:
        m, amounts = len(tags), list(node.args[1])  # type: ignore[arg-type]
        here: list[Any] = []
        for d in reversed(range(m)):
            pair = amounts[2 * (m - 1 - d) : 2 * (m - d)] or [0, 0]
            if tags[d] != ROW:
                here += [self._filled_in(p, {}) for p in pair]
        return self._step(aten.constant_pad_nd.default, (ref, here, *node.args[2:]), {})

    def _size(self, s: Any) -> Any:
        if isinstance(s, int):
            return s
        if s not in self.sizes:
            self.sizes.append(s)
        return Sym(self.sizes.index(s))

    def _local(self, tags: str, node: Node) -> tuple[Any, ...]:
        return tuple(self._size(s) for s in local_sizes(tags, shape_of(node) or ()))

    def _step(self, op: Any, args: Any, kwargs: dict[str, Any]) -> Ref:
        self.steps.append((op, tuple(args), kwargs))
        return Ref(-len(self.steps))

    # -- inputs

    def _input(self, kind: str, node: Node, tags: str, home: Space, expanded: Any = None, classes: Any = None) -> Ref:
        if isinstance(node.meta.get("val"), (tuple, list)):
            raise Crossing("several tensors as one input")
        key = (kind, node, tags, home.find(), expanded, classes)
        if key not in self._inputs:
            self._inputs[key] = self._new_input(kind, Given(node, tags, home, expanded, classes))
        return self._inputs[key]

    def _new_input(self, kind: str, what: Any) -> Ref:
        self.kinds.append(kind)
        self.given[kind].append(what)
        return Ref(len(self.kinds) - 1)

    def _index_of(self, ref: Ref) -> int:
        """Which of the tensors of its kind an input is."""
        return self.kinds[: ref.index].count(self.kinds[ref.index])
