"""What the passes did: one record per head, as log lines, counters and trace artifacts."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections import Counter
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from ..reasons import NOWHERE, REASONS

log = logging.getLogger("lce_inductor")


@dataclasses.dataclass(frozen=True)
class HeadRecord:
    """One product that a loss reads, or could read where it is returned to; or a loss that no such product feeds.

    Attributes:
        kind: "linear", or "loss" for a loss over logits that no linear of its graph computes.
        source: user's `file:line: code` of the linear; stop: the same of the node where recognition stopped.
        losses: the same of each operation that reads the logits as a loss.
        tokens, classes: N and V as written in the graph (a symbol under dynamic shapes).
        logits_bytes: bytes of the logits, by hint; saved if rewritten, else held. guessed: how many rows there will be
            was not known when the graph was made (rows that a mask selects); sums leave such bytes out.
        code: reason code, or None if rewritten.
        trains: do the logits need a gradient?
        tier: "kernels" or "region", what computes a rewritten head; steps: of a region's program, for each row.
        products: matrix products of the head's size in a training step, of all `together` heads that one program
            computes. gradients: computed in the "forward", or by
            "recompute", or "" without any.
        held: rewritten, and yet something else in the graph needs the logits. gradient_held: or a gradient of their
            size is made in the backward: what read the logits left it nothing of them to ask for, as gather() does.
        joined: a loss whose head has a record of its own, in another graph.
        prefer: "memory" where a rewritten head's kernels are to take less of it. hint: also of a rewritten head, of
            which nothing is saved otherwise.
        told: False for what is no head as far as this graph shows; explain() may learn otherwise from what runs later.
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
    tier: str = ""
    steps: int = 0
    products: int = 0
    together: int = 1
    gradients: str = ""
    held: bool = False
    gradient_held: bool = False
    told: bool = True
    joined: bool = False
    prefer: str = ""
    guessed: bool = False

    @property
    def rewritten(self) -> bool:
        return self.code is None

    @property
    def saved(self) -> bool:
        """Do the logits not exist, nor anything of their size?"""
        return self.rewritten and not self.held and not self.gradient_held

    @property
    def saved_bytes(self) -> int:
        return self.logits_bytes if self.saved and not self.guessed else 0

    @property
    def held_bytes(self) -> int:
        """The same logits in two graphs count once."""
        return self.logits_bytes if not (self.saved or self.guessed or self.joined) else 0

    def bytes_text(self) -> str:
        return "unknown size" if self.guessed else size_text(self.logits_bytes)

    def how(self) -> str:
        """What computes a rewritten head, in words."""
        parts = {"kernels": "fused kernels", "region": f"a program of {self.steps} steps"}.get(self.tier, "")
        return ", ".join(filter(None, [parts, self.products_text(), self.prefer_text()]))

    def products_text(self) -> str:
        shared = f" for {self.together} heads" if self.together > 1 else ""
        return f"{self.products} product{'s' * (self.products > 1)}{shared}" if self.products else ""

    def prefer_text(self) -> str:
        return f"prefer={self.prefer!r}" if self.prefer else ""

    def refused(self, code: str, stop: str = "") -> HeadRecord:
        """The same head, left alone for this reason."""
        row = REASONS[code]
        return dataclasses.replace(self, code=code, explanation=row.explanation, hint=row.hint, stop=stop, told=True)

    def lines(self) -> list[str]:
        """The record as log lines."""
        size = f"{self.tokens}x{self.classes} logits, {self.bytes_text()}"
        if self.code is None:
            exist = "no longer exist, but a gradient of their size does" if self.gradient_held else "no longer exist"
            exist = "exist all the same: something else needs them" if self.held else exist
            return [
                f"rewrote {self.source} ({'; '.join(filter(None, [f'{size} {exist}', self.plan, self.how()]))})",
                *(f"  - {line}" for line in self.replaced),
                *(f"  + {line}" for line in self.inserted),
                *([f"  hint: {self.hint}"] if self.hint else []),
            ]
        where = f" at {self.stop}" if self.stop else ""
        return [
            f"left {self.source} as it is ({size}): {self.code}{where}: {self.explanation}",
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
    from torch._dynamo.utils import counters

    found = _collected.get()
    if found is not None:
        found.records += records
        return
    # A loss over small logits from elsewhere, and a small product that is returned, are no news.
    news = [r for r in records if r.told and ((r.kind == "linear" and r.losses) or r.rewritten or _is_large(r, config))]
    if not news:
        return
    prefix = "cached:" if cached else ""
    sums = counters["lce_inductor.heads"]
    for record in news:
        count(prefix + ("rewritten" if record.rewritten else f"refused:{record.code}"))
        if record.rewritten:
            sums[prefix + (record.tier or "unknown")] += 1
            sums[prefix + "steps"] += record.steps
            # of heads that are computed together, an equal share each: the sum is right
            share = record.products / record.together
            sums[prefix + "products"] += int(share) if share.is_integer() else share  # type: ignore[assignment]
        for name in ("saved_bytes", "held_bytes"):
            if getattr(record, name):
                sums[prefix + name] += getattr(record, name)
        for line in record.lines():
            log.debug("%s%s", "from the compile caches: " if cached else "", line)
    attach("lce_inductor_heads", [dataclasses.asdict(r) for r in news])


def _is_large(record: HeadRecord, config: Any) -> bool:
    return bool(record.logits_bytes >= config.min_logits_bytes)


def attach(name: str, data: Any) -> None:
    """Attach JSON-ready data to torch's structured trace (TORCH_TRACE)."""
    from torch._logging._internal import trace_structured

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "json"}, payload_fn=lambda: data)


