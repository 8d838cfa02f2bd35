"""Heads whose classes are split among processes, and collectives of other kinds around the logits.

Each process's graph is traced on its own, then all are run in step: where one comes to a collective, all must come to
the same one, or real processes would wait for each other forever.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness import joint_graph, listing, rewrite
from torch import Tensor
from torch.utils._pytree import tree_leaves
from traced import Traced, inference_graph

from lce_inductor.config import make_config
from lce_inductor.passes import HeadsPass
from lce_inductor.reporting.records import collect

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="a torch without torch.distributed")
N, H, V = 12, 6, 34
SHARDS = (slice(0, 19), slice(19, V))  # not as many classes in each

Fn = Callable[..., Any]


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """Of one process: enough for a trace."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def reduced(x: Tensor, op: str) -> Tensor:
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_reduce(x, op, dist.group.WORLD.group_name))


class Sum(torch.autograd.Function):
    """A sum over processes, each of which goes on with all of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return reduced(x, "sum")

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Megatron(torch.autograd.Function):
    """As in Megatron-LM: the softmax is kept, and turned into the gradient in place."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor, first: int) -> Tensor:
        top = z.max(dim=-1)[0]
        dist.all_reduce(top, op=dist.ReduceOp.MAX)
        z = z - top.unsqueeze(-1)
        outside = (y < first) | (y >= first + z.shape[1])
        local = y.clone() - first
        local[outside] = 0
        picked = z[torch.arange(len(y)), local].clone()
        picked[outside] = 0.0
        dist.all_reduce(picked)
        exps = z.exp()
        total = exps.sum(-1)
        dist.all_reduce(total)
        ctx.save_for_backward(exps / total.unsqueeze(-1), outside, local)
        return total.log() - picked

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        p, outside, local = ctx.saved_tensors
        dz = p.clone()
        dz[torch.arange(len(dz)), local] -= 1.0 - outside.to(dz.dtype)
        return dz * g.unsqueeze(-1), None, None


class LossParallel(torch.autograd.Function):
    """As in torch's loss_parallel(): labels are picked by gather, and put by an index that may count from the end."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor, first: int) -> Tensor:
        z = z - reduced(z.amax(1, True), "max")
        log_p = z - reduced(z.exp().sum(1, True), "sum").log()
        outside = (y < first) | (y >= first + z.shape[1])
        local = torch.where(outside, 0, y - first)
        here = torch.where(outside[:, None], 0, log_p.gather(1, local[:, None]))
        ctx.save_for_backward(log_p, outside, local)
        return -reduced(here, "sum")[:, 0]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        log_p, outside, local = ctx.saved_tensors
        dz = torch.zeros_like(log_p)
        dz[torch.arange(len(dz)), local] = outside.to(dz.dtype) - 1.0
        return (dz + log_p.exp()) * g[:, None], None, None


def picked(z: Tensor, y: Tensor, first: int) -> Tensor:
    outside = (y < first) | (y >= first + z.shape[1])
    here = z.gather(1, torch.where(outside, 0, y - first)[:, None])[:, 0]
    return Sum.apply(torch.where(outside, 0, here))


def lse_of_all(z: Tensor) -> Tensor:
    top = reduced(z.detach().amax(1), "max")
    return top + Sum.apply((z - top[:, None]).exp().sum(1)).log()


def rows_of_all(z: Tensor, y: Tensor, first: int) -> Tensor:
    return lse_of_all(z) - picked(z, y, first)


def by_lse(z: Tensor, y: Tensor, first: int) -> Tensor:
    """The logsumexp of each process, then that of these."""
    lse = torch.logsumexp(z, 1)
    top = reduced(lse.detach(), "max")
    return top + Sum.apply((lse - top).exp()).log() - picked(z, y, first)


def plain(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="none")


# name -> (loss of each row on one process's classes, on all classes), then what makes logits
Loss = tuple[Fn, Fn]
LOSSES: dict[str, Loss] = {
    "Megatron": (lambda z, y, first: Megatron.apply(z, y, first), plain),
    "loss_parallel": (lambda z, y, first: LossParallel.apply(z, y, first), plain),
    "by autograd": (rows_of_all, plain),
    "by logsumexp": (by_lse, plain),
    "z-loss": (
        lambda z, y, first: rows_of_all(z, y, first) + 0.1 * lse_of_all(z) ** 2,
        lambda z, y: plain(z, y) + 0.1 * z.logsumexp(1) ** 2,
    ),
    "weights of rows": (
        lambda z, y, first: rows_of_all(z, y, first) * torch.where(y % 3 == 0, 0, 1.5),
        lambda z, y: plain(z, y) * torch.where(y % 3 == 0, 0, 1.5),
    ),
    "focal": (
        lambda z, y, first: (lambda rows: (1 - (-rows).exp()) ** 2 * rows)(rows_of_all(z, y, first)),
        lambda z, y: (lambda rows: (1 - (-rows).exp()) ** 2 * rows)(plain(z, y)),
    ),
    "softcap": (
        lambda z, y, first: rows_of_all(3 * torch.tanh(z / 3), y, first),
        lambda z, y: plain(3 * torch.tanh(z / 3), y),
    ),
}


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight and bias of all classes, labels."""
    g = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*s, generator=g, dtype=torch.float64).to(dtype) for s in ((N, H), (V, H), (V,)))
    return x, w, b, torch.randint(0, V, (N,), generator=g)


