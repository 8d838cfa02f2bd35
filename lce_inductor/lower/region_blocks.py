"""A program step by step over a block of rows, with little memory: what is not needed any more is written over.

Steps of few values a row are called as they are. A step of many writes into memory that an earlier one has left: the
block's own logits, once nothing reads them, an operand of its own where the op is elementwise, or a buffer that all
blocks of a call share. New memory for each step would cost more than its arithmetic, in page faults.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..spec.program import Program, Ref, Step, parse, resolve
from .region_values import Meta, fill, owner, places, propagate, refs, settled, takes_device

aten = torch.ops.aten
prims = torch.ops.prims

# Up to so many values a row, a step is called as it is.
_FEW = 256
# The same op with a number wrapped as a tensor has an implementation with `out`.
_OF_NUMBERS = {
    aten.add.Scalar: aten.add.out,
    aten.sub.Scalar: aten.sub.out,
    aten.mul.Scalar: aten.mul.out,
    aten.div.Scalar: aten.div.out,
}
# Not elementwise, but from a copy of the first operand on they work in place.
_ON_A_COPY = (aten.scatter.value, aten.scatter.src, aten.scatter_add.default, aten.masked_fill.Scalar)
_CONSTANT = {aten.zeros_like.default: 0, aten.ones_like.default: 1}


class _Move(NamedTuple):
    """One step: `write` fills the memory `slot`; without, `op` makes its own.

    args, kwargs: as the op takes them, but for values, which are there as Ref. nested: some are inside of lists.
    done: values that nobody needs behind it.
    """

    op: Callable[..., Any]
    args: list[Any]
    kwargs: dict[str, Any]
    nested: bool
    slot: int
    write: Callable[..., Any] | None
    done: tuple[int, ...]


class _Plan(NamedTuple):
    """slots: shape and dtype of each; the first are the logits' own. copied: results in memory that a factor takes."""

    program: Program
    moves: tuple[_Move, ...]
    slots: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    places: dict[int, int | None]
    copied: tuple[int, ...]


def run(
    text: str, n: int, inputs: Sequence[Tensor], metas: tuple[Meta, ...], sizes: tuple[int, ...], memory: list[Tensor]
) -> list[Tensor]:
    """The values of a program's results for n rows; those that have a place among the logits (see places) lie there.

    Args:
        inputs: in the program's order. The logits among them are written over.
        memory: [] at first; what a call for as many rows may use again.
    """
    device = inputs[0].device
    plan = _planned(text, n, metas, sizes, device)
    logits = [t for kind, t in zip(plan.program.inputs, inputs) if kind == "logits"]
    if not memory:
        memory += [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in plan.slots[len(logits) :]]
    slots, values = [*logits, *memory], list[Any](inputs)
    # A block takes microseconds a step: no more is done here than must be.
    for op, args, kwargs, nested, slot, write, done in plan.moves:
        if nested:
            args, kwargs = fill(args, values, n, sizes), {k: fill(v, values, n, sizes) for k, v in kwargs.items()}
        else:
            args = [values[a.index] if type(a) is Ref else a for a in args]
        if write is None:
            values.append(op(*args, **kwargs))
        else:
            write(slots[slot], args, kwargs)
            values.append(slots[slot])
        for index in done:
            values[index] = None
    for index in plan.copied:
        values[index] = values[index].clone()
    for index, place in plan.places.items():
        if place is not None:
            values[index] = _brought(values[index], inputs[place])
    return [values[r.value.index] for r in plan.program.results]


def _brought(value: Tensor, home: Tensor) -> Tensor:
    """The value, in the memory `home`."""
    if value.untyped_storage().data_ptr() == home.untyped_storage().data_ptr():
        if (value.data_ptr(), value.stride()) == (home.data_ptr(), home.stride()):
            return home
        value = value.clone()
    return home.copy_(value)


@functools.lru_cache(maxsize=256)
def _planned(text: str, n: int, inputs: tuple[Meta, ...], sizes: tuple[int, ...], device: torch.device) -> _Plan:
    program, fakes = parse(text), propagate(text, n, inputs, sizes, device)
    place = places(text, inputs, sizes, device)
    last = _last_uses(program, fakes)
    first = len(program.inputs)
    logits = [i for i, kind in enumerate(program.inputs) if kind == "logits"]
    slots = [(tuple(fakes[i].shape), fakes[i].dtype) for i in logits]
    slot_of = {owner(fakes[i]): k for k, i in enumerate(logits)}
    # What lies in the end in which of the logits' own memories; nothing else that lasts may lie there.
    home = {logits.index(at): owner(fakes[index]) for index, at in place.items() if at is not None}
    free: list[int] = []
    moves: list[_Move] = []
    for index, (step, fake) in enumerate(zip(program.steps, fakes[first:]), first):
        dying = {memory for memory, at in last.items() if at == index}
        mine, slot = owner(fake), -1
        makes = _is_large(fake, n) and all(owner(v) != mine for v in fakes[:index])
        write = _writer(step) if makes else None
        if write is not None:
            fitting = [
                s
                for s in free
                if slots[s] == (tuple(fake.shape), fake.dtype)
                and (s >= len(logits) or fakes[logits[s]].is_contiguous())
                and (mine in last or home.get(s, mine) == mine)
            ]
            fitting[:0] = [
                s
                for s in _own(step, fake, fakes, dying, slot_of)
                if slots[s] == (tuple(fake.shape), fake.dtype) and (mine in last or home.get(s, mine) == mine)
            ]
            at_home = [s for s in fitting if home.get(s) == mine]
            slot = next(iter(at_home + fitting), len(slots))
            if slot == len(slots):
                slots.append((tuple(fake.shape), fake.dtype))
            slot_of[mine] = slot
        free = [s for s in free if s != slot]
        free += [slot_of[m] for m in dying if m in slot_of and slot_of[m] != slot]
        done = tuple(i for i, v in enumerate(fakes[: index + 1]) if _owners(v) and set(_owners(v)) <= dying)
        moves.append(_move(step, n, sizes, device, slot, write, done))
    taken = {owner(fakes[at]) for index, at in place.items() if at not in (None, index)}
    rows = {r.value.index for r in program.results if r.kind in ("row", "sum")}
    copied = tuple(i for i in rows if owner(fakes[i]) in taken)
    return _Plan(program, tuple(moves), tuple(slots), place, copied)


