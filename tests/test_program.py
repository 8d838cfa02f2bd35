"""Programs as text: what they hold, what comes back, and what is never called."""

from __future__ import annotations

import json
import math

import pytest
import torch
from harness import decided, head, joint_graph
from torch.nn import functional as F

from lce_inductor.lower.region_values import evaluate
from lce_inductor.spec.program import Program, Ref, Result, Rows, Step, Sym, name_of, parse, resolve

aten = torch.ops.aten


def program(*steps: Step, inputs=("logits", "rows", "whole")) -> Program:
    last = Ref(len(inputs) + len(steps) - 1)
    return Program(inputs, steps, (Result("row", last, torch.float32, (3, Sym(0))),))


FULL = program(
    Step("aten.mul.Tensor", (Ref(0), 2.5), {}),
    Step("aten.full.default", ((Rows(), Sym(0), 3), -math.inf), {"dtype": torch.bfloat16}),
    Step("aten.sum.dim_IntList", (Ref(3), (1,), True), {"dtype": None}),
    Step("getitem", (Ref(5), 0), {}),
)


def test_round_trip():
    assert parse(FULL.text()) == parse(parse(FULL.text()).text())
    assert parse(FULL.text()).text() == FULL.text()
    assert json.loads(FULL.text())  # plain JSON: infinities have a form of their own


def test_what_a_head_writes_comes_back():
    x, w, y = head()
    traced = joint_graph(lambda x, w, y: F.cross_entropy(F.linear(x, w).sinh(), y), x, w, y)
    decided(traced)
    (node,) = traced.graph.find_nodes(op="call_function", target=torch.ops.lce_inductor.row_region.default)
    text = next(a for a in node.args if isinstance(a, str))
    assert parse(text).text() == text and "aten.sinh.default" in text


@pytest.mark.parametrize(
    "op",
    [
        "aten.mul_.Tensor", "aten.rand_like.default", "aten.mm.default", "aten.bernoulli.default", "aten.nothing.default",
        "aten.mul", "aten.mul.Tensor.more", "os.system", "aten.__class__.mro", "aten.mul.__doc__", "lce_inductor.once.default",
        "prims.nothing.default", "", "getitem.default", "aten._to_copy.default;", "builtins.eval.default",
    ],
)  # fmt: skip
def test_an_op_that_no_program_may_hold(op):
    with pytest.raises(ValueError):
        resolve(op)
    with pytest.raises(ValueError):
        parse(program(Step(op, (Ref(0),), {})).text())


def test_an_op_of_others_has_no_name():
    for target in (torch.sin, aten.mm.default, torch.ops.lce_inductor.once.default, aten.sin_.default, len):
        with pytest.raises(ValueError):
            name_of(target)
    assert name_of(aten.sinh.default) == "aten.sinh.default" and resolve("aten.sinh.default") is aten.sinh.default


@pytest.mark.parametrize(
    "text",
    [
        "", "{}", "[]", "[[],[]]", "[[],[],[],[]]", "nonsense", "[1,2,3]", '[["logits"],[["aten.sin.default"]],[]]',
        '[["nothing"],[],[]]',
        '[["logits"],[["aten.sin.default",[{"v":1}],{}]],[]]',  # a step that reads itself
        '[["logits"],[["aten.sin.default",[{"v":-1}],{}]],[]]',
        '[["logits"],[["aten.sin.default",[{"x":0}],{}]],[]]',
        '[["logits"],[["aten.sin.default",[{"v":0,"n":0}],{}]],[]]',
        '[["logits"],[["aten.sin.default",[{"f":"1e5"}],{}]],[]]',
        '[["logits"],[["aten.sin.default",[{"s":-1}],{}]],[]]',
        '[["logits"],[["aten.sin.default",[{"d":"Tensor"}],{}]],[]]',
        '[["logits"],[["aten.sin.default",[{"d":"load.x"}],{}]],[]]',
        '[["logits"],[[7,[],{}]],[]]',
        '[["logits"],[["aten.sin.default",[{"v":0}],[]]],[]]',
        '[["logits"],[],[["row",1,"float32",[],-1]]]',
        '[["logits"],[],[["total",0,"float32",[],-1]]]',
        '[["logits"],[],[["row",0,"floats",[],-1]]]',
        '[["logits"],[],[["row",0,"float32",[],null]]]',
        '[["logits"],[],[["row","0","float32",[],-1]]]',
        "[" * 5000,
    ],
)  # fmt: skip
def test_malformed(text):
    with pytest.raises(ValueError):
        parse(text)


def test_too_long():
    with pytest.raises(ValueError, match="characters"):
        parse(" " * (1 << 20) + "[[],[],[]]")


def test_what_a_program_can_not_hold():
    with pytest.raises(ValueError, match="can't hold"):
        program(Step("aten.mul.Tensor", (Ref(0), 1j), {})).text()


def test_evaluate():
    """Rows of one chunk, sizes beside the text, several results."""
    p = Program(
        ("logits", "rows", "whole"),
        (
            Step("aten.unsqueeze.default", (Ref(1), 1), {}),
            Step("aten.div.Tensor", (Ref(0), Ref(3)), {}),
            Step("aten.add.Tensor", (Ref(4), Ref(2)), {}),
            Step("aten.topk.default", (Ref(5), Sym(0), 1), {}),
            Step("getitem", (Ref(6), 0), {}),
            Step("aten.full.default", ((Rows(), Sym(0)), 1.0), {"dtype": torch.float64}),
            Step("aten.sub.Tensor", (Ref(7), Ref(8)), {}),
        ),
        (Result("row", Ref(9), torch.float64, (Sym(0),)), Result("sum", Ref(5), torch.float64, (5,))),
    )
    z, r, c = torch.randn(4, 5).double(), torch.rand(4).double() + 1, torch.randn(5).double()
    top, summed = evaluate(parse(p.text()), [z, r, c], 4, [2])
    wanted = z / r[:, None] + c
    torch.testing.assert_close(top, wanted.topk(2, 1).values - 1)
    torch.testing.assert_close(summed, wanted)
