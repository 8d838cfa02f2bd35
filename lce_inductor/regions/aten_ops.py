"""What an op does with dimensions: one row of facts for each family of ops, and nothing about what a loss means.

A `Fact` says, for each tensor operand, which dimension of the result each of its dimensions is. A dimension that is
none of the result's, and one of the result's that is no operand's, must be local to a row: there the op reads or writes
several positions at once (a softmax's, what a gather picks, what a sum takes away). From that follow the tags of a
result, the tags that operands must have, and what the op is inside a program, where rows are one dimension.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch._inductor.inductor_prims  # registers ops of joint graphs
from torch.fx import Node

from ..graph.values import is_collective
from .tags import LOCAL, ONE, ROW, is_one, position, same_size, shape_of

aten = torch.ops.aten
prims = torch.ops.prims
FMA = getattr(getattr(prims, "fma", None), "default", None)  # Inductor's; a * b + c

Map = list[int | None]


class Fact(NamedTuple):
    """operands: each tensor operand with the result's dimension for each of its own, None for one that is local.

    dims: arguments that name dimensions, by position, and of which operand (an index into operands). kind: how the
    program writes it: "op" as it is, with dims moved; else a form of its own.
    """

    operands: list[tuple[Node, Map]]
    dims: dict[int, int] = {}  # noqa: RUF012  (never written)
    kind: str = "op"


class Crossing(Exception):
    """Several rows are read at once, or nothing is known of this op. node: where, if it is not the one in question."""

    def __init__(self, why: str, code: str = "crossing", node: Node | None = None) -> None:
        super().__init__(why)
        self.code, self.node = code, node


Rule = Callable[[Node], Fact]
RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    def register(fn: Rule) -> Rule:
        for target in targets:
            RULES[target] = fn
        return fn

    return register


def fact(node: Node) -> Fact:
    """The fact of a node's op. Raises Crossing where there is none."""
    target = node.target
    if target in RULES:
        return RULES[target](node)
    if isinstance(target, torch._ops.OpOverload):
        if torch.Tag.nondeterministic_seeded in target.tags:
            raise Crossing("random numbers of the size of the logits", "random")
        if (
            torch.Tag.pointwise in target.tags
            and target.namespace in ("aten", "prims")
            and not target._schema.is_mutable
        ):
            return pointwise(node)
    if is_collective(node):
        raise Crossing("processes exchange the logits", "collective")
    raise Crossing(f"nothing is known of {target}", "escape")


def bound(node: Node) -> dict[str, Any]:
    """All arguments by name, defaults included: what a rule reads is what the op's schema says."""
    schema = node.target._schema  # type: ignore[union-attr]
    values = dict(zip((a.name for a in schema.arguments), node.args))
    values.update(node.kwargs)
    return {a.name: values.get(a.name, a.default_value) for a in schema.arguments}


def rank(node: Any) -> int:
    shape = shape_of(node)
    if shape is None:
        raise Crossing("an operand is no tensor")
    return len(shape)


def at(dim: Any, rank: int) -> int:
    if not isinstance(dim, int):
        raise Crossing("a dimension that is no number")
    return dim % rank if rank else 0


def pointwise(node: Node) -> Fact:
    m = rank(node)
    found: list[tuple[Node, Map]] = []
    for arg in node.all_input_nodes:
        shape = shape_of(arg)
        if shape is None:
            if isinstance(arg.meta.get("val"), (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)):
                continue
            raise Crossing("an operand is no tensor")
        found.append((arg, [m - len(shape) + i for i in range(len(shape))]))
    return Fact(found)


rule(
    aten.where.self, aten.masked_fill.Scalar, aten.masked_fill.Tensor, prims.convert_element_type.default,
    aten._to_copy.default, aten.clone.default, aten.alias.default, aten.detach.default, aten.copy.default,
    aten.lift_fresh_copy.default, aten.clamp.default, aten.clamp.Tensor, aten.full_like.default,
    aten.zeros_like.default, aten.ones_like.default, aten.nan_to_num.default, aten.relu.default,
    aten.erf.default, aten.logical_not.default,
)(pointwise)  # fmt: skip


if FMA is not None:
    rule(FMA)(pointwise)


