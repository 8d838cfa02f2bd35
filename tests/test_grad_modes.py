"""Gradients must be cut where eager cuts them, in whichever order modes nest: see grad_modes.py.

`python tests/many_fuzz.py --kind grad_modes --programs 20000 --processes 8` runs them all.
"""

from __future__ import annotations

import random

import grad_modes
import pytest
import torch
import torch.nn.functional as F
from fault_cases import BY_RULE, of_rule
from grad_modes import Edit, edits, graphs, head
from turns import one_of

MAKERS = dict(grad_modes.sources(seed=2, count=30))


def test_an_edit_says_what_it_does():
    (graph,) = graphs(lambda x, w, y: F.cross_entropy(F.linear(x, w).tanh() * 2, y), head(), "")
    gm = grad_modes.edited(graph.gm, Edit((1,), ((False, 0, 2), (True, 1, 1))))
    names = [getattr(n.target, "__name__", n.target) for n in gm.graph.nodes if n.op.startswith("call")]
    on = "_set_grad_enabled"
    assert names == [on, "linear", on, "tanh", "detach", on, "mul", on, "cross_entropy"]
    assert [n.args[0] for n in gm.graph.nodes if n.target is grad_modes.SWITCH] == [False, True, False, True]


def test_edits_reach_every_result():
    (graph,) = graphs(of_rule("rsqrt"), head(), "")
    found = edits(graph.gm, random.Random(0))
    assert {e.detached[0] for e in found if e.detached and not e.spans} == set(range(6))


@pytest.mark.parametrize("name", one_of(4, list(BY_RULE)))
def test_rules(name):
    """Two edits of the program of each rule."""
    (graph,) = graphs(of_rule(name), head(), name)
    for edit in random.Random(name).sample(edits(graph.gm, random.Random(name)), 2):
        verdict = grad_modes.check(graph, edit)
        assert not verdict.failed, f"{edit}: {verdict}"


@pytest.mark.parametrize("name", random.Random(1).sample([n for n in MAKERS if not n.startswith("rule")], 25))
def test_programs(name):
    """An edit of programs of the corpus and of random ones."""
    fn, args = MAKERS[name]()
    rng = random.Random(name)
    try:
        found = graphs(fn, args, name)
    except Exception as error:
        pytest.skip(f"not to be compiled: {type(error).__name__}")
    graph = rng.choice(found)
    chosen = edits(graph.gm, rng)
    if chosen:
        edit = rng.choice(chosen)
        verdict = grad_modes.check(graph, edit)
        assert not verdict.failed, f"{edit}: {verdict}"


def _straight_through(z, y):
    d = z.detach()
    return F.cross_entropy(z * torch.rsqrt(d * d + 4.0), y)


def _norm_without_gradient(z, y):
    with torch.no_grad():
        r = torch.rsqrt(z * z + 4.0)
    return F.cross_entropy(z * r, y)


def _cast_that_is_none(z, y):
    with torch.no_grad():
        same = z.to(z.dtype)
    return F.cross_entropy(same, y)


def _contiguous_that_is_none(z, y):
    with torch.no_grad():
        same = z.contiguous()
    return F.cross_entropy(same, y)


def _parts_without_gradient(z, y):
    with torch.no_grad():
        parts = z.split(12)
    return F.cross_entropy(parts[0], y[:12])


def _picked_without_gradient(z, y):
    lp = z.log_softmax(-1)
    with torch.no_grad():
        t = lp * F.one_hot(y.clamp(min=0), lp.shape[-1])
    return -t.sum(-1).mean()


def _enabled_inside(z, y):
    with torch.no_grad():
        a = z * 2
        with torch.enable_grad():
            b = z / 3
        c = a + b
    return F.cross_entropy(c, y) + F.cross_entropy(b, y)


def _disabled_inside_enabled(z, y):
    with torch.no_grad(), torch.enable_grad():
        b = z / 3
        with torch.set_grad_enabled(False):
            c = b.log_softmax(-1)
    return F.nll_loss(c, y) + b.logsumexp(-1).mean()


def _inference_inside(z, y):
    with torch.no_grad():
        with torch.inference_mode():
            n = y.sum()
        p = z.log_softmax(-1)
    return F.nll_loss(p, y) + 0 * n


WRITTEN = [
    _straight_through, _norm_without_gradient, _cast_that_is_none, _contiguous_that_is_none, _parts_without_gradient,
    _picked_without_gradient, _enabled_inside, _disabled_inside_enabled, _inference_inside,
]  # fmt: skip


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a loss"])
@pytest.mark.parametrize("loss", WRITTEN, ids=lambda f: f.__name__.strip("_"))
def test_written(loss, beside):
    def fn(x, w, y):
        z = F.linear(x, w)
        return loss(z, y) + (0.1 * F.cross_entropy(z, y) if beside else 0)

    assert not (verdict := grad_modes.judge(fn, head())).failed, verdict
