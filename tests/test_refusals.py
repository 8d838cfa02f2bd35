"""A head that is left alone: one case or more per reason code, the graph and the bits unchanged."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from harness import (
    Compiled,
    N,
    V,
    assert_same_bits,
    check_graph,
    decided,
    fresh,
    head,
    inference_graph,
    joint_graph,
    results,
    rewrite,
    targets,
)
from torch import Tensor

import lce_inductor
from lce_inductor import regions
from lce_inductor.reasons import REASONS, refuse

Fn = Callable[..., object]


def linear(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w)


def adapter(x: Tensor, w: Tensor) -> Tensor:
    """A low-rank product of the logits' size."""
    return (x @ x.new_ones(8, 2)) @ x.new_ones(2, V)


def rows(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w), y, reduction="none")


# code -> functions of x [N, H], weight [V, H], target [N]
CASES: dict[str, dict[str, Fn]] = {
    "escape": {
        "diagonal": lambda x, w, y: F.linear(x, w).log_softmax(-1).diagonal().sum(),
    },
    "foreign-product": {
        "a scaled product in 16 bits": lambda x, w, y: F.cross_entropy(
            torch.addmm(w[:, 0].bfloat16(), x.bfloat16(), w.T.bfloat16(), beta=0.5, alpha=2).float(), y
        ),
    },
    "one-row": {
        "of many": lambda x, w, y: F.cross_entropy(F.linear(x, w)[3], y[3]),
    },
    "crossing": {
        "a slice of one": lambda x, w, y: F.cross_entropy(F.linear(x, w)[-1:], y[-1:]),
        "softmax over rows": lambda x, w, y: F.cross_entropy(F.linear(x, w).softmax(0), y),
        "statistics of a batch": lambda x, w, y: (lambda z: F.cross_entropy(z - z.mean(0), y))(F.linear(x, w)),
        "maximum of all": lambda x, w, y: (lambda z: F.cross_entropy(z - z.max(), y))(F.linear(x, w)),
        "neighbours": lambda x, w, y: (lambda z: (z[1:] - z[:-1]).logsumexp(-1).sum())(F.linear(x, w)),
        "labels of the next row": lambda x, w, y: (lambda z: F.cross_entropy(z[:-1], z[1:].argmax(-1)))(F.linear(x, w)),
        "each row meets all": lambda x, w, y: (lambda z: (z[:, None] - z[None]).logsumexp(-1).sum())(F.linear(x, w)),
        "sorted rows": lambda x, w, y: F.cross_entropy(F.linear(x, w).sort(0).values, y),
        "mixed by a view": lambda x, w, y: F.linear(x, w[:36]).view(8, -1).logsumexp(-1).sum(),
        "class weights of all rows": lambda x, w, y: (
            lambda z: F.cross_entropy(z, y, z.detach().softmax(-1).mean(0))
        )(F.linear(x, w)),
    },
    "returned": {
        "logits": lambda x, w, y: (lambda z: (F.cross_entropy(z, y), z))(F.linear(x, w)),
        "probabilities": lambda x, w, y: (lambda z: (F.cross_entropy(z, y), z.softmax(-1)))(F.linear(x, w)),
    },
    "rows-differ": {
        "labels of fewer rows": lambda x, w, y: F.linear(x, w).log_softmax(-1).gather(1, y.clamp(min=0)[:7, None]).sum(),
    },
    "too-small": {"threshold": lambda x, w, y: F.cross_entropy(F.linear(x, w), y)},
}  # fmt: skip

