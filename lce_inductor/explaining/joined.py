"""What no single graph shows: a head and its loss in two graphs, and a loss outside of all."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..reasons import REASONS
from ..reporting.records import HeadRecord
from .tracing import GraphReport, Session

_DYNAMIC = "torch._dynamo.config.capture_dynamic_output_shape_ops = True"
_SCALAR = "torch._dynamo.config.capture_scalar_outputs = True"


def across(session: Session, results: Any, given: Any) -> list[GraphReport]:
    """results: what the function returned. given: its arguments."""
    graphs, parts = session.reports(), session.parts
    changed: dict[int, HeadRecord] = {}
    for graph in graphs:
        for head in graph.records if graph.break_at else ():
            if head.code == "returned":  # to the code behind the break, not to the caller
                changed[id(head)] = _refused(head, "returned", _stop(graph, session), REASONS["graph-break"].hint)
    eager = _read_by_eager(results)
    for i, graph in enumerate(graphs):
        for head in graph.records:
            if head.kind != "linear" or not _unread(head):
                continue
            later = [(j, r) for j in range(i + 1, len(graphs)) for r in graphs[j].records]
            apart = [(j, r) for j, r in later if _is_its_loss(r, head) and id(r) not in changed]
            if apart:
                j, loss = apart[0]
                ended = next((g for g in graphs[i:j] if g.break_at), None)
                code = "loss-outside" if parts and ended is None else "graph-break"
                for record in (head, loss):
                    why = _stop(ended, session if code == "graph-break" else None)
                    changed[id(record)] = dataclasses.replace(_refused(record, code, why), joined=record is loss)
            elif head.trains and (head.told or head.classes in eager):
                ended = next((g for g in graphs[i:] if g.break_at), None)
                inside = head.classes in eager or not _returns(results, head)
                broken = (ended is not None and inside) or (not parts and head.classes in eager)
                why = _stop(ended, session) if broken else ""
                changed[id(head)] = _refused(head, "graph-break" if broken else "loss-outside", why)
    if not parts and session.breaks:
        for record in [r for g in graphs for r in g.records if _is_its_loss(r, r) and id(r) not in changed]:
            if not _holds(given, record.classes):  # eager code of the function made these logits
                changed[id(record)] = _refused(record, "graph-break", _stop(None, session))
    graphs = [g.mapped(lambda r: changed.get(id(r), r)) for g in graphs]
    return [dataclasses.replace(g, records=tuple(r for r in g.records if r.told)) for g in graphs]


def _unread(head: HeadRecord) -> bool:
    """Nothing in its graph reads the head as a loss does."""
    return head.code is not None and (head.code == "returned-loss-free" or not head.losses)


def _is_its_loss(record: HeadRecord, head: HeadRecord) -> bool:
    """A loss over logits that come into the graph from outside, as many as these."""
    return record.code == "no-head" and not record.stop and record.classes == head.classes


def _stop(ended: GraphReport | None, session: Session | None) -> str:
    """Where and why a graph ended; else, of a break that ended none, the reasons that Dynamo counted."""
    if ended is not None:
        return f"{ended.break_at} ({ended.break_reason})"
    return f"({'; '.join(session.breaks)})" if session is not None and session.breaks else ""


def _refused(record: HeadRecord, code: str, stop: str, hint: str = "") -> HeadRecord:
    record, hint = record.refused(code, stop), _hint(stop, code) or hint
    return dataclasses.replace(record, hint=hint) if hint else record


def _hint(stop: str, code: str) -> str:
    """What is to be done about some breaks."""
    if "self.loss_function" in stop:  # models without a loss type of their own warn about it through a logger
        return 'set model.loss_type = "ForCausalLM" before compiling (Hugging Face)'
    if "backwards hooks" in stop:
        return "take the backward hook off the module; a hook on the weight (weight.register_hook) breaks nothing"
    if "torch.compiler.disable" in stop:
        return "take torch.compiler.disable off the head, off the loss, or off what stands between them"
    if "dynamic shape operator" in stop.lower() or "dynamic output shape" in stop.lower():
        found = f"set {_DYNAMIC}: rows that a mask selects then stay in the graph"
        # Rows of what the loss has made of each class would hold it there, too.
        of_sums = "; of a value for each class, select rows of the sums: values.sum(-1)[mask]"
        return found + of_sums if code == "returned" else found
    if "item()" in stop or "scalar" in stop.lower():
        return f"set {_SCALAR}, or take the number out of the tensor behind the loss"
    return ""


def _returns(results: Any, head: HeadRecord) -> bool:
    """Do the function's results hold something of the size of these logits?"""
    return _holds(results, head.classes) or any(
        t.numel() * t.element_size() == head.logits_bytes for t in _tensors(results)
    )


def _holds(values: Any, classes: str) -> bool:
    """A floating tensor with a dimension of so many classes; True where their number is only a symbol."""
    return not classes.isdigit() or any(int(classes) in t.shape and t.is_floating_point() for t in _tensors(values))


def _tensors(values: Any) -> list[Any]:
    import torch
    from torch.utils._pytree import tree_leaves

    return [t for t in tree_leaves(values) if isinstance(t, torch.Tensor)]


def _read_by_eager(results: Any) -> set[str]:
    """Numbers of classes of losses that eager code computed from what compiled graphs returned: autograd knows."""
    todo = [t.grad_fn for t in _tensors(results) if t.grad_fn is not None]
    seen, found = set(todo), set()
    while todo:
        node = todo.pop()
        saved = {"LogSoftmaxBackward0": "_saved_result", "LogsumexpBackward0": "_saved_self"}.get(node.name())
        if saved is not None and _above_compiled(node):
            try:
                found.add(
                    str(getattr(node, saved).shape[node._saved_dim[0] if saved == "_saved_self" else node._saved_dim])
                )
            except RuntimeError:  # a backward has freed it
                continue
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                todo.append(below)
    return found


def _above_compiled(node: Any) -> bool:
    todo, seen = [node], {node}
    while todo:
        now = todo.pop()
        if now.name().startswith("CompiledFunction"):
            return True
        for below, _ in now.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                todo.append(below)
    return False
