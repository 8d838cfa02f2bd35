"""What a call of the op asks for, read off its nodes: what the plan of that call is made from."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from ..graph.values import size_hint
from ..lower.plan import Request, planned
from ..spec.epilogue import parse
from ..spec.statistics import GRADIENTS, RowGrads, computed
from .tangents import ROW_GRADIENTS

_READ = ("x", "weight", "bias", "target", "epilogue", "stats", "chunk_tokens", "workspace_bytes")


def request_of(forward: Node, backward: Node | None) -> Request:
    """Of row_stats, or with its row_stats_backward of the row_stats_with_grad that they may become; sizes by hint."""
    r = _request(forward, _given(forward))
    if backward is None:
        return r
    grads = sum(GRADIENTS[name] for name, i in ROW_GRADIENTS.items() if backward.args[i] is not None)
    return _with_gradients(r, grads, backward.args[-1])


def leaves_rows_out(op: Node) -> bool:
    """Would rows that don't count be left out of a row_stats or row_stats_with_grad that is told which are needed?"""
    given = _given(op)
    x = _value(given["x"])
    if x.device.type == "cpu":
        return True
    r = _request(op, given)
    if "output_mask" in given:
        r = _with_gradients(
            r, RowGrads(*(given[f"g_{name}"] for name in RowGrads._fields)).bits(), given["output_mask"]
        )
    return planned(r._replace(counts=True), x.device).packs


def _given(op: Node) -> dict[str, Any]:
    """A call's positional arguments by name."""
    schema: Any = op.target
    return dict(zip((argument.name for argument in schema._schema.arguments), op.args))


def _request(op: Node, given: dict[str, Any]) -> Request:
    x, weight, bias, target, epilogue, stats, chunk_tokens, workspace_bytes = (_value(given[name]) for name in _READ)
    N, H, V = map(size_hint, (*x.shape, weight.shape[0]))
    r = Request(N, H, V, x.dtype, chunk_tokens, workspace_bytes, stats, steps=parse(epilogue))
    r = r._replace(columns=0 if target is None else target.shape[1], bias=bias is not None, aligned=_is_aligned(weight))
    prefer: Any = op.kwargs.get("prefer", "speed")
    return r._replace(prefer=prefer)


def _with_gradients(r: Request, grads: int, mask: Any) -> Request:
    return r._replace(stats=computed(r.stats, grads), grads=grads, mask=tuple(mask))


def _value(a: Any) -> Any:
    return a.meta["val"] if isinstance(a, Node) else a


def _is_aligned(weight: Any) -> bool:
    """As products.aligned, of memory that is not there yet: it begins where allocators let it."""
    rows, columns = map(size_hint, weight.stride())
    return columns == 1 and rows % (16 // weight.element_size()) == 0 and rows >= size_hint(weight.shape[1])
