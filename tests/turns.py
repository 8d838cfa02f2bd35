"""Which of several ways a case is run in: all of them with LCE_EVERYTHING=1, else one, which its name decides.

Everything takes an hour on two cores. What a run by turns leaves out is another spelling's turn.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from typing import TypeVar

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
