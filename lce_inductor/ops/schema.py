"""Definition of the ops: schemas, fake kernels and autograd.

Three ops on flat rows do the work of the fused kernels; the passes put them into graphs:

    row_stats            statistics of the logits' rows, never the logits; its backward is row_stats_backward
    row_stats_backward   gradients by recomputing the logits chunk by chunk (4 matrix products in all)
    row_stats_with_grad  statistics and gradients in one go, row gradients known beforehand (3 products); wide: dW and
                         db in fp32, for a caller that has to multiply them once more

Shapes: N tokens, H hidden, V vocabulary, K target columns. x [N, H], weight [V, H], bias [V],
target [N, K] int64. Statistics are fp32 (fp64 for fp64 inputs), lse is fp64; `stats` is a mask of the bits in
spec/statistics.py, for row_stats_backward of those that its forward has computed. needed: bool [N], rows whose
statistics are read; those of others are finite and may be of no logits. None: all. prefer: "speed", or "memory" where
less of it is worth time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..lower import head as heads
from ..spec.epilogue import parse
from ..spec.statistics import (
    ARGMAX,
    BITS,
    GRADIENTS,
    LSE,
    NEG_ENTROPY,
    STATISTICS,
    HeadArgs,
    RowGrads,
    Stats,
    empty_stats,
    grad_dtype,
)

_HEAD = "Tensor x, Tensor weight, Tensor? bias, Tensor? target, Tensor? class_weight"
_PREFER = "*, str prefer='speed'"
_PLAN = "str epilogue, {stats}int chunk_tokens, int workspace_bytes"
_STATS = "(" + ", ".join(f"Tensor {s.result}" for s in STATISTICS)
_WITH_STATS = _PLAN.format(stats="int stats, ")


def _optional(names: Iterable[str]) -> str:
    return ", ".join(f"Tensor? {name}" for name in names)


_lib = torch.library.Library("lce_inductor", "DEF")
_lib.define(f"row_stats({_HEAD}, {_WITH_STATS}, Tensor? needed=None, {_PREFER}) -> {_STATS})")
_lib.define(
    f"row_stats_backward({_HEAD}, Tensor lse, Tensor? neg_entropy, {_optional(GRADIENTS)}, "
    f"{_PLAN.format(stats='')}, bool[3] output_mask, {_PREFER}, int stats=0) -> (Tensor dx, Tensor dw, Tensor db)"
)
_lib.define(
    f"row_stats_with_grad({_HEAD}, {_optional(f'g_{name}' for name in RowGrads._fields)}, {_WITH_STATS}, "
    f"bool[3] output_mask, bool wide=False, Tensor? needed=None, {_PREFER}) -> "
    f"{_STATS}, Tensor dx, Tensor dw, Tensor db)"
)
_lib.define("once(Tensor value, Tensor[] inputs) -> Tensor")
_lib.define("kept(Tensor value) -> Tensor")


def _positions(name: str) -> dict[str, int]:
    schema = getattr(torch.ops.lce_inductor, name).default._schema
    return {argument.name: i for i, argument in enumerate(schema.arguments)}


# Where two of the ops have their arguments, by name.
ROW_STATS, ROW_STATS_BACKWARD = map(_positions, ("row_stats", "row_stats_backward"))


def _row_stats(  # type: ignore[no-untyped-def]
    x, weight, bias, target, class_weight, epilogue, stats, chunk_tokens, workspace_bytes, needed=None, prefer="speed"
):
    check_inputs(x, weight, bias, target, class_weight, needed=needed)
    a = HeadArgs(x, weight, bias, target, class_weight, parse(epilogue), chunk_tokens, workspace_bytes, prefer)
    return _distinct(heads.forward(a, stats, needed))


def _row_stats_backward(  # type: ignore[no-untyped-def]
    x, weight, bias, target, class_weight, lse, neg_entropy, *rest, prefer="speed", stats=0
):
    *given, epilogue, chunk_tokens, workspace_bytes, output_mask = rest
    grads = _row_grads(given)
    _check_devices(x, weight, bias, target, class_weight, grads, lse, neg_entropy)
    a = HeadArgs(x, weight, bias, target, class_weight, parse(epilogue), chunk_tokens, workspace_bytes, prefer)
    dx, dw, db = heads.backward(a, lse, neg_entropy, grads, tuple(output_mask), stats=stats)
    return _distinct((dx, dw, db.to(weight.dtype if bias is None else bias.dtype)))


def _row_stats_with_grad(x, weight, bias, target, class_weight, *rest, prefer="speed"):  # type: ignore[no-untyped-def]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        raise RuntimeError("row_stats_with_grad has no derivatives, they are among its results: call it under no_grad")
    grads, epilogue, stats, chunk_tokens, workspace_bytes, output_mask, wide, needed = _of_with_grad(*rest)
    check_inputs(x, weight, bias, target, class_weight, grads, needed)
    a = HeadArgs(x, weight, bias, target, class_weight, parse(epilogue), chunk_tokens, workspace_bytes, prefer)
    with torch._C._AutoDispatchBelowAutograd():
        found, dx, dw, db = heads.with_grad(a, stats, grads, tuple(output_mask), wide, needed)
        return _distinct((*found, dx, dw, db.to(grad_dtype((weight if bias is None else bias).dtype, wide))))


def _row_grads(given: Sequence[Tensor | None]) -> RowGrads:
    """From those of row_stats_backward."""
    return RowGrads(**{name.removeprefix("g_"): g for name, g in zip(GRADIENTS, given)})


def _of_with_grad(*rest: Any) -> tuple[Any, ...]:
    """The arguments behind the head's tensors; `wide` and `needed` may be left out."""
    count = len(RowGrads._fields)
    given = (*rest[count:], *(False, None)[len(rest) - count - 5 :])
    return RowGrads(*rest[:count]), *given


