"""What row_region is called with, and whether that fits together."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..spec.program import Program, Ref, Sym, parse
from .chunk_plan import ChunkPlan
from .plan import chunks, policy_of

_NAMES = ("xs", "weights", "biases", "rows", "whole", "matrices")


class Cut(NamedTuple):
    """Pieces of the rows.

    chunks: rows whose logits exist at a time, of heads whose logits make room for a factor of dX or dW. block: those of
    a chunk whose logits exist at a time, of other heads, such as a teacher's.
    """

    chunks: ChunkPlan
    block: int

    def blocks(self, n: int) -> list[tuple[int, int]]:
        """First row and number of rows of each block of a chunk of n rows."""
        return [(first, min(self.block, n - first)) for first in range(0, n, self.block)]


class Arguments(NamedTuple):
    """N tokens, H hidden, V vocabulary; each head has a V of its own, and x and its weight agree in an H.

    Attributes:
        xs: [N, H], weights: [H, V], biases: [V] or None; the k-th make the k-th logits.
        rows: [N, ...]. whole: any shape, the same for all rows. matrices: [V, H], the other factors of each dX.
        sizes: what the program's Sym stand for.
        chunk_tokens: rows of logits that may exist at a time; 0 lets the chunk plan decide.
        workspace_bytes: upper limit in bytes for the logits of all heads together that exist at a time.
    """

    N: int
    xs: Sequence[Tensor]
    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    rows: Sequence[Tensor]
    whole: Sequence[Tensor]
    matrices: Sequence[Tensor]
    sizes: tuple[int, ...]
    text: str
    program: Program
    chunk_tokens: int
    workspace_bytes: int

    @property
    def first(self) -> Tensor:
        return (*self.xs, *self.rows, *self.whole)[0]

    def cut(self, held: Sequence[bool]) -> Cut:
        """Pieces that keep to the budget. held: which heads' logits make room for a factor of dX or dW.

        Without heads it is the widest factor that counts.
        """
        factors = [self.matrices[r.other].shape[0] for r in self.program.results if r.kind == "dx"]
        factors += [self.size(r.sizes)[0] for r in self.program.results if r.kind == "dw"]
        V = sum(w.shape[1] for w in self.weights) or max(factors, default=1)
        H = max((x.shape[1] for x in self.xs), default=1)
        itemsize = max((x.element_size() for x in self.xs), default=1)
        policy = policy_of(self.first.device.type).programs
        sizes = self.N, H, V, itemsize, self.chunk_tokens, self.workspace_bytes, policy
        plan = chunks(*sizes)
        passing = sum(w.shape[1] for w, kept in zip(self.weights, held) if not kept)
        block = min(policy.least_rows, plan.rows)
        rest = self.workspace_bytes - block * passing * itemsize
        if not passing or passing == V or rest < 1:
            return Cut(plan, plan.rows)
        longer = chunks(self.N, H, V - passing, itemsize, self.chunk_tokens, rest, policy)
        return Cut(longer, block) if longer.rows >= plan.rows else Cut(plan, plan.rows)

    def size(self, sizes: Sequence[int | Sym]) -> list[int]:
        """A result's sizes as numbers."""
        return [self.sizes[s.index] if isinstance(s, Sym) else s for s in sizes]


