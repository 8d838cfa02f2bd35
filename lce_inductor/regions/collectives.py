"""Collectives: what processes have of a row, reduced over the processes, is of that row still."""

from __future__ import annotations

import torch
from torch.fx import Node

from .aten_ops import Fact, rank, rule


def reduce(node: Node) -> Fact:
    x = node.args[0]
    return Fact([(x, list(range(rank(x))))])  # type: ignore[list-item]


# Not every build of torch has these.
_REDUCING = (getattr(torch.ops._c10d_functional, name, None) for name in ("all_reduce", "wait_tensor"))
rule(*(op.default for op in _REDUCING if op is not None))(reduce)