def _distinct(outputs: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """No two results of an op may share memory: each empty one gets a tensor of its own."""
    return tuple(t if t.numel() else t.new_empty(t.shape) for t in outputs)


def check_inputs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    class_weight: Tensor | None,
    grads: RowGrads | None = None,
    needed: Tensor | None = None,
) -> None:
    """Raise a RuntimeError that names the argument, what came and what is allowed."""
    _check_devices(x, weight, bias, target, class_weight, grads, needed=needed)
    if forward_ad._current_level >= 0 and any(t is not None and _has_tangent(t) for t in (x, weight, bias)):
        raise NotImplementedError("lce_inductor has no forward-mode derivatives; torch.compile has none either")
    if x.dim() != 2 or weight.dim() != 2:
        raise RuntimeError(f"x must be [N, H] and weight [V, H], got {list(x.shape)} and {list(weight.shape)}")
    if x.shape[1] != weight.shape[1]:
        raise RuntimeError(f"x {list(x.shape)} and weight {list(weight.shape)} must agree in H")
    if not x.is_floating_point():
        raise RuntimeError(f"x must be a floating-point tensor, got {x.dtype}")
    if weight.dtype != x.dtype:
        raise RuntimeError(f"weight must have the dtype of x, {x.dtype}, got {weight.dtype}")
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise RuntimeError(f"bias must be a float tensor [{weight.shape[0]}], got {bias.dtype} {list(bias.shape)}")
    if target is not None and (target.dim() != 2 or target.shape[0] != x.shape[0] or target.dtype != torch.int64):
        raise RuntimeError(f"target must be int64 [{x.shape[0]}, K], got {target.dtype} {list(target.shape)}")
    if class_weight is not None and class_weight.shape != weight.shape[:1]:
        raise RuntimeError(f"class_weight must have shape [{weight.shape[0]}], got {list(class_weight.shape)}")
    if needed is not None and (needed.shape != x.shape[:1] or needed.dtype != torch.bool):
        raise RuntimeError(f"needed must be bool [{x.shape[0]}], got {needed.dtype} {list(needed.shape)}")


_HEAD_NAMES = ("weight", "bias", "target", "class_weight", "lse", "neg_entropy")


def _check_devices(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    class_weight: Tensor | None,
    grads: RowGrads | None = None,
    *statistics: Tensor | None,
    needed: Tensor | None = None,
) -> None:
    """The same for devices: a kernel is given addresses, and would read another device's."""
    here, of_grads = x.device, grads or RowGrads()
    for i, t in enumerate((weight, bias, target, class_weight, *statistics, *of_grads, needed)):
        if t is not None and t.device != here:
            fields = (f"g_{field}" for field in RowGrads._fields)
            names = (*_HEAD_NAMES[: 4 + len(statistics)], *fields, "needed")
            raise RuntimeError(f"{names[i]} must be on the device of x, {here}, got {t.device}")


def _has_tangent(t: Tensor) -> bool:
    """Does a forward-mode tangent come with t? It would silently end in an op that knows of none."""
    include, none = torch._C._dispatch_tls_local_include_set(), torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
    with torch._C._ForceDispatchKeyGuard(include, none):  # below autograd, tangents are not to be seen otherwise
        return forward_ad.unpack_dual(t).tangent is not None


def _fake_grads(  # type: ignore[no-untyped-def]
    x: Tensor, weight: Tensor, bias: Tensor | None, output_mask, wide: bool | None
) -> tuple[Tensor, Tensor, Tensor]:
    def like(t: Tensor, needed: bool, wide: bool | None = None) -> Tensor:
        return x.new_empty(t.shape if needed else (0,), dtype=t.dtype if wide is None else grad_dtype(t.dtype, wide))

    db = like(weight if bias is None else bias, output_mask[2] and bias is not None, wide)
    return like(x, output_mask[0]), like(weight, output_mask[1], wide), db