def check(a: Arguments) -> None:
    """Raise a RuntimeError that names the argument, what came and what is allowed."""
    p, N = a.program, a.N
    given = {"logits": len(a.xs), "rows": len(a.rows), "whole": len(a.whole)}
    for kind, count in given.items():
        if p.inputs.count(kind) != count:
            name = "xs" if kind == "logits" else kind
            raise RuntimeError(f"{name}: the program reads {p.inputs.count(kind)} of kind {kind!r}, got {count}")
    if not p.inputs:
        raise RuntimeError("program: it reads nothing")
    if N < 0 or a.chunk_tokens < 0 or a.workspace_bytes < 1:
        raise RuntimeError(
            f"N and chunk_tokens must be at least 0 and workspace_bytes at least 1, got {N}, {a.chunk_tokens} and "
            f"{a.workspace_bytes}"
        )
    if len(a.weights) != len(a.xs) or len(a.biases) != len(a.xs):
        raise RuntimeError(f"xs: {len(a.xs)} for {len(a.weights)} weights and {len(a.biases)} has_bias")
    tensors = (a.xs, a.weights, a.biases, a.rows, a.whole, a.matrices)
    check_devices(*tensors)
    for name, group in zip(_NAMES, tensors) if torch.is_grad_enabled() else ():
        for i, t in enumerate(group):
            if t is not None and t.requires_grad:
                raise RuntimeError(
                    f"{name}[{i}] requires grad: row_region has no derivatives, they are among its results; call it "
                    "under no_grad"
                )
    for i, (x, w, b) in enumerate(zip(a.xs, a.weights, a.biases)):
        if x.dim() != 2 or x.shape[0] != N:
            raise RuntimeError(f"xs[{i}] must be [{N}, H], got {list(x.shape)}")
        if not x.is_floating_point():
            raise RuntimeError(f"xs[{i}] must be a floating-point tensor, got {x.dtype}")
        if w.dim() != 2 or w.shape[0] != x.shape[1] or w.dtype != x.dtype:
            raise RuntimeError(f"weights[{i}] must be {x.dtype} [{x.shape[1]}, V], got {w.dtype} {list(w.shape)}")
        if b is not None and (b.shape != w.shape[1:] or b.dtype != x.dtype):
            raise RuntimeError(
                f"biases: that of xs[{i}] must be {x.dtype} [{w.shape[1]}], got {b.dtype} {list(b.shape)}"
            )
    for i, r in enumerate(a.rows):
        if r.dim() < 1 or r.shape[0] != N:
            raise RuntimeError(f"rows[{i}] must be [{N}, ...], got {list(r.shape)}")
    for i, m in enumerate(a.matrices):
        if m.dim() != 2:
            raise RuntimeError(f"matrices[{i}] must be [V, H], got {list(m.shape)}")
    _check_references(a)


def check_devices(*tensors: Sequence[Tensor | None]) -> None:
    """Raise a RuntimeError that names the first of these lists, in the order of _NAMES, that is elsewhere."""
    device = next((t.device for group in tensors for t in group if t is not None), None)
    for name, group in zip(_NAMES, tensors):
        for i, t in enumerate(group):
            if t is not None and t.device != device:
                raise RuntimeError(f"{name}[{i}] must be on {device}, got {t.device}")


@functools.lru_cache(maxsize=256)
def _last_size(text: str) -> int:
    """The last of the sizes that a program reads; -1 if none."""

    def last(value: object) -> int:
        if isinstance(value, Sym):
            return value.index
        inside = value if isinstance(value, (list, tuple)) and not isinstance(value, Ref) else ()
        return max(map(last, inside), default=-1)

    program = parse(text)
    steps = [(step.args, tuple(step.kwargs.values())) for step in program.steps]
    return last([*steps, *(result.sizes for result in program.results)])


def _check_references(a: Arguments) -> None:
    if (index := _last_size(a.text)) >= len(a.sizes):
        raise RuntimeError(f"sizes: the program reads the size {index}, got {len(a.sizes)}")
    for result in a.program.results:
        of = {"dx": ("matrices", a.matrices), "dw": ("rows", a.rows)}.get(result.kind)
        if of is not None and not 0 <= result.other < len(of[1]):
            raise RuntimeError(f"{of[0]}: the program reads number {result.other}, got {len(of[1])}")
        if result.kind == "dx" and a.size(result.sizes) != list(a.matrices[result.other].shape[1:]):
            shape = list(a.matrices[result.other].shape)
            raise RuntimeError(f"matrices[{result.other}] must be [V, *{a.size(result.sizes)}], got {shape}")
        if result.kind == "dw" and a.size(result.sizes)[1:] != list(a.rows[result.other].shape[1:]):
            shape = list(a.rows[result.other].shape)
            raise RuntimeError(f"rows[{result.other}] must be [N, {a.size(result.sizes)[-1]}], got {shape}")
