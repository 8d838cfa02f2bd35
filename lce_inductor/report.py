"""What the passes did: one record per head, as log lines, counters and trace artifacts."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections import Counter
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from .reasons import REASONS

log = logging.getLogger("lce_inductor")

# What reads logits as a loss does; a softmax alone may be attention.
_LOSSES = ("cross_entropy", "nll_loss", "log_softmax")
# On the way from an input of the graph to a loss these leave a tensor the same logits.
_SAME_LOGITS = (
    "cast", "same", "detach", "reshape", "flatten", "permute", "transpose", "t", "mT", "getitem", "slice", "pad",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class HeadRecord:
    """One linear that a loss reads, or whose output is large enough to matter; or a loss that no linear feeds.

    Attributes:
        kind: "linear", or "loss" for a loss over logits that no linear of its graph computes.
        source: user's `file:line: code` of the linear; stop: the same of the node where recognition stopped.
        losses: the same of each operation that reads the logits as a loss.
        tokens, classes: N and V as written in the graph (a symbol under dynamic shapes).
        logits_bytes: bytes of the logits, by hint; saved if rewritten, else held.
        code: reason code, or None if rewritten.
        trains: do the logits need a gradient?
    """

    source: str
    tokens: str
    classes: str
    logits_bytes: int
    code: str | None
    explanation: str
    hint: str
    stop: str
    replaced: tuple[str, ...]
    inserted: tuple[str, ...]
    plan: str
    kind: str = "linear"
    losses: tuple[str, ...] = ()
    trains: bool = False

    @property
    def rewritten(self) -> bool:
        return self.code is None

    def refused(self, code: str, stop: str = "") -> HeadRecord:
        """The same head, left alone for this reason."""
        row = REASONS[code]
        return dataclasses.replace(self, code=code, explanation=row.explanation, hint=row.hint, stop=stop)

    def lines(self) -> list[str]:
        """The record as log lines."""
        size = f"{self.tokens}x{self.classes} logits, {size_text(self.logits_bytes)}"
        if self.code is None:
            return [
                f"rewrote {self.source or 'head'} ({size} no longer exist; {self.plan})",
                *(f"  - {line}" for line in self.replaced),
                *(f"  + {line}" for line in self.inserted),
            ]
        where = f" at {self.stop}" if self.stop else ""
        return [
            f"left {self.source or 'head'} as it is ({size}): {self.code}{where}: {self.explanation}",
            f"  hint: {self.hint}",
        ]


def size_text(count: int) -> str:
    """A number of bytes in the unit that fits."""
    unit, text = next(((u, t) for u, t in ((30, "GiB"), (20, "MiB")) if count >= 1 << u), (10, "KiB"))
    return f"{count / (1 << unit):.1f} {text}" if count else "0"


@dataclasses.dataclass
class Collected:
    """Records and counts that somebody asked for, instead of log lines and counters."""

    records: list[HeadRecord] = dataclasses.field(default_factory=list)
    counts: Counter[str] = dataclasses.field(default_factory=Counter)


_collected: ContextVar[Collected | None] = ContextVar("lce_inductor_collected", default=None)


@contextlib.contextmanager
def collect() -> Iterator[Collected]:
    """Take what is published and counted inside the with-block; nobody else hears of it."""
    found = Collected()
    token = _collected.set(found)
    try:
        yield found
    finally:
        _collected.reset(token)


def collecting() -> bool:
    return _collected.get() is not None


def count(key: str) -> None:
    """Count an event in torch._dynamo.utils.counters["lce_inductor"]."""
    from torch._dynamo.utils import counters

    found = _collected.get()
    (counters["lce_inductor"] if found is None else found.counts)[key] += 1


def publish(records: list[HeadRecord], config: Any, cached: bool = False) -> None:
    """Log and count the heads of one graph, and attach them to the structured trace.

    cached: the graph came from a compile cache; the records are those of the compile that filled it.
    """
    found = _collected.get()
    if found is not None:
        found.records += records
        return
    # A large output that no loss reads is news where it could be saved; a loss without a head is explain()'s to tell.
    news = [r for r in records if r.losses or r.logits_bytes >= config.min_logits_bytes]
    if not news:
        return
    prefix = "cached:" if cached else ""
    for record in news:
        if record.kind == "linear":
            count(prefix + ("rewritten" if record.rewritten else f"refused:{record.code}"))
        for line in record.lines():
            log.debug("%s%s", "from the compile caches: " if cached else "", line)
    attach("lce_inductor_heads", [dataclasses.asdict(r) for r in news])


def attach(name: str, data: Any) -> None:
    """Attach JSON-ready data to torch's structured trace (TORCH_TRACE)."""
    from torch._logging import trace_structured

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "json"}, payload_fn=lambda: data)


