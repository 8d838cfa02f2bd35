"""What really happened in this process: every graph compiled with the passes, and every read of deferred logits."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from . import table
from .records import HeadRecord, log, size_text

_GRAPHS = 1000  # kept; of older ones only the sums
_SITES = 200


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled graph. cached: its code came from a compile cache, and so do its records. settings: of the passes."""

    compile_id: str
    records: tuple[HeadRecord, ...]
    cached: bool
    thread: str
    break_at: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {
            "compile_id": self.compile_id,
            "cached": self.cached,
            "thread": self.thread,
            "heads": [_brief(r) for r in self.records],
        }


def _brief(record: HeadRecord) -> dict[str, Any]:
    """A record without the text of nodes, which may be long."""
    left_out = ("replaced", "inserted", "told")
    data = {k: v for k, v in dataclasses.asdict(record).items() if k not in left_out}
    return {"outcome": "rewritten" if record.rewritten else "left alone", **data, "saved": record.saved}


@dataclasses.dataclass
class Reads:
    """Reads of deferred logits of one size, in rows and classes.

    rows: how many they computed; products: that in products of the whole head. pending: of a head under defer().
    """

    logits: tuple[int, int]
    count: int = 0
    rows: int = 0
    bytes: int = 0
    products: float = 0.0
    pending: bool = False


@dataclasses.dataclass(frozen=True)
class Report:
    """What happened so far. print() shows a table; as_dict() and to_json() give the same as data.

    Attributes:
        graphs: those compiled last, oldest first. forgotten: how many older ones are only in the sums.
        reads: of deferred logits, by eager code. read_by_compiled: were functions compiled, too, that read some? What
            these compute themselves is not counted.
    """

    graphs: tuple[Compiled, ...]
    reads: tuple[Reads, ...]
    read_by_compiled: bool
    forgotten: int
    rewritten: int
    left_alone: int
    saved_bytes: int
    held_bytes: int

    @property
    def records(self) -> list[HeadRecord]:
        return [record for graph in self.graphs for record in graph.records]

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        numbers = ("forgotten", "rewritten", "left_alone", "saved_bytes", "held_bytes", "read_by_compiled")
        return {
            **{name: getattr(self, name) for name in numbers},
            "graphs": [graph.as_dict() for graph in self.graphs],
            "deferred_reads": [{**dataclasses.asdict(r), "logits": list(r.logits)} for r in self.reads],
        }

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.as_dict(), indent=indent)

    def __str__(self) -> str:
        cached = sum(g.cached for g in self.graphs)
        total = len(self.graphs) + self.forgotten
        lines = [
            f"lce_inductor.report: graphs compiled: {total}{f' ({cached} from the compile caches)' if cached else ''}; "
            f"heads rewritten: {self.rewritten} of {self.rewritten + self.left_alone}; "
            f"{table.sums(self.saved_bytes, self.held_bytes, self.records)}"
        ]
        if any(g.records for g in self.graphs):
            rows = [(_name(g), g.records, g.break_at) for g in self.graphs if g.records]
            lines += ["", *table.rows(rows), *(line for r in self.records for line in table.why(r))]
        for reads in self.reads:
            lines += ["", _told(reads)]
        if self.read_by_compiled:
            lines += ["", "compiled functions read deferred logits, too: their products are not counted here"]
        if not total:
            lines.append(
                "no graph was compiled with the passes: call install(), if you did not, before the first call of a "
                "compiled function, in the thread that compiles; what torch.compile leaves to eager makes no graph "
                "(explain() says so)"
            )
        return "\n".join(lines)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # a notebook shows the table
        printer.text(str(self))


def _name(graph: Compiled) -> str:
    return graph.compile_id + (" cached" if graph.cached else "")


def times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _told(reads: Reads) -> str:
    return (
        f"deferred logits {list(reads.logits)} were read {times(reads.count)} by eager code: {reads.products:.2f} more "
        f"products of the head, {size_text(reads.bytes)} computed ({_WITHOUT_READS[reads.pending]})"
    )


# What a user can do instead, of logits that a compiled model returned and of those of a head under defer().
_WITHOUT_READS = {
    False: "who reads them several times, and has room for them, reads logits.clone()",
    True: "torch.compile of the function that reads them does without",
}


class _History:
    """Everything under one lock: graphs are compiled in several threads."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.graphs: deque[Compiled] = deque(maxlen=_GRAPHS)
        self.reads: OrderedDict[tuple[int, int, bool], Reads] = OrderedDict()
        self.read_by_compiled = False
        self.forgotten = self.rewritten = self.left_alone = self.saved_bytes = self.held_bytes = 0

    def add(self, graph: Compiled) -> None:
        with self.lock:
            self.forgotten += len(self.graphs) == _GRAPHS
            self.graphs.append(graph)
            for record in graph.records:
                self.rewritten += record.rewritten
                self.left_alone += not record.rewritten and not record.joined
                self.saved_bytes += record.saved_bytes
                self.held_bytes += record.held_bytes

    def read(self, logits: tuple[int, int], rows: int, size: int, pending: bool) -> bool:
        """Is it the first of these logits?"""
        with self.lock:
            key = (*logits, pending)
            first = key not in self.reads
            if first and len(self.reads) == _SITES:
                self.reads.popitem(last=False)
            reads = self.reads.setdefault(key, Reads(logits, pending=pending))
            reads.count += 1
            reads.rows += rows
            reads.bytes += size
            reads.products += rows / max(logits[0], 1)
            return first


_history = _History()
_ignored: ContextVar[bool] = ContextVar("lce_inductor_ignored", default=False)


def graph_compiled(compile_id: str, records: list[HeadRecord], cached: bool) -> None:
    told = tuple(r for r in records if r.told)
    _history.add(Compiled(compile_id, told, cached, threading.current_thread().name))


def deferred_read(whole: int, rows: int, classes: int, itemsize: int, pending: bool = False) -> None:
    """Some rows of deferred logits, of so many, are about to be computed. pending: of a head under defer()."""
    if _ignored.get():
        return
    shape = int(whole), int(classes)
    if _history.read(shape, int(rows), int(rows) * int(classes) * itemsize, pending):
        log.info(
            "deferred logits %s are read: a read costs a product of its rows. lce_inductor.report() counts them, "
            "%s", list(shape), _WITHOUT_READS[pending],
        )  # fmt: skip


def read_by_compiled() -> None:
    """A function is being compiled that reads deferred logits."""
    if not _ignored.get():
        _history.read_by_compiled = True


@contextlib.contextmanager
def ignored() -> Iterator[None]:
    """Reads inside the with-block are not the user's."""
    token = _ignored.set(True)
    try:
        yield
    finally:
        _ignored.reset(token)


def report() -> Report:
    """What happened in this process so far: `print(lce_inductor.report())`.

    Each graph that was compiled with the passes, also those whose code came from a compile cache; each head in it:
    rewritten, by which kernels or program, with how many products and what that saves, or why not; and reads of
    deferred logits. It need not be asked for beforehand. The last 1000 graphs are kept; the sums are of all.
    """
    h = _history
    with h.lock:
        reads = tuple(dataclasses.replace(r) for r in h.reads.values())
        return Report(
            tuple(h.graphs), reads, h.read_by_compiled, h.forgotten, h.rewritten, h.left_alone, h.saved_bytes,
            h.held_bytes,
        )  # fmt: skip


def forget() -> None:
    """Begin anew."""
    global _history
    _history = _History()
