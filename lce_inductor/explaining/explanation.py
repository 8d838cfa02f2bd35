"""explain(): which heads of a function are rewritten, which are not, and why."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from .. import install
from ..config import Config, make_config
from ..reporting import history, table
from ..reporting.records import HeadRecord, attach
from . import tracing
from .joined import across
from .tracing import GraphReport
from .undisturbed import undisturbed


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What explain() found. print() shows a table; as_dict() and to_json() give the same as data.

    Attributes:
        graphs: in the order in which they were compiled.
        notes: what concerns no single head.
        settings: the settings that the table is for.
    """

    graphs: tuple[GraphReport, ...]
    notes: tuple[str, ...]
    settings: Config

    @property
    def records(self) -> list[HeadRecord]:
        return [record for graph in self.graphs for record in graph.records]

    @property
    def saved_bytes(self) -> int:
        """Bytes of logits that no longer exist, by hint."""
        return sum(r.saved_bytes for r in self.records)

    @property
    def held_bytes(self) -> int:
        """Bytes of logits that stay, by hint; the same logits in two graphs count once."""
        return sum(r.held_bytes for r in self.records)

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return {
            "saved_bytes": self.saved_bytes,
            "held_bytes": self.held_bytes,
            "settings": dataclasses.asdict(self.settings),
            "notes": list(self.notes),
            "graphs": [dataclasses.asdict(graph) for graph in self.graphs],
        }

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.as_dict(), indent=indent)

    def __str__(self) -> str:
        heads = [r for r in self.records if not table.counted(r)]
        done = sum(r.rewritten for r in heads)
        lines = [
            f"lce_inductor.explain: graphs: {len(self.graphs)}; heads rewritten: {done} of {len(heads)}; "
            f"{table.sums(self.saved_bytes, self.held_bytes, self.records)}"
        ]
        if not self.graphs:
            lines = ["lce_inductor.explain: graphs: 0; nothing is known of what eager code holds"]
        elif not heads:
            lines.append("no head, and no loss over logits")
        else:
            graphs = [(str(i), g.records, g.break_at) for i, g in enumerate(self.graphs)]
            lines += ["", *table.rows(graphs), *(line for r in self.records for line in table.why(r))]
        return "\n".join([*lines, *(line for note in self.notes for line in ("", f"note: {note}"))])

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # a notebook shows the table
        printer.text(str(self))


def explain(fn: Callable[..., Any], **settings: Any) -> Callable[..., Explanation]:
    """Say what becomes of each head and each loss of a function: `print(lce_inductor.explain(fn)(*args))`.

    fn is what you compile: a function, a module, or what torch.compile made of one, whose options= and dynamic=
    are then used. Of a function that is not compiled itself but calls compiled parts, these parts are told.
    The call compiles afresh, past all compile caches, through every graph pass of Inductor, but generates no code; it
    takes seconds. Where compiled code for these arguments exists already, the table is for the passes that it was
    compiled with. With settings (as install() takes them) the table is for these; without, for what is in force.

    The call runs fn once on args, forward; the backward is traced, not run. The gradients of parameters, buffers
    and generators of random numbers that fn, its modules and args hold are put back afterwards, as are torch's
    compile counters; your compiled code stays in place (before torch 2.13, where a graph breaks, this counts as one
    of its recompilations). What else fn does is done: an optimizer step inside fn steps, and tensors changed in
    place stay changed. It needs the memory of a forward pass.

    Raises:
        ValueError, TypeError: a setting that install() would not take either.
        Whatever fn raises.
    """
    asked = make_config(settings) if settings else None
    target = tracing.target_of(fn)

    def run(*args: Any, **kwargs: Any) -> Explanation:
        session = tracing.Session(asked)
        with undisturbed(fn, args, kwargs), history.ignored():
            results = session.run(target, args, kwargs)
        graphs = across(session, results, (args, kwargs))
        notes = session.notes()
        if asked is not None and not install.is_installed():
            notes.append("install() is not in force: the table is for install() with these settings")
        explanation = Explanation(tuple(graphs), tuple(notes), session.config or Config())
        attach("lce_inductor_explain", explanation.as_dict())
        return explanation

    return run


__all__ = ["Explanation", "GraphReport", "explain"]
