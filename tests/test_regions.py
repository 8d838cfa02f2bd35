"""The heads stage on joint graphs: what is rewritten computes what the graph computed, whatever it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import check_graph, inference_graph, joint_graph, joint_of_make_fx
from region_cases import KERNELS, NO_HEAD, REFUSED, REGION, Case, inputs
from turns import one_of, turns

TENSORS = inputs()
REFUSALS = {f"{code}: {name}": case for code, found in REFUSED.items() for name, case in found.items()}
ALL = {**KERNELS, **REGION, **NO_HEAD, **REFUSALS}
# Left alone where sizes are symbols: they are not known to be equal, or one is divided by.
STATIC_ONLY = {
    "gather index by T only",
    "labels transposed by broadcasting",
    "expand labels",
    "unflatten other way",
    "std",
}
# Rows that are selected twice: the user asked about sizes of the logits, nobody may ask the same about those of x.
TWICE = {"nested slices", "slice of slice of flat"}


def arguments(case: Case) -> list[torch.Tensor]:
    return [TENSORS[name] for name in case[0].split()]


def tier(name: str) -> set[str]:
    """What a head may be found as: reach may grow, it must not shrink."""
    if name in KERNELS:
        return {"kernels"}
    if name in REGION:
        return {"kernels", "region"}
    return {"kernels", "region", name.partition(":")[0]}


def numbers(name: str) -> None:
    found = check_graph(joint_graph(ALL[name][1], *arguments(ALL[name])))
    assert set(found) <= tier(name) and bool(found) == (name not in NO_HEAD)


def symbols(name: str) -> None:
    """The same tiers, and no guard more. What is refused may be refused for another reason."""
    found = check_graph(joint_graph(ALL[name][1], *arguments(ALL[name]), dynamic=True))
    assert name not in {**KERNELS, **REGION} or name in STATIC_ONLY or set(found) <= tier(name)


def no_gradients(name: str) -> None:
    found = check_graph(inference_graph(ALL[name][1], *arguments(ALL[name])))
    assert "internal-error" not in found


def ways(name: str) -> list[Callable[[str], None]]:
    inference = name in {**KERNELS, **REGION} and not name.startswith("checkpoint")  # it has nothing to recompute
    return [numbers, *([symbols] if name not in NO_HEAD else []), *([no_gradients] if inference else [])]


def cases() -> list[Any]:
    found = [(n, w) for n in one_of(3, list(ALL)) for w in turns(n, ways(n))] + [(n, symbols) for n in sorted(TWICE)]
    return [pytest.param(n, w, id=f"{n}-{w.__name__}") for n, w in dict.fromkeys(found)]


@pytest.mark.parametrize("name, way", cases())
def test_a_graph(name: str, way: Callable[[str], None]) -> None:
    way(name)


SIZES = [
    "N==V",
    "bool mask where",
    "overlapping slices",
    "flip both losses",
    "gather many",
    "trained row",
    "slice step",
]


@pytest.mark.parametrize("name", SIZES)
def test_other_sizes_than_those_of_the_trace(name):
    """One graph for all: nothing in it is the number that it was traced with."""
    args = arguments(ALL[name])
    rows = args[0].shape[0]
    fewer = [[t[:n].contiguous() if t.shape[:1] == (rows,) and t is not args[1] else t for t in args] for n in (18, 23)]
    traced = joint_graph(ALL[name][1], *args, dynamic=True)
    if name == "N==V":  # one symbol for both
        fewer = []
    assert set(check_graph(traced, fewer)) <= tier(name)


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
@pytest.mark.parametrize("name", ["V==H", "trained row", "overlapping slices", "several heads same x"])
def test_traced_by_hand(name, mode):
    assert set(check_graph(joint_of_make_fx(ALL[name][1], arguments(ALL[name]), mode))) <= tier(name)