# What recognition by name once refused, by the reason of then: refused or not, it must be right.
EITHER: dict[str, dict[str, Fn]] = {
    "escape": {
        "a bias behind masked classes": lambda x, w, y: F.cross_entropy(
            linear(x, w).masked_fill(torch.arange(V) < 3, -torch.inf) + w[:, 0], y
        ),
        "a cap behind masked classes": lambda x, w, y: F.cross_entropy(
            3 * torch.tanh(linear(x, w).masked_fill(torch.arange(V) < 3, -torch.inf) / 3), y
        ),
        "a sigmoid behind masked classes": lambda x, w, y: F.cross_entropy(
            9 * torch.sigmoid(linear(x, w).masked_fill(torch.arange(V) < 3, -torch.inf)), y
        ),
        "no rule": lambda x, w, y: F.cross_entropy(F.linear(x, w).erf(), y),
        "another reader": lambda x, w, y: (lambda z: F.cross_entropy(z, y) + z.sin().sum())(F.linear(x, w)),
        "sorted": lambda x, w, y: (lambda z: F.cross_entropy(z, y) + z.sort(-1).values[:, 0].sum())(F.linear(x, w)),
        "reader before the loss": lambda x, w, y: (lambda z: z.cumsum(-1).sum() + F.cross_entropy(z, y))(
            F.linear(x, w)
        ),
        "dropout": lambda x, w, y: F.cross_entropy(F.dropout(F.linear(x, w), 0.5), y),
        "whole sum": lambda x, w, y: (lambda z: F.cross_entropy(z, y) + z.abs().mean())(F.linear(x, w)),
        "returned after an operation": lambda x, w, y: (lambda z: (F.cross_entropy(z, y), z.sigmoid().square()))(
            F.linear(x, w)
        ),
        "in a container": lambda x, w, y: (lambda z: F.cross_entropy(z, y) + torch.cat([z, z]).square().sum())(
            F.linear(x, w)
        ),
        "copied into a buffer": lambda x, w, y: (
            lambda z: F.cross_entropy(z, y) + torch.zeros(N, V).copy_(z).square().sum()
        )(F.linear(x, w)),
        "integer logits": lambda x, w, y: (lambda z: F.cross_entropy(z, y) + z.to(torch.int64).sum())(F.linear(x, w)),
        "alpha": lambda x, w, y: F.cross_entropy(torch.add(F.linear(x, w), w.sum(1), alpha=2), y),
        "columns by index": lambda x, w, y: (lambda z: F.cross_entropy(z, y) + z[:, y.clamp(min=0)].sum())(F.linear(x, w)),
        "nothing but masked classes": lambda x, w, y: F.cross_entropy(
            F.linear(x, w).masked_fill(torch.arange(V) > 29, -1e9)[:, 30:], y.clamp(max=6)
        ),
        "rows repeated": lambda x, w, y: F.cross_entropy(F.linear(x, w)[:1].expand(len(y), -1), y),
        "trained class weights": lambda x, w, y: -(F.log_softmax(F.linear(x, w), -1) * w.sum(1)).sum(-1).mean(),
        "branch": lambda x, w, y: F.cross_entropy(torch.where(x.sum() > 0, F.linear(x, w), 0.0), y),
    },
    "mutated": {
        "offset after its use": lambda x, w, y: (
            lambda z, r: (lambda z: (r.add_(1), z.gather(-1, y.clamp(min=0)[:, None]).sum())[1])(z - r)
        )(F.linear(x, w), x.detach().sum(-1, keepdim=True)),
        "bias after its use": lambda x, w, y: (
            lambda z, c: (lambda z: (c.mul_(2), F.cross_entropy(z, y))[1])(z + c)
        )(F.linear(x, w), w.detach().sum(1)),
        "one-hot labels after their use": lambda x, w, y: (
            lambda p, t: (lambda q: (t.fill_(1), q.sum(-1).sum())[1])(F.one_hot(t, V) * p)
        )(F.linear(x, w).log_softmax(-1), y.clamp(min=0)),
        "columns": lambda x, w, y: (lambda z: (z[:, 3:].fill_(0.0), F.cross_entropy(z, y))[1])(F.linear(x, w)),
        "row": lambda x, w, y: (lambda z: (z[0].zero_(), F.cross_entropy(z, y))[1])(F.linear(x, w)),
        "clamp": lambda x, w, y: (lambda z: (z.clamp_(-1, 1), F.cross_entropy(z, y))[1])(F.linear(x, w)),
        "relu": lambda x, w, y: (lambda z: (F.relu(z, inplace=True), F.cross_entropy(z, y))[1])(F.linear(x, w)),
        "detached": lambda x, w, y: (lambda z: (z.detach().exp_(), F.cross_entropy(z, y))[1])(F.linear(x, w)),
    },
    "order": {
        "pseudo labels": lambda x, w, y: (lambda z: F.cross_entropy(z, z.argmax(-1)))(F.linear(x, w)),
        "labels changed twice": lambda x, w, y: (
            lambda z: sum(
                (
                    y.fill_(1)[0] * 0,
                    F.cross_entropy(z.clone(), y.clone()),
                    y.fill_(2)[0] * 0,
                    F.cross_entropy(z, y),
                )
            )
        )(F.linear(x, w)),
    },
    "class-dim": {
        "loss over rows": lambda x, w, y: F.cross_entropy(F.linear(x, w).t(), y[:1].clamp(0, 3).expand(V)),
        "log_softmax over rows": lambda x, w, y: F.nll_loss(F.linear(x, w).log_softmax(0), y),
        "positions": lambda x, w, y: F.cross_entropy(
            F.linear(x, w).view(4, 6, V), y[:1].clamp(0, 3).expand(4 * V).view(4, V)
        ),
        "split class dimension": lambda x, w, y: F.cross_entropy(
            F.linear(x, w[:36]).view(N * 2, 18), y.repeat_interleave(2).clamp(max=17)
        ),
    },
    "soft-targets": {
        "softmax": lambda x, w, y: F.cross_entropy(F.linear(x, w), F.softmax(x @ x.new_ones(8, V), -1)),
        "one hot": lambda x, w, y: F.cross_entropy(F.linear(x, w), x.new_ones(N, V) / V),
        "by hand": lambda x, w, y: -(F.linear(x, w).log_softmax(-1) * torch.rand_like(x)[:, :1].expand(N, V).contiguous())
        .sum(-1)
        .mean(),
    },
    "two-heads": {
        "sum": lambda x, w, y: F.cross_entropy(F.linear(x, w) + F.linear(x * 2, w), y),
        "divergence": lambda x, w, y: F.kl_div(
            F.linear(x, w).log_softmax(-1), F.linear(x, w * 2).softmax(-1), reduction="batchmean"
        ),
    },
    "returned-loss-free": {
        "logits": lambda x, w, y: F.linear(x, w),
        "view": lambda x, w, y: F.linear(x, w).float().view(4, 6, V),
    },
    "class-weight-grad": {
        # With gradients on, torch refuses as well.
        "parameter": torch.no_grad()(lambda x, w, y: F.cross_entropy(F.linear(x, w), y, w[:, 0])),
    },
    "margin": {
        "scatter": lambda x, w, y: F.cross_entropy(
            F.linear(x, w) - torch.zeros(N, V).scatter(1, y.clamp(min=0)[:, None], 0.35), y
        ),
        "one hot": lambda x, w, y: F.cross_entropy(F.linear(x, w) - F.one_hot(y.clamp(min=0), V) * 0.35, y),
        "clamped cosine": lambda x, w, y: F.cross_entropy(
            F.linear(F.normalize(x), F.normalize(w)).clamp(-1, 1).acos(), y
        ),
    },
}  # fmt: skip

