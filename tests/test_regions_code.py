"""The graph of a program that Inductor is given, which test_regions_lowering.py runs."""

from __future__ import annotations

import torch
from region_programs import log_probability

from lce_inductor.lower import region
from lce_inductor.lower import region_compiled as compiled


def test_one_number_for_each_row_is_selected_and_not_scattered() -> None:
    """In Inductor's code a scatter is memory of the logits' size, in fp32."""
    a = log_probability(13, 8, 31, torch.bfloat16).arguments(7)
    assert "scatter_add" in a.text
    graph, _ = compiled.build(region._Memory(a, 7, region._logits(a, 7)).key, 7, True)
    targets = {n.target for n in graph.graph.nodes}
    assert torch.ops.aten.where.self in targets and torch.ops.aten.scatter_add.default not in targets
