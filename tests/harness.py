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

import dataclasses
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
from functorch.compile import default_partition, make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._guards import TracingContext, tracing
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.fx.passes.shape_prop import ShapeProp
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves, tree_map_only

from lce_inductor import Config, regions
from lce_inductor.ops import schema  # noqa: F401  (registers the ops)
from lce_inductor.schedule import schedule as schedule_stage

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


@dataclasses.dataclass
class Traced:
    """A graph and the values of its inputs: those of the call that it was traced from, and gradients that come in."""

    gm: GraphModule
    inputs: list[Any]
    order: list[int]  # for each tensor among the inputs, which of the function's arguments it is; -1: none

    @property
    def graph(self) -> Graph:
        return self.gm.graph

    def run(self, args: Sequence[Any] | None = None) -> list[Any]:
        """Everything that the graph returns: with the arguments of the trace, or with others (of other sizes)."""
        given = [t.detach().clone() if isinstance(t, Tensor) else t for t in self._given(args)]
        return tree_leaves(torch.fx.Interpreter(self.gm).run(*given, enable_io_processing=False))

    def guards(self) -> list[str]:
        """What the trace has had to assume about sizes."""
        env = fake_mode(self.gm).shape_env
        return [] if env is None else [str(g.expr) for g in env.guards]

    def largest(self) -> int:
        """Elements of the largest tensor that a run makes outside the fused ops."""
        return largest(self.gm, *(t.clone() if isinstance(t, Tensor) else t for t in self._given(None)))

    def _given(self, args: Sequence[Any] | None) -> list[Any]:
        holes = self.graph.find_nodes(op="placeholder")
        inputs = list(self.inputs)
        if args is not None:
            tensors = [i for i, t in enumerate(inputs) if isinstance(t, Tensor)]
            for i, k in zip(tensors, self.order):
                inputs[i] = args[k] if k >= 0 else inputs[i]
        known: dict[Any, int] = {}
        for hole, value in zip(holes, inputs):
            if isinstance(value, Tensor):
                symbols = (s.node.expr if isinstance(s, torch.SymInt) else s for s in hole.meta["val"].shape)
                known.update(zip(symbols, value.shape))
        for i, hole in enumerate(holes[: len(inputs)]):
            if isinstance(hole.meta["val"], torch.SymInt):
                inputs[i] = known.get(hole.meta["val"].node.expr, inputs[i])
                known[hole.meta["val"].node.expr] = inputs[i]
        generator = torch.Generator().manual_seed(1)
        for hole in holes[len(inputs) :]:
            inputs.append(tangent(hole.meta["val"], known, generator))
        return inputs


def tangent(like: Any, known: dict[Any, int], generator: torch.Generator) -> Any:
    """Random numbers in the shape of a graph's incoming gradient."""
    if not isinstance(like, Tensor):
        return int(like.node.expr.subs(known)) if isinstance(like, torch.SymInt) else like
    shape = [int(s.node.expr.subs(known)) if isinstance(s, torch.SymInt) else s for s in like.shape]
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(like.dtype)


def joint_graph(fn: Fn, *args: Any, dynamic: bool | None = False, decompose: bool = True) -> Traced:
    """Forward and backward of a function in one graph, before any pass of Inductor's.

    decompose: as Inductor does it; else softmax, its gradient and losses are one operation each.
    """
    return _traced(fn, args, dynamic, decompose, grad=True)


def inference_graph(fn: Fn, *args: Any, dynamic: bool | None = False, decompose: bool = True) -> Traced:
    """The graph of a function under no_grad."""
    return _traced(fn, args, dynamic, decompose, grad=False)


