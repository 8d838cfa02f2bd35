"""A fresh process for test_caches.py: compiles one training step in several settings and tells what the caches did.

Argument: a JSON list of objects with `install` (settings, or null) and `user` ("", "uuid" or "callable": a pass of the
user's own in the joint hook). Prints a JSON list of results.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass

import lce_inductor

calls: list[str] = []


class UserPass(CustomGraphPass):
    """A pass that changes nothing."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        calls.append("user")

    def uuid(self) -> str:
        return "user pass, version 1"


USER = {"": None, "uuid": UserPass(), "callable": lambda graph: calls.append("user")}


def measure(install: dict[str, Any] | None, user: str = "") -> dict[str, Any]:
    """Counts and results of one compile."""
    torch._dynamo.reset()
    counters.clear()
    calls.clear()
    torch.manual_seed(0)
    config.joint_custom_pre_pass = USER[user]
    if install is not None:
        lce_inductor.install(**install)

    @torch.compile
    def step(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(x, w), y)

    x, w, y = torch.randn(24, 8, requires_grad=True), torch.randn(37, 8, requires_grad=True), torch.arange(24)
    loss = step(x, w, y)
    loss.backward()
    eager = F.cross_entropy(F.linear(x, w), y)
    for found, wanted in zip((loss, x.grad, w.grad), (eager, *torch.autograd.grad(eager, (x, w)))):
        torch.testing.assert_close(found, wanted)
    lce_inductor.uninstall()
    fx, aot = counters["inductor"], counters["aot_autograd"]
    return {
        "fx": [fx["fxgraph_cache_hit"], fx["fxgraph_cache_miss"], fx["fxgraph_cache_bypass"]],
        "aot": [aot["autograd_cache_hit"], aot["autograd_cache_miss"], aot["autograd_cache_bypass"]],
        "rewritten": counters["lce_inductor"]["rewritten"],
        "user": len(calls),
        "bits": [t.double().sum().item().hex() for t in (loss, x.grad, w.grad)],
    }


if __name__ == "__main__":
    print(json.dumps([measure(**step) for step in json.loads(sys.argv[1])]))
