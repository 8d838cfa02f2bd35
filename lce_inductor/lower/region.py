"""A row region in chunks: logits into memory that the chunks share, the program over them, then dX and dW.

Logits that make no room for a factor of dX or dW, a teacher's, are there for one block of a chunk at a time.

What devices do in their own way, the products and the program over a chunk, is in region_cpu and region_cuda. No
synchronisation with the host and no allocation that depends on values.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from ..spec.sizes import round_up
from . import region_cpu, region_cuda
from .plan import policy_of
from .products import as_factor
from .region_arguments import Arguments, Cut, check
from .region_compiled import Key
from .region_steps import Chunk
from .region_tidy import tidied
from .region_values import Meta, meta, places, propagate, used, wide


def run(a: Arguments) -> list[Tensor]:
    """The results, each of its own memory."""
    check(a)
    with torch.no_grad():
        return _run(a, device_of(a)).finished()  # the chunks' memory is free by then


def fits(a: Arguments) -> None:
    """Raise what `run` would raise for arguments like these, fake ones with sizes that are numbers: every step of the
    program is taken for two rows, computing nothing, and its results are compared with what it says of them."""
    check(a)
    if not a.N:
        return
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        inputs = _metas(a, _inputs(a, _logits(a, [2] * len(a.xs)), slice(0, 2)))
    values = propagate(a.text, 2, inputs, a.sizes, a.first.device)
    for k, result in enumerate(a.program.results):
        found = list(values[result.value.index].shape)
        if result.kind in ("row", "sum"):
            wanted = [2, *a.size(result.sizes)]
            same = torch.broadcast_shapes(found, wanted) == tuple(wanted)
        else:  # a factor of a product
            wanted = [2, a.matrices[result.other].shape[0] if result.kind == "dx" else a.size(result.sizes)[0]]
            same = found == wanted
        if not same:
            raise RuntimeError(
                f"program: of two rows, result {k} of kind {result.kind!r} must be {wanted}, got {found}"
            )


def device_of(a: Arguments) -> ModuleType:
    return region_cuda if a.first.is_cuda else region_cpu


def cut_of(a: Arguments) -> Cut:
    """The pieces that a call with arguments like these takes, fake ones with sizes that are numbers."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        return a.cut(_held(a))


def _held(a: Arguments) -> list[bool]:
    """Of which heads' logits is the memory needed until dX and dW? Where that is a question at all."""
    if len(a.xs) < 2 or not any(r.kind in ("dx", "dw") for r in a.program.results) or not a.N:
        return [True] * len(a.xs)
    inputs = _metas(a, _inputs(a, _logits(a, [2] * len(a.xs)), slice(0, 2)))
    taken = places(a.text, inputs, a.sizes, a.first.device).values()
    return [i in taken for i, kind in enumerate(a.program.inputs) if kind == "logits"]


def _run(a: Arguments, device: ModuleType) -> _Outputs:
    held, outputs = _held(a), _Outputs(a)
    cut = a.cut(held)
    chunks = cut.chunks
    if chunks.count:
        # Products take these as they are; a copy, if one is needed, is made once.
        xs, weights, matrices = ([as_factor(t) for t in ts] for ts in (a.xs, a.weights, a.matrices))
        logits, memory = _logits(a, [chunks.rows if kept else cut.block for kept in held]), None

        def products(rows: slice, now: bool) -> None:
            for z, x, w, b, kept in zip(logits, xs, weights, a.biases, held):
                if kept == now:
                    device.logits(z[: rows.stop - rows.start], x[rows], w, b)

        with device.guard(a.first):
            for start, n in chunks.bounds(a.N):
                chunk = slice(start, start + n)
                products(chunk, True)
                # Until the first product is launched a GPU waits: what the program needs comes after it.
                memory = memory or _Memory(a, chunks.rows, logits, held)
                for first, count in cut.blocks(n):
                    block = slice(start + first, start + first + count)
                    products(block, False)
                    for at, some, values in device.program(memory.block(a, block, first), count):
                        outputs.take(slice(block.start + at, block.start + at + some), values)
                outputs.add(device, memory, chunk, matrices, several=chunks.count > 1)
    return outputs


