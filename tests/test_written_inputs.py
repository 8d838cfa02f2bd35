"""Inputs that are written to behind a head, in every way that AOTAutograd carries a write out.

Leaves are written to under no_grad (a copy_ in the graph), others also with their gradient (AOTAutograd copies what the
graph returns). See test_never_wrong.py for more of the first, and test_held_inputs.py for writes after the call.
"""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from corpus.harness import GraphRecord, no_codegen_backend
from text_programs import make_inputs

import lce_inductor

NAMES = ("x", "w", "b", "y")
PROGRAMS = {
    "bias": ("b", lambda x, w, b, y: (F.linear(x, w, b), b.add_(1))[0]),
    "part of a bias": ("b", lambda x, w, b, y: (F.linear(x, w, b), b[1:5].mul_(3))[0]),
    "bias of a region": ("b", lambda x, w, b, y: (F.linear(x, w, b), b.add_(1))[0].clamp(max=1.0)),
    "x of a frozen weight": ("x", lambda x, w, b, y: (F.linear(x, w.detach(), b), x.mul_(2))[0]),
    "weight of a frozen x": ("w", lambda x, w, b, y: (F.linear(x.detach(), w, b), w.mul_(2))[0]),
}


def losses(name):
    def program(*args):
        return F.cross_entropy(PROGRAMS[name][1](*args), args[-1], reduction="none") ** 2

    return program


def step(fn, frozen: str) -> list[torch.Tensor | None]:
    leaves = [
        t.requires_grad_(t.is_floating_point() and n != frozen)
        for n, t in zip(NAMES, make_inputs(NAMES, torch.float64))
    ]
    out = fn(*(t * 1 if t.requires_grad else t for t in leaves))
    out.square().sum().backward()
    return [out.detach(), *(t.grad for t in leaves)]


@pytest.mark.parametrize("frozen", ["none", "what is written"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_as_eager(name: str, frozen: str, installed: None) -> None:
    """Through all of Inductor, which leaves out copies that it takes for no-ops."""
    which = PROGRAMS[name][0] if frozen != "none" else ""
    expected = step(losses(name), which)
    records: list[GraphRecord] = []
    found = step(torch.compile(losses(name), backend=no_codegen_backend(records)), which)
    for mine, theirs in zip(found, expected):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    assert lce_inductor.report().rewritten, "the head is left alone, and nothing is shown"


def test_graphs(installed: None) -> None:
    """The forward copies the bias before the write, and the backward reads the copy."""
    records: list[GraphRecord] = []
    step(torch.compile(losses("bias"), backend=no_codegen_backend(records)), "")
    forward, backward = (r.text for r in records)
    (copy, of) = re.findall(r"%(\w+) .*lce_inductor.kept.default\]\(args = \(%(\w+),\)", forward)[0]
    if of != "primals_3":  # torch 2.15 writes to the input after it was cloned, and reads the clone
        assert re.search(rf"%{of} .*aten.clone.default\]\(args = \(%primals_3,\)", forward)
    assert copy in forward.split("return")[1], "it is not saved"
    (call,) = re.findall(r"row_stats_backward.default\]\(args = \(([^)]*)", backward)
    assert call.split(", ")[2] == f"%{copy}" and "kept" not in re.sub(copy, "", backward)
