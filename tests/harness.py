"""Graphs of every kind that the passes see, and comparisons against eager.

joint_graph       what AOTAutograd hands to Inductor: forward and backward, incoming gradients as tangents_*
inference_graph   the same of a function that nobody differentiates
joint_of_make_fx  a joint graph traced by hand, of a function that calls autograd.grad
dynamo_graph      what Dynamo hands to a backend (functions, methods, in-place operators)
symbolic_graph    torch.fx.symbolic_trace with shapes propagated (modules are leaves)
aten_graph        make_fx: a flat graph of ATen overloads
compiled          torch.compile through all of Inductor's graph passes, without code generation
"""

from __future__ import annotations

import itertools
import json
import math
import operator
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from corpus import harness as casts
from corpus.harness import GraphRecord, no_codegen_backend
from torch import Tensor
from torch._dynamo.utils import counters
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.fx.passes.shape_prop import ShapeProp
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves, tree_map_only
from traced import Traced, fake_mode, fresh, inference_graph, joint_graph, joint_of_make_fx, largest

from lce_inductor import Config, regions
from lce_inductor.ops import schema  # noqa: F401  (registers the ops)
from lce_inductor.schedule import schedule as schedule_stage

__all__ = ["fresh", "inference_graph", "joint_graph", "joint_of_make_fx", "largest"]

N, H, V = 24, 8, 37  # V is no other size of any graph here, and N * V is larger than V * H

Fn = Callable[..., Any]


