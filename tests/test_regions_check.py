"""The comparison that a match has to stand before it is believed: a wrong rule must not get through."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import check_graph, head, joint_graph

from lce_inductor.regions import check, fused
from lce_inductor.regions.algebra import Poly
from lce_inductor.regions.fused import NotFused, Wide

aten = torch.ops.aten
LOSSES = {
    "cross-entropy": lambda z, y: F.cross_entropy(z, y),
    "smoothed": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
    "z-loss": lambda z, y: z.logsumexp(-1).square().mean(),
    "softcap": lambda z, y: F.cross_entropy(3 * torch.tanh(z / 3), y),
}


def wrong_exp(e, args, kwargs):
    found = RIGHT[aten.exp.default](e, args, kwargs)
    return Wide({k: v.times(1.0 + 1e-6) for k, v in found.terms.items()}) if isinstance(found, Wide) else found


def wrong_sum(e, args, kwargs):
    return RIGHT[aten.sum.dim_IntList](e, args, kwargs) + Poly.number(1e-6)


def wrong_gather(e, args, kwargs):
    return -RIGHT[aten.gather.default](e, args, kwargs)


def wrong_mul(e, args, kwargs):
    """The row values of one operand are forgotten."""
    found = RIGHT[aten.mul.Tensor](e, args, kwargs)
    return Wide({k: Poly.number(1) for k in found.terms}, found.slopes) if isinstance(found, Wide) else found


def wrong_scatter(e, args, kwargs):
    found = RIGHT[aten.scatter.value](e, args, kwargs)
    return Wide({k: v.times(-1) for k, v in found.terms.items()})


def wrong_tanh(e, args, kwargs):
    """Another epilogue than the user's."""
    return RIGHT[aten.sigmoid.default](e, args, kwargs)


RIGHT = dict(fused._STEPS)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "op, rule",
    [
        (aten.exp.default, wrong_exp),
        (aten.sum.dim_IntList, wrong_sum),
        (aten.gather.default, wrong_gather),
        (aten.mul.Tensor, wrong_mul),
        (aten.scatter.value, wrong_scatter),
        (aten.tanh.default, wrong_tanh),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_a_wrong_rule_is_refused_and_the_region_takes_over(op, rule, loss, monkeypatch):
    """Whatever the symbols say, the numbers stay right."""
    x, w, y = head(dtype=torch.float64)
    traced = joint_graph(lambda x, w, y: LOSSES[loss](F.linear(x, w), y), x, w, y)
    used = {n.target for n in traced.graph.nodes}
    refusals: list[str] = []
    real = check._compare

    def compare(*args):
        try:
            real(*args)
        except NotFused as why:
            refusals.append(str(why))
            raise

    monkeypatch.setattr(check, "_compare", compare)
    monkeypatch.setitem(fused._STEPS, op, rule)
    (tier,) = check_graph(traced)
    if op in used and refusals:
        assert tier == "region" and "disagrees" in refusals[0]
    if op not in used:
        assert tier == "kernels"


def test_the_wrong_rules_are_caught(monkeypatch):
    """Not only by luck: each of these reaches the comparison."""
    x, w, y = head(dtype=torch.float64)
    for op, rule in (
        (aten.sum.dim_IntList, wrong_sum),
        (aten.gather.default, wrong_gather),
        (aten.scatter.value, wrong_scatter),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(fused._STEPS, op, rule)
            found = check_graph(joint_graph(lambda x, w, y: F.cross_entropy(F.linear(x, w), y), x, w, y))
        assert found == ["region"], rule


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_what_counts_as_a_difference(scale):
    value = torch.linspace(-1, 1, 9, dtype=torch.float64) * scale
    check._compare(value, value)
    check._compare(value, value * (1 + 1e-10))
    if scale > 1e-4:
        with pytest.raises(NotFused, match="disagrees"):
            check._compare(value, value * (1 + 1e-6))
    with pytest.raises(NotFused, match="disagrees"):
        check._compare(value, torch.full_like(value, torch.nan))
    with pytest.raises(NotFused, match="disagrees"):
        check._compare(torch.full_like(value, torch.nan), value)


def test_the_slope_of_an_epilogue():
    """tanh's derivative as the user's backward spells it, up to a number."""
    steps = (("div", 3.0), ("tanh",), ("mul", 3.0))
    tanh = ("tanh", ("div", ("z",), 3.0))
    own = ("add", 1.0, ("mul", tanh, tanh), -1)
    assert check._slope_factor(steps, (own,)) == pytest.approx(1.0)
    assert check._slope_factor((*steps, ("mul", 2.0)), (own,)) == pytest.approx(2.0)
    for wrong in ((), (tanh,), (own, own)):
        with pytest.raises(NotFused):
            check._slope_factor(steps, wrong)
    assert check._slope_factor((), ()) == 1.0


def test_programs_run_in_double():
    from lce_inductor.spec.program import Program, Ref, Step

    steps = (
        Step("prims.convert_element_type.default", (Ref(0), torch.bfloat16), {}),
        Step("aten.full.default", ((2, 2), 1.0), {"dtype": torch.float32}),
        Step("prims.convert_element_type.default", (Ref(0), torch.int64), {}),
    )
    a, b, c = check._in_double(Program(("logits",), steps, ())).steps
    assert (a.args[1], b.kwargs["dtype"], c.args[1]) == (torch.float64, torch.float64, torch.int64)