def traced(loss: Fn, x: Tensor, w: Tensor, b: Tensor, y: Tensor, how: Fn = joint_graph) -> list[Traced]:
    """The graph of each process."""
    found = []
    for shard in SHARDS:
        given = [t.detach().clone().requires_grad_() for t in (x, w[shard], b[shard])]
        run = lambda x, w, b, y, first=shard.start: loss(F.linear(x, w, b), y, first).mean()
        found.append(how(run, *given, y))
    return found


Request = tuple[str, Tensor]


def steps(graph: Traced) -> Generator[Request, Tensor, list[Any]]:
    """Runs a graph up to each collective, which is given back to it."""
    run = torch.fx.Interpreter(graph.gm)
    run.args_iter = iter(t.clone() if isinstance(t, Tensor) else t for t in graph._given(None))
    for node in graph.graph.nodes:
        name = getattr(node.target, "__name__", "")
        if name == "all_reduce.default":
            (x, op, _), _ = run.fetch_args_kwargs_from_env(node)
            run.env[node] = yield op, x
        elif name == "wait_tensor.default":
            run.env[node] = run.env[node.args[0]]
        elif node.op == "output":
            return [v for v in tree_leaves(run.map_nodes_to_values(node.args[0], node)) if v is not None]
        else:
            run.env[node] = run.run_node(node)
    raise AssertionError("no output")


def together(graphs: Sequence[Traced]) -> list[list[Any]]:
    """Results of all processes. Raises if they do not come to the same collectives."""
    runs, results, given = [steps(g) for g in graphs], {}, [None] * len(graphs)
    while len(results) < len(runs):
        asked: dict[int, Request] = {}
        for i, run in enumerate(runs):
            try:
                asked[i] = run.send(given[i])  # type: ignore[arg-type]
            except StopIteration as end:
                results[i] = end.value
        assert len(asked) in (0, len(runs)), "a process waits for the others forever"
        assert len({(op, x.shape, x.dtype) for op, x in asked.values()}) <= 1
        for i, (op, x) in asked.items():
            whole = torch.stack([x for _, x in asked.values()])
            given[i] = whole.sum(0) if op == "sum" else whole.amax(0)  # type: ignore[call-overload]
            assert given[i].shape == x.shape
    return [results[i] for i in range(len(runs))]


def largest(graph: Traced) -> int:
    """Elements of the largest value that the graph makes."""
    values = [n.meta["val"] for n in graph.graph.nodes if n.op == "call_function"]
    return max(v.numel() for v in tree_leaves(values) if isinstance(v, Tensor))


def check(graphs: Sequence[Traced], loss: Fn, given: tuple[Tensor, ...], tolerance: float = 1e-12) -> None:
    """Loss and gradients of all processes together, against those of one process that has all classes."""
    x, w, b, y = given
    whole = [t.detach().double().requires_grad_() for t in (x, w, b)]
    tangent = graphs[0]._given(None)[-1]
    value = loss(F.linear(*whole), y).mean()
    dx, dw, db = torch.autograd.grad(value, whole, tangent.double())
    found = together(graphs)
    for (part, _, part_dw, part_db, *_), shard in zip(found, SHARDS):
        for ours, theirs in ((part, value), (part_dw, dw[shard]), (part_db, db[shard])):
            assert (ours - theirs).norm() <= tolerance * (1 + theirs.norm())
    assert (sum(r[1].double() for r in found) - dx).norm() <= tolerance * (1 + dx.norm())


