"""Inputs of an op on several devices: an error that names the argument, as eager's."""

from __future__ import annotations

import pytest
import rows_cases
import torch
from rows_cases import ALL, GRADS, Case
from torch import Tensor
from torch._subclasses import FakeTensorMode

from lce_inductor.ops import schema  # noqa: F401  (registers the ops)

ops = torch.ops.lce_inductor
CASE = Case(N=5, H=4, V=7, K=2, bias=True, class_weight=True, grads=GRADS)
HEAD = ("x", "weight", "bias", "target", "class_weight")
ROWS = ("g_lse", "g_target", "g_sum", "g_neg_entropy")
PLAN = (2, 1 << 30)
MASK = [True, True, True]
OPS = {
    "row_stats": (*HEAD[1:], "needed"),
    "row_stats_backward": (*HEAD[1:], "lse", "neg_entropy", *ROWS),
    "row_stats_with_grad": (*HEAD[1:], ROWS[0], "g_lse_slope", *ROWS[1:], "needed"),
}


def call(op: str, t: dict[str, Tensor]) -> None:
    given = [t[name] for name in ("x", *OPS[op]) if name != "needed"]
    stats = [] if op == "row_stats_backward" else [ALL]
    needed = {"needed": t["needed"]} if "needed" in OPS[op] else {}
    getattr(ops, op)(*given, "", *stats, *PLAN, *([] if op == "row_stats" else [MASK]), **needed)


def tensors() -> dict[str, Tensor]:
    a, g = rows_cases.make(CASE, "cpu")
    t = dict(zip((*HEAD, "g_lse", "g_lse_slope", *ROWS[1:]), (*a[:5], *g)))
    n = torch.zeros(5, dtype=torch.float64)
    return t | {"lse": n, "neg_entropy": n.float(), "g_lse_slope": n.float(), "needed": torch.ones(5, dtype=torch.bool)}


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("op, name", [(op, name) for op, names in OPS.items() for name in names])
def test_the_argument_on_another_device_is_named(op: str, name: str, fake: bool) -> None:
    """At run time, and where torch.compile traces."""
    t = tensors()
    call(op, t)
    if fake:
        with FakeTensorMode() as mode:
            t = {k: mode.from_tensor(v) for k, v in t.items()}
            t[name] = torch.empty(t[name].shape, dtype=t[name].dtype, device="cuda")
            with pytest.raises(RuntimeError, match=rf"{name} must be on the device of x, cpu, got cuda"):
                call(op, t)
    else:
        t[name] = t[name].to("meta")
        with pytest.raises(RuntimeError, match=rf"{name} must be on the device of x, cpu, got meta"):
            call(op, t)


def test_a_compiled_call_fails_as_eager(installed: None) -> None:
    t = tensors()
    x, w, y = t["x"], t["weight"].requires_grad_(), t["target"][:, 0].clamp(min=0).to("meta")
    fn = lambda x, w, y: torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, w), y)
    for run in (fn, torch.compile(fn)):
        with pytest.raises((RuntimeError, torch._dynamo.exc.TorchRuntimeError)):
            run(x, w, y)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("op, name", [(op, name) for op, names in OPS.items() for name in names])
def test_the_argument_left_on_the_cpu_is_named(op: str, name: str) -> None:
    t = {k: v.cuda() if k != name else v for k, v in tensors().items()}
    with pytest.raises(RuntimeError, match=rf"{name} must be on the device of x, cuda:0, got cpu"):
        call(op, t)
