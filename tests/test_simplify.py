"""Slices of logits that are changed in place: what is read back, and what is another slice."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from corpus.harness import no_codegen_backend
from harness import joint_graph
from oracle import judge
from text_programs import make_inputs
from torch._dynamo.utils import counters
from turns import crossed

from lce_inductor.deferred_logits.tensor import DeferredLogits
from lce_inductor.graph.backup import Backup
from lce_inductor.graph.simplify import simplify, writes_to_slices

aten = torch.ops.aten


def _lse(z):
    return z.logsumexp(-1).square().sum()


# What is read back is what was written.
SAME = {
    "a slice": lambda z: (p := z[:, :-1], p.div_(0.9), _lse(p))[-1],
    "its own slice": lambda z: (z[:, :-1].div_(0.9), _lse(z[:, :-1]))[-1],
    "a slice of a slice": lambda z: (p := z[:, :-1][:, -3:], p.mul_(2), _lse(p))[-1],
    "one of the first dimension": lambda z: (p := z[2], p.mul_(2), _lse(p))[-1],
    "twice": lambda z: (p := z[:, 1:], p.mul_(2), p.tanh_(), _lse(p))[-1],
    "classes": lambda z: (p := z[..., 3:], p.mul_(2), _lse(p))[-1],
}
# Something else is read, too: only eager's numbers are asked for.
OTHER = {
    "all": lambda z: (z[:, :-1].div_(0.9), _lse(z))[-1],
    "another slice": lambda z: (z[:, :-1].div_(0.9), _lse(z[:, 1:]))[-1],
    "another step": lambda z: (z[:, ::2].div_(0.9), _lse(z[:, 0:]))[-1],
    "another dimension": lambda z: (z[:2].div_(0.9), _lse(z[:, :2]))[-1],
    "the slice and all": lambda z: (p := z[:, :-1], p.div_(0.9), _lse(p) + z.amax(-1).sum())[-1],
    "two slices": lambda z: (z[:, :3].div_(0.9), z[:, 2:].mul_(2), _lse(z[:, :3]) + _lse(z[:, 2:]))[-1],
    "another index": lambda z: (z[1].mul_(2), _lse(z[0]) + _lse(z[-1]))[-1],
    "an index from the end": lambda z: (z[-1].mul_(2), _lse(z[3]))[-1],
    "the same end in other words": lambda z: (z[:, :-1].mul_(2), _lse(z[:, :5]))[-1],
    "beyond the end": lambda z: (z[:, 2:99].mul_(2), _lse(z[:, 2:]))[-1],
    "filled": lambda z: (z[:, :2].fill_(0.5), _lse(z))[-1],
    "a transposed value": lambda z: (
        p := z[:, :4],
        p.copy_(p.transpose(0, 1)[:, :4].contiguous().transpose(0, 1)),
        _lse(p.flatten(0, 1)),
    )[-1],
    "an expanded value": lambda z: (p := z[:, :4], p.copy_(z[:, 5:].detach().tanh()), _lse(p.reshape(16, -1)))[-1],
    "one into another": lambda z: (z[:, :2].copy_(z[:, 2:4]), _lse(z[:, :2]) + _lse(z[:, 2:]))[-1],
}
ARGS = make_inputs(("x3", "w"), torch.float64)


@pytest.mark.parametrize("name, dynamic", crossed([*SAME, *OTHER], [False, True]))
def test_right(name, dynamic):
    fn = {**SAME, **OTHER}[name]
    verdict = judge(lambda x, w: fn(F.linear(x, w)), ARGS, dynamic=dynamic)
    assert not verdict.failed, verdict
    assert verdict.rewritten or name in OTHER or dynamic


@pytest.mark.parametrize("name", SAME)
def test_nothing_is_scattered_in_the_forward(name):
    graph = joint_graph(lambda x, w: SAME[name](F.linear(x, w)), *ARGS).gm.graph
    assert writes_to_slices(graph) and simplify(graph)
    graph.lint()
    graph.eliminate_dead_code()
    (loss, *_), scatters = graph.output_node().args[0], (aten.slice_scatter.default, aten.select_scatter.default)
    todo, seen = [loss], set()
    while todo:
        seen.add(node := todo.pop())
        todo += [n for n in node.all_input_nodes if n not in seen]
    assert not [n for n in seen if n.target in scatters]


RETURNED = {
    "a slice": lambda z: (p := z[:, :-1], p.div_(0.9), (_lse(p), p))[-1],
    "its own slice": lambda z: (z[:, :-1].div_(0.9), (_lse(z[:, :-1]), z[:, :-1]))[-1],
    "of a copy": lambda z: (p := z.clone()[:, :-1], p.div_(0.9), (_lse(p), z))[-1],
}


@pytest.mark.parametrize("name", RETURNED)
def test_what_is_returned_beside_it_is_deferred(name, installed):
    x, w, x1, w1 = [a.detach().clone().requires_grad_() for a in (*ARGS, *ARGS)]
    compiled = torch.compile(lambda x, w: RETURNED[name](F.linear(x, w)), backend=no_codegen_backend([]))
    loss, z = compiled(x, w)
    expected, logits = RETURNED[name](F.linear(x1, w1))
    assert isinstance(z, DeferredLogits) and counters["lce_inductor"]["rewritten"] == 1
    torch.testing.assert_close((loss, z.clone()), (expected, logits))
    torch.testing.assert_close(torch.autograd.grad(loss, (x, w)), torch.autograd.grad(expected, (x1, w1)))


def test_there_is_a_way_back():
    graph = joint_graph(lambda x, w: SAME["twice"](F.linear(x, w)), *ARGS).gm.graph
    before = [(n.target, n.args, n.kwargs) for n in graph.nodes]
    backup = Backup(graph)
    assert simplify(graph) and [(n.target, n.args, n.kwargs) for n in graph.nodes] != before
    backup.restore()
    assert [(n.target, n.args, n.kwargs) for n in graph.nodes] == before


def test_nothing_to_do():
    graph = joint_graph(lambda x, w: _lse(F.linear(x, w)[:, 1:]), *ARGS).gm.graph
    assert not simplify(graph)
