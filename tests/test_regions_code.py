"""Programs before they run: the graph that Inductor is given, and whether all that is written fits together."""

from __future__ import annotations

import pytest
import torch
from region_programs import CASES, log_probability

from lce_inductor.lower import region
from lce_inductor.lower import region_compiled as compiled
from lce_inductor.ops.row_region import dry_run
from lce_inductor.spec.program import Program, Ref, parse


def test_one_number_for_each_row_is_selected_and_not_scattered() -> None:
    """In Inductor's code a scatter is memory of the logits' size, in fp32."""
    a = log_probability(13, 8, 31, torch.bfloat16).arguments(7)
    assert "scatter_add" in a.text
    graph, _ = compiled.build(region._Memory(a, 7, region._logits(a, [7] * len(a.xs)), [True] * len(a.xs)).key, 7, True)
    targets = {n.target for n in graph.graph.nodes}
    assert torch.ops.aten.where.self in targets and torch.ops.aten.scatter_add.default not in targets


@pytest.mark.parametrize("name", CASES)
def test_a_dry_run_takes_what_runs(name: str) -> None:
    dry_run(*CASES[name](13, 8, 31, torch.float32).call, 7, 1 << 30)


def changed(step: int | None, result: int | None) -> tuple[object, ...]:
    """The call of log_probability with a step, or a result, that reads its targets instead."""
    *call, text = log_probability(13, 8, 31, torch.float32).call
    p, other = parse(text), Ref(1)
    steps, results = list(p.steps), list(p.results)
    if step is not None:
        steps[step] = steps[step]._replace(args=(other, *steps[step].args[1:]))
    if result is not None:
        results[result] = results[result]._replace(value=other)
    return (*call, Program(p.inputs, tuple(steps), tuple(results)).text(), 7, 1 << 30)


def test_a_dry_run_names_what_does_not_fit() -> None:
    dry_run(*changed(None, 0))  # a value of each row for another
    with pytest.raises(RuntimeError, match=r"result 2 of kind 'dw' must be \[2, 31\], got \[2, 1\]"):
        dry_run(*changed(None, 2))
    with pytest.raises(RuntimeError, match=r"program|size|dim"):
        dry_run(*changed(0, 1))
