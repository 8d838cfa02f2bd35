"""The joint graph of a tail, as AOTAutograd would make it, with the logits detached on their way out."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch._aot_autograd.functional_utils import from_fun, to_fun
from torch._guards import tracing
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from ..graph.simplify import simplify
from ..graph.values import info
from .products import attribute
from .tail import ENTER, EXIT, NotDeferred, Tail


@dataclasses.dataclass
class Joint:
    """A joint graph, of a module that holds its constants.

    stands_for: what its inputs are in the graph that the tail is of. detached: of each candidate, the node that leaves
    the graph in its place.
    """

    module: GraphModule
    graph: Graph
    stands_for: dict[Node, Node]
    detached: dict[Node, Node]


def value_of(node: Node) -> Any:
    return node.meta.get("example_value", node.meta.get("val"))


def fake_mode(graph: Graph) -> Any:
    """The mode of the graph's values. The trace under way may have another one already, the backend's."""
    modes = {v.fake_mode for v in map(value_of, graph.nodes) if isinstance(v, FakeTensor)}
    if len(modes) != 1:
        raise NotDeferred("the values of the graph are of no fake mode, or of several")
    return modes.pop()


@contextlib.contextmanager
def quietly(mode: Any) -> Iterator[None]:
    """What is computed in here adds no guard and no symbol to the graph of the user, and leaves no mode behind."""
    grad = torch.is_grad_enabled()
    env = mode.shape_env
    with contextlib.ExitStack() as stack:
        stack.enter_context(tracing(None))
        if env is not None:
            stack.enter_context(env.suppress_guards())
            stack.enter_context(env.ignore_fresh_unbacked_symbols())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(grad))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(mode)
        yield


def trace(graph: Graph, tail: Tail, candidates: list[Node], mode: Any) -> Joint:
    """Raises NotDeferred if the tail can't be traced, for whatever reason: the user's operations run in here."""
    constants = {n: attribute(n) for n in tail.inputs if n.op == "get_attr" and info(n) is None}
    inputs = [n for n in tail.inputs if n not in constants]
    outputs = [n for n in tail.outputs if isinstance(value_of(n), (Tensor, torch.SymInt))]
    roots = [
        n for n in outputs if n not in candidates and isinstance(value_of(n), Tensor) and value_of(n).requires_grad
    ]
    try:
        with quietly(mode):
            given = [_input(n) for n in inputs]
            tangents = [_like(value_of(n)) for n in roots]
            run = _function(tail, constants, inputs, outputs, roots, candidates)
            with enable_python_dispatcher(), FunctionalTensorMode(_allow_token_discovery=True):
                joint = make_fx(run, decomposition_table=select_decomp_table())(*given, *tangents)
    except NotDeferred:
        raise
    except Exception as error:
        raise NotDeferred(f"the end of the graph can't be traced alone: {type(error).__name__}: {error}") from error
    return _finished(joint, inputs, outputs, candidates)


def _function(
    tail: Tail, constants: dict[Node, Any], inputs: list[Node], outputs: list[Node], roots: list[Node],
    candidates: list[Node],
) -> Callable[..., Any]:  # fmt: skip
    def run(*flat: Any) -> Any:
        values = [to_fun(v) for v in flat]
        given, tangents = values[: len(inputs)], values[len(inputs) :]
        env = constants | dict(zip(inputs, given))
        with _modes() as entered:
            for node in tail.nodes:
                env[node] = _call(node, env, entered)
        out = [env[n].detach() if n in candidates else env[n] for n in outputs]
        out += [env[n] for n in tail.changed]
        starts = [env[n] for n in roots]
        if not all(t.requires_grad for t in starts):
            raise NotDeferred("an output that should need a gradient does not")
        leaves = [v for v in given if isinstance(v, Tensor) and v.requires_grad]
        grads = torch.autograd.grad(starts, leaves, tangents, allow_unused=True) if starts and leaves else ()
        return [from_fun(v) for v in (*out, *grads)]

    return run


@contextlib.contextmanager
def _modes() -> Iterator[list[Any]]:
    """Autocast as it was before, if the tail fails in the middle; a list of what it has entered."""
    entered: list[Any] = []
    with torch.set_grad_enabled(torch.is_grad_enabled()):
        try:
            yield entered
        finally:
            while entered:
                EXIT(entered.pop())


def _call(node: Node, env: dict[Node, Any], entered: list[Any]) -> Any:
    if node.op == "get_attr":
        return attribute(node)
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), env.__getitem__)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op != "call_function":
        raise NotDeferred(f"the end of the graph calls a module: {node.name}")
    if node.target is EXIT:
        entered.remove(args[0])
    result = node.target(*args, **kwargs)  # type: ignore[operator]
    if node.target is ENTER:
        entered.append(result)
    return result


def _input(node: Node) -> Any:
    value = value_of(node)
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)):
        return value
    known = info(node)
    if known is None or not known.plain or not isinstance(value, FakeTensor):
        raise NotDeferred(f"no plain tensor with a known shape: {node.name}")
    if not value.requires_grad:
        return value  # itself: a fake mask knows how many values it selects
    with torch.no_grad():
        return value.detach().requires_grad_()


def _like(value: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.empty_like(value)


def _finished(module: GraphModule, inputs: list[Node], outputs: list[Node], candidates: list[Node]) -> Joint:
    graph = module.graph
    placeholders = graph.find_nodes(op="placeholder")
    for i, node in enumerate(placeholders[len(inputs) :]):
        node.target = f"tangents_{i + 1}"
    simplify(graph)  # as the joint graph's pass will
    (end,) = graph.find_nodes(op="output")
    (results,) = end.args
    detached = {n: r for n, r in zip(outputs, results) if n in candidates}
    graph.eliminate_dead_code()
    return Joint(module, graph, dict(zip(placeholders, inputs)), detached)