# Codes that no function of plain tensors on one device can show; each has a test of its own below.
ELSEWHERE = {
    "product",
    "compiled-before",
    "device",  # test_other_gpus.py
    "collective",  # test_collectives.py
    "collective-order",
    "random",
    "no-loss",
    "internal-error",
    "lora",
    "no-shapes",
    "layout",
    "dtype",
}
ELSEWHERE |= {
    "ahead-of-time",
    "no-head",
    "graph-break",
    "loss-outside",
    "little-saved",
    "not-installed",
    "hooks-replaced",
    "recompile-limit",
    "other-backend",
}  # test_explain.py

NAMES = [(code, name) for code, found in CASES.items() for name in found]
FORMER = [(code, name) for code, found in EITHER.items() for name in found]


def settings(code: str) -> dict[str, int]:
    return {"min_logits_bytes": N * V * 4 + 1 if code == "too-small" else 0}


def test_a_single_row_is_no_head_and_is_told():
    found = decided(joint_graph(lambda x, w, y: F.cross_entropy(F.linear(x[3], w), y[3]), *head()))
    assert not found.heads and [s.refusal.reason.code for s in found.strays] == ["one-row"]


@pytest.mark.parametrize("code, name", NAMES)
def test_refused_with_a_code_and_the_graph_unchanged(code, name):
    traced = joint_graph(CASES[code][name], *head())
    nodes, before = list(traced.graph.nodes), str(traced.graph)
    metadata = [list(n.meta) for n in nodes]
    assert code in rewrite(traced, **settings(code))
    assert list(traced.graph.nodes) == nodes and str(traced.graph) == before
    assert [list(n.meta) for n in nodes] == metadata