def _traced(fn: Fn, args: Sequence[Any], dynamic: bool | None, decompose: bool, grad: bool) -> Traced:
    graphs: list[GraphModule] = []
    inputs: list[Any] = []

    def partition(gm: GraphModule, joint_inputs: Any, **options: Any) -> Any:
        graphs.append(_copy(gm))
        return default_partition(gm, joint_inputs, **options)

    def infer(gm: GraphModule, example_inputs: Any) -> Any:
        graphs.append(_copy(gm))
        return make_boxed_func(gm.forward)

    def backend(gm: GraphModule, example_inputs: Any) -> Fn:
        run = aot_autograd(
            fw_compiler=lambda gm, inputs: make_boxed_func(gm.forward),
            inference_compiler=infer,
            partition_fn=partition,
            decompositions=select_decomp_table() if decompose else {},
        )(gm, example_inputs)

        def first(*given: Any) -> Any:
            inputs.extend(given)
            return run(*given)

        return first

    torch._dynamo.reset()
    args = fresh(args)  # Dynamo remembers on a tensor which of its sizes were symbols
    with torch.set_grad_enabled(grad):
        torch.compile(fn, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
    (gm,) = graphs
    order = [next((k for k, a in enumerate(args) if a is t), -1) for t in inputs if isinstance(t, Tensor)]
    return Traced(gm, [t.detach() if isinstance(t, Tensor) else t for t in inputs], order)


def _copy(gm: GraphModule) -> GraphModule:
    """The partitioner takes the graph apart; values (meta) stay the same objects."""
    graph = Graph()
    out = graph.graph_copy(gm.graph, {})
    graph.output(out)
    return GraphModule(gm, graph)


def joint_of_make_fx(fn: Fn, args: Sequence[Tensor], mode: str = "fake") -> Traced:
    """A joint graph by make_fx: fn's results and the gradients of the arguments that need one, for given tangents."""
    places = [i for i, t in enumerate(args) if t.requires_grad]
    shapes = [t for t in tree_leaves(fn(*args)) if t.requires_grad]

    def both(primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> Any:
        out = tree_leaves(fn(*primals))
        roots = [t for t in out if t.requires_grad]
        grads = torch.autograd.grad(roots, [primals[i] for i in places], list(tangents), allow_unused=True)
        return [t.detach() for t in out], grads

    tangents = [torch.ones_like(t).detach() for t in shapes]
    gm = make_fx(both, tracing_mode=mode, decomposition_table=select_decomp_table())(fresh(args), tangents)
    for i, hole in enumerate(gm.graph.find_nodes(op="placeholder")):
        hole.target = f"primals_{i + 1}" if i < len(args) else f"tangents_{i + 1 - len(args)}"
        hole.name = hole.target
    gm.graph.set_codegen(torch.fx.graph.CodeGen())
    gm.recompile()
    return Traced(gm, [t.detach() for t in args], list(range(len(args))))


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


def fake_mode(gm: GraphModule) -> FakeTensorMode:
    """The mode of a graph's values."""
    values = (n.meta.get("val") for n in gm.graph.nodes)
    return next(v.fake_mode for v in values if hasattr(v, "fake_mode"))


def decided(gm: GraphModule | Traced, schedule: bool = True, **settings: Any) -> regions.Decision:
    """Run the heads stage on a graph, and the schedule stage behind it."""
    gm = gm.gm if isinstance(gm, Traced) else gm
    config = Config(**{"min_logits_bytes": 0, **settings})
    with tracing(TracingContext(fake_mode(gm))):  # as Inductor runs its passes
        decision = regions.decide(gm.graph, config)
        if decision.chosen:
            regions.apply(gm.graph, decision, config)
            if schedule:
                schedule_stage(gm.graph, config)
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
            scale = max(e.abs().nan_to_num(0, 0, 0).max().item(), 1.0) if e.is_floating_point() and e.numel() else 0.0
            torch.testing.assert_close(
                f, e, rtol=64 * eps, atol=64 * eps * scale, equal_nan=True, msg=lambda m: f"result {i}: {m}"
            )
    return found


def targets(gm: GraphModule) -> list[str]:
    """The operations of a graph, in order."""
    return [_operation(n) for n in gm.graph.nodes if n.op.startswith("call")]


def largest(gm: GraphModule, *args: Any) -> int:
    """Elements of the largest tensor that a run of the graph makes outside the fused ops."""
    found = [0]

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: Node) -> Any:
            result = super().run_node(n)
            if n.op.startswith("call"):
                found.extend(t.numel() for t in tree_leaves(result) if isinstance(t, Tensor))
            return result

    Watch(gm).run(*args)
    return max(found)


# -- runs


def fresh(args: Sequence[Any]) -> list[Any]:
    """Copies of the arguments that share no memory with them; the same tensor twice stays one tensor."""
    known: dict[int, Tensor] = {}

    def copy(t: Tensor) -> Tensor:
        return known.setdefault(id(t), t.detach().clone().requires_grad_(t.requires_grad))

    return [tree_map_only(Tensor, copy, a) for a in args]


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
