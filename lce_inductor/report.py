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


def records_of(heads: list[Any], config: Any) -> list[HeadRecord]:
    """Records of the heads of a graph that are worth telling about: rewritten, or refused where a loss reads them or
    they are returned as logits are."""
    found = []
    for head in heads:
        refusal = head.refusal
        if refusal is not None and not head.losses and not _looks_like_logits(head):
            continue
        chunks = head.chunks(config)
        found.append(
            HeadRecord(
                source=head.source,
                tokens=head.tokens,
                classes=head.classes,
                logits_bytes=head.logits_bytes,
                code=None if refusal is None else refusal.reason.code,
                explanation="" if refusal is None else refusal.reason.explanation,
                hint="" if refusal is None else refusal.reason.hint,
                stop="" if refusal is None else _stop(refusal),
                replaced=tuple(head.replaced) if refusal is None else (),
                inserted=tuple(head.inserted),
                plan=f"{chunks.count} chunks of {chunks.rows} tokens",
                losses=tuple(head.losses),
                trains=head.trains,
            )
        )
    return found


def _looks_like_logits(head: Any) -> bool:
    """Returned, and wide: what a loss outside could read."""
    if head.refusal.reason.code not in ("returned", "no-loss"):
        return False
    _, hidden, classes, _ = head.sizes
    return bool(classes >= 32000 or classes > 5 * hidden)


def _stop(refusal: Any) -> str:
    from .graph.values import source

    node = refusal.node
    text = source(node) if node is not None else ""
    if node is not None and not text:
        text = node.format_node() or node.name
    return f"{text} ({refusal.detail})" if refusal.detail else str(text)
