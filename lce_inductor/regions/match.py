"""Labelled nodes -> what the fused kernels are asked for: statistics of each row, and row gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Node

from ..graph.values import lifted, size_hint
from ..spec.program import Program
from ..spec.statistics import BITS, LSE, NEG_ENTROPY
from . import algebra
from .algebra import Poly
from .aten_ops import Crossing
from .emit import Emitter
from .fused import ONE, Class, Count, Cut, Evaluate, Index, NotFused, Wide
from .heads import Head
from .index_ops import is_masked
from .labels import Labels, Sink
from .spaces import Space
from .tags import LOCAL, ROW, is_one, product, same_size, shape_of

aten = torch.ops.aten
prims = torch.ops.prims


@dataclasses.dataclass
class Gradients:
    """dy = p (a + b y) + onehot(target_k) t_k + c s, and dz = dy times the epilogue's slope.

    norm: what stands for lse in p = exp(y - lse), if it is something else: the classes of other processes count, too.
    """

    norm: Poly | None
    lse: Poly | None
    neg_entropy: Poly | None
    targets: dict[int, Poly]
    sum: Poly | None
    sinks: dict[str, Node]

    def divide(self, factor: float) -> None:
        """All row gradients by a number."""

        def by(p: Poly | None) -> Poly | None:
            return None if p is None else p.times(1.0 / factor)

        self.lse, self.neg_entropy, self.sum = by(self.lse), by(self.neg_entropy), by(self.sum)
        self.targets = {k: p.times(1.0 / factor) for k, p in self.targets.items()}


@dataclasses.dataclass
class Match:
    """One call of row_stats, and of row_stats_backward where there is a backward.

    atoms maps ("in", ...) atoms of the polynomials to what they are: (node, tags, home, ...) as the emitter has it.
    targets: columns of labels that are asked for, of all `columns` that the programs have.
    """

    space: Space
    source: Node
    epilogue: tuple[Any, ...]
    values: dict[Node, Poly]
    gradients: Gradients | None
    targets: dict[int, Any]
    columns: dict[int, Any]
    class_weight: Any
    atoms: dict[Any, Any]
    stats: int
    bias: Any
    cut: tuple[int, int] | None
    programs: list[tuple[Program, Emitter, list[Any]]]  # to compare with, and what they should give


def fused_calls(labels: Labels, heads: list[Node], spaces: set[Space]) -> list[Match]:
    """The calls that compute a region. Raises NotFused where the kernels don't, with the first reason."""
    from .check import check

    sinks = [s for s in labels.sinks if labels.of[s.wide].space.find() in spaces and s.node.users]
    if any(s.node not in labels.on_tangent for s in sinks):
        raise NotFused("a sum over rows in the forward")
    narrow = [n for n in labels.outputs if labels.of[n].space.find() in spaces]
    if any(labels.of[n].parts is not None for n in narrow) or any(
        n in labels.on_tangent and n in labels.behind for n in narrow
    ):
        raise NotFused("a gradient of a row value")
    wanted: dict[Space, list[Node]] = {}
    for node in narrow:
        wanted.setdefault(labels.of[node].space.find(), []).append(node)
    late: dict[Space, list[Sink]] = {}
    for sink in sinks:
        label = labels.of[sink.wide]
        for space in label.parts or (label.space,):
            late.setdefault(space.find(), []).append(sink)
    matches = []
    # What a backward reads of other rows (their row values) must be among what is replaced: see Matcher.run.
    for space in dict.fromkeys([*late, *wanted]):
        matcher = Matcher(labels, space)
        found = matcher.run(wanted.get(space, []), late.get(space, []))
        classes = size_hint(found.source.meta["val"].shape[-1])
        factor = check(found, matcher.slopes, classes)
        if found.gradients is not None and factor != 1.0:
            found.gradients.divide(factor)
        matches.append(found)
    return matches