@pytest.mark.parametrize("code, name", NAMES)
def test_refused_gives_the_bits_of_torch_compile(code, name):
    fn, args = CASES[code][name], head()

    def run() -> list[Tensor | None]:
        torch.manual_seed(3)
        return results(Compiled(fn), fresh(args))

    plain = run()
    with lce_inductor.installed(returned_logits="keep", **settings(code)):
        assert_same_bits(run(), plain)


@pytest.mark.parametrize("code, name", FORMER)
def test_never_wrong(code, name):
    """Refused, or rewritten with the same numbers."""
    if "dropout" in name or name == "by hand":
        pytest.skip("random numbers: see the code of that name")
    args = [t.detach() for t in head()] if code in ("mutated", "order") or name == "parameter" else head()
    how = joint_graph if any(t.requires_grad for t in args) else inference_graph
    check_graph(how(EITHER[code][name], *args))


def test_random_numbers_of_the_size_of_the_logits():
    """Drawn from the logits, or drawn beside them: they would have to exist as a whole."""
    x, w, _y = head()
    noisy = lambda x, w: (lambda z: (z + torch.rand_like(z)).logsumexp(-1).sum())(F.linear(x, w))
    assert rewrite(joint_graph(noisy, x, w, decompose=False)) == ["random"]
    traced = joint_graph(noisy, x, w)
    before = str(traced.graph)
    assert set(rewrite(traced)) <= {"random", "escape", "crossing"} and str(traced.graph) == before


def test_an_adapter_on_the_head():
    """A low-rank product that is added to the logits is computed with them."""
    x, w, y = head()
    a, b = torch.randn(2, 8, requires_grad=True), torch.randn(V, 2, requires_grad=True)
    fn = lambda x, w, a, b, y: F.cross_entropy(F.linear(x, w) + F.linear(F.linear(x, a), b) * 2, y)
    traced = joint_graph(fn, x, w, a, b, y)
    assert set(check_graph(traced)) == {"region"} and traced.largest() < N * V


def test_one_of_two_heads_refused():
    """A refusal of one head leaves the other's rewrite alone."""
    x, w, y = head()
    traced = joint_graph(
        lambda x, w, u, y: F.cross_entropy(F.linear(x, w), y) + F.linear(x, u).flatten().softmax(0).sin().sum(),
        x,
        w,
        w * 2,
        y,
    )
    assert sorted(check_graph(traced)) == ["crossing", "kernels"]
    assert "aten.sin" in targets(traced.gm)


def test_refusals_are_counted(installed):
    compiled = Compiled(lambda x, w, y: (lambda z: F.cross_entropy(z, y) + z.softmax(0).sin().sum())(F.linear(x, w)))
    compiled(*head())
    assert compiled.refusals == {"crossing": 1}


@pytest.mark.parametrize("what", ["complex", "sparse", "int8"])
def test_inputs_that_are_no_dense_floats(what, installed):
    """Not taken for heads, and what torch.compile or eager made of them stays."""
    x, w, y = (t.detach() for t in head())
    if what == "complex":
        args, fn = (x, w.to(torch.complex64), y), lambda x, w, y: F.cross_entropy((x.to(w.dtype) @ w.T).abs(), y)
    elif what == "sparse":
        args, fn = (x.to_sparse(), w, y), lambda x, w, y: F.cross_entropy(torch.sparse.mm(x, w.T), y)
    else:
        args = (x.to(torch.int64), w.to(torch.int64), y)
        fn = lambda x, w, y: F.cross_entropy((x @ w.T).float(), y)
    torch.testing.assert_close(torch.compile(fn, backend="eager")(*args), fn(*args))
    if what != "sparse":  # Inductor takes no sparse tensors
        compiled = Compiled(fn)
        torch.testing.assert_close(compiled(*args), fn(*args))
        assert not compiled.counts["rewritten"]


# -- failures inside a pass