def _reduce(dim_name: str = "dim", keep_name: str = "keepdim", always: bool = False) -> Rule:
    def reduction(node: Node) -> Fact:
        a = bound(node)
        x, m = a[next(iter(a))], rank(a[next(iter(a))])
        dims = a.get(dim_name)
        if dims is None or (isinstance(dims, (list, tuple)) and not dims):
            raise Crossing("a reduction over everything")
        chosen = {at(d, m) for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
        keep, mapped, out = bool(a.get(keep_name, False)), [], 0
        for d in range(m):
            mapped.append(None if d in chosen else out)
            out += keep or d not in chosen
        names = list(a)
        return Fact([(x, mapped)], {names.index(dim_name): 0})

    return reduction


rule(
    aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default, aten.argmax.default, aten.argmin.default,
    aten.any.dim, aten.any.dims, aten.all.dim, aten.all.dims, aten.prod.dim_int, aten.logsumexp.default,
    aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim, aten.var.correction, aten.std.correction,
    aten.var_mean.correction, aten.max.dim, aten.min.dim, aten.median.dim, aten.mode.default, aten.kthvalue.default,
)(_reduce())  # fmt: skip


@rule(aten.sum.default, aten.mean.default, aten.max.default, aten.min.default, aten.prod.default)
def total(node: Node) -> Fact:
    raise Crossing("a reduction over everything")


def _along(dim_at: int, operands: int = 1) -> Rule:
    """Each row's positions along one dimension are read together, and as many are written."""

    def along(node: Node) -> Fact:
        a = bound(node)
        names = list(a)
        x = a[names[0]]
        m = rank(x)
        dim = at(a[names[dim_at]], m)
        mapped: Map = [None if d == dim else d for d in range(m)]
        return Fact([(a[n], mapped) for n in names[:operands]], {dim_at: 0})

    return along


rule(
    aten._softmax.default, aten._log_softmax.default, aten._safe_softmax.default, aten.cumsum.default,
    aten.cumprod.default, aten.sort.default, aten.argsort.default, aten.logcumsumexp.default, aten.cummax.default,
    aten.cummin.default,
)(_along(1))  # fmt: skip
rule(aten.sort.stable, aten.topk.default)(_along(2))
rule(aten._softmax_backward_data.default, aten._log_softmax_backward_data.default)(_along(2, operands=2))


@rule(aten.gather.default)
def gather(node: Node) -> Fact:
    a = bound(node)
    return Fact(_indexed(a, "a gather"), {1: 0})


@rule(aten.scatter.src, aten.scatter.value, aten.scatter_add.default, aten.scatter_reduce.two, aten.scatter.reduce,
      aten.scatter.value_reduce)  # fmt: skip
def scatter(node: Node) -> Fact:
    a = bound(node)
    found = _indexed(a, "a scatter")
    if isinstance(a.get("src"), Node):
        if not all(map(same_size, shape_of(a["src"]) or (), shape_of(a["index"]) or ())):
            raise Crossing("a scatter of a part of its source")
        found.append((a["src"], found[0][1]))
    return Fact(found, {1: 0})


def _indexed(a: Any, what: str) -> list[tuple[Any, Map]]:
    """The operands that are there alike of an op that looks rows up along a dimension by an index."""
    m = rank(a["self"])
    if m == 0 or rank(a["index"]) != m:
        raise Crossing(f"{what} of one number")
    dim = at(a["dim"], m)
    _same_but(a["self"], a["index"], dim)
    mapped: Map = [None if d == dim else d for d in range(m)]
    return [(a["self"], mapped), (a["index"], mapped)]


def _same_but(a: Node, b: Node, dim: int) -> None:
    """gather and scatter take indices of fewer rows, and then leave the other rows out."""
    for d, (p, q) in enumerate(zip(shape_of(a) or (), shape_of(b) or ())):
        if d != dim and not same_size(p, q):
            raise Crossing("an index of another number of rows", "rows-differ")


def _cut(dims_kept: bool) -> Rule:
    def cut(node: Node) -> Fact:
        a = bound(node)
        x, m = a["self"], rank(a["self"])
        if node.target is aten.slice.Tensor and all(map(same_size, shape_of(x) or (), shape_of(node) or ())):
            return view(node)  # of everything, whatever that dimension is
        dim = at(a["dim"], m)
        mapped: Map = [None if d == dim else d if dims_kept or d < dim else d - 1 for d in range(m)]
        chosen: list[tuple[Node, Map]] = [(a["index"], [None])] if node.target is aten.index_select.default else []
        return Fact([(x, mapped), *chosen], {list(a).index("dim"): 0})

    return cut


rule(aten.slice.Tensor, aten.split_with_sizes.default, aten.split.Tensor, aten.index_select.default)(_cut(True))
rule(aten.select.int, aten.unbind.int)(_cut(False))


@rule(aten.slice_scatter.default)
def slice_scatter(node: Node) -> Fact:
    a = bound(node)
    m = rank(a["self"])
    dim = at(a["dim"], m)
    mapped: Map = [None if d == dim else d for d in range(m)]
    return Fact([(a["self"], mapped), (a["src"], mapped)], {2: 0})


@rule(aten.select_scatter.default)
def select_scatter(node: Node) -> Fact:
    a = bound(node)
    m = rank(a["self"])
    dim = at(a["dim"], m)
    mapped: Map = [None if d == dim else d for d in range(m)]
    source: Map = [d if d < dim else d + 1 for d in range(m - 1)]
    return Fact([(a["self"], mapped), (a["src"], source)], {2: 0})


@rule(aten.cat.default)
def cat(node: Node) -> Fact:
    tensors = node.args[0]
    m = rank(node)
    dim = at(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0), m)
    if any(rank(t) != m for t in tensors):  # type: ignore[union-attr]
        raise Crossing("a cat with an empty tensor")
    mapped: Map = [None if d == dim else d for d in range(m)]
    return Fact([(t, mapped) for t in dict.fromkeys(tensors)], {1: 0})  # type: ignore[arg-type]


