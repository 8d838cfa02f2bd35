"""Inputs that are written to between forward and backward: the backward is right, or raises where it must.

Vectors may be changed: torch.compile alone saves none that is only added. Of matrices that it does not save either the
backward raises, and never computes with what stands there now.
"""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from corpus.harness import GraphRecord, no_codegen_backend
from test_written_inputs import step
from text_programs import Text

ROWS = "F.cross_entropy({z}, {y}, reduction='none')"
FLAT = ROWS.format(z="z.flatten(0, 1)", y="y3.flatten()")
PLAIN = ROWS.format(z="z", y="y")
# Programs, and what is changed: of each, every way in which the backward may hold it.
RIGHT = {
    "row subtracted": ("z = F.linear(x3, w) - row3[..., None]\nreturn z.clamp(max=1).logsumexp(-1)", "row3.mul_(2)"),
    "classes added": (f"z = F.linear(x, w) + classes\nreturn {PLAIN}", "classes.mul_(2)"),
    "classes added as a row": (f"z = (F.linear(x, w) + classes[None]).clamp(max=1)\nreturn {PLAIN}", "classes.mul_(2)"),
    "mask of classes": (f"z = F.linear(x, w).masked_fill(mask_classes[None], -1e4)\nreturn {PLAIN}", "mask_classes.logical_not_()"),
    "labels": (f"z = F.linear(x3, w, b)\nreturn {FLAT}", "y3.copy_(y3.flip(0))"),
}  # fmt: skip
RAISES = {
    "mask": (f"z = F.linear(x, w) * mask\nreturn {PLAIN}", "mask.logical_not_()"),
    "added to each logit": (f"z = F.linear(x, w) + const\nreturn {PLAIN}", "const.mul_(2)"),
    "frozen x": (f"z = F.linear(x3.detach(), w)\nreturn {FLAT}", "x3.mul_(2)"),
    "frozen x, cut": (f"z = F.linear(x3.detach()[1:, :, :8], w)\nreturn {FLAT.replace('y3', 'y3[1:]')}", "x3.mul_(2)"),
    "frozen x, unbound": (f"z = F.linear(x3.detach().unbind(0)[1], w)\nreturn {PLAIN.replace('y,', 'y3[1],')}", "x3.mul_(2)"),
    "frozen weight": (f"z = F.linear(x3, w.detach(), b)\nreturn {FLAT}", "w.mul_(2)"),
    "frozen weight, turned": (f"z = x @ w.detach().T[:, :30].clone()\nreturn {PLAIN.replace('y,', 'y % 30,')}", "x.mul_(2)"),
    "weight turned in a region": (f"z = (x @ w.detach().T).clamp(max=1)\nreturn {PLAIN}", "w.mul_(2)"),
    "several labels": ("z = F.linear(x, w)\nreturn z.gather(1, many).sum(-1) - z.logsumexp(-1)", "many.copy_(many.flip(0))"),
    "soft labels": ("z = F.linear(x, w)\nreturn F.cross_entropy(z, soft, reduction='none')", "soft.mul_(2)"),
}  # fmt: skip


@pytest.mark.parametrize("name", [*RIGHT, *RAISES])
def test_between_forward_and_backward(name: str) -> None:
    body, change = {**RIGHT, **RAISES}[name]
    text = Text(body, between=change)
    verdict = text.check()
    if name in RIGHT:
        assert (verdict.kind, verdict.rewritten) == ("right", 1), f"{verdict}\n{text}"
    else:  # ours raises; where eager does not, what it holds is a matrix
        assert "modified by an inplace operation" in verdict.detail, f"{verdict}\n{text}"
    assert Text(body).check()[:3] == ("right", "", 1)


def test_a_vector_is_copied_and_a_matrix_is_not(installed: None) -> None:
    """Forward and backward read the same copy of the bias; the weight is held itself."""
    records: list[GraphRecord] = []
    step(
        torch.compile(
            lambda x, w, b, y: F.cross_entropy(F.linear(x, w, b), y, reduction="none") ** 2,
            backend=no_codegen_backend(records),
        ),
        "",
    )
    forward, backward = (r.text for r in records)
    (copy,) = re.findall(r"%(\w+) .*lce_inductor.kept.default\]\(args = \(%primals_3,\)", forward)
    for graph, op in ((forward, "row_stats"), (backward, "row_stats_backward")):
        (call,) = re.findall(rf"{op}.default\]\(args = \(([^)]*)", graph)
        assert call.split(", ")[:3] == ["%primals_1", "%primals_2", f"%{copy}"]
    assert "kept.default" not in backward
