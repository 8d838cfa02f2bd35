"""Inputs that are written to between forward and backward: the backward is right, or raises where it must.

Vectors may be changed: torch.compile alone saves none that is only added. Of matrices the backward raises where it holds
one, and never computes with what stands there now.
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
# A bias is named in the backward, for second derivatives, and not read.
NAMED = {
    "gradients in the forward": "return F.cross_entropy(F.linear(x, w, b), y)",
    "gradients in the backward": f"z = F.linear(x, w, b)\nreturn {PLAIN}",
    "of a region": "return (F.linear(x3, w, b) - row3[..., None]).clamp(max=1).logsumexp(-1)",
    "behind a reshape": f"z = F.linear(x, w) + b.view(1, 37)\nreturn {PLAIN}",
    "of a layer before": f"z = F.linear(F.linear(x, w[:8], b[:8]).tanh(), w2)\nreturn {PLAIN}",
    "read elsewhere, too": f"z = F.linear(x, w, b)\nreturn {PLAIN} + b.sum() + (b * classes).sum()",
    "added twice": f"z = F.linear(x, w, b) + b\nreturn {PLAIN}",
}  # fmt: skip
# Here autograd itself reads it again.
READ = {
    "in a product of rows": f"z = F.linear(x, w, b)\nreturn {PLAIN} + (x * b[:8]).tanh().sum()",
    "squared": f"z = F.linear(x, w, b)\nreturn {PLAIN} * b.square().sum()",
}  # fmt: skip
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


@pytest.mark.parametrize("name", [*NAMED, *READ])
def test_a_bias(name: str) -> None:
    """It may be changed where eager does not read it again."""
    verdict = Text({**NAMED, **READ}[name], between="b.mul_(2)").check()
    if name in NAMED:
        assert (verdict.kind, verdict.rewritten) == ("right", 1), f"{verdict}\n{NAMED[name]}"
    else:
        assert verdict.kind == "invalid", verdict  # eager raises, and so did ours


@pytest.mark.parametrize(
    "config",
    [
        {"activation_memory_budget": 0.3},
        {"activation_memory_budget": 0.0},
        {"ban_recompute_not_in_allowlist": False, "aggressive_recomputation": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", [*NAMED, *READ])
def test_a_bias_where_more_is_computed_again(name: str, config: dict[str, float]) -> None:
    """Autograd looks at its version then, or the backward still does not read it."""
    with torch._functorch.config.patch(config):
        verdict = Text({**NAMED, **READ}[name], between="b.mul_(2)").check()
    assert verdict.kind in ("right", "as torch", "crash", "invalid"), f"{verdict}\n{name}"
    assert verdict.kind == "right" or "modified by an inplace operation" in verdict.detail


def test_compiled_autograd_gets_all_that_is_held(installed: None) -> None:
    """It knows of nothing that autograd does not look at."""
    import torch._dynamo.compiled_autograd as engine

    program = Text(NAMED["gradients in the forward"])
    fn, _ = program.functions()
    with torch._dynamo.config.patch(compiled_autograd=True):
        compiled, found = torch.compile(fn, backend=no_codegen_backend([])), []
        for run in (fn, compiled):
            inputs = program.inputs()
            loss = run(*inputs)
            with engine._enable(lambda gm: torch.compile(gm, backend="aot_eager")):
                loss.backward()
            found.append([t.grad for t in inputs if t.requires_grad])
    torch.testing.assert_close(*found)


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
