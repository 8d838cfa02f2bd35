"""What a call of the op asks for, read off its nodes: what the plan of that call is made from."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from ..graph.values import size_hint
from ..lower.plan import Request
from ..spec.epilogue import parse
from ..spec.statistics import GRADIENTS, computed
from .tangents import HEAD_ARGS, ROW_GRADIENTS


def request_of(forward: Node, backward: Node | None) -> Request:
    """Of row_stats, or with its row_stats_backward of the row_stats_with_grad that they may become; sizes by hint."""
    x, weight, bias, target, epilogue, stats, chunk_tokens, workspace_bytes = map(_value, _args(forward))
    N, H, V = map(size_hint, (*x.shape, weight.shape[0]))
    r = Request(N, H, V, x.dtype, chunk_tokens, workspace_bytes, stats, steps=parse(epilogue))
    r = r._replace(columns=0 if target is None else target.shape[1], bias=bias is not None, aligned=_is_aligned(weight))
    r = r._replace(prefer=forward.kwargs.get("prefer", "speed"))  # type: ignore[arg-type]
    if backward is None:
        return r
    grads = sum(GRADIENTS[name] for name, i in ROW_GRADIENTS.items() if backward.args[i] is not None)
    mask: Any = backward.args[-1]
    return r._replace(stats=computed(stats, grads), grads=grads, mask=tuple(mask))


def _args(forward: Node) -> list[Any]:
    """All but the class weight."""
    return [a for i, a in enumerate(forward.args) if i != HEAD_ARGS - 1]


def _value(a: Any) -> Any:
    return a.meta["val"] if isinstance(a, Node) else a


def _is_aligned(weight: Any) -> bool:
    """As products.aligned, of memory that is not there yet: it begins where allocators let it."""
    rows, columns = map(size_hint, weight.stride())
    return columns == 1 and rows % (16 // weight.element_size()) == 0 and rows >= size_hint(weight.shape[1])
