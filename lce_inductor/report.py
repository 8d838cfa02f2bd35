"""What the passes did: one record per head, as log lines, counters and trace artifacts."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

log = logging.getLogger("lce_inductor")


@dataclasses.dataclass(frozen=True)
class HeadRecord:
    """One linear that a loss reads, or whose output is large enough to matter.

    Attributes:
        source: user's `file:line: code` of the linear; stop: the same of the node where recognition stopped.
        tokens, classes: N and V as written in the graph (a symbol under dynamic shapes).
        logits_bytes: bytes of the logits, by hint; saved if rewritten, else held.
        code: reason code, or None if rewritten.
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

    @property
    def rewritten(self) -> bool:
        return self.code is None

    def lines(self) -> list[str]:
        """The record as log lines."""
        size = f"{self.tokens}x{self.classes} logits, {self.logits_bytes / 2**20:.1f} MiB"
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


def count(key: str) -> None:
    """Count an event in torch._dynamo.utils.counters["lce_inductor"]."""
    from torch._dynamo.utils import counters

    counters["lce_inductor"][key] += 1


def publish(records: list[HeadRecord]) -> None:
    """Log and count the heads of one graph, and attach them to the structured trace."""
    if not records:
        return
    for record in records:
        count("rewritten" if record.rewritten else f"refused:{record.code}")
        for line in record.lines():
            log.debug("%s", line)
    from torch._logging import trace_structured

    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "lce_inductor_heads", "encoding": "json"},
        payload_fn=lambda: [dataclasses.asdict(r) for r in records],
    )


def records_of(plans: list[Any], config: Any) -> list[HeadRecord]:
    """Records of the heads worth telling about: rewritten, or refused with a loss or many logits."""
    from .ops.chunking import plan as chunk_plan
    from .recognize.values import info, numel_hint, size_hint, source

    found = []
    for plan in plans:
        head, refusal = plan.head, plan.refusal
        known = info(head.node)
        if known is None:
            if refusal is not None:
                found.append(_bare(head, refusal))
            continue
        if refusal is not None and not plan.terminals and not _worth_telling(plan, config):
            continue
        x = info(head.x)
        tokens, hidden = numel_hint(known.shape[:-1]), size_hint(x.shape[-1]) if x is not None else 0
        value = head.node.meta.get("example_value", head.node.meta.get("val"))
        device = getattr(getattr(value, "device", None), "type", "cpu")
        # Off the GPU a chunk is held in the statistics' dtype.
        itemsize = known.dtype.itemsize if device == "cuda" else max(known.dtype.itemsize, 4)
        chunks = chunk_plan(
            tokens, hidden, size_hint(head.num_classes), itemsize, config.chunk_tokens or 0,
            config.workspace_bytes, device=device,
        )  # fmt: skip
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
                plan=f"{chunks.count} chunks of {chunks.rows} tokens",
            )
        )
    return found


def _bare(head: Any, refusal: Any) -> HeadRecord:
    """The record of a head of which not even the shape is known."""
    from .recognize.values import source

    r = refusal.reason
    return HeadRecord(source(head.node), "?", "?", 0, r.code, r.explanation, r.hint, _stop(refusal), (), (), "")


def _worth_telling(plan: Any, config: Any) -> bool:
    """A linear without a loss is news only if its output could be logits that matter: wide and large.

    The layers of a transformer's body widen at most about fourfold.
    """
    from .recognize.values import info, size_hint

    x = info(plan.head.x)
    hidden = size_hint(x.shape[-1]) if x is not None else 0
    classes = size_hint(plan.head.num_classes)
    return bool((classes >= 32000 or classes > 5 * hidden) and plan.logits_bytes >= config.min_logits_bytes)


def _stop(refusal: Any) -> str:
    from .recognize.values import source

    node = refusal.node
    text = source(node) if node is not None else ""
    if node is not None and not text:
        text = node.format_node() or node.name
    return f"{text} ({refusal.detail})" if refusal.detail else str(text)
