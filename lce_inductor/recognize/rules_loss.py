"""Rules for the losses themselves.

cross_entropy(logits, target, ...)     nll_loss(log_softmax(logits, -1), target, ...)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from torch.nn import _reduction

from ..graph.values import info
from ..ops.types import LSE, SUM, TARGET
from ..reasons import refuse
from .canon import Attr, Call
from .emit import Emitter
from .forms import ClassMap, Outcome, Terminal, Want, rule
from .rules_head import ref_info
from .rules_reduce import cancel

if TYPE_CHECKING:
    from .walk import Walk


_PAIRS = (torch.ops.aten.nll_loss_forward.default, torch.ops.aten.nll_loss2d_forward.default)


@rule("cross_entropy", "nll_loss")
def cross_entropy(walk: Walk, call: Call, form: Any) -> Outcome:
    """Both are one formula of the statistics: the loss of log-probabilities does not change if they are
    normalised once more."""
    node = call.node
    if not isinstance(form, ClassMap) or walk.form(call.get("input")) is not form or form.exp or form.coef != 1.0:
        return None
    if call.name == "nll_loss" and (not form.normalized or form.offset):
        return None
    # torch takes the class dimension second, or first for a single row without a batch dimension.
    if form.class_dim != (1 if form.ndim > 1 else 0):
        return refuse("class-dim", node)
    target, weight = call.get("target"), call.get("weight")
    known = info(target)
    if known is None:
        return None
    if known.dtype.is_floating_point:
        return refuse("soft-targets", node)
    smoothing = call.get("label_smoothing", 0.0)
    ignore_index = call.get("ignore_index", -100)
    reduction = _legacy_reduction(call)
    if not isinstance(smoothing, (int, float)) or not isinstance(ignore_index, int) or reduction is None:
        return None
    if weight is not None:
        weight_info = ref_info(node, weight) if isinstance(weight, (Node, Attr)) else None
        if weight_info is None:
            return None
        if weight_info.requires_grad:
            return refuse("class-weight-grad", node)
    wants = [Want(LSE), Want(TARGET, target, ignore_index)]
    if smoothing > 0:
        wants.append(Want(SUM, weight))
    # They give (loss, total weight); nobody but their own backward reads the second.
    pair = call.node.target in _PAIRS
    if pair and any(u.args[1] != 0 and u.users for u in node.users):
        return None
    out = next((u for u in node.users if u.args[1] == 0), None) if pair else node
    out_info = info(out)
    dtype = form.dtype if out_info is None else out_info.dtype

    def emit(e: Emitter) -> Any:
        args = (
            e.per_row(wants[0]), e.per_row(wants[1]), e.per_row(wants[2]) if smoothing > 0 else None, e.ref(target),
            e.ref(weight), reduction, ignore_index, float(smoothing), e.num_classes, dtype,
        )  # fmt: skip
        loss = e.op("cross_entropy", *args, like=out)
        return (loss, loss) if pair else loss

    return Terminal(node, cancel(form), tuple(wants), emit)


def _legacy_reduction(call: Call) -> str | None:
    size_average, reduce = call.get("size_average"), call.get("reduce")
    if size_average is not None or reduce is not None:
        return str(_reduction.legacy_get_string(size_average, reduce, emit_warning=False))
    reduction = call.get("reduction", "mean")
    return reduction if reduction in ("none", "mean", "sum") else None