@pytest.mark.parametrize(
    "where",
    [
        "lce_inductor.regions.find",
        "lce_inductor.regions.write_fused",
        "lce_inductor.regions.sort",
        "lce_inductor.schedule.rewrite.merge",
        "lce_inductor.schedule.rewrite.merge",
        "lce_inductor.passes.schedule",
    ],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_failure_inside_a_pass_leaves_a_working_compile(where, when, installed, monkeypatch, caplog):
    """Raised before or after the real work, so that the graph is half-way changed: one warning, right numbers."""
    import importlib

    module, _, name = where.rpartition(".")
    owner = importlib.import_module(module)
    real = getattr(owner, name)

    def broken(*args, **kwargs):
        if when == "after":
            real(*args, **kwargs)
        raise ValueError("out of luck")

    monkeypatch.setattr(owner, name, broken)
    args = head()
    compiled = Compiled(CASES["too-small"]["threshold"])
    found = results(compiled, fresh(args))
    for f, e in zip(found, results(CASES["too-small"]["threshold"], fresh(args)), strict=True):
        torch.testing.assert_close(f, e)
    assert compiled.refusals == {"internal-error": 1}
    (warning,) = [r.getMessage() for r in caplog.records if "internal-error" in r.getMessage()]
    assert "ValueError: out of luck" in warning


def _masked(z: Tensor, value: float) -> Tensor:
    return z.masked_fill(torch.arange(V) > 30, value)


def _one_hot_product(z: Tensor, y: Tensor) -> Tensor:
    return -(F.one_hot(y.clamp(min=0, max=30), V) * z.log_softmax(-1)).sum(-1).mean()


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, w, y: _one_hot_product(_masked(F.linear(x, w), -torch.inf), y),  # 0 * -inf: NaN, as eager
        lambda x, w, y: _one_hot_product(_masked(F.linear(x, w), -1e9), y),
        lambda x, w, y: F.cross_entropy(2 * _masked(F.linear(x, w), -torch.inf), y.clamp(max=30)),
        lambda x, w, y: F.cross_entropy(_masked(F.linear(x, w), -torch.inf) + 1, y.clamp(max=30)),
    ],
    ids=["one-hot of -inf", "one-hot of a number", "scaled", "shifted"],
)
def test_behind_masked_classes(fn, installed):
    x, w, y = head()
    y = y.clamp(min=0)
    compiled = Compiled(fn)
    torch.testing.assert_close(compiled(x, w, y), fn(x, w, y), equal_nan=True)
    assert (compiled.refusals, compiled.counts["rewritten"]) == ({}, 1)


@pytest.mark.parametrize(
    "settings, refused",
    [
        ({"min_logits_bytes": 1}, True),
        ({"min_logits_bytes": 0}, False),
        ({"min_logits_bytes": 1, "chunk_tokens": N}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["trains", "one weight", "returned", "no_grad", "two weights"])
def test_little_saved(settings, refused, kind, monkeypatch):
    """On a GPU only, and only where torch.compile alone would hold hardly more; heads of one weight are one."""
    monkeypatch.setattr(regions, "device_type", lambda node: "cuda")

    def fn(x, w, y):
        z = F.linear(x, w)
        if kind in ("one weight", "two weights"):
            return F.cross_entropy(z, y) + F.cross_entropy(F.linear(x.sin(), w if kind == "one weight" else w * 2), y)
        return (F.cross_entropy(z, y), z) if kind == "returned" else F.cross_entropy(z, y)

    with lce_inductor.installed(**settings), torch.set_grad_enabled(kind != "no_grad"):
        compiled = Compiled(fn)
        args = head()
        found = compiled(*args)
    torch.testing.assert_close(found, fn(*args))
    assert ("little-saved" in compiled.refusals) == (refused and kind in ("trains", "one weight"))


# -- the table


def test_every_code_of_the_table_has_a_case():
    assert set(CASES) | ELSEWHERE | set(EITHER) >= set(REASONS)


def test_rows_say_something():
    for code, row in REASONS.items():
        assert code == row.code and code == code.lower() and " " not in code
        assert len(row.explanation) > 20 and row.hint and not row.explanation.endswith(".")


def test_unknown_code():
    with pytest.raises(KeyError):
        refuse("nonsense")