def records_of(graph: Any, plans: list[Any], config: Any) -> list[HeadRecord]:
    """Records of a graph after recognition: heads worth telling about (rewritten, or refused with a loss or many
    classes), and losses whose logits no linear of the graph computes."""
    from .graph.values import info, source

    read_by, homeless = _losses_left(graph, plans)
    found = []
    for plan in plans:
        head, refusal = plan.head, plan.refusal
        known = info(head.node)
        losses = tuple(dict.fromkeys(map(source, (*(t.node for t in plan.terminals), *read_by.get(id(plan), ())))))
        if known is None:
            if refusal is not None:
                found.append(_bare(head, refusal))
            continue
        if refusal is not None and not losses and not _wide(plan):
            continue
        found.append(
            HeadRecord(
                source=source(head.node),
                tokens="*".join(map(str, known.shape[:-1])),
                classes=str(head.num_classes),
                logits_bytes=plan.logits_bytes,
                code=None if refusal is None else refusal.reason.code,
                explanation="" if refusal is None else refusal.reason.explanation,
                hint="" if refusal is None else refusal.reason.hint,
                stop="" if refusal is None else _stop(refusal),
                replaced=tuple(plan.replaced_nodes),
                inserted=tuple(n.format_node() or n.name for n in plan.new_nodes),
                plan=_chunks(head, config),
                losses=losses,
                trains=known.requires_grad,
            )
        )
    return found + [_homeless(node, logits) for node, logits in homeless]


def _chunks(head: Any, config: Any) -> str:
    """The chunk plan in words."""
    from .recognize.walk import chunks_of

    chunks = chunks_of(head, config)
    return f"{chunks.count} chunks of {chunks.rows} tokens"


def _bare(head: Any, refusal: Any) -> HeadRecord:
    """The record of a head of which not even the shape is known."""
    from .graph.values import source

    r = refusal.reason
    return HeadRecord(source(head.node), "?", "?", 0, r.code, r.explanation, r.hint, _stop(refusal), (), (), "")


def _wide(plan: Any) -> bool:
    """A linear without a loss is news only if its output could be logits: wide, and not a layer of the body.

    The layers of a transformer's body widen at most about eightfold, and what they give is not returned.
    """
    from .graph.values import info, size_hint

    x = info(plan.head.x)
    hidden = size_hint(x.shape[-1]) if x is not None else 0
    classes = size_hint(plan.head.num_classes)
    return bool(classes >= 32000 or classes > (5 if plan.returned else 8) * hidden)


def _losses_left(graph: Any, plans: list[Any]) -> tuple[dict[int, list[Any]], list[tuple[Any, Any]]]:
    """Losses that are still in the graph: by the id of the plan whose head's logits they read, however changed on
    the way; and, with their logits, those that read no head's."""
    from torch.fx import Node

    heads = {plan.head.node: plan for plan in plans}
    owners: dict[Any, Any] = {}  # of each loss: its plan, None, or the loss that it is a part of
    read_by: dict[int, list[Any]] = {}
    homeless = []
    for node in graph.nodes:
        logits, classes = _read_as_loss(node)
        if logits is None:
            continue
        owner = owners[node] = _owner(logits, classes, heads, owners)
        if owner is None:
            homeless.append((node, logits))
        elif not isinstance(owner, Node):
            read_by.setdefault(id(owner), []).append(node)
    return read_by, homeless


def _read_as_loss(node: Any) -> tuple[Any, Any]:
    """The logits that a node reads as a loss, and their number of classes; (None, None) for any other node."""
    from .recognize.canon import canonical
    from .graph.values import info

    call = canonical(node)
    known = info(call.get("input")) if call is not None and call.name in _LOSSES else None
    if call is None or known is None or getattr(node.target, "namespace", "") == "lce_inductor":
        return None, None
    dim = call.get("dim", -1) if call.name == "log_softmax" else min(1, len(known.shape) - 1)
    return call.get("input"), known.shape[dim] if isinstance(dim, int) and known.shape else None


def _owner(logits: Any, classes: Any, heads: dict[Any, Any], owners: dict[Any, Any]) -> Any:
    """Backwards from a loss to the nearest product or loss: the plan of that head, the loss, or None."""
    from .graph.values import same

    todo, visited = [logits], set()
    while todo:
        node = todo.pop()
        if node in visited:
            continue
        visited.add(node)
        if node in owners:
            return node
        if node not in heads:
            todo += node.all_input_nodes
        elif same(heads[node].head.num_classes, classes):
            return heads[node]
    return None


def _homeless(node: Any, logits: Any) -> HeadRecord:
    """The record of a loss over logits that come into the graph, or from something that is no linear."""
    from .recognize.canon import canonical
    from .graph.values import info, numel_hint, source

    known = info(logits)
    assert known is not None
    origin = logits
    while (call := canonical(origin)) is not None and call.name in _SAME_LOGITS and call.get("input") is not None:
        origin = call.get("input")
    from_outside = origin.op in ("placeholder", "get_attr")
    row = REASONS["no-head"]
    return HeadRecord(
        source=source(node),
        tokens="*".join(map(str, known.shape[:-1])),
        classes=str(known.shape[-1]),
        logits_bytes=numel_hint(known.shape) * known.dtype.itemsize,
        code=row.code,
        explanation=row.explanation,
        hint=row.hint,
        stop="" if from_outside else f"{source(origin)} (computes them)",
        replaced=(),
        inserted=(),
        plan="",
        kind="loss",
        losses=(source(node),),
        trains=known.requires_grad,
    )


def _stop(refusal: Any) -> str:
    from .graph.values import source

    node = refusal.node
    text = source(node) if node is not None else ""
    if node is not None and not text:
        text = node.format_node() or node.name
    return f"{text} ({refusal.detail})" if refusal.detail else str(text)