class Matcher:
    """Tries one set of rows. Raises NotFused with the reason why the kernels do not compute it."""

    def __init__(self, labels: Labels, space: Space) -> None:
        self.labels, self.space = labels, space.find()
        self.targets: dict[Any, tuple[int, Any]] = {}  # key -> column, input
        self.whole: dict[Any, tuple[int, Any]] = {}
        self.atoms: dict[Any, Any] = {}
        self.epilogue: tuple[Any, ...] | None = None
        self.programs: list[tuple[Program, Emitter, list[Any]]] = []
        self.slopes: tuple[Any, ...] = ()
        self._sum_of: Any = None
        self.bias: int | None = None
        self.cut: tuple[int, int] | None = None

    def run(self, wanted: list[Node], sinks: list[Sink]) -> Match:
        """wanted: narrow nodes that are read outside; sinks: of the backward."""
        gradients = self._gradients(sinks) if sinks else None
        read = [n for kind in ("rows", "whole") for _, e, _ in self.programs for n in [w[0] for w in e.given[kind]]]
        values = self._values([*wanted, *(n for n in read if n in self.labels.of)])
        source = self._source()
        if gradients is not None:
            self._join_targets(gradients, values)
        used = self._used(values, gradients)
        stats = 0
        for atom in used:
            if atom[0] == "stat":
                stats |= BITS[atom[1]]
        if gradients is not None and (gradients.lse is not None or gradients.neg_entropy is not None):
            stats |= LSE | (NEG_ENTROPY if gradients.neg_entropy is not None else 0)
        weights = {a[2] for a in used if a[:2] == ("stat", "sum")}
        if len(weights) > 1:
            raise NotFused("sums of several class weights")
        weight = next(iter(weights), None)
        if gradients is not None and gradients.sum is not None:
            weight = self._sum_of
        columns = {a[2] for a in used if a[:2] == ("stat", "target")} | {
            a[3] for a in used if a[:2] == ("in", "picked")
        }
        columns |= set(gradients.targets) if gradients is not None else set()
        targets = {column: what for column, what in self.targets.values() if column in columns}
        if not stats:
            raise NotFused("no statistic is read")
        return Match(
            self.space, source, self.epilogue or (), values, gradients, targets, dict(self.targets.values()),
            None if weight is None else self.whole_input(weight), self.atoms, stats,
            None if self.bias is None else self.whole_input(self.bias), self.cut, self.programs,
        )  # fmt: skip

    def whole_input(self, index: int) -> Any:
        return next(what for i, what in self.whole.values() if i == index)

    def _source(self) -> Node:
        sources = {node for _, e, _ in self.programs for node, _ in e.given["logits"]}
        if len(sources) != 1:
            raise NotFused("several heads")
        source: Node = sources.pop()
        bias = Head.of(source).bias
        shape = shape_of(bias) if bias is not None else None
        if shape is not None and (len(shape) != 1 or is_one(shape[0])):
            raise NotFused("a bias that is no vector of classes")
        if bias is not None and self.bias is not None:
            raise NotFused("two biases")
        return source

    def _join_targets(self, gradients: Gradients, values: dict[Node, Poly]) -> None:
        """Labels that the forward looked up without counting from the end are none that count from the end."""
        looked_up = {a[2] for p in values.values() for a in p.atoms() if a[:2] == ("stat", "target")}
        columns = {key: column for key, (column, _) in self.targets.items()}
        for (same, classes), column in columns.items():
            plain = columns.get((same, None))
            if classes is not None and plain in looked_up and column in gradients.targets:
                more = gradients.targets.pop(column)
                gradients.targets[plain] = gradients.targets.get(plain, Poly({})) + more  # type: ignore[index,arg-type]

    def _used(self, values: dict[Node, Poly], gradients: Gradients | None) -> set[Any]:
        polys = list(values.values())
        if gradients is not None:
            polys += [p for p in (gradients.norm, gradients.lse, gradients.neg_entropy, gradients.sum) if p is not None]
            polys += list(gradients.targets.values())
        return {a for p in polys for a in p.atoms()}

    # -- the forward

    def _values(self, wanted: list[Node]) -> dict[Node, Poly]:
        """Nodes to replace: the last ones on the way to what is wanted that are simple in the statistics."""
        emitter = Emitter(self.labels, self.space, lambda n: False)
        order: list[Node] = []
        todo, seen = list(wanted), set()
        while todo:
            node = todo.pop(0)
            if node in seen or node not in self.labels.of or self.labels.wide(node):
                continue
            seen.add(node)
            todo += node.all_input_nodes
            if node in self.labels.on_tangent or self.labels.of[node].space.find() is not self.space:
                continue
            try:
                emitter.row(node)
                order.append(node)
            except Crossing:
                continue
        program = emitter.program()
        found = dict(zip(order, self._evaluate(program, emitter)))
        chosen: dict[Node, Poly] = {}
        todo, seen = list(wanted), set()
        while todo:
            node = todo.pop(0)
            if node in seen or node not in self.labels.of:
                continue
            seen.add(node)
            value = found.get(node)
            from_wide = any(a in self.labels.of and self.labels.wide(a) for a in node.all_input_nodes)
            if isinstance(value, Poly) and (_simple(value) or from_wide):
                chosen[node] = value
            elif from_wide:
                raise value if isinstance(value, NotFused) else NotFused(f"{node} is no statistic")
            else:
                todo += node.all_input_nodes
        checked = [chosen.get(n) for n in order]
        self.programs.append((program, emitter, checked))
        return chosen

    # -- the backward

    def _gradients(self, sinks: list[Sink]) -> Gradients:
        labels = self.labels
        if any(s.kind not in ("dx", "dw", "sum") for s in sinks):
            raise NotFused("a gradient of something else than x, weight and bias")
        emitter = Emitter(labels, self.space, lambda n: n in labels.on_tangent and n not in labels.behind)
        for sink in sinks:
            getattr(emitter, sink.kind)(sink.node, sink.wide)
        if len(emitter.given["logits"]) != 1:
            raise NotFused("several heads, or gradients that do not read the logits")
        program = emitter.program()
        results = self._evaluate(program, emitter)
        self._check_sinks(sinks, emitter)
        for r in results:
            if isinstance(r, NotFused):
                raise r
        kinds = [s.kind for s in sinks]
        if len(set(kinds)) != len(kinds) or len({r.value for r in program.results}) != 1:
            raise NotFused("several gradients of one kind")
        self.programs.append((program, emitter, [results[0]]))
        return self._form(results[0], {s.kind: s.node for s in sinks})

    def _check_sinks(self, sinks: list[Sink], emitter: Emitter) -> None:
        """Are the products those with the head's own x and weight, and the sum that of its bias?"""
        ((source, _),) = emitter.given["logits"]
        head = Head.of(source)
        for sink in sinks:
            left, right = sink.node.args[:2] if sink.kind != "sum" else (None, None)
            other = right if left is sink.wide else left
            if sink.kind == "dx":
                flip = left is sink.wide
                if _matrix(other) != _matrix(head.weight, turned=flip):
                    raise NotFused("dX by another weight")
            elif sink.kind == "dw":
                if _matrix(other) != _matrix(head.x, turned=left is not sink.wide):
                    raise NotFused("dW by another input")
            elif (head.bias is None and self.bias is None) or len(shape_of(sink.node) or ()) > 2:
                raise NotFused("a sum over rows")

    def _form(self, value: Any, sinks: dict[str, Node]) -> Gradients:
        if not isinstance(value, Wide):
            raise NotFused("a gradient that does not read the logits")
        terms, targets = dict(value.terms), {}
        a, b, s = terms.pop("P", None), terms.pop("PY", None), terms.pop("1", None)
        for basis in list(terms):
            if basis[0] == "onehot":
                targets[basis[1]] = terms.pop(basis)
            elif basis[0] == "class" and s is None:
                s = terms.pop(basis)
                self._sum_of = basis[1]
        if terms:
            raise NotFused(f"a gradient with {next(iter(terms))}")
        norm = None
        if b is not None:  # p (a + b y) = p (g + b (log p - sum p log p))
            known = Poly.atom("stat", "lse") + Poly.atom("stat", "neg_entropy")
            a = algebra.simplified((a or Poly({})) + b * known)
            a = a if a.terms else None
        elif a is not None and (factored := algebra.exponent(a, ("stat", "lse"))) is not None:
            given = [self.atoms[x].node for x in factored[1].atoms() if x[:2] == ("in", "rows")]
            if not self.labels.reduced.isdisjoint(given):
                a, norm = factored  # also right where lse is -inf: of a process whose classes are all masked
        self.slopes = value.slopes
        return Gradients(norm, a, b, targets, s, sinks)

    # -- inputs

    def _evaluate(self, program: Program, emitter: Emitter) -> list[Any]:
        sources = emitter.given["logits"]
        if len(sources) > 1:
            raise NotFused("several heads")
        value = sources[0][0].meta["val"] if sources else None
        classes = value.shape[-1] if value is not None else 0
        given = {
            "rows": [self._row(w) for w in emitter.given["rows"]],
            "whole": [self._whole(w, classes) for w in emitter.given["whole"]],
        }
        double = value is not None and value.dtype == torch.float64
        evaluate = Evaluate(program, classes, double, given, self.epilogue)
        results = evaluate.run()
        self.epilogue = evaluate.epilogue
        if not self.programs and self.bias is None:
            self.bias, self.cut = evaluate.bias, evaluate.cut
        elif (evaluate.bias, evaluate.cut) != (self.bias, self.cut):
            raise NotFused("another bias, or other classes, in the forward than in the backward")
        return [self._whole_of(r) for r in results]

    def _whole_of(self, result: Any) -> Any:
        """A gradient of all classes; those that were cut off get zeros when it is written."""
        if isinstance(result, Cut):
            return result.inner
        return NotFused("a gradient of some of the classes") if self.cut and isinstance(result, Wide) else result

    def _row(self, what: Any) -> Any:
        node, tags, _, expanded, classes = what
        value, shape = node.meta["val"], expanded or shape_of(node) or ()
        if any(t == LOCAL for t in tags):
            return NotFused("several values for each row")
        if not value.dtype.is_floating_point and value.dtype != torch.bool:
            if node in self.labels.reduced:
                return NotFused("labels that follow from the statistics")
            key = same_rows(node), classes
            if key not in self.targets:
                self.targets[key] = (len(self.targets), what)
            return Index(self.targets[key][0])
        atom = ("in", "rows", same_rows(node))
        self.atoms[atom] = what
        return Poly.atom(*atom) if ROW in tags and shape is not None else NotFused("no row value")

    def _whole(self, what: Any, classes: Any) -> Any:
        node = what[0]
        shape = shape_of(node) or ()
        several = [s for s in shape if s != 1]
        if not several:
            atom = ("in", "whole", node.name)
            self.atoms[atom] = what
            return Poly.atom(*atom)
        if len(several) != 1:
            return NotFused("a matrix beside the logits")
        if _counts(node):
            return Count()
        if node.name not in self.whole:
            self.whole[node.name] = (len(self.whole), what)
        index = self.whole[node.name][0]
        self.atoms[("in", "total", index)] = what
        return Class(index)