def head(n: int = N, h: int = H, v: int = V, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x [n, h] and weight [v, h] that require gradients, target [n] with one row ignored."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, h, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(v, h, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    target = torch.randint(0, v, (n,), generator=g)
    target[1:2] = -100
    return x, weight, target


# -- graphs


def dynamo_graph(fn: Fn, *args: Any, dynamic: bool = False) -> GraphModule:
    """The one graph that Dynamo makes of a function."""
    found: list[GraphModule] = []

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Fn:
        found.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(fn, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
    return found[0]


def symbolic_graph(module: torch.nn.Module, *args: Tensor, fake: bool = True) -> GraphModule:
    """A symbolic trace with the shapes of these arguments."""
    gm = torch.fx.symbolic_trace(module)
    if fake:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            FakeTensorProp(gm, mode).propagate(*args)
    else:
        ShapeProp(gm).propagate(*args)
    return gm


def aten_graph(fn: Fn, *args: Any, mode: str = "fake") -> GraphModule:
    """A graph of ATen overloads, as make_fx traces them."""
    return make_fx(fn, tracing_mode=mode)(*args)


def listing(graph: Graph | GraphModule) -> str:
    """A graph as short lines `name = operation(arguments)`, the same in every version of torch.

    What only takes a part of a value, `v[0]` or `v[..., 0]`, stands where it is used.
    """
    lines = []
    graph = graph.graph if isinstance(graph, GraphModule) else graph
    short: dict[Node, str] = {}
    for node in graph.nodes:
        args = [_text(a, short) for a in node.args] + [f"{k}={_text(v, short)}" for k, v in node.kwargs.items()]
        if node.op == "output":
            lines.append(f"return {_text(node.args[0], short)}")
        elif node.op in ("placeholder", "get_attr"):
            short[node] = _clean(str(node.target))
        elif node.target is operator.getitem and isinstance(node.args[1], int):
            short[node] = f"{args[0]}[{args[1]}]"
        elif node.target is torch.ops.aten.select.int and node.args[1] == -1:
            short[node] = f"{args[0]}[..., {args[2]}]"
        else:
            short[node] = node.name
            lines.append(f"{node.name} = {_operation(node)}({', '.join(args)})")
    return "\n".join(lines)


def _clean(name: str) -> str:
    for noise in ("L_", "_", "self_"):
        name = name.removeprefix(noise)
    return name.removesuffix("_")


def _operation(node: Node) -> str:
    if node.op == "call_method":
        return f".{node.target}"
    if node.op == "call_module":
        return f"self.{node.target}"
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).removesuffix(".default")
    return getattr(node.target, "__name__", str(node.target))


def _text(value: Any, names: dict[Node, str]) -> str:
    if isinstance(value, Node):
        return names[value]
    if isinstance(value, (tuple, list)):
        inner = ", ".join(_text(v, names) for v in value)
        return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
    return repr(value)


def decided(gm: GraphModule | Traced, schedule: bool = True, **settings: Any) -> regions.Decision:
    """Run the heads stage on a graph, and the schedule stage behind it."""
    gm = gm.gm if isinstance(gm, Traced) else gm
    config = Config(**{"min_logits_bytes": 0, **settings})
    with tracing(TracingContext(fake_mode(gm))):  # as Inductor runs its passes
        decision = regions.respelled(gm.graph, regions.decide(gm.graph, config), config)
        if decision.chosen:
            regions.apply(gm.graph, decision, config)
            if schedule:
                schedule_stage(gm.graph, config)
            gm.graph.eliminate_dead_code()
    gm.recompile()
    return decision


def rewrite(gm: GraphModule | Traced, schedule: bool = True, **settings: Any) -> list[str]:
    """Run both stages on a graph; "rewritten" or the reason code of each head found."""
    heads = decided(gm, schedule, **settings).heads.values()
    return ["rewritten" if h.refusal is None else h.refusal.reason.code for h in heads]


def tiers(gm: GraphModule | Traced, schedule: bool = True, **settings: Any) -> list[str]:
    """The same, but "kernels" or "region" for heads that are rewritten: what computes them."""
    heads = decided(gm, schedule, **settings).heads.values()
    return [h.tier if h.refusal is None else h.refusal.reason.code for h in heads]


def check_graph(traced: Traced, others: Sequence[Sequence[Any]] = (), **settings: Any) -> list[str]:
    """Rewrite a graph; before and after it must return the same, at the sizes of the trace and with other arguments.

    No guard may be added. Returns what tiers() does.
    """
    calls = [None, *others]
    coarsest = max(
        (
            torch.finfo(v.dtype).eps
            for n in traced.graph.nodes
            if isinstance(v := n.meta.get("val"), Tensor) and v.is_floating_point()
        ),
        default=0.0,
    )
    before, guards, text = [traced.run(a) for a in calls], traced.guards(), str(traced.graph)
    found = tiers(traced, **settings)
    assert traced.guards() == guards
    if not {"kernels", "region"} & set(found):
        assert str(traced.graph) == text
    for expected, args in zip(before, calls):
        for i, (f, e) in enumerate(zip(traced.run(args), expected, strict=True)):
            if not isinstance(e, Tensor):
                assert f == e, f"result {i}"
                continue
            assert (f.dtype, f.shape) == (e.dtype, e.shape), f"result {i}"
            eps = torch.finfo(e.dtype).eps if e.is_floating_point() else 0.0
            room = max(64 * eps, 4 * coarsest if coarsest > eps else 0.0) if e.is_floating_point() else 0.0
            scale = max(e.abs().nan_to_num(0, 0, 0).max().item(), 1.0) if e.is_floating_point() and e.numel() else 0.0
            say = lambda text, i=i: f"result {i}: {text}"
            torch.testing.assert_close(f, e, rtol=room, atol=room * scale, equal_nan=True, msg=say)
    return found


def targets(gm: GraphModule) -> list[str]:
    """The operations of a graph, in order."""
    return [_operation(n) for n in gm.graph.nodes if n.op.startswith("call")]


# -- runs


def results(fn: Fn, args: Sequence[Any]) -> list[Tensor | None]:
    """Outputs of fn, then the gradients of its arguments for fixed cotangents, then the arguments afterwards."""
    leaves = [t for t in tree_leaves(list(args)) if isinstance(t, Tensor)]
    outputs = [t for t in tree_leaves(fn(*args)) if isinstance(t, Tensor)]
    roots = [t for t in outputs if t.requires_grad]
    if roots:
        g = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype) for t in roots]
        torch.autograd.backward(roots, cotangents)
    grads = [t.grad for t in leaves if t.is_leaf and t.requires_grad]
    return [*(t.detach() for t in outputs), *grads, *(t.detach() for t in leaves)]


class Compiled:
    """A compiled function, its post-grad graphs, and the counts of what the passes did."""

    def __init__(self, fn: Fn, **options: Any) -> None:
        torch._dynamo.reset()
        counters.clear()
        self.graphs: list[GraphRecord] = []
        self.fn = torch.compile(fn, backend=no_codegen_backend(self.graphs), **options)

    def __call__(self, *args: Any) -> Any:
        return self.fn(*args)

    @property
    def counts(self) -> Counter[str]:
        return Counter(counters["lce_inductor"])

    @property
    def gradients(self) -> list[str]:
        """Where the gradients of the heads are computed: "forward" or "recompute", sorted."""
        found = ((k.removeprefix("gradients:"), n) for k, n in self.counts.items() if k.startswith("gradients:"))
        return sorted(k for k, n in found for _ in range(n))

    @property
    def refusals(self) -> dict[str, int]:
        return {k.removeprefix("refused:"): n for k, n in self.counts.items() if k.startswith("refused:")}

    @property
    def heads(self) -> list[int]:
        """How many fused heads each graph holds, those of a backward left out."""
        return [g.text.count("target=torch.ops.lce_inductor.row_stats") for g in self.graphs if g.kind != "backward"]

    @property
    def largest(self) -> int:
        """Elements of the largest storage that the graphs made, fused ops inside not counted."""
        return max(g.largest for g in self.graphs)


