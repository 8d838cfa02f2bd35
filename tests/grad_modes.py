"""Programs with their gradient cut at other places: the Dynamo graph of a program, and some nodes of it detached or
moved under no_grad, enable_grad, no_grad again.

What the edited graph computes is what eager computes when it runs it. An operation that a rule takes for part of a
larger expression must cut the gradient where its own mode says.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from corpus import CASES
from fault_cases import BY_RULE, WHOLE, of_rule
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from oracle import Verdict, fresh, judge
from programs import DTYPES, Inputs, inputs
from programs import programs as drawn_programs
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx._lazy_graph_module import _use_lazy_graph_module

Fn = Callable[..., Any]
N, H, V = 24, 8, 37
SWITCH = torch._C._set_grad_enabled


class Edit(NamedTuple):
    """Positions among the calls of a graph: `detached` behind each of these; `off` and `on` are spans [from, to] whose
    gradient mode is set in this order, later ones inside or across earlier ones."""

    detached: tuple[int, ...] = ()
    spans: tuple[tuple[bool, int, int], ...] = ()


class Graph(NamedTuple):
    """A graph as Dynamo made it, and the arguments that it was called with."""

    name: str
    gm: GraphModule
    args: list[Any]


def graphs(fn: Fn, args: Sequence[Any], name: str) -> list[Graph]:
    """Every graph that Dynamo makes of a function."""
    found: list[Graph] = []

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Fn:
        def call(*real: Any) -> Any:
            known = [torch.is_tensor(a) and a.requires_grad for a in real]
            values = [a.detach().clone().requires_grad_(k) if torch.is_tensor(a) else a for a, k in zip(real, known)]
            found.append(Graph(f"{name} graph {len(found)}", gm, values))
            return gm.forward(*real)

        return call

    torch._dynamo.reset()
    torch.compile(fn, backend=backend, dynamic=False)(*args)
    return found


def calls(gm: GraphModule) -> list[Node]:
    return [n for n in gm.graph.nodes if n.op.startswith("call") and n.target is not SWITCH]


def _floats(node: Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, Tensor) and value.is_floating_point()


def edits(gm: GraphModule, rng: random.Random) -> list[Edit]:
    """Each node detached and each alone under no_grad; a span, a span with a hole in it, and the nesting turned round."""
    places = calls(gm)
    floats = [i for i, n in enumerate(places) if _floats(n)]
    last = len(places) - 1
    found = [Edit((i,)) for i in floats]
    for i in floats:
        found.append(Edit(spans=((False, i, i),)))
        to = rng.randint(i, last)
        hole = rng.randint(i, to)
        found.append(Edit(spans=((False, i, to),)))
        found.append(Edit(spans=((False, i, to), (True, hole, rng.randint(hole, to)))))
        found.append(Edit(spans=((False, i, to), (True, hole, to), (False, hole, hole))))
        found.append(Edit((i,), ((False, 0, rng.randint(0, last)), (True, rng.randint(0, i), i))))
    return found


def edited(gm: GraphModule, edit: Edit) -> GraphModule:
    """A copy of a graph with an edit applied. Modes that the graph sets itself hold where the edit sets none."""
    graph = torch.fx.Graph()
    output = graph.graph_copy(gm.graph, copies := {})
    graph.output(output)
    mode, modes, position = True, {}, 0
    places = []
    for node in gm.graph.nodes:
        if node.target is SWITCH:
            mode = node.args[0]
            graph.erase_node(copies[node])
        elif node.op.startswith("call"):
            modes[node] = mode
            for on, first, last in edit.spans:
                if first <= position <= last:
                    modes[node] = on
            places.append(node)
            position += 1
    now = True
    for node in places:
        if modes[node] != now:
            now = modes[node]
            with graph.inserting_before(copies[node]):
                graph.call_function(SWITCH, (now,))
    if not now:
        with graph.inserting_before(next(iter(graph.find_nodes(op="output")))):
            graph.call_function(SWITCH, (True,))
    for i in edit.detached:
        node = copies[places[i]]
        with graph.inserting_after(node):
            cut = graph.call_method("detach", (node,))
        node.replace_all_uses_with(cut, delete_user_cb=lambda user, cut=cut: user is not cut)
    graph.lint()
    with _use_lazy_graph_module(False):  # Dynamo does not trace a lazy one
        return GraphModule(gm, graph)


def check(graph: Graph, edit: Edit) -> Verdict:
    gm = edited(graph.gm, edit)
    # The module would be called by its type's forward; Dynamo inlines that as it would a user's.
    fn = lambda *args: gm(*args)
    verdict = judge(fn, graph.args, settings={"returned_logits": "keep"})
    if verdict.failed or sum(map(_floats, gm.graph.output_node().args[0])) < 2:
        return verdict
    return judge(fn, graph.args, first=True)


# -- where the graphs come from


def head() -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, H, generator=g, dtype=torch.float64).requires_grad_()
    weight = torch.randn(V, H, generator=g, dtype=torch.float64).requires_grad_()
    target = torch.randint(0, V, (N,), generator=g)
    target[1:2] = -100
    return [x, weight, target]


def random_programs(seed: int, count: int) -> list[Any]:
    drawn: list[Any] = []

    @seeded(seed)
    @settings(
        max_examples=count, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(drawn_programs())
    def draw(p: Any) -> None:
        drawn.append(p)

    draw()
    return drawn


def sources(seed: int = 0, count: int = 100) -> Iterator[tuple[str, Callable[[], tuple[Fn, list[Any]]]]]:
    """Name and maker of each program: one per rule, the corpus, random ones."""
    for name in BY_RULE:
        yield f"rule {name}", lambda name=name: (of_rule(name), head())
    for fn in WHOLE:
        yield f"whole {fn.__name__}", lambda fn=fn: (fn, head())
    for name, case in CASES.items():
        yield f"corpus {name}", lambda case=case: case.build(torch.float64)[:2]
    for p in random_programs(seed, count):
        yield str(p), lambda p=p: (lambda *leaves: p(Inputs(*leaves)), list(inputs(DTYPES[p.dtype])))


class Variant(NamedTuple):
    graph: Graph
    edit: Edit

    def check(self) -> Verdict:
        return check(self.graph, self.edit)

    def __str__(self) -> str:
        return f"# {self.graph.name}\n# {self.edit}\n{edited(self.graph.gm, self.edit).code.strip()}\n"


def programs(seed: int, count: int = 200, most: int = 12) -> Iterator[Variant]:
    """Some edits of every program, in an order given by the seed."""
    rng = random.Random(seed)
    listed = list(sources(seed, count))
    while True:
        rng.shuffle(listed)
        for name, make in listed:
            fn, args = make()
            try:
                found = graphs(fn, fresh(args), name)
            except Exception:  # eager refuses it, or Dynamo does
                continue
            for graph in found:
                chosen = edits(graph.gm, rng)
                for edit in rng.sample(chosen, min(most, len(chosen))):
                    yield Variant(graph, edit)