@pytest.mark.parametrize("name", LOSSES)
def test_split_head(name):
    """Rewritten in all processes, in one and in none: the same numbers, and nobody waits."""
    split, whole = LOSSES[name]
    given = inputs()
    graphs = traced(split, *given)
    check(graphs, whole, given)
    for graph in graphs:
        assert largest(graph) >= N * 15
        assert rewrite(graph) == ["rewritten"]
        assert "row_stats_backward" in str(graph.graph) and largest(graph) < N * 15
        check(graphs, whole, given)


def test_split_head_of_any_size():
    given = inputs()
    graphs = traced(LOSSES["loss_parallel"][0], *given, how=functools.partial(joint_graph, dynamic=True))
    guards = [graph.guards() for graph in graphs]
    assert [rewrite(graph) for graph in graphs] == [["rewritten"]] * 2
    assert [graph.guards() for graph in graphs] == guards
    check(graphs, plain, given)


def test_split_head_in_low_precision():
    given = inputs(torch.bfloat16)
    loss = LOSSES["by autograd"][0]
    graphs = traced(lambda z, y, first: loss(z.float(), y, first), *given)
    assert [rewrite(graph) for graph in graphs] == [["rewritten"]] * 2
    check(graphs, plain, given, 1e-2)


def test_split_head_without_gradients():
    given = inputs()
    graphs = traced(rows_of_all, *given, how=inference_graph)
    assert [rewrite(graph) for graph in graphs] == [["rewritten"]] * 2
    expected = plain(F.linear(*given[:3]), given[3]).mean()
    assert all(torch.allclose(loss, expected, rtol=1e-12) for (loss,) in together(graphs))


@pytest.mark.parametrize("name", ["Megatron", "by autograd", "z-loss"])
def test_all_classes_of_a_process_are_masked(name):
    """Its own logsumexp is -inf. Its probabilities are zero all the same, and not 0 / 0."""
    x, w, b, y = inputs()
    b[SHARDS[1]] = -torch.inf
    given, (split, whole) = (x, w, b, y % 19), LOSSES[name]
    graphs = traced(split, *given)
    for graph in graphs:
        assert rewrite(graph) == ["rewritten"]
    check(graphs, whole, given)


def test_labels_are_one_column():
    """The forward has looked them up without counting from the end."""
    graph, _ = traced(LOSSES["loss_parallel"][0], *inputs())
    rewrite(graph)
    (node,) = graph.graph.find_nodes(op="call_function", target=torch.ops.lce_inductor.row_stats.default)
    assert node.args[3].meta["val"].shape == (N, 1)


def test_other_collectives_stay_between():
    """One that has nothing to do with the head is where it was, among those of the head."""

    def loss(z: Tensor, y: Tensor, first: int) -> Tensor:
        top = reduced(z.detach().amax(1), "max")
        count = reduced((y % 2).sum(), "sum")
        return (top + Sum.apply((z - top[:, None]).exp().sum(1)).log() - picked(z, y, first)) / count

    given = inputs()
    graphs = traced(loss, *given)
    before = [collectives(graph) for graph in graphs]
    assert [op for op, _ in before[0][:3]] == ["max", "sum", "sum"] and before[0][1][1] == ()
    for graph in graphs:
        assert rewrite(graph) == ["rewritten"]
    assert [collectives(graph) for graph in graphs] == before
    check(graphs, lambda z, y: plain(z, y) / (2 * (y % 2).sum()), given)


def collectives(graph: Traced) -> list[Any]:
    nodes = graph.graph.find_nodes(op="call_function", target=torch.ops._c10d_functional.all_reduce.default)
    return [(n.args[1], tuple(n.meta["val"].shape)) for n in nodes]


