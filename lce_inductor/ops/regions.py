"""row_region: the user's own arithmetic between logits and rows, over one chunk of logits at a time."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from ..regions.program import Program, Ref, Rows, Sym, parse, resolve
from .chunking import plan
from .products import product
from .types import stat_dtype

_lib = torch.library.Library("lce_inductor", "FRAGMENT")
_lib.define(
    "row_region(SymInt N, Tensor[] xs, Tensor[] weights, Tensor[] biases, bool[] has_bias, Tensor[] rows, Tensor[] whole, "
    "Tensor[] matrices, SymInt[] sizes, str program, int chunk_tokens, int workspace_bytes) -> Tensor[]"
)

# Elements of a block of rows that is computed at a time on a CPU: 2 MiB in fp32.
_BLOCK = 1 << 19


def run(program: Program, inputs: list[Tensor], n: int, sizes: list[int], device: torch.device) -> list[Tensor]:
    """The values of a program's results, for rows of which each input holds n (those of kind "whole": all of it)."""
    env: list[Any] = list(inputs)
    last = _last_uses(program)

    def fill(value: Any) -> Any:
        if isinstance(value, Ref):
            return env[value.index]
        if isinstance(value, Rows):
            return n
        if isinstance(value, Sym):
            return sizes[value.index]
        return [fill(v) for v in value] if isinstance(value, (list, tuple)) else value

    for i, step in enumerate(program.steps):
        op = resolve(step.op)
        kwargs = {k: fill(v) for k, v in step.kwargs.items()}
        if op is not operator.getitem and any(a.name == "device" for a in op._schema.arguments):
            kwargs["device"] = device
        env.append(op(*[fill(a) for a in step.args], **kwargs))
        for done in last.get(len(inputs) + i, ()):
            env[done] = None
    return [env[r.value.index] for r in program.results]


def _last_uses(program: Program) -> dict[int, list[int]]:
    """After which step which values are not needed again."""
    used: dict[int, int] = {}

    def see(value: Any, at: int) -> None:
        if isinstance(value, Ref):
            used[value.index] = at
        elif isinstance(value, (list, tuple)) and not isinstance(value, (Rows, Sym)):
            for v in value:
                see(v, at)

    first = len(program.inputs)
    for i, step in enumerate(program.steps):
        used[first + i] = first + i
        see(step.args, first + i)
        see(tuple(step.kwargs.values()), first + i)
    for result in program.results:
        used.pop(result.value.index, None)
    out: dict[int, list[int]] = {}
    for index, at in used.items():
        if index >= first:
            out.setdefault(at, []).append(index)
    return out


def _shape(result: Any, N: Any, sizes: list[Any]) -> list[Any]:
    own = [sizes[s.index] if isinstance(s, Sym) else s for s in result.sizes]
    return [N, *own] if result.kind in ("row", "dx") else own


def _fake(N, xs, weights, biases, has_bias, rows, whole, matrices, sizes, program, chunk_tokens, workspace_bytes):  # type: ignore[no-untyped-def]
    like = (xs or rows or whole or matrices)[0]
    return [like.new_empty(_shape(r, N, sizes), dtype=r.dtype) for r in parse(program).results]


def _cpu(N, xs, weights, biases, has_bias, rows, whole, matrices, sizes, program, chunk_tokens, workspace_bytes):  # type: ignore[no-untyped-def]
    p = parse(program)
    like = (xs or rows or whole or matrices)[0]
    device = like.device
    V = max((w.shape[1] for w in weights), default=1)
    H = max((x.shape[1] for x in xs), default=1)
    chunks = plan(N, H, V, like.element_size(), chunk_tokens, workspace_bytes, device="cpu")
    out = [
        like.new_empty(_shape(r, N, sizes), dtype=r.dtype)
        if r.kind in ("row", "dx")
        else like.new_zeros(_shape(r, N, sizes), dtype=_wide(r.dtype))
        for r in p.results
    ]
    given = iter(biases)
    bias = [next(given) if has else None for has in has_bias]
    buffers: dict[int, Tensor] = {}
    for start, count in chunks.bounds(N):
        zs = []
        for x, w, b in zip(xs, weights, bias):
            z = x[start : start + count] @ w
            zs.append(z if b is None else torch.addmm(b, x[start : start + count], w))
        size = max(_BLOCK // max(V, 1), 1)
        for a in range(0, count, size):
            n = min(size, count - a)
            part = slice(a, a + n)
            here = slice(start + a, start + a + n)
            sources = {"logits": iter([z[part] for z in zs]), "rows": iter([r[here] for r in rows]), "whole": iter(whole)}
            values = run(p, [next(sources[kind]) for kind in p.inputs], n, sizes, device)
            for r, value, o in zip(p.results, values, out):
                if r.kind == "row":
                    o[here] = value
                elif r.kind == "sum":
                    o += value.to(o.dtype).sum(0)
                else:
                    if r.value.index not in buffers:
                        buffers[r.value.index] = value.new_empty(min(chunks.rows, N), value.shape[1])
                    buffers[r.value.index][part] = value
        for r, o in zip(p.results, out):
            if r.kind == "dx":
                torch.mm(buffers[r.value.index][:count], matrices[r.other], out=o[start : start + count])
            elif r.kind == "dw":
                product(o, buffers[r.value.index][:count].t(), rows[r.other][start : start + count], accumulate=True)
    return [o.to(r.dtype) for r, o in zip(p.results, out)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


_lib.impl("row_region", _cpu, "CompositeExplicitAutograd")
torch.library.register_fake("lce_inductor::row_region", _fake, lib=_lib)
_ = stat_dtype
