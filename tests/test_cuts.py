"""What was cut from one value is told from what was not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from harness import aten_graph
from torch import Tensor

from lce_inductor.graph.cuts import uncut

X = torch.arange(24 * 6.0).view(24, 6)
Cut = Callable[[Tensor], Sequence[Tensor]]

WHOLE: dict[str, Cut] = {
    "chunks": lambda x: x.chunk(4),
    "a last one that is shorter": lambda x: x.split(7),
    "sizes": lambda x: x.split([3, 20, 1]),
    "slices": lambda x: [x[:5], x[5:9], x[9:]],
    "beyond the end": lambda x: [x[:20], x[20:40]],
    "flattened": lambda x: [p.reshape(-1, 6) for p in x.view(4, 6, 6).split(3)],
}
NOT: dict[str, Cut] = {
    "another order": lambda x: x.chunk(4)[::-1],
    "a part twice": lambda x: [*x.chunk(4)[:3], x.chunk(4)[0]],
    "not all": lambda x: x.chunk(4)[:3],
    "not the end": lambda x: [x[:5], x[5:23]],
    "not the start": lambda x: [x[1:5], x[5:]],
    "overlapping": lambda x: [x[:6], x[5:]],
    "every second": lambda x: [x[0:12:2], x[12:24:2]],
    "from the end": lambda x: [x[:5], x[-19:]],
    "columns": lambda x: x.chunk(2, 1),
    "columns, flattened": lambda x: [p.reshape(-1, 6) for p in x.view(6, 4, 6).chunk(2, 1)],
    "rows and columns mixed": lambda x: [p.reshape(-1, 3) for p in x.chunk(4)],
    "of two": lambda x: [x[:5], (x + 1)[5:]],
    "no cut": lambda x: [x, x + 1],
}


@pytest.mark.parametrize("name", [*WHOLE, *NOT])
def test_uncut(name: str) -> None:
    cut = {**WHOLE, **NOT}[name]
    graph = aten_graph(lambda x: [p.clone() for p in cut(x)], X)
    parts = [n.args[0] for n in graph.graph.nodes if n.target is torch.ops.aten.clone.default][-len(cut(X)) :]
    found = uncut(parts)  # type: ignore[arg-type]
    assert (found is not None) == (name in WHOLE)
    if found is not None:
        rest = cut(X)[0].shape[1:]
        assert found.meta["val"].numel() == X.numel()
        torch.testing.assert_close(torch.cat(list(cut(X))), X.reshape(-1, *rest), rtol=0, atol=0)