def records_of(decision: Any, config: Any, existing: set[Any]) -> list[HeadRecord]:
    """Records of a graph's heads, and of its losses without one. existing: nodes of the graph as it is now."""
    # What was rewritten has its products elsewhere.
    alone = {n for head in decision.heads.values() if head.refusal is not None for n in head.backward}
    dense = {n for head in decision.heads.values() for n in head.backward if n in existing - alone}
    found = [_of_head(head, config, existing, _together(head, decision), dense) for head in decision.heads.values()]
    return found + [_of_stray(stray) for stray in decision.strays]


def _together(head: Any, decision: Any) -> list[Any]:
    """The heads that one program computes."""
    return [h for h in decision.heads.values() if h is head or (head.ops and h.ops is head.ops)]


def _of_head(head: Any, config: Any, existing: set[Any], together: list[Any], dense: set[Any]) -> HeadRecord:
    """dense: products of gradients of logits that are still there, but for heads that are left alone, which may share
    a weight with this one."""
    refusal = head.refusal
    record = HeadRecord(
        source=head.source or NOWHERE,
        tokens=head.tokens,
        classes=head.classes,
        logits_bytes=head.logits_bytes,
        code=None,
        explanation="",
        hint="",
        stop="",
        replaced=tuple(head.replaced) if refusal is None else (),
        inserted=tuple(head.inserted),
        plan=head.plan_text(config),
        losses=tuple(filter(None, head.losses)),
        trains=head.trains,
        tier=head.tier,
        steps=head.steps,
        products=head.products + len(dense & {n for h in together for n in h.backward}),
        together=head.together,
        gradients=head.gradients,
        held=refusal is None and head.node in existing,
        gradient_held=refusal is None and not dense.isdisjoint(head.backward),
        prefer=config.prefer if config.prefer != "speed" and head.tier == "kernels" else "",
        guessed=head.guessed,
    )
    other = _alternative(head.for_memory)
    if refusal is None:
        return dataclasses.replace(record, hint=other)
    if not head.losses and refusal.reason.code in ("returned", "no-loss"):
        record = record.refused("returned-loss-free")
        return dataclasses.replace(record, told=head.returned)
    record = record.refused(refusal.reason.code, _stop(refusal))
    hint = "; ".join(filter(None, [record.hint, other]))
    return dataclasses.replace(record, hint=hint, told=bool(head.losses) or head.returned)


def _alternative(other: Any) -> str:
    """A regions.Alternative in words."""
    if other is None:
        return ""
    return (
        f"prefer='memory' would add {size_text(other.bytes)} at the peak of a step, gradients included, where "
        f"torch.compile alone adds {size_text(other.bytes_alone)}; matrix products: {other.products} for its "
        f"{other.products_alone}"
    )


def _of_stray(stray: Any) -> HeadRecord:
    where, *more = stray.losses
    record = HeadRecord(
        source=stray.product or where or NOWHERE,
        tokens=stray.tokens,
        classes=stray.classes,
        logits_bytes=stray.logits_bytes,
        code=None,
        explanation="",
        hint="",
        stop="",
        replaced=(),
        inserted=(),
        plan="",
        kind="linear" if stray.product else "loss",
        losses=tuple(stray.losses if stray.product else more),
        trains=stray.trains,
        guessed=stray.guessed,
    )
    return record.refused(stray.refusal.reason.code, _stop(stray.refusal))


def _stop(refusal: Any) -> str:
    from ..graph.values import source  # it needs torch

    node = refusal.node
    text = source(node) if node is not None else ""
    if node is not None and not text:
        text = node.format_node() or node.name
    return f"{text} ({refusal.detail})" if refusal.detail else str(text)
