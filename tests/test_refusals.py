"""A head that is left alone: one case or more per reason code, the graph and the bits unchanged."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from harness import Compiled, N, V, assert_same_bits, aten_graph, dynamo_graph, fresh, head, results, symbolic_graph
from lce_inductor.recognize import recognize, walk
from torch import Tensor, nn

import lce_inductor
from lce_inductor import Config
from lce_inductor.ops import schema  # noqa: F401  (registers the ops)
from lce_inductor.reasons import REASONS, refuse

Fn = Callable[..., object]


def linear(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w)


def adapter(x: Tensor, w: Tensor) -> Tensor:
    """A low-rank product of the logits' size."""
    return (x @ x.new_ones(8, 2)) @ x.new_ones(2, V)


# code -> functions of x [N, H], weight [V, H], target [N]
CASES: dict[str, dict[str, Fn]] = {
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
    "too-small": {"threshold": lambda x, w, y: F.cross_entropy(F.linear(x, w), y)},
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
ELSEWHERE = {"no-loss", "internal-error", "lora", "no-shapes", "layout", "dtype"}
ELSEWHERE |= {
    "ahead-of-time",
    "no-head",
    "graph-break",
    "loss-outside",
    "little-saved",
    "not-installed",
    "hooks-replaced",
    "other-backend",
}  # test_explain.py

NAMES = [(code, name) for code, found in CASES.items() for name in found]


def settings(code: str) -> dict[str, int]:
    return {"min_logits_bytes": N * V * 4 + 1 if code == "too-small" else 0}


@pytest.mark.parametrize("code, name", NAMES)
def test_refused_with_a_code_and_the_graph_unchanged(code, name):
    args = [t.requires_grad_(t.is_floating_point()) for t in fresh(head())]
    if code in ("mutated", "order"):
        args = [t.detach() for t in args]
    gm = dynamo_graph(CASES[code][name], *args)
    nodes, before = list(gm.graph.nodes), str(gm.graph)
    metadata = [dict(n.meta) for n in nodes]
    plans = recognize(gm.graph, Config(**settings(code)))
    assert plans and code in [p.refusal.reason.code for p in plans if p.refusal is not None]
    assert not any(p.refusal is None for p in plans)
    assert list(gm.graph.nodes) == nodes and str(gm.graph) == before
    assert [list(n.meta) for n in nodes] == [list(m) for m in metadata]


@pytest.mark.parametrize("code, name", NAMES)
def test_refused_gives_the_bits_of_torch_compile(code, name):
    fn, args = CASES[code][name], [t.detach() for t in head()] if code in ("mutated", "order") else head()

    def run() -> list[Tensor | None]:
        torch.manual_seed(3)
        return results(Compiled(fn), fresh(args))

    plain = run()
    with lce_inductor.installed(**settings(code)):
        assert_same_bits(run(), plain)


@pytest.mark.parametrize("code, name", NAMES)
def test_the_same_in_an_aten_graph(code, name):
    """Never wrong there either: refused, or rewritten with the same numbers."""
    if name == "branch":
        pytest.skip("a constant tensor in a traced graph")
    fn, args = CASES[code][name], [t.detach() for t in head()]
    gm = aten_graph(lambda x, w, y: fn(x, w, y), *fresh(args))
    torch.manual_seed(3)
    before, text = results(gm, fresh(args)), str(gm.graph)
    plans = recognize(gm.graph, Config(**settings(code)))
    gm.recompile()
    torch.manual_seed(3)
    after = results(gm, fresh(args))
    if all(p.refusal is not None for p in plans):
        assert str(gm.graph) == text
        assert_same_bits(after, before)
    for f, e in zip(after, before, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)


def test_an_adapter_on_the_head():
    x, w, y = head()
    a, b = torch.randn(2, 8), torch.randn(V, 2)
    gm = dynamo_graph(
        lambda x, w, a, b, y: F.cross_entropy(F.linear(x, w) + F.linear(F.linear(x, a), b) * 2, y), x, w, a, b, y
    )
    before = str(gm.graph)
    codes = {p.refusal.reason.code for p in recognize(gm.graph, Config(min_logits_bytes=0)) if p.refusal}
    assert codes & {"lora", "two-heads"}
    assert str(gm.graph) == before


def test_no_loss():
    """Nobody reads the logits: a graph break lies between them and the loss."""

    class Model(nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            F.linear(x, w)
            return x * 2

    x, w, _ = head()
    gm = symbolic_graph(Model(), x.detach(), w.detach())
    before = str(gm.graph)
    (plan,) = recognize(gm.graph, Config(min_logits_bytes=0))
    assert plan.refusal.reason.code == "no-loss" and str(gm.graph) == before


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, V)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.head(x), y)


def test_no_shapes():
    gm = torch.fx.symbolic_trace(Head())
    before = str(gm.graph)
    (plan,) = recognize(gm.graph, Config(min_logits_bytes=0))
    assert plan.refusal.reason.code == "no-shapes" and str(gm.graph) == before


