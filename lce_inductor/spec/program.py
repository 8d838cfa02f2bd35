"""A region's program: what is done with the logits of some rows, as data.

It travels as text in an op's schema, so that every cache knows it, and is parsed into a fixed list of ATen ops: nothing
in it is ever evaluated as code. All rows are one dimension, the first, of a size that is not known before a chunk
is; sizes that the graph knows by a symbol come as numbers beside the text.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

_LONGEST = 1 << 20
_OTHERS = ("getitem",)
# Beside all pointwise ops. A fact in regions/aten_ops.py says what each does with dimensions.
_OPS = frozenset(
    """
    aten._log_softmax.default aten._log_softmax_backward_data.default aten._safe_softmax.default aten._softmax.default
    aten._softmax_backward_data.default aten._unsafe_index.Tensor aten._unsafe_index_put.default aten.all.dim
    aten.all.dims aten.amax.default aten.amin.default aten.any.dim aten.any.dims aten.argmax.default
    aten.argmin.default aten.argsort.default aten.cat.default aten.constant_pad_nd.default aten.copy.default
    aten.cummax.default aten.cummin.default aten.cumprod.default aten.cumsum.default aten.expand.default
    aten.flip.default aten.full.default aten.full_like.default aten.gather.default aten.index.Tensor
    aten.index_put.default aten.index_select.default aten.kthvalue.default aten.linalg_vector_norm.default
    aten.logcumsumexp.default aten.logsumexp.default aten.masked_fill.Tensor aten.max.dim aten.mean.dim
    aten.median.dim aten.min.dim aten.mode.default aten.norm.ScalarOpt_dim aten.ones_like.default aten.permute.default
    aten.prod.dim_int aten.reshape.default aten.scatter.reduce aten.scatter.src aten.scatter.value
    aten.scatter.value_reduce aten.scatter_add.default aten.scatter_reduce.two aten.select.int
    aten.select_scatter.default aten.slice.Tensor aten.slice_scatter.default aten.sort.default aten.sort.stable
    aten.split.Tensor aten.split_with_sizes.default aten.squeeze.dim aten.std.correction aten.sum.dim_IntList
    aten.topk.default aten.unbind.int aten.unsqueeze.default aten.var.correction aten.var_mean.correction
    aten.zeros_like.default aten.view.default aten.squeeze.default aten.squeeze.dims aten.t.default
    aten.transpose.int prims.rev.default
    """.split()
)
KINDS = ("logits", "rows", "whole")
RESULTS = ("row", "sum", "dx", "dw")


class Ref(NamedTuple):
    """A value of the program: an input, then the steps, in order."""

    index: int  # type: ignore[assignment]


class Rows(NamedTuple):
    """The number of rows of a chunk."""


class Sym(NamedTuple):
    """A size that comes beside the text, by its place there."""

    index: int  # type: ignore[assignment]


class Step(NamedTuple):
    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Result(NamedTuple):
    """What becomes of a value [n, ...] over all chunks.

    kind: "row" [N, *sizes], side by side; "sum" [*sizes], added up over rows; "dx" value @ matrices[other] [N, H], side
    by side; "dw" value^T @ rows[other] [V, H], added up. sizes: behind the rows; of a "sum", all.
    """

    kind: str
    value: Ref
    dtype: torch.dtype
    sizes: tuple[Any, ...]
    other: int = -1


@dataclasses.dataclass(frozen=True)
class Program:
    inputs: tuple[str, ...]  # kinds, the k-th of a kind is the k-th tensor of that list
    steps: tuple[Step, ...]
    results: tuple[Result, ...]

    def text(self) -> str:
        data = [
            list(self.inputs),
            [[s.op, _out(s.args), {k: _out(v) for k, v in s.kwargs.items()}] for s in self.steps],
            [[r.kind, r.value.index, _dtype_name(r.dtype), _out(r.sizes), r.other] for r in self.results],
        ]
        return json.dumps(data, separators=(",", ":"))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _out(value: Any) -> Any:
    if isinstance(value, Ref):
        return {"v": value.index}
    if isinstance(value, Rows):
        return {"n": 0}
    if isinstance(value, Sym):
        return {"s": value.index}
    if isinstance(value, (list, tuple)):
        return [_out(v) for v in value]
    if isinstance(value, torch.dtype):
        return {"d": _dtype_name(value)}
    if isinstance(value, float) and not math.isfinite(value):
        return {"f": repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"a program can't hold {value!r}")


def _in(value: Any, known: int) -> Any:
    if isinstance(value, list):
        return [_in(v, known) for v in value]
    if not isinstance(value, dict):
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise ValueError(f"unknown value {value!r}")
    if len(value) != 1:
        raise ValueError(f"unknown value {value!r}")
    ((kind, what),) = value.items()
    if kind == "v" and isinstance(what, int) and 0 <= what < known:
        return Ref(what)
    if kind == "n":
        return Rows()
    if kind == "s" and isinstance(what, int) and what >= 0:
        return Sym(what)
    if kind == "d":
        return _dtype(what)
    if kind == "f" and what in ("inf", "-inf", "nan"):
        return float(what)
    raise ValueError(f"unknown value {value!r}")


def _dtype(name: Any) -> torch.dtype:
    found = getattr(torch, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not isinstance(found, torch.dtype):
        raise ValueError(f"unknown dtype {name!r}")
    return found


def refs_in(value: Any) -> list[Ref]:
    """The values that an argument refers to."""
    if isinstance(value, Ref):
        return [value]
    if isinstance(value, (Rows, Sym)):
        return []
    return [r for v in value for r in refs_in(v)] if isinstance(value, (list, tuple)) else []


def mapped(value: Any, change: Callable[[Ref], Ref]) -> Any:
    """An argument with what it refers to changed."""
    if isinstance(value, Ref):
        return change(value)
    if isinstance(value, (Rows, Sym)):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(mapped(v, change) for v in value)
    return value


def name_of(target: Any) -> str:
    """The name of an op in a program. Raises ValueError for one that no program may hold."""
    if not isinstance(target, torch._ops.OpOverload):
        raise ValueError(f"a program can't call {target}")
    name = str(target)
    if _resolve(name) is not target:
        raise ValueError(f"a program can't call {target}")
    return name


@functools.lru_cache(maxsize=1024)
def _resolve(name: str) -> Any:
    """The op of that name, if it is one of those that programs may hold."""
    namespace, *rest = name.split(".")
    if namespace not in ("aten", "prims") or len(rest) != 2 or not all(part.isidentifier() for part in rest):
        raise ValueError(f"unknown op {name!r}")
    packet = getattr(getattr(torch.ops, namespace), rest[0], None)
    op = getattr(packet, rest[1], None) if packet is not None else None
    if not isinstance(op, torch._ops.OpOverload):
        raise ValueError(f"unknown op {name!r}")
    pure = not op._schema.is_mutable and torch.Tag.nondeterministic_seeded not in op.tags
    if not pure or not (name in _OPS or torch.Tag.pointwise in op.tags):
        raise ValueError(f"op {name!r} is none that a program may hold")
    return op


def resolve(name: str) -> Any:
    import operator

    return operator.getitem if name in _OTHERS else _resolve(name)


@functools.lru_cache(maxsize=256)
def parse(text: str) -> Program:
    """The program of a text.

    Raises:
        ValueError: too long, malformed, or an op that no program may hold.
    """
    if len(text) > _LONGEST:
        raise ValueError(f"a program of {len(text)} characters: at most {_LONGEST} are allowed")
    try:
        inputs, steps, results = json.loads(text)
        if not all(kind in KINDS for kind in inputs):
            raise ValueError(f"unknown kind of input in {inputs!r}")
        made = []
        for i, (op, args, kwargs) in enumerate(steps):
            known = len(inputs) + i
            resolve(op)
            made.append(Step(op, tuple(_in(args, known)), {str(k): _in(v, known) for k, v in kwargs.items()}))
        known = len(inputs) + len(steps)
        out = []
        for kind, value, dtype, sizes, other in results:
            if kind not in RESULTS or not isinstance(other, int) or not (isinstance(value, int) and 0 <= value < known):
                raise ValueError(f"unknown result {kind!r} {value!r}")
            out.append(Result(kind, Ref(value), _dtype(dtype), tuple(_in(sizes, 0)), other))
    except (TypeError, AttributeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"malformed program: {error}") from None
    return Program(tuple(inputs), tuple(made), tuple(out))


def only(program: Program, results: Sequence[int]) -> Program:
    """The program of some of its results, in this order, with the steps that these need. It reads the same inputs."""
    first = len(program.inputs)
    needed: set[int] = set()
    todo = [program.results[i].value for i in results]
    while todo:
        ref = todo.pop()
        if ref.index >= first and ref.index not in needed:
            needed.add(ref.index)
            step = program.steps[ref.index - first]
            todo += refs_in((step.args, tuple(step.kwargs.values())))
    place = {k: first + i for i, k in enumerate(sorted(needed))}

    def final(ref: Ref) -> Ref:
        return Ref(place.get(ref.index, ref.index))

    steps = [
        Step(s.op, mapped(s.args, final), {k: mapped(v, final) for k, v in s.kwargs.items()})
        for i, s in enumerate(program.steps, first)
        if i in needed
    ]
    kept = (program.results[i] for i in results)
    return Program(program.inputs, tuple(steps), tuple(r._replace(value=final(r.value)) for r in kept))
