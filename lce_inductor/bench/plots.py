"""Pictures: time and added memory over one dimension of a sweep, and as bars."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .measure import FLOOR, Row
from .processes import OK, OUT_OF_MEMORY

_NAMES = {"N": "tokens N", "H": "hidden size H", "V": "vocabulary V"}
# Distinct for readers who do not see all colours: lce_inductor and the floor look the same in every picture.
_COLORS = ("#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#a08000", "#7a5195", "#4d4d4d")
_MARKERS = "osv^Dp*h"


def can_plot() -> bool:
    """Is matplotlib installed?"""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def draw(path: Path, dimension: str, rows: Sequence[Row], caption: str) -> None:
    """Write a PNG with two panels over N, H or V. A cross at the upper edge marks a size that ran out of memory."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(12, 5), layout="constrained")
    panels = figure.subplots(1, 2)
    styles = _styles(rows)
    sizes = sorted({getattr(row.job.shape, dimension) for row in rows})
    figures: list[tuple[str, Callable[[Row], float | None]]] = [
        ("time of a step (ms)", lambda row: row.ms),
        ("memory added by a step (MiB)", lambda row: None if row.added_bytes is None else row.added_bytes / 2**20),
    ]
    for axes, (label, value) in zip(panels, figures):
        for name, style in styles.items():
            mine = [row for row in rows if row.job.impl == name]
            points = [(getattr(r.job.shape, dimension), v) for r in mine if (v := value(r)) is not None]
            if points:
                axes.plot(*zip(*points), label=name, **style)
            lost = [getattr(row.job.shape, dimension) for row in mine if row.status == OUT_OF_MEMORY]
            if lost:
                at_the_top = axes.get_xaxis_transform()
                axes.plot(lost, [0.98] * len(lost), "x", color=style["color"], transform=at_the_top, markersize=9)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sizes)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
            axis.set_minor_locator(NullLocator())
        axes.set(xlabel=_NAMES[dimension], ylabel=label, title=label.partition(" (")[0])
        axes.tick_params(axis="x", labelrotation=30 if len(sizes) > 5 else 0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if any(row.status == OK for row in rows):
        panels[0].legend(loc="upper left", fontsize=9)
    if any(row.status == OUT_OF_MEMORY for row in rows):
        panels[1].annotate("x: out of memory", (0.99, 0.02), xycoords="axes fraction", ha="right", fontsize=8)
    figure.suptitle(caption, fontsize=9)
    figure.savefig(path, dpi=130)


def draw_bars(
    path: Path, groups: Mapping[str, Sequence[tuple[str, float | None, float | None, str]]], caption: str
) -> None:
    """Write a PNG with a line of two panels for each group, whose entries are (name, ms, GiB, status).

    A bar without a figure has its status written in its place.
    """
    from matplotlib.figure import Figure

    height = sum(0.32 * len(entries) + 0.9 for entries in groups.values()) + 0.6
    figure = Figure(figsize=(12, height), layout="constrained")
    panels = figure.subplots(len(groups), 2, squeeze=False)
    for line, (title, entries) in zip(panels, groups.items()):
        for axes, column, label in zip(line, (1, 2), ("time of a step (ms)", "memory added by a step (GiB)")):
            values = [entry[1] if column == 1 else entry[2] for entry in entries]
            highest = max((value or 0.0 for value in values), default=0.0) or 1.0
            for i, (entry, value) in enumerate(zip(entries, values)):
                axes.barh(i, value or 0.0, color="#0b62c4" if entry[0] == "lce_inductor" else "#b0b0b0", height=0.7)
                text = entry[3] if value is None else f"{value:,.4g}"
                axes.text((value or 0.0) + 0.01 * highest, i, text, va="center", fontsize=8)
            axes.set_yticks(range(len(entries)), [entry[0] for entry in entries])
            axes.invert_yaxis()
            axes.set_xlim(0, 1.15 * highest)
            axes.set_title(f"{title}: {label}", fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(caption, fontsize=9)
    figure.savefig(path, dpi=130)


def _styles(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    styles: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(row.job.impl for row in rows):
        if name == FLOOR:
            styles[name] = {"color": "black", "linestyle": ":", "linewidth": 1.5}
        elif name == "lce_inductor":
            styles[name] = {"color": "#0b62c4", "marker": "o", "linewidth": 2.5, "zorder": 3}
        else:
            i = len(styles)
            color, marker = _COLORS[i % len(_COLORS)], _MARKERS[i % len(_MARKERS)]
            styles[name] = {"color": color, "marker": marker, "linewidth": 1.5}
    return styles
