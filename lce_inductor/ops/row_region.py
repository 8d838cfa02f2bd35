"""row_region: the user's own arithmetic between logits and rows, over one chunk of logits at a time.

    row_region    for chunks of rows: the logits of each head, a program over them (spec/program.py), dX and dW

Shapes: N tokens, H hidden, V vocabulary, of each head its own. xs [N, H], weights [H, V], biases [V] for those heads
that has_bias names; rows [N, ...], whole of any shape, matrices [V, H]. The results are the program's. See
lower/region_arguments.py; the work is done in lower/.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..lower.region import cut_of, fits, run
from ..lower.region_arguments import Arguments, Cut, check_devices
from ..spec.program import Sym, parse

_lib = torch.library.Library("lce_inductor", "FRAGMENT")
_lib.define(
    "row_region(SymInt N, Tensor[] xs, Tensor[] weights, Tensor[] biases, bool[] has_bias, Tensor[] rows, "
    "Tensor[] whole, Tensor[] matrices, SymInt[] sizes, str program, int chunk_tokens, int workspace_bytes) -> Tensor[]"
)


def _arguments(  # type: ignore[no-untyped-def]
    N, xs, weights, biases, has_bias, rows, whole, matrices, sizes, program, chunk_tokens, workspace_bytes
) -> Arguments:
    if sum(has_bias) != len(biases):
        raise RuntimeError(f"biases: has_bias names {sum(has_bias)}, got {len(biases)}")
    given = iter(biases)
    of_heads = [next(given) if has else None for has in has_bias]
    return Arguments(
        N, xs, weights, of_heads, rows, whole, matrices, tuple(sizes), program, parse(program), chunk_tokens,
        workspace_bytes,
    )  # fmt: skip


def dry_run(*args: Any) -> None:
    """Raise now what a call with arguments like these would raise, if its program does not fit together.

    For the pass that puts the op into a graph, with the values in its node's meta: what has been written is taken back
    while nobody has seen it. Sizes that are symbols count as their hints; nothing is done where one is not known.
    """
    found = _by_hints(args)
    if found is not None:
        fits(found)


def cut_by_hints(*args: Any) -> Cut | None:
    """The pieces that a call with arguments like these would take, by the hints of its sizes; None if one is not
    known."""
    found = _by_hints(args)
    return None if found is None else cut_of(found)


def _by_hints(args: Sequence[Any]) -> Arguments | None:
    """Fakes of the arguments with numbers for sizes; None if one is not known."""
    from torch._subclasses import FakeTensorMode

    found = []
    with FakeTensorMode():
        for arg in args:
            try:
                found.append(_with_hints(arg))
            except ValueError:
                return None
    return _arguments(*found)


def _with_hints(value: Any) -> Any:
    if isinstance(value, torch.SymInt):
        known = value.node.maybe_as_int() if value.node.hint is None else value.node.hint
        if known is None:
            raise ValueError(f"{value} is not known")
        return int(known)
    if isinstance(value, (list, tuple)):
        return [_with_hints(v) for v in value]
    if isinstance(value, Tensor):
        shape, stride = _with_hints(list(value.shape)), _with_hints(list(value.stride()))
        return torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
    return value


def _row_region(*args: Any) -> list[Tensor]:
    return run(_arguments(*args))


def _fake(N, xs, weights, biases, has_bias, rows, whole, matrices, sizes, program, chunk_tokens, workspace_bytes):  # type: ignore[no-untyped-def]
    check_devices(xs, weights, biases, rows, whole, matrices)
    like, out = (*xs, *rows, *whole)[0], []
    for r in parse(program).results:
        own = [sizes[s.index] if isinstance(s, Sym) else s for s in r.sizes]
        out.append(like.new_empty([N, *own] if r.kind in ("row", "dx") else own, dtype=r.dtype))
    return out


_lib.impl("row_region", _row_region, "CompositeExplicitAutograd")
# The op has no derivatives, they are among its results; it refuses tensors that want some.
_lib.impl("row_region", torch.library.fallthrough_kernel, "Autograd")
torch.library.register_fake("lce_inductor::row_region", _fake, lib=_lib)