def _simple(p: Poly) -> bool:
    """Statistics times numbers: nothing that a program computes better where it stands."""
    return all(len(m) <= 1 and all(a[0] == "stat" for a in m) for m in p.terms)


def _counts(node: Node) -> bool:
    while node.target in (aten.view.default, aten.unsqueeze.default, aten.expand.default, aten.alias.default):
        node = node.args[0]  # type: ignore[assignment]
    if node.target is prims.iota.default:
        return bool(node.kwargs.get("start", 0) == 0 and node.kwargs.get("step", 1) == 1)
    return node.target is aten.arange.default and len(node.args) == 1


_SHAPE_ONLY = (
    aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.clone.default, aten.alias.default, aten.detach.default, aten._unsafe_view.default,
)  # fmt: skip


def same_rows(node: Any) -> Any:
    """What two nodes with the same values, row by row, have in common, whatever their shapes."""
    if not isinstance(node, Node):
        return repr(node)
    while node.target in _SHAPE_ONLY:
        node = node.args[0]
    args = list(node.args)
    if masked := node.target is aten.index_put.default and is_masked(node):
        args[1] = args[1][0]
    if node.op != "call_function" or torch.Tag.pointwise not in getattr(node.target, "tags", ()):
        if (number := lifted(node)) is not None:
            return ("number", str(node.meta["val"].dtype), repr(number))
        if node.target in (aten.full.default, aten.scalar_tensor.default) and not node.all_input_nodes:
            return ("number", str(node.meta["val"].dtype), repr(node.args[-1]))
        if node.target is not aten.where.self and not masked:
            return node.name
    whole = product(shape_of(node) or ())

    def operand(a: Any) -> Any:  # one that is broadcast is more than its values: u[:, None] + v is not u + v[:, None]
        count = product(shape_of(a) or ()) if isinstance(a, Node) else whole
        return same_rows(a) if is_one(count) or same_size(count, whole) else a.name

    return (str(node.target), *map(operand, args), *sorted((k, repr(v)) for k, v in node.kwargs.items()))


def _matrix(node: Any, turned: bool = False) -> tuple[Node, bool]:
    """A matrix behind its transpositions and views, and whether it is turned."""
    while isinstance(node, Node):
        if (
            node.target is aten.permute.default and list(node.args[1]) in ([1, 0], [0, 2, 1])  # type: ignore[arg-type]
        ) or node.target is aten.t.default:
            node, turned = node.args[0], not turned
        elif node.target in (aten.alias.default, aten.detach.default):
            node = node.args[0]
        else:
            break
    return node, turned


__all__ = ["ONE", "Match", "Matcher", "same_rows"]
