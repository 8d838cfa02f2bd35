"""The heads stage on joint graphs: what is rewritten computes what the graph computed, whatever it is."""

from __future__ import annotations

import pytest
import torch
from harness import check_graph, inference_graph, joint_graph
from region_cases import KERNELS, NO_HEAD, REFUSED, REGION, Case, inputs

TENSORS = inputs()
REFUSALS = {f"{code}: {name}": case for code, found in REFUSED.items() for name, case in found.items()}
ALL = {**KERNELS, **REGION, **NO_HEAD, **REFUSALS}
# Sizes that are not known to be equal where they are symbols.
STATIC_ONLY = {"gather index by T only"}


def arguments(case: Case) -> list[torch.Tensor]:
    return [TENSORS[name] for name in case[0].split()]


def tier(name: str) -> set[str]:
    """What a head may be found as: reach may grow, it must not shrink."""
    if name in KERNELS:
        return {"kernels"}
    if name in REGION:
        return {"kernels", "region"}
    return {"kernels", "region", name.partition(":")[0]}


@pytest.mark.parametrize("name", ALL)
def test_with_numbers_for_sizes(name):
    found = check_graph(joint_graph(ALL[name][1], *arguments(ALL[name])))
    assert set(found) <= tier(name) and bool(found) == (name not in NO_HEAD)


@pytest.mark.parametrize("name", [*KERNELS, *REGION])
def test_with_symbols_for_sizes(name):
    """The same tiers, and no guard more."""
    found = check_graph(joint_graph(ALL[name][1], *arguments(ALL[name]), dynamic=True))
    assert name in STATIC_ONLY or set(found) <= tier(name)


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_with_symbols_for_sizes(name):
    """Never wrong; a size that is a symbol may be another reason."""
    check_graph(joint_graph(ALL[name][1], *arguments(ALL[name]), dynamic=True))


@pytest.mark.parametrize("name", [*KERNELS, *REGION])
def test_without_gradients(name):
    if name.startswith("checkpoint"):
        pytest.skip("nothing to recompute")
    found = check_graph(inference_graph(ALL[name][1], *arguments(ALL[name])))
    assert not set(found) & {"internal-error"}