def _fake_row_stats(  # type: ignore[no-untyped-def]
    x, weight, bias, target, class_weight, epilogue, stats, chunk_tokens, workspace_bytes, needed=None, prefer="speed"
):
    _check_devices(x, weight, bias, target, class_weight, needed=needed)
    return tuple(empty_stats(x, target, stats))


def _fake_row_stats_backward(  # type: ignore[no-untyped-def]
    x, weight, bias, target, class_weight, lse, neg_entropy, *rest, prefer="speed", stats=0
):
    *given, _, _, _, output_mask = rest
    _check_devices(x, weight, bias, target, class_weight, _row_grads(given), lse, neg_entropy)
    return _fake_grads(x, weight, bias, output_mask, None)


def _fake_row_stats_with_grad(  # type: ignore[no-untyped-def]
    x, weight, bias, target, class_weight, *rest, prefer="speed"
):
    grads, _, stats, _, _, output_mask, wide, needed = _of_with_grad(*rest)
    _check_devices(x, weight, bias, target, class_weight, grads, needed=needed)
    return (*empty_stats(x, target, stats), *_fake_grads(x, weight, bias, output_mask, wide))


def _setup_context(ctx, inputs, keyword_only_inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias, target, class_weight, epilogue, stats, chunk_tokens, workspace_bytes, _ = inputs
    found = Stats(*output)
    # What was not asked for is empty: a gradient of it would have the wrong shape.
    ctx.mark_non_differentiable(*(t for t, bit in zip(found, BITS.values()) if bit == ARGMAX or not stats & bit))
    # An undefined gradient stays None: a statistic that nobody differentiates costs nothing.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        x,
        weight,
        bias,
        target,
        class_weight,
        found.lse,
        found.neg_entropy if stats & NEG_ENTROPY else None,
        found.argmax,
    )
    ctx.plan, ctx.by_name = (epilogue, chunk_tokens, workspace_bytes), {**keyword_only_inputs, "stats": stats}
    ctx.has_lse, ctx.has_argmax = bool(stats & LSE), bool(stats & ARGMAX)


def _backward(ctx, *grads):  # type: ignore[no-untyped-def]
    x, weight, bias, target, class_weight, lse, neg_entropy, argmax = ctx.saved_tensors
    of = Stats(*grads)
    if of.max_logit is not None:
        if not ctx.has_argmax:
            raise RuntimeError("the gradient of max_logit needs argmax: ask row_stats for both")
        # The maximum is the logit at its index: one more target.
        column, g_column = argmax[:, None], of.max_logit[:, None]
        if target is not None and of.target_logit is not None:
            column, g_column = torch.cat([target, column], 1), torch.cat([of.target_logit, g_column], 1)
        target, of = column, of._replace(target_logit=g_column)
    mask = ctx.needs_input_grad[:3]
    none = (None,) * 7
    given = [g for g, s in zip(of, STATISTICS) if s.has_gradient]
    if all(g is None for g in given):
        return (None, None, None, *none)
    if of.neg_entropy is not None and not ctx.has_lse:
        raise RuntimeError("the gradient of neg_entropy needs lse: ask row_stats for both")
    dx, dw, db = torch.ops.lce_inductor.row_stats_backward(
        x, weight, bias, target, class_weight, lse, neg_entropy, *given, *ctx.plan, mask, **ctx.by_name
    )
    return (dx if mask[0] else None, dw if mask[1] else None, db if mask[2] else None, *none)


def _no_second_derivative(ctx, *grads):  # type: ignore[no-untyped-def]
    raise RuntimeError("lce_inductor has no second derivatives; torch.compile has none either")


def _once(value: Tensor, inputs: list[Tensor]) -> Tensor:
    """The value, and inputs that a backward has to save for it (see graph/second_derivative.py)."""
    return value.clone()


def _kept(value: Tensor) -> Tensor:
    """A copy that Inductor does not take for a no-op (see schedule/held_inputs.py)."""
    return value.clone()


for _name, _real, _fake in (
    ("once", _once, _once),
    ("kept", _kept, _kept),
    ("row_stats", _row_stats, _fake_row_stats),
    ("row_stats_backward", _row_stats_backward, _fake_row_stats_backward),
    ("row_stats_with_grad", _row_stats_with_grad, _fake_row_stats_with_grad),
):
    _lib.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lce_inductor::{_name}", _fake, lib=_lib)
torch.library.register_autograd("lce_inductor::row_stats", _backward, setup_context=_setup_context, lib=_lib)
torch.library.register_autograd("lce_inductor::row_stats_backward", _no_second_derivative, lib=_lib)
# Not a kernel in Python: the GPU waits for the first launch in row_stats_with_grad. The op itself refuses.
_lib.impl("row_stats_with_grad", torch.library.fallthrough_kernel, "Autograd")
