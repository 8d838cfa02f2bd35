"""What a program's values are, of some rows: shapes, dtypes, which of them share memory. Nothing is computed here."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from ..spec.program import Program, Ref, Rows, Sym, parse, resolve


class Meta(NamedTuple):
    """An input's shape behind the rows (of kind "whole": all of it), strides and dtype."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def meta(t: Tensor, kind: str) -> Meta:
    return Meta(tuple(t.shape if kind == "whole" else t.shape[1:]), tuple(t.stride()), t.dtype)


def fill(value: Any, values: Sequence[Any], n: Any, sizes: Sequence[Any]) -> Any:
    """A step's argument with what it refers to put in."""
    if isinstance(value, Ref):
        return values[value.index]
    return _mapped(value, lambda v: fill(v, values, n, sizes), n, sizes)


def _mapped(value: Any, change: Callable[[Any], Any], n: Any, sizes: Sequence[Any]) -> Any:
    if isinstance(value, Rows):
        return n
    if isinstance(value, Sym):
        return sizes[value.index]
    return [change(v) for v in value] if isinstance(value, (list, tuple)) else value


def settled(value: Any, n: int, sizes: Sequence[int]) -> Any:
    """A step's argument in which only Refs are left open."""
    if isinstance(value, dict):
        return {k: settled(v, n, sizes) for k, v in value.items()}
    return value if isinstance(value, Ref) else _mapped(value, lambda v: settled(v, n, sizes), n, sizes)


def refs(value: Any) -> list[int]:
    """The values that a step's arguments refer to."""
    if isinstance(value, Ref):
        return [value.index]
    if isinstance(value, (list, tuple)) and not isinstance(value, (Rows, Sym)):
        return [r for v in value for r in refs(v)]
    return list(refs(list(value.values()))) if isinstance(value, dict) else []


@functools.lru_cache(maxsize=1024)
def takes_device(op: Any) -> bool:
    """Does an op make a tensor out of nothing, on a device that programs do not name?"""
    return op is not operator.getitem and any(a.name == "device" for a in op._schema.arguments)


def call(step: Any, values: Sequence[Any], n: Any, sizes: Sequence[Any], device: torch.device) -> Any:
    op = resolve(step.op)
    kwargs = {k: fill(v, values, n, sizes) for k, v in step.kwargs.items()}
    if takes_device(op):
        kwargs["device"] = device
    return op(*fill(step.args, values, n, sizes), **kwargs)


def evaluate(program: Program, inputs: Sequence[Tensor], n: int, sizes: Sequence[int]) -> list[Tensor]:
    """The values of a program's results for n rows, one op after another: what every faster way must give, too."""
    values: list[Any] = list(inputs)
    for step in program.steps:
        values.append(call(step, values, n, sizes, inputs[0].device))
    return [values[r.value.index] for r in program.results]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums over chunks are kept in."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def owner(value: Any) -> int | None:
    """The memory that a fake tensor lies in."""
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


@functools.lru_cache(maxsize=256)
def propagate(text: str, n: int, inputs: tuple[Meta, ...], sizes: tuple[int, ...], device: torch.device) -> list[Any]:
    """A fake of each value, inputs first, for n rows. Values that share memory share a storage (see owner)."""
    program = parse(text)
    with torch.utils._python_dispatch._disable_current_modes(), FakeTensorMode(), torch.no_grad():
        found: list[Any] = []
        for kind, m in zip(program.inputs, inputs):
            shape = m.shape if kind == "whole" else (n, *m.shape)
            found.append(torch.empty_strided(shape, m.stride, dtype=m.dtype, device=device))
        for step in program.steps:
            found.append(call(step, found, n, sizes, device))
    return found


@functools.lru_cache(maxsize=256)
def used(text: str) -> frozenset[int]:
    """The inputs that a step or a result reads: a factor's other half is none of the program's business."""
    program = parse(text)
    read = {i for step in program.steps for i in (*refs(step.args), *refs(step.kwargs))}
    return frozenset(i for i in read | {r.value.index for r in program.results} if i < len(program.inputs))


@functools.lru_cache(maxsize=256)
def places(text: str, inputs: tuple[Meta, ...], sizes: tuple[int, ...], device: torch.device) -> dict[int, int | None]:
    """For each value that is a factor of dX or dW, the logits input whose memory it takes, if one is of its kind.

    No input that a result is, or shares memory with, is overwritten.
    """
    program, values = parse(text), propagate(text, 2, inputs, sizes, device)
    kept = {owner(values[r.value.index]) for r in program.results}
    factors = list(dict.fromkeys(r.value.index for r in program.results if r.kind in ("dx", "dw")))
    kinds = [i for i, kind in enumerate(program.inputs) if kind == "logits"]
    free = [i for i in kinds if owner(values[i]) not in kept]
    found: dict[int, int | None] = {}
    for index in factors:
        value, place = values[index], index if index in kinds else None
        for i in free if place is None else ():
            if values[i].dtype == value.dtype and values[i].shape == value.shape:
                place = i
                free.remove(i)
                break
        found[index] = place
    return found