def test_dtype():
    """A float that the op does not take, as 8-bit heads have it."""
    x, _, y = head()
    gm = symbolic_graph(Head(), x.detach(), y, fake=False)
    node = next(n for n in gm.graph.nodes if n.op == "call_module")
    node.meta["tensor_meta"] = node.meta["tensor_meta"]._replace(dtype=torch.float8_e4m3fn)
    before = str(gm.graph)
    (plan,) = recognize(gm.graph, Config(min_logits_bytes=0))
    assert plan.refusal.reason.code == "dtype" and str(gm.graph) == before


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


def test_layout():
    """A traceable wrapper as weight: its product is not an ordinary one."""
    from torch.testing._internal.two_tensor import TwoTensor

    x, w, y = (t.detach() for t in head())
    both = TwoTensor(w, w.clone())
    gm = dynamo_graph(lambda x, w, y: F.cross_entropy(F.linear(x, w), y), x, both, y)
    before = str(gm.graph)
    (plan,) = recognize(gm.graph, Config(min_logits_bytes=0))
    assert plan.refusal.reason.code == "layout" and str(gm.graph) == before


def test_one_of_two_heads_refused():
    """A refusal of one head leaves the other's rewrite alone, and its own nodes untouched."""
    x, w, y = head()
    gm = dynamo_graph(
        lambda x, w, u, y: F.cross_entropy(F.linear(x, w), y) + F.linear(x, u).erf().sum(), x, w, w * 2, y
    )
    plans = recognize(gm.graph, Config(min_logits_bytes=0))
    assert sorted("" if p.refusal is None else p.refusal.reason.code for p in plans) == ["", "escape"]
    text = str(gm.graph)
    assert "erf" in text and text.count("torch._C._nn.linear") == 1 and "head_stats" in text


def test_refusals_are_counted(installed):
    x, w, y = head()
    compiled = Compiled(CASES["escape"]["another reader"])
    compiled(x, w, y)
    assert compiled.refusals == {"escape": 1}


# -- failures inside a pass


@pytest.mark.parametrize(
    "where",
    [
        "lce_inductor.recognize.rewrite.apply",
        "lce_inductor.schedule.rewrite.merge",
        "lce_inductor.schedule.rewrite.finish",
        "lce_inductor.passes.recognize",
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
    "fn, refused",
    [
        (lambda x, w, y: _one_hot_product(_masked(F.linear(x, w), -torch.inf), y), True),  # 0 * -inf: NaN, as eager
        (lambda x, w, y: _one_hot_product(_masked(F.linear(x, w), -1e9), y), False),
        (lambda x, w, y: F.cross_entropy(2 * _masked(F.linear(x, w), -torch.inf), y.clamp(max=30)), False),
        (lambda x, w, y: F.cross_entropy(_masked(F.linear(x, w), -torch.inf) + 1, y.clamp(max=30)), False),
    ],
    ids=["one-hot of -inf", "one-hot of a number", "scaled", "shifted"],
)
def test_behind_masked_classes(fn, refused, installed):
    """What may stand there, and what may not; the rest of it is in CASES."""
    x, w, y = head()
    y = y.clamp(min=0)
    compiled = Compiled(fn)
    torch.testing.assert_close(compiled(x, w, y), fn(x, w, y), equal_nan=True)
    assert (compiled.refusals, compiled.counts["rewritten"]) == (({"escape": 1}, 0) if refused else ({}, 1))


@pytest.mark.parametrize(
    "settings, refused",
    [
        ({"min_logits_bytes": 1}, True),
        ({"min_logits_bytes": 0}, False),
        ({"min_logits_bytes": 1, "chunk_tokens": N}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["trains", "returned", "no_grad", "two heads"])
def test_little_saved(settings, refused, kind, monkeypatch):
    """On a GPU only, and only where torch.compile alone would hold hardly more."""
    monkeypatch.setattr(walk, "device_type", lambda node: "cuda")

    def fn(x, w, y):
        z = F.linear(x, w)
        if kind == "two heads":
            return F.cross_entropy(z, y) + F.cross_entropy(F.linear(x.sin(), w), y)
        return (F.cross_entropy(z, y), z) if kind == "returned" else F.cross_entropy(z, y)

    with lce_inductor.installed(**settings), torch.set_grad_enabled(kind != "no_grad"):
        compiled = Compiled(fn)
        args = head()
        found = compiled(*args)
    torch.testing.assert_close(found, fn(*args))
    assert compiled.refusals == ({"little-saved": 1} if refused and kind == "trains" else {})


# -- the table


def test_every_code_of_the_table_has_a_case():
    assert set(CASES) | ELSEWHERE >= set(REASONS)


def test_rows_say_something():
    for code, row in REASONS.items():
        assert code == row.code and code == code.lower() and " " not in code
        assert len(row.explanation) > 20 and row.hint and not row.explanation.endswith(".")


def test_unknown_code():
    with pytest.raises(KeyError):
        refuse("nonsense")