@pytest.mark.parametrize("between", [False, True])
def test_heads_of_one_weight(between):
    """One call of all rows; not where it would have to wait for what is exchanged behind the first head."""

    def fn(x: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        first = F.cross_entropy(F.linear(x[:5], w, b), y[:5], reduction="sum")
        count = reduced((y % 2).sum(), "sum")
        labels = reduced(y, "max") if between else y
        return (first + F.cross_entropy(F.linear(x[5:], w, b), labels[5:], reduction="sum")) / count

    *parameters, y = inputs()
    graph = joint_graph(fn, *(t.requires_grad_() for t in parameters), y)
    (expected,), order = together([graph]), collectives(graph)
    assert rewrite(graph) == ["rewritten"] * 2 and collectives(graph) == order
    calls = graph.graph.find_nodes(op="call_function", target=torch.ops.lce_inductor.row_stats_with_grad.default)
    assert len(calls) == 1 + between
    (found,) = together([graph])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_labels_that_come_behind_a_collective():
    """The statistics are computed at once, and the labels are among what they are computed of: all would wait."""

    def loss(z: Tensor, y: Tensor, first: int) -> Tensor:
        top = reduced(z.detach().amax(1), "max")
        y = reduced(y, "max")
        return top + Sum.apply((z - top[:, None]).exp().sum(1)).log() - picked(z, y, first)

    for graph in traced(loss, *inputs()):
        before = listing(graph.gm)
        with collect() as told:
            HeadsPass(make_config({"min_logits_bytes": 0}))(graph.graph)
        assert [r.code for r in told.records] == ["collective-order"] and listing(graph.gm) == before


def gathered(z: Tensor, y: Tensor, first: int) -> Tensor:
    ops = torch.ops._c10d_functional
    z = ops.wait_tensor(ops.all_gather_into_tensor(z.t().contiguous(), 1, dist.group.WORLD.group_name))
    return plain(z.t(), y)


def not_a_softmax(z: Tensor, y: Tensor, first: int) -> Tensor:
    return rows_of_all(z * reduced(z.detach().amax(1), "max")[:, None], y, first)


def labels_of_all(z: Tensor, y: Tensor, first: int) -> Tensor:
    return picked(z, reduced(z.argmax(1), "max"), first)


class Copy(torch.autograd.Function):
    """What each process goes on with on its own: the gradients of all are added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return reduced(g, "sum")


def entropy(z: Tensor, y: Tensor, first: int) -> Tensor:
    """Its backward adds up gradients of classes of all processes, and goes on to those of each class."""
    lse = lse_of_all(z)
    p = (z - Copy.apply(lse)[:, None]).exp()
    return rows_of_all(z, y, first) - 0.1 * (lse - Sum.apply((p * z).sum(1)))


def plain_entropy(z: Tensor, y: Tensor) -> Tensor:
    log_p = z.log_softmax(1)
    return plain(z, y) + 0.1 * (log_p.exp() * log_p).sum(1)


def test_gradients_that_are_exchanged():
    given = inputs()
    for graph in (graphs := traced(entropy, *given)):
        before = listing(graph.gm)
        assert rewrite(graph) == ["collective"] and listing(graph.gm) == before
    check(graphs, plain_entropy, given)


@pytest.mark.parametrize(
    "loss", [gathered, not_a_softmax, labels_of_all, lambda z, y, first: plain(reduced(z, "sum"), y)]
)
def test_refused(loss):
    x, w, _, y = inputs()
    graph = inference_graph(lambda x, w, y: loss(F.linear(x, w), y, 0).mean(), x, w, y)
    before = listing(graph.gm)
    assert rewrite(graph) == ["collective"] and listing(graph.gm) == before


def test_program_of_its_own():
    """What comes back is read by the backward alone: between the two programs there is time for a collective."""

    def loss(z: Tensor, t: Tensor, of_all: Fn) -> Tensor:
        return of_all((z.sigmoid() * t).sum(1)) ** 2

    x, w, b, _ = inputs()
    t = torch.rand(N, V, dtype=torch.float64)
    graphs = [
        joint_graph(
            lambda x, w, b, t: loss(F.linear(x, w, b), t, Sum.apply).mean(),
            *(p.detach().clone().requires_grad_() for p in (x, w[s], b[s])),
            t[:, s].contiguous(),
        )
        for s in SHARDS
    ]
    for graph in graphs:
        assert rewrite(graph) == ["rewritten"] and "row_region" in str(graph.graph)
    check(graphs, lambda z, t: loss(z, t, lambda s: s), (x, w, b, t))