@rule(aten.flip.default, prims.rev.default)
def flip(node: Node) -> Fact:
    a = bound(node)
    x, m = node.args[0], rank(node.args[0])
    dims = {at(d, m) for d in list(a.values())[1]}
    return Fact([(x, [None if d in dims else d for d in range(m)])], {1: 0})  # type: ignore[list-item]


@rule(aten.constant_pad_nd.default)
def pad(node: Node) -> Fact:
    m = rank(node)
    amounts = node.args[1]
    touched = {m - 1 - i // 2 for i, p in enumerate(amounts) if p != 0}  # type: ignore[arg-type]
    return Fact([(node.args[0], [None if d in touched else d for d in range(m)])], kind="pad")  # type: ignore[list-item]


@rule(aten.permute.default)
def permute(node: Node) -> Fact:
    x, order = node.args[0], node.args[1]
    m = rank(x)
    where = [at(d, m) for d in order]  # type: ignore[union-attr]
    return Fact([(x, [where.index(d) for d in range(m)])], kind="permute")  # type: ignore[list-item]


@rule(aten.transpose.int)
def transpose(node: Node) -> Fact:
    x, m = node.args[0], rank(node.args[0])
    order = list(range(m))
    p, q = at(node.args[1], m), at(node.args[2], m)
    order[p], order[q] = order[q], order[p]
    return Fact([(x, order)], kind="permute")  # type: ignore[list-item]


@rule(aten.t.default)
def t(node: Node) -> Fact:
    m = rank(node.args[0])
    return Fact([(node.args[0], list(reversed(range(m))))], kind="permute")  # type: ignore[list-item]


@rule(aten.expand.default)
def expand(node: Node) -> Fact:
    x, m = node.args[0], rank(node)
    before, after = shape_of(x) or (), shape_of(node) or ()
    ahead = m - len(before)
    return Fact([(x, [ahead + d for d in range(len(before))])], kind="expand") if after is not None else Fact([])  # type: ignore[list-item]


@rule(aten.unsqueeze.default)
def unsqueeze(node: Node) -> Fact:
    x, m = node.args[0], rank(node)
    dim = at(node.args[1], m)
    return Fact([(x, [d if d < dim else d + 1 for d in range(m - 1)])], kind="reshape")  # type: ignore[list-item]


@rule(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
def squeeze(node: Node) -> Fact:
    x = node.args[0]
    shape = shape_of(x) or ()
    dims = node.args[1] if len(node.args) > 1 else list(range(len(shape)))
    gone = {at(d, len(shape)) for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
    gone = {d for d in gone if is_one(shape[d])}
    kept = [d for d in range(len(shape)) if d not in gone]
    if len(kept) != rank(node):
        raise Crossing("a squeeze of a size that is not known")
    return Fact([(x, [None if d in gone else kept.index(d) for d in range(len(shape))])], kind="reshape")  # type: ignore[list-item]


VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


@rule(*VIEWS)
def view(node: Node) -> Fact:
    return Fact([(node.args[0], [])], kind="view")  # type: ignore[list-item]


def stacked(node: Node) -> tuple[list[Node], int] | None:
    """What torch.stack is of, and along which dimension: it comes as a view of a cat, in which rows would meet rows."""
    if node.target not in VIEWS:
        return None
    cat = node.args[0]
    if not isinstance(cat, Node) or cat.target is not aten.cat.default:
        return None
    tensors, shape = list(cat.args[0]), shape_of(node) or ()  # type: ignore[arg-type]
    dim = at(bound(cat)["dim"], rank(cat))
    one = shape[:dim] + shape[dim + 1 :]
    alike = all(len(p) == len(one) and all(map(same_size, p, one)) for p in (shape_of(t) or () for t in tensors))
    whole = len(tensors) > 1 and len(shape) > dim and shape[dim] == len(tensors)
    return (tensors, dim) if whole and alike else None


def stack(node: Node) -> Fact:
    """Of a view that is one."""
    tensors, dim = stacked(node)  # type: ignore[misc]
    dims: Map = [d for d in range(rank(node)) if d != dim]
    return Fact([(t, dims) for t in dict.fromkeys(tensors)], kind="stack")


@rule(aten.full.default, aten.scalar_tensor.default, aten.zeros.default, aten.ones.default, aten.empty.memory_format)
def full(node: Node) -> Fact:
    return Fact([], kind="full")


def filled_with(node: Node) -> Any:
    """The number that a tensor of one number is made of. What nobody wrote may be any: zero."""
    if node.target is aten.full.default:
        return bound(node)["fill_value"]
    return node.args[0] if node.target is aten.scalar_tensor.default else int(node.target is aten.ones.default)


@rule(aten.new_empty_strided.default, aten.new_empty.default, aten.new_zeros.default, aten.new_full.default,
      aten.empty_like.default)  # fmt: skip
def new(node: Node) -> Fact:
    """A tensor of which only shape and dtype follow from the operand."""
    x = node.args[0]
    before, after = shape_of(x) or (), shape_of(node) or ()
    if len(before) != len(after) or not all(map(same_size, before, after)):
        raise Crossing("a new tensor of another shape")
    return Fact([(x, list(range(len(after))))], kind="new")  # type: ignore[list-item]


@rule(operator.getitem)
def getitem(node: Node) -> Fact:
    source = node.args[0]
    several = source.meta.get("val")  # type: ignore[union-attr]
    if not isinstance(several, (tuple, list)):
        raise Crossing("an item of what is no list of tensors")
    return Fact([(source, [])], kind="getitem")  # type: ignore[list-item]


def result_tags(node: Node, found: Fact, known: dict[Node, str]) -> str:
    """Tags of a result from those of the operands that have some. Raises Crossing where rows meet."""
    shape = shape_of(node) or ()
    out = [ONE if is_one(s) else LOCAL for s in shape]
    mapped: set[int] = set()
    for arg, dims in found.operands:
        sizes = shape_of(arg) or ()
        for d, k in enumerate(dims):
            tag = known[arg][d] if arg in known else None
            if k is None:
                if tag == ROW:
                    raise Crossing("several rows are read at once")
                continue
            if is_one(sizes[d]) and not is_one(shape[k]):
                continue
            if tag == ROW:
                if not same_size(sizes[d], shape[k]) or (k in mapped and out[k] != ROW):
                    raise Crossing("rows meet classes")
                out[k] = ROW
            elif tag == LOCAL and out[k] == ROW:
                raise Crossing("rows meet classes")
            if tag is not None:
                mapped.add(k)
    return "".join(out)


def operand_tags(node: Node, found: Fact, tags: str) -> list[tuple[Node, str]]:
    """Tags that the operands must have where the result has `tags`. Raises Crossing where that can't be."""
    wanted = []
    covered: set[int] = set()
    for arg, dims in found.operands:
        sizes = shape_of(arg) or ()
        here = []
        for d, k in enumerate(dims):
            if is_one(sizes[d]):
                here.append(ONE)
            elif k is None:
                here.append(LOCAL)
            else:
                here.append(tags[k])
                covered.add(k)
        wanted.append((arg, "".join(here)))
    if found.kind not in ("full", "expand") and any(t == ROW and k not in covered for k, t in enumerate(tags)):
        raise Crossing("several rows are read at once")
    return wanted


def moved_dims(found: Fact, node: Node, wanted: list[tuple[Node, str]]) -> dict[int, Any]:
    """The arguments that name dimensions, as they are in a program."""
    out: dict[int, Any] = {}
    names = list(bound(node)) if isinstance(node.target, torch._ops.OpOverload) else []
    for index, operand in found.dims.items():
        arg, tags = wanted[operand]
        value = node.args[index] if index < len(node.args) else bound(node)[names[index]]
        m = rank(arg)
        dims = [at(d, m) for d in (value if isinstance(value, (list, tuple)) else [value])]
        if any(tags[d] == ROW for d in dims):
            raise Crossing("several rows are read at once")
        new = [position(tags, d) for d in dims]
        out[index] = new if isinstance(value, (list, tuple)) else new[0]
    return out