def check_against_eager(fn: Fn, args: Sequence[Any], **options: Any) -> Compiled:
    """Compile fn, run it on copies of args, and compare outputs, gradients and mutated arguments with eager's."""
    compiled = Compiled(fn, **options)
    check_results(fn, args, results(compiled, fresh(args)))
    return compiled


def check_results(fn: Fn, args: Sequence[Any], found: Sequence[Tensor | None]) -> None:
    """Compare results() of another way to compute fn with eager's."""
    eager = results(fn, fresh(args))
    with InDouble() as mode:
        exact = results(fn, [tree_map_only(Tensor, _double, a) for a in fresh(args)])
    assert_as_accurate(found, eager, exact, mode.narrowed)


def _double(t: Tensor) -> Tensor:
    return t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t


class InDouble(casts.InDouble):
    """Autocast runs in fp64 too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.is_autocast_enabled("cpu"):
            self.narrowed.add(torch.get_autocast_dtype("cpu"))
        return super().__torch_function__(func, types, args, kwargs)


def assert_as_accurate(
    found: Sequence[Tensor | None],
    eager: Sequence[Tensor | None],
    exact: Sequence[Tensor | None],
    narrowed: Iterable[torch.dtype] = (),
) -> None:
    """Error against fp64 at most 1.25 times eager's; dtype, shape and None as eager has them.

    The floor, relative to the exact result's 2-norm, is what two correct evaluations may differ by: one rounding
    in the narrowest dtype (the result's own, or one that the function casts to), and 16 in the dtype of the sums.
    """
    coarsest = max([0.0, *(torch.finfo(d).eps for d in narrowed)])
    assert len(found) == len(eager) == len(exact)
    for i, (f, e, r) in enumerate(zip(found, eager, exact)):
        if f is None or e is None:
            assert f is None and e is None, f"result {i}: {'None' if f is None else 'a tensor'}, eager has the opposite"
            continue
        assert r is not None
        assert (f.dtype, f.shape) == (e.dtype, e.shape), f"result {i}"
        if not f.is_floating_point():
            assert torch.equal(f, e), f"result {i}"
            continue
        accumulator = torch.float64 if f.dtype == torch.float64 else torch.float32
        floor = max(torch.finfo(f.dtype).eps, coarsest) / 2 + 16 * torch.finfo(accumulator).eps
        mine, theirs = error(f, r), error(e, r)
        norm = r.double()[torch.isfinite(r)].norm().item()
        assert mine <= 1.25 * theirs + floor * norm, f"result {i}: error {mine:.3e}, eager's {theirs:.3e} of {norm:.3e}"


def error(value: Tensor, exact: Tensor) -> float:
    """2-norm of the difference; infinities and NaN must stand at the same places."""
    a, b = value.double(), exact.double()
    special = ~torch.isfinite(b)
    if not torch.equal(torch.nan_to_num(a[special], nan=1.0), torch.nan_to_num(b[special], nan=1.0)):
        return math.inf
    return (a - b)[~special].norm().item()


def assert_same_bits(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    """Equal to the last bit, NaN included."""
    assert len(found) == len(expected)
    for i, (f, e) in enumerate(zip(found, expected)):
        if f is None or e is None:
            assert f is e, f"result {i}"
        else:
            assert (f.dtype, f.shape) == (e.dtype, e.shape), f"result {i}"
            torch.testing.assert_close(f, e, rtol=0, atol=0, equal_nan=True, msg=f"result {i} differs")


def products(call: Callable[[], Any]) -> int:
    """Matrix products that a call executes, those inside the fused ops included."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        call()
    return sum(event.name in ("aten::mm", "aten::addmm", "aten::bmm") for event in found.events())


def peak_bytes(call: Callable[[], Any]) -> int:
    """Largest number of bytes that a call holds at a time above what was there before, by torch's own allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        found.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    return max(itertools.accumulate((size for _, size in changes), initial=0))