def _new(a: Arguments, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """[rows, columns] with the row stride that the device's products like."""
    apart = max(round_up(columns, policy_of(a.first.device.type).chunks.align), 1)
    return a.first.new_empty((rows, apart), dtype=dtype)[:, :columns]


def _logits(a: Arguments, rows: Sequence[int]) -> list[Tensor]:
    """Memory for so many rows of logits of each head."""
    return [_new(a, n, w.shape[1], x.dtype) for n, x, w in zip(rows, a.xs, a.weights)]


class _Memory:
    """What all chunks share: the logits of each head, and the factors of dX and dW that none of those are for.

    Attributes:
        logits: [rows, V] of each head that is held, else those of a block.
        factors: by value, of rows as well; most are one of the logits.
        key: of the program over them.
    """

    def __init__(self, a: Arguments, rows: int, logits: list[Tensor], held: list[bool]) -> None:
        self.logits, self.held = logits, held
        metas = _metas(a, _inputs(a, self.logits, slice(0, rows)))
        what = (a.text, metas, a.sizes, a.first.device)
        if not device_of(a).compiles(a.first.device):  # Inductor finds its own passes
            what = (tidied(*what), *what[1:])
        text = what[0]
        fakes = propagate(text, 2, *what[1:])
        found, order = places(*what), [i for i, kind in enumerate(a.program.inputs) if kind == "logits"]
        self._homes = {i: _new(a, rows, fakes[i].shape[1], fakes[i].dtype) for i, at in found.items() if at is None}
        self.factors = self._homes | {i: self.logits[order.index(at)] for i, at in found.items() if at is not None}
        homes = tuple(meta(h, "rows") for h in self._homes.values())
        self.key = Key(text, metas, homes, a.sizes, a.first.device)
        self._blocks: dict[int, list[Tensor]] = {}

    def factor(self, k: int) -> Tensor:
        """The factor of dX or dW that the k-th result is a product of."""
        return self.factors[self.key.program.results[k].value.index]

    def block(self, a: Arguments, rows: slice, first: int) -> Chunk:
        """Some rows of a chunk, from its row `first` on."""
        here = slice(first, first + rows.stop - rows.start)
        logits = [z[here] if kept else z[: rows.stop - rows.start] for z, kept in zip(self.logits, self.held)]
        return Chunk(self.key, _inputs(a, logits, rows), {i: h[here] for i, h in self._homes.items()}, self._blocks)


def _inputs(a: Arguments, logits: Sequence[Tensor], rows: slice) -> list[Tensor]:
    """The program's inputs, in order, for some rows."""
    found, given = [], {"logits": iter(logits), "rows": iter(a.rows), "whole": iter(a.whole)}
    for i, kind in enumerate(a.program.inputs):
        t = next(given[kind])
        if kind == "rows":
            t = _side_by_side(t[rows]) if i in used(a.text) else t[rows]
        found.append(t)
    return found


def _metas(a: Arguments, inputs: Sequence[Tensor]) -> tuple[Meta, ...]:
    return tuple(meta(t, kind) for kind, t in zip(a.program.inputs, inputs))


class _Outputs:
    """The results as they grow: rows and dX side by side, sums and dW added up, in fp32 if there are several chunks."""

    def __init__(self, a: Arguments) -> None:
        self.a, self.results = a, a.program.results
        # Made when they are needed: before the first product, a GPU waits.
        self.found: list[Tensor | None] = [None] * len(self.results)

    def take(self, rows: slice, values: Sequence[Tensor]) -> None:
        """Some rows' values of kind row and sums of those of kind sum, in order."""
        given = iter(values)
        for k, result in enumerate(self.results):
            if result.kind == "row":
                self._of_rows(k)[rows].copy_(next(given))
            elif result.kind == "sum":
                value, found = next(given), self.found[k]
                self.found[k] = value if found is None else found.add_(value)

    def add(self, device: ModuleType, memory: _Memory, rows: slice, matrices: Sequence[Tensor], several: bool) -> None:
        """A chunk's products. several: there are other chunks."""
        for k, result in enumerate(self.results):
            if result.kind not in ("dx", "dw"):
                continue
            factor = memory.factor(k)[: rows.stop - rows.start]
            if result.kind == "dx":
                device.dx(self._of_rows(k)[rows], factor, matrices[result.other])
                continue
            found = self.found[k]
            if found is None:
                dtype = wide(result.dtype) if several else result.dtype
                self.found[k] = factor.new_empty(self.a.size(result.sizes), dtype=dtype)
            device.dw(self.found[k], factor, as_factor(self.a.rows[result.other][rows]), found is None)

    def finished(self) -> list[Tensor]:
        """The chunk must be free by now: a cast is where a sum exists twice."""
        out = []
        for k, result in enumerate(self.results):
            found, self.found[k] = self.found[k], None
            if found is None and result.kind in ("row", "dx"):
                found = self._of_rows(k)
            elif found is None:
                found = self.a.first.new_zeros(self.a.size(result.sizes), dtype=result.dtype)
            out.append(found.to(result.dtype))
        return out

    def _of_rows(self, k: int) -> Tensor:
        found = self.found[k]
        if found is None:
            shape = (self.a.N, *self.a.size(self.results[k].sizes))
            found = self.found[k] = self.a.first.new_empty(shape, dtype=self.results[k].dtype)
        return found


def _side_by_side(t: Tensor) -> Tensor:
    """Rows whose values are side by side, so that no stride depends on how many rows there are."""
    t = t if t[0].is_contiguous() else t.contiguous()
    inside = tuple(itertools.accumulate(reversed(t.shape[2:]), operator.mul, initial=1))[::-1] if t.dim() > 1 else ()
    return t if t.stride()[1:] == inside else t.as_strided(t.shape, (t.stride(0), *inside))
