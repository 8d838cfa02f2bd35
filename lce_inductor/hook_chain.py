"""Several passes in a hook that takes one callable (torch before 2.13)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._inductor import custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph


def takes_lists() -> bool:
    """Do the hooks of this torch take lists of passes?"""
    return hasattr(custom_graph_pass, "get_custom_graph_passes")


class Chain(CustomGraphPass):
    """Runs passes one after another. As cacheable as its least cacheable pass: without a uuid there is none."""

    def __init__(self, passes: tuple[Callable[[Graph], None], ...]) -> None:
        self.passes = passes

    def __call__(self, graph: Graph) -> None:
        for each in self.passes:
            each(graph)

    def uuid(self) -> Any:
        ids = [each.uuid() if isinstance(each, CustomGraphPass) else None for each in self.passes]
        return None if None in ids else tuple(ids)