def _move(
    step: Step, n: int, sizes: tuple[int, ...], device: torch.device, slot: int, write: Any, done: tuple[int, ...]
) -> _Move:
    op = resolve(step.op)
    args, kwargs = (settled(what, n, sizes) for what in (list(step.args), step.kwargs))
    if takes_device(op):
        kwargs["device"] = device
    nested = bool(refs(kwargs)) or any(refs(a) for a in args if not isinstance(a, Ref))
    return _Move(op, args, kwargs, nested, slot, write, done)


def _last_uses(program: Program, fakes: list[Any]) -> dict[int, int]:
    """For each memory, the index of the step that is the last to read it. That of a result is read behind all."""
    last: dict[int, int] = {}
    for index, step in enumerate(program.steps, len(program.inputs)):
        for i in (index, *refs(step.args), *refs(step.kwargs)):
            last.update(dict.fromkeys(_owners(fakes[i]), index))
    for result in program.results:
        for memory in _owners(fakes[result.value.index]):
            last.pop(memory, None)
    return last


def _owners(value: Any) -> list[int]:
    found = [owner(v) for v in value] if isinstance(value, (list, tuple)) else [owner(value)]
    return [f for f in found if f is not None]


def _is_large(fake: Any, n: int) -> bool:
    return isinstance(fake, Tensor) and fake.numel() > _FEW * n and fake.is_contiguous()


def _own(step: Step, fake: Tensor, fakes: list[Any], dying: set[int], slot_of: dict[Any, int]) -> list[int]:
    """The memory of operands that the step may write over while it reads them."""
    op, read = resolve(step.op), refs(step.args) + refs(step.kwargs)
    on_a_copy = op in _ON_A_COPY
    if not on_a_copy and torch.Tag.pointwise not in op.tags and op is not aten.where.self:
        return []

    def alike(i: int) -> bool:
        value = fakes[i]
        return (value.shape, value.dtype, value.stride()) == (fake.shape, fake.dtype, fake.stride())

    found = []
    for i in read[:1] if on_a_copy else read:
        memory = owner(fakes[i])
        shared = [j for j in read if owner(fakes[j]) == memory]
        if memory in dying and memory in slot_of and all(alike(j) for j in shared) and not (on_a_copy and shared[1:]):
            found.append(slot_of[memory])
    return found


# -- how an op writes into given memory


@functools.lru_cache(maxsize=1024)
def _out_of(op: Any) -> Any:
    """The overload that is this op with a result given, written by hand: those made from the op itself call it."""
    packet = op.overloadpacket
    wanted = [(a.name, str(a.type)) for a in op._schema.arguments]
    for name in packet.overloads():
        other = getattr(packet, name)
        arguments = other._schema.arguments
        if [a.is_out for a in arguments].count(True) != 1 or torch.Tag.generated in other.tags:
            continue
        if [(a.name, str(a.type)) for a in arguments if not a.is_out] == wanted:
            return other, next(a.name for a in arguments if a.is_out)
    return None


@functools.lru_cache(maxsize=1024)
def _in_place_of(op: Any) -> Any:
    """The overload that changes the first operand."""
    packet = getattr(aten, op._schema.name.split("::")[1] + "_", None)
    other = getattr(packet, op._overloadname, None)
    if other is None or op.namespace != "aten":
        return None
    same = [(a.name, str(a.type)) for a in other._schema.arguments] == [
        (a.name, str(a.type)) for a in op._schema.arguments
    ]
    return other if same else None


def _writer(step: Step) -> Callable[..., Any] | None:
    """write(out, args, kwargs) that leaves the step's result in `out`; None if there is no way to."""
    op = resolve(step.op)
    if not isinstance(op, torch._ops.OpOverload) or len(op._schema.returns) != 1:
        return None
    if op is prims.convert_element_type.default:
        return _converted
    if op in (aten.full.default, aten.full_like.default):
        return _filled
    if op in _CONSTANT:
        return functools.partial(_constant, _CONSTANT[op])
    if op in _ON_A_COPY:
        return functools.partial(_changed, _in_place_of(op)) if _in_place_of(op) is not None else None
    if op in _OF_NUMBERS and not step.kwargs and len(step.args) == 2:
        return functools.partial(_given, _OF_NUMBERS[op], "out")
    if op.namespace == "aten" and (found := _out_of(op)) is not None:
        return functools.partial(_given, *found)
    return None


def _given(op: Any, name: str, out: Tensor, args: list[Any], kwargs: dict[str, Any]) -> None:
    op(*args, **kwargs, **{name: out})


def _converted(out: Tensor, args: list[Any], kwargs: dict[str, Any]) -> None:
    out.copy_(args[0])


def _filled(out: Tensor, args: list[Any], kwargs: dict[str, Any]) -> None:
    out.fill_(args[1])


def _constant(value: int, out: Tensor, args: list[Any], kwargs: dict[str, Any]) -> None:
    out.fill_(value)


def _changed(op: Any, out: Tensor, args: list[Any], kwargs: dict[str, Any]) -> None:
    if args[0] is not out:
        out.copy_(args[0])
    op(out, *args[1:], **kwargs)
