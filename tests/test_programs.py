"""Random programs against eager, and against torch.compile alone where the pass left them alone.

More of them: python -m pytest tests/test_programs.py --programs 1000 --hypothesis-seed 1, or many_programs.py
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch._dynamo.guards as guards
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from harness import Compiled, assert_same_bits, error
from hypothesis import HealthCheck, given, settings
from programs import DTYPES, B, Program, T, V, programs
from torch import Tensor
from torch.fx import Graph
from turns import EVERYTHING

import lce_inductor
from lce_inductor.passes import DeferPass, HeadsPass

QUICK = 30 if EVERYTHING else 15


@contextlib.contextmanager
def cheap() -> Iterator[None]:
    """Without what takes a quarter of the time and touches no graph: keys of caches, and measuring guards."""
    with (
        functorch_config.patch(enable_autograd_cache=False),
        inductor_config.patch(fx_graph_cache=False),
        mock.patch.object(guards, "profile_guard_manager", lambda *args: 0.0),
    ):
        yield


@contextlib.contextmanager
def watched(changed: list[bool]) -> Iterator[None]:
    """Tell of each pass that runs whether it changed anything: nodes, their order, arguments, or metadata."""

    def watch(run: Callable[[Any, Graph], None]) -> Callable[[Any, Graph], None]:
        def both(self: Any, graph: Graph) -> None:
            before = _nodes(graph)
            run(self, graph)
            changed.append(_nodes(graph) != before)

        return both

    with contextlib.ExitStack() as stack:
        for each in (DeferPass, HeadsPass):
            stack.enter_context(mock.patch.object(each, "run", watch(each.run)))
        yield


def _nodes(graph: Graph) -> list[tuple[Any, ...]]:
    return [(n, n.op, n.target, n.args, n.kwargs, [(k, _Same(v)) for k, v in n.meta.items()]) for n in graph.nodes]


class _Same:
    """A value that equals nothing but itself, kept alive so that no other gets its identity."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value


def compiled(p: Program) -> tuple[Compiled, list[Tensor | None]]:
    fn = Compiled(p, dynamic=p.dynamic or None)
    # torch.compile alone refuses a second backward unless told so.
    with functorch_config.patch(donated_buffer=p.backward != "twice"):
        return fn, p.train(fn, DTYPES[p.dtype])


def check(p: Program) -> None:
    """Same numbers as eager, no logits held where all is rewritten, same graphs or bits where nothing is."""
    try:
        eager = p.train(p, DTYPES[p.dtype])
    except RuntimeError as error:  # an in-place change that autograd forbids
        assert "inplace operation" in str(error) or "in-place" in str(error), p
        return
    except IndexError:
        assert "half of the rows" in p.steps, p  # of a single one
        return
    changed: list[bool] = []
    with lce_inductor.installed(min_logits_bytes=0), watched(changed), cheap():
        fn, found = compiled(p)
        counts, refusals, largest = fn.counts, fn.refusals, fn.largest
    assert "internal-error" not in refusals, p
    missing = [i for i, (f, e) in enumerate(zip(found, eager, strict=True)) if f is None and e is not None]
    assert not missing, f"{p}: no gradients {missing}"
    exact = eager if p.dtype == "fp64" else p.train(p, torch.float64)
    try:
        _assert_all_close(p, found, eager, exact)
    except AssertionError:
        if p.dtype == "fp64":
            raise
        # Where bf16 numbers cancel, torch.compile alone may be as far from eager: its roundings are not eager's.
        _assert_all_close(p, found, compiled(p)[1], exact)
    if all(heads == p.heads for heads in fn.heads) and p.outputs != "logits":
        assert largest < B * T * (V - 3), f"{p}: logits are held"
    assert changed, p
    if not counts["rewritten"] and any(changed):  # else what follows the passes is torch.compile alone
        assert_same_bits(found, compiled(p)[1])


def _assert_all_close(p: Program, *runs: Sequence[Tensor | None]) -> None:
    for found, eager, exact in zip(*_zeros_for_none(*runs), strict=True):
        _assert_close(p, found, eager, exact)


def _assert_close(p: Program, found: Tensor | None, eager: Tensor | None, exact: Tensor | None) -> None:
    """To the last digits in fp64. Narrower, a program of many roundings may be lucky or not: how accurate the parts are
    is tested elsewhere, here it is whether they are put together right."""
    if found is None or eager is None or exact is None:
        return
    assert (found.dtype, found.shape) == (eager.dtype, eager.shape), p
    if p.dtype == "fp64":
        torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-8, equal_nan=True, msg=lambda m: f"{p}: {m}")
        return
    ours, theirs, norm = error(found, exact), error(eager, exact), exact.nan_to_num(posinf=0, neginf=0).norm().item()
    # Logits come to 15 and more, and each rounding of them counts fully in a probability.
    roundings = {"fp32": 128, "bf16": 16}[p.dtype]
    room = 2 * theirs + roundings * torch.finfo(DTYPES[p.dtype]).eps * (norm + 1)
    assert ours <= room, f"{p}: error {ours:.3e}, eager's {theirs:.3e} of {norm:.3e}"


def _zeros_for_none(*runs: Sequence[Tensor | None]) -> list[list[Tensor | None]]:
    """A number that cancels out of the loss may get a zero where eager cuts it off."""
    shapes = [next((t for t in same if t is not None), None) for same in zip(*runs, strict=True)]
    return [[torch.zeros_like(s) if t is None and s is not None else t for t, s in zip(run, shapes)] for run in runs]


def test_random_programs(request: pytest.FixtureRequest) -> None:
    count = request.config.getoption("--programs")

    @settings(
        max_examples=count or QUICK, deadline=None, database=None, derandomize=not count, print_blob=False,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(programs())
    def run(p: Program) -> None:
        check(p)

    run()


@pytest.mark.parametrize(
    "found_wrong",
    [
        Program(("row offset", "divided"), (("picked", "detached"),)),
        Program(("swapped",), (("one row", ""), ("logsumexp", ""))),
        Program(("swapped", "minus"), (("three rows", ""), ("max", "no_grad"))),
        Program(("part of the batch", "halved"), (("sum", ""), ("picked", "")), True),
        Program(("last position", "trained scale"), (("weighted rows", "after log_softmax"), ("nll", "no_grad")), True),
        Program(("flat", "minus"), (("mean", ""), ("picked probability", "after log_softmax")), True),
        Program(("masked classes",), (("picked probability", ""),)),
        Program(("masked classes",), (("one-hot", ""),)),
        Program(("masked classes", "class bias"), (("mean", ""),)),
        Program(("masked classes", "capped"), (("nll", "after log_softmax"),), head="matmul and bias"),
        Program(losses=(("one row", ""),), frozen=frozenset({"weight"}), dynamic=True),
        Program(
            ("plus", "plus in place", "shifted", "shifted"),
            (("sum", "no_grad"), ("by hand", "no_grad")),
            head="tied",
            second="same weight",
            outputs="logits",
            dtype="bf16",
        ),
    ],
    ids=str,
)
def test_programs_that_once_went_wrong(found_wrong: Program) -> None:
    check(found_wrong)
