"""Joint graphs and graphs of inference, with values of their inputs, before any pass of Inductor's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from functorch.compile import default_partition, make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map_only

Fn = Callable[..., Any]


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


def fake_mode(gm: GraphModule) -> FakeTensorMode:
    """The mode of a graph's values."""
    values = (n.meta.get("val") for n in gm.graph.nodes)
    return next(v.fake_mode for v in values if hasattr(v, "fake_mode"))


def fresh(args: Sequence[Any]) -> list[Any]:
    """Copies of the arguments that share no memory with them; the same tensor twice stays one tensor."""
    known: dict[int, Tensor] = {}

    def copy(t: Tensor) -> Tensor:
        return known.setdefault(id(t), t.detach().clone().requires_grad_(t.requires_grad))

    return [tree_map_only(Tensor, copy, a) for a in args]


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
