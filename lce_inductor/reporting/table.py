"""Heads and losses as rows of text, for explain() and report()."""

from __future__ import annotations

import os
from collections.abc import Iterable

from .records import HeadRecord, size_text

_WIDTH = 58  # of a line of code


def short(source: str) -> str:
    """`file:line: code` with a path relative to the working directory, or its last parts, in one width."""
    path, colon, rest = source.partition(":")
    inside = os.path.relpath(path) if os.path.isabs(path) else path
    path = inside if not inside.startswith("..") else os.path.join(*path.split(os.sep)[-2:])
    text = path + colon + rest
    return text if len(text) <= _WIDTH else text[: _WIDTH - 3] + "..."


def sums(saved: int, held: int, records: Iterable[HeadRecord]) -> str:
    unknown = " (some of unknown size left out)" if any(r.guessed for r in records) else ""
    return f"logits saved: {size_text(saved)}, held: {size_text(held)}{unknown}"


def outcome(record: HeadRecord) -> str:
    if record.code is not None:
        return record.code
    products = [record.products_text()] if record.products else []
    tier = {"kernels": ["kernels"], "region": [f"program of {record.steps} steps"]}.get(record.tier, [])
    prefer = list(filter(None, [record.prefer_text()]))
    held = ["held all the same"] if record.held else ["a gradient held"] if record.gradient_held else []
    return ", ".join(["rewritten", *products, *tier, *prefer, *held])


def counted(record: HeadRecord) -> bool:
    """Is this the loss of a head that has a record of its own?"""
    return record.joined


def rows(graphs: Iterable[tuple[str, tuple[HeadRecord, ...], str]]) -> list[str]:
    """One row for each head, with its losses, and for each loss without one. graphs: name, records, a break's line."""
    cells = [("graph", "", "where", "logits", "bytes", "outcome")]
    for name, records, break_at in graphs:
        for r in records:
            size = f"{r.bytes_text()} {'saved' if r.saved else 'held'}"
            cells.append((name, r.kind, short(r.source), f"{r.tokens} x {r.classes}", size, outcome(r)))
            if r.kind == "linear":
                cells += [("", "loss", short(source), "", "", "") for source in r.losses if source != r.source]
        if break_at:
            cells.append(("", "break", short(break_at), "", "", ""))
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def why(record: HeadRecord) -> list[str]:
    """The paragraph below the table for what was left alone, or rewritten without a gain."""
    if counted(record) or (record.rewritten and not record.hint):
        return []
    if record.rewritten:
        return ["", record.source, f"  hint: {record.hint}"]
    return [
        "",
        record.source,
        f"  {record.code}: {record.explanation}",
        *([f"  at: {record.stop}"] if record.stop else []),
        f"  hint: {record.hint}",
    ]
