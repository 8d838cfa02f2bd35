"""Which of several ways a case is run in: all of them with LCE_EVERYTHING=1, else one, which its name decides.

Everything takes hours on two cores. What a run by turns leaves out is another spelling's turn.
"""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Sequence
from typing import Any, TypeVar

EVERYTHING = bool(os.environ.get("LCE_EVERYTHING"))
T = TypeVar("T")


def one_of(count: int, cases: Sequence[T]) -> list[T]:
    """One of `count` cases, or all with LCE_EVERYTHING=1: where others look at the same from another side."""
    return [c for c in cases if EVERYTHING or zlib.crc32(repr(c).encode()) % count == 0]


def turns(name: str, ways: Sequence[T]) -> list[T]:
    """Those of `ways` whose turn it is; zlib, since hash() differs from run to run."""
    if EVERYTHING or not ways:
        return list(ways)
    return [ways[zlib.crc32(name.encode()) % len(ways)]]


def crossed(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """All combinations of one value of each axis with LCE_EVERYTHING=1, else as few that each value is in one of them:
    of which others it is combined with, its place in its axis decides."""
    every = list(itertools.product(*(range(len(axis)) for axis in axes)))
    chosen = every if EVERYTHING else []
    for i in sorted(range(len(axes)), key=lambda i: -len(axes[i])):
        for at in range(len(axes[i])):
            if all(c[i] != at for c in chosen):
                chosen = chosen + turns(f"{i}: {at}", [c for c in every if c[i] == at])
    return [tuple(axis[at] for axis, at in zip(axes, c)) for c in sorted(chosen)]
