"""Programs in fewer passes: as text, the same numbers as before, and what is left alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from region_programs import CASES, Builder, close
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lce_inductor.lower import region_tidy
from lce_inductor.lower.region_tidy import tidied
from lce_inductor.lower.region_values import evaluate, meta
from lce_inductor.spec.program import Program, Ref, Rows, parse

N, V = 5, 40


@pytest.fixture(autouse=True)
def no_errors(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No program runs as it was because of an error."""
    yield
    expected = request.function is test_a_program_that_cannot_be_written_runs_as_it_is
    assert expected or "runs as it is" not in caplog.text


def shown(program: Program) -> str:
    def of(value: Any) -> str:
        if isinstance(value, Ref):
            return f"v{value.index}"
        if isinstance(value, Rows):
            return "n"
        return f"[{', '.join(map(of, value))}]" if isinstance(value, (list, tuple)) else str(value)

    first, lines = len(program.inputs), []
    for i, step in enumerate(program.steps, first):
        given = [of(a) for a in step.args] + [f"{k}={of(v)}" for k, v in step.kwargs.items()]
        lines.append(f"v{i} = {step.op.removeprefix('aten.')}({', '.join(given)})\n")
    return "".join(lines) + "return " + ", ".join(f"v{r.value.index}" for r in program.results) + "\n"


def tidy(program: Program, inputs: list[Tensor]) -> Program:
    metas = tuple(meta(t, kind) for kind, t in zip(program.inputs, inputs))
    return parse(tidied(program.text(), metas, (), torch.device("cpu")))


def check(program: Program, inputs: list[Tensor]) -> Program:
    """The tidied program, whose results are those of the program: in fp64, and no worse in fp32."""
    found = tidy(program, inputs)
    n = len(inputs[0])
    exact = evaluate(program, inputs, n, ())
    close(evaluate(found, inputs, n, ()), exact, 1e-13)
    single = [t.float() if t.is_floating_point() else t for t in inputs]
    theirs, ours = (evaluate(p, [t.clone() for t in single], n, ()) for p in (program, tidy(program, single)))
    for t, o, e in zip(theirs, ours, exact):
        assert (o.double() - e).norm() <= 1.25 * (t.double() - e).norm() + 3e-7 * e.norm()
    return found


def log_softmax(b: Builder, z: Ref) -> Ref:
    low = b.add("aten.sub.Tensor", z, b.add("aten.amax.default", z, (1,), True))
    total = b.add("aten.sum.dim_IntList", b.add("aten.exp.default", low), (1,), True)
    return b.add("aten.sub.Tensor", low, b.add("aten.log.default", total))


def backward(b: Builder, logp: Ref, g: Ref) -> Ref:
    """As autograd writes the gradient of a log_softmax."""
    total = b.add("aten.sum.dim_IntList", g, (1,), True)
    return b.add("aten.sub.Tensor", g, b.add("aten.mul.Tensor", b.add("aten.exp.default", logp), total))


def zeros(b: Builder) -> Ref:
    return b.add("aten.full.default", (Rows(), V), 0, dtype=torch.float64)


def spread(b: Builder, row: Ref) -> Ref:
    return b.add("aten.expand.default", row, (Rows(), V))


def given(*kinds: str, n: int = N) -> list[Tensor]:
    """logits and values for each class [n, V], numbers [n, 1], labels [n, 1]."""
    g = torch.Generator().manual_seed(0)
    makers: dict[str, Callable[[], Tensor]] = {
        "logits": lambda: torch.randn(n, V, dtype=torch.float64, generator=g) * 3,
        "classes": lambda: torch.randn(n, V, dtype=torch.float64, generator=g),
        "number": lambda: torch.rand(n, 1, dtype=torch.float64, generator=g) + 0.5,
        "labels": lambda: torch.randint(V, (n, 1), generator=g),
    }
    return [makers[kind]() for kind in kinds]


def nll(b: Builder, z: Ref, y: Ref, g: Ref) -> tuple[Ref, Ref]:
    logp = log_softmax(b, z)
    hot = b.add("aten.mul.Tensor", b.add("aten.scatter.value", zeros(b), 1, y, -1.0), g)
    return b.add("aten.gather.default", logp, 1, y), backward(b, logp, hot)


def test_cross_entropy_and_squares():
    """Of 20 steps over all classes 8 are left."""
    b = Builder("logits", "rows", "rows")
    z, y, g = b.inputs()
    value, dz = nll(b, z, y, g)
    scale = b.add("aten.div.Scalar", spread(b, g), 64)
    twice = b.add("aten.mul.Scalar", b.add("aten.pow.Tensor_Scalar", z, 1.0), 2.0)
    b.result("row", value, torch.float64, (1,))
    b.result("dx", b.add("aten.add.Tensor", b.add("aten.mul.Tensor", scale, twice), dz), torch.float64, (3,), 0)
    assert_expected_inline(
        shown(check(b.program(), given("logits", "labels", "number"))),
        """\
v3 = amax.default(v0, [1], True)
v4 = sub.Tensor(v0, v3)
v5 = exp.default(v4)
v6 = sum.dim_IntList(v5, [1], True)
v7 = log.default(v6)
v8 = gather.default(v4, 1, v1)
v9 = sub.Tensor(v8, v7)
v10 = reciprocal.default(v6)
v11 = mul.Tensor(v2, -1.0)
v12 = mul.Tensor(v11, -1.0)
v13 = mul.Tensor(v10, v12)
v14 = mul.Tensor(v5, v13)
v15 = scatter_add.default(v14, 1, v1, v11)
v16 = div.Scalar(v2, 64)
v17 = mul.Tensor(v16, 2.0)
v18 = addcmul.default(v15, v0, v17)
return v9, v18
""",
    )


def test_two_heads():
    """A KL divergence of two softmaxes: neither is computed twice, and nothing is added up for the gradient."""
    b = Builder("logits", "logits", "rows")
    z, teacher, g = b.inputs()
    p, q = log_softmax(b, teacher), log_softmax(b, z)
    exp = b.add("aten.exp.default", p)
    value = b.add("aten.sum.dim_IntList", b.add("aten.mul.Tensor", exp, b.add("aten.sub.Tensor", p, q)), (1,))
    dq = b.add("aten.neg.default", b.add("aten.mul.Tensor", spread(b, g), exp))
    b.result("row", value, torch.float64, ())
    b.result("dx", backward(b, q, dq), torch.float64, (3,), 0)
    assert_expected_inline(
        shown(check(b.program(), given("logits", "logits", "number"))),
        """\
v3 = amax.default(v1, [1], True)
v4 = sub.Tensor(v1, v3)
v5 = exp.default(v4)
v6 = sum.dim_IntList(v5, [1], True)
v7 = log.default(v6)
v8 = sub.Tensor(v4, v7)
v9 = amax.default(v0, [1], True)
v10 = sub.Tensor(v0, v9)
v11 = exp.default(v10)
v12 = sum.dim_IntList(v11, [1], True)
v13 = log.default(v12)
v14 = sub.Tensor(v10, v13)
v15 = reciprocal.default(v6)
v16 = mul.Tensor(v5, v15)
v17 = sub.Tensor(v8, v14)
v18 = mul.Tensor(v16, v17)
v19 = sum.dim_IntList(v18, [1])
v20 = reciprocal.default(v12)
v21 = mul.Tensor(v2, -1.0)
v22 = mul.Tensor(v21, -1.0)
v23 = mul.Tensor(v20, v22)
v24 = mul.Tensor(v11, v23)
v25 = mul.Tensor(v15, v21)
v26 = addcmul.default(v24, v5, v25)
return v19, v26
""",
    )


def test_hard_and_soft_targets():
    """A sum of a one-hot and a softmax."""
    b = Builder("logits", "logits", "rows", "rows")
    z, teacher, y, g = b.inputs()
    exp = b.add("aten.exp.default", b.add("aten.sub.Tensor", teacher, b.add("aten.amax.default", teacher, (1,), True)))
    p = b.add("aten.div.Tensor", exp, b.add("aten.sum.dim_IntList", exp, (1,), True))
    logp = log_softmax(b, z)
    hot = b.add("aten.mul.Tensor", b.add("aten.scatter.value", zeros(b), 1, y, -1.0), b.add("aten.mul.Scalar", g, 0.3))
    soft = b.add("aten.div.Scalar", b.add("aten.mul.Tensor", spread(b, g), p), -4.0)
    b.result("dx", backward(b, logp, b.add("aten.add.Tensor", hot, soft)), torch.float64, (3,), 0)
    assert_expected_inline(
        shown(check(b.program(), given("logits", "logits", "labels", "number"))),
        """\
v4 = amax.default(v1, [1], True)
v5 = sub.Tensor(v1, v4)
v6 = exp.default(v5)
v7 = sum.dim_IntList(v6, [1], True)
v8 = div.Tensor(v6, v7)
v9 = amax.default(v0, [1], True)
v10 = sub.Tensor(v0, v9)
v11 = exp.default(v10)
v12 = sum.dim_IntList(v11, [1], True)
v13 = mul.Scalar(v3, 0.3)
v14 = reciprocal.default(v12)
v15 = mul.Tensor(v13, -1.0)
v16 = div.Tensor(v3, -4.0)
v17 = add.Tensor(v15, v16)
v18 = mul.Tensor(v17, -1.0)
v19 = mul.Tensor(v14, v18)
v20 = mul.Tensor(v11, v19)
v21 = addcmul.default(v20, v8, v16)
v22 = scatter_add.default(v21, 1, v2, v15)
return v22
""",
    )


def test_numbers_of_rows_meet_first():
    """Exactly as they did, also where they are integers or in a lower precision."""
    b = Builder("logits", "rows", "rows")
    z, g, y = b.inputs()
    wide = b.add("aten.mul.Tensor", spread(b, g), b.add("aten.add.Scalar", spread(b, g), 1.0))
    below = b.add("aten.lt.Scalar", spread(b, y), 20)
    b.result("dx", b.add("aten.where.self", below, b.add("aten.mul.Tensor", wide, z), wide), torch.float64, (3,), 0)
    program, inputs = b.program(), given("logits", "number", "labels")
    assert_expected_inline(
        shown(check(program, inputs)),
        """\
v3 = add.Scalar(v1, 1.0)
v4 = mul.Tensor(v1, v3)
v5 = lt.Scalar(v2, 20)
v6 = mul.Tensor(v4, v0)
v7 = where.self(v5, v6, v4)
return v7
""",
    )
    low = [t.bfloat16() if t.is_floating_point() else t for t in inputs]
    assert evaluate(tidy(program, low), low, N, ())[0].equal(evaluate(program, low, N, ())[0])


def test_numbers_are_no_values() -> None:
    """1 - x and 0 * x: the numbers are not taken for the first values of the program."""
    b = Builder("logits", "logits", "rows")
    z, _, g = b.inputs()
    less = b.add("aten.sub.Tensor", 1, b.add("aten.mul.Tensor", z, z))
    b.result("dx", b.add("aten.add.Tensor", b.add("aten.mul.Tensor", 0, less), less), torch.float64, (3,), 0)
    b.result("row", b.add("aten.sub.Tensor", 2, g), torch.float64, (1,))
    check(b.program(), given("logits", "logits", "number"))


@pytest.mark.parametrize("number", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("logits", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (N, 1)], ids=str)
def test_dtypes_are_those_of_the_program(logits: torch.dtype, number: torch.dtype, shape: tuple[int, ...]) -> None:
    """A number that is spread has dimensions, which decide what dtype comes out."""
    b = Builder("logits", "rows" if len(shape) == 2 else "whole")
    z, g = b.inputs()
    for op, result in (("aten.mul.Tensor", "row"), ("aten.lt.Tensor", "row"), ("aten.add.Tensor", "dx")):
        b.result(result, b.add(op, spread(b, g), z), torch.float64, (V,) if result == "row" else (3,), 0)
    program = b.program()
    inputs = [given("logits")[0].to(logits), torch.full(shape, 1.2345678901234).to(number)]
    for f, w in zip(evaluate(tidy(program, inputs), inputs, N, ()), evaluate(program, inputs, N, ())):
        assert f.dtype == w.dtype and torch.equal(f, w)


def test_factors_of_another_dtype() -> None:
    """They do not meet each other, where less of them would be left: integers, and 16 bits beside fp32."""
    b = Builder("logits", "rows", "rows")
    z, y, g = b.inputs()
    times = b.add("aten.mul.Tensor", b.add("aten.mul.Tensor", z, 0.7), y)
    huge = b.add("aten.mul.Tensor", b.add("aten.mul.Tensor", b.add("aten.mul.Tensor", z, 1e-30), 1e6), 1e300)
    hot = b.add("aten.scatter.value", zeros(b), 1, b.add("aten.remainder.Scalar", y, V), -1.0)
    part = b.add("aten.mul.Tensor", b.add("aten.mul.Tensor", hot, g), g)
    for value in (times, huge, backward(b, log_softmax(b, z), part)):
        b.result("dx", value, torch.float64, (3,), 0)
    z_, _, g_ = given("logits", "labels", "number")
    inputs = [z_, torch.arange(N)[:, None] + 2**24 + 1, g_.bfloat16()]
    program = b.program()
    close(evaluate(tidy(program, inputs), inputs, N, ()), evaluate(program, inputs, N, ()), 1e-13)


@pytest.mark.parametrize("how", ["raises", "another dtype"])
def test_a_program_that_cannot_be_written_runs_as_it_is(
    how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(self: Any, old: int, step: Any) -> Ref:
        if how == "raises":
            raise RuntimeError("out of luck")
        return self._op(torch.ops.prims.convert_element_type.default, Ref(0), torch.bfloat16)

    monkeypatch.setattr(region_tidy._Tidy, "_pointwise", fails)
    tidied.cache_clear()
    b = Builder("logits")
    b.result("dx", b.add("aten.exp.default", *b.inputs()), torch.float64, (3,), 0)
    with caplog.at_level("WARNING", "lce_inductor"):
        assert tidy(b.program(), given("logits")) == b.program()
    assert "runs as it is" in caplog.text
    tidied.cache_clear()


def test_the_result_is_written_over_the_logits() -> None:
    """Where they are an operand of the last step, without a copy."""
    from lce_inductor.lower import region_blocks as blocks

    b = Builder("logits", "rows")
    z, c = b.inputs()
    b.result("dx", b.add("aten.add.Tensor", b.add("aten.exp.default", c), z), torch.float64, (3,), 0)
    n, classes = 4, 400  # a step of few values is called as it is
    z_, c_ = torch.randn(n, classes, dtype=torch.float64), torch.randn(n, classes, dtype=torch.float64)
    expected, home = c_.exp() + z_, z_.data_ptr()
    metas = tuple(meta(t, kind) for t, kind in ((z_, "logits"), (c_, "rows")))
    with Counted() as ops:
        (found,) = blocks.run(b.program().text(), n, [z_, c_], metas, (), [])
    assert found.data_ptr() == home and torch.equal(found, expected)
    assert "aten.copy_.default" not in ops.seen


class Counted(TorchDispatchMode):
    """The names of the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def _left(name: str, b: Builder) -> Ref:
    z, g, c = b.inputs()
    logp = log_softmax(b, z)
    if name == "given for each class":  # adds up to what it adds up to
        return backward(b, logp, b.add("aten.mul.Tensor", c, g))
    if name == "another sum":
        total = b.add("aten.sum.dim_IntList", b.add("aten.exp.default", z), (1,), True)
        return backward(
            b, logp, b.add("aten.mul.Tensor", b.add("aten.div.Tensor", b.add("aten.exp.default", logp), total), c)
        )
    if name == "of another softmax":  # g - p * sum(q): not what a softmax's derivative is
        p = b.add("aten.exp.default", logp)
        total = b.add("aten.sum.dim_IntList", b.add("aten.mul.Tensor", c, g), (1,), True)
        return b.add("aten.sub.Tensor", b.add("aten.mul.Tensor", p, g), b.add("aten.mul.Tensor", p, total))
    if name == "a base that is not zero":
        base = b.add("aten.full.default", (Rows(), V), 1, dtype=torch.float64)
        y = b.add("prims.convert_element_type.default", g, torch.int64)
        return backward(b, logp, b.add("aten.mul.Tensor", b.add("aten.scatter.value", base, 1, y, -1.0), g))
    assert name == "over some of the classes"
    some = b.add("aten.slice.Tensor", b.add("aten.exp.default", logp), 1, 0, V - 1)
    total = b.add("aten.sum.dim_IntList", some, (1,), True)
    p = b.add("aten.exp.default", logp)
    return b.add("aten.sub.Tensor", p, b.add("aten.mul.Tensor", p, total))


@pytest.mark.parametrize(
    "name",
    [
        "given for each class",
        "another sum",
        "of another softmax",
        "a base that is not zero",
        "over some of the classes",
    ],
)
def test_what_adds_up_to_something_else(name: str) -> None:
    b = Builder("logits", "rows", "rows")
    b.result("dx", _left(name, b), torch.float64, (3,), 0)
    found = check(b.program(), given("logits", "number", "classes"))
    assert sum(step.op == "aten.sum.dim_IntList" for step in found.steps) >= 2


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("where", ["a logit", "a row of logits", "the number"])
def test_rows_that_are_not_finite(value: float, where: str) -> None:
    """They are where they were, and no other row is touched."""
    b = Builder("logits", "rows", "rows")
    z, y, g = b.inputs()
    picked, dz = nll(b, z, y, g)
    b.result("row", picked, torch.float64, (1,))
    b.result("dx", dz, torch.float64, (3,), 0)
    program, inputs = b.program(), given("logits", "labels", "number")
    if where == "the number":
        inputs[2][2] = value
    else:
        inputs[0][2, 3 if where == "a logit" else slice(None)] = value
    found, wanted = (evaluate(p, inputs, N, ()) for p in (tidy(program, inputs), program))
    for f, w in zip(found, wanted):
        assert torch.equal(f.isfinite().all(1), w.isfinite().all(1))
        torch.testing.assert_close(f[w.isfinite().all(1)], w[w.isfinite().all(1)])
    assert found[0].equal(wanted[0]) or where != "the number"


@pytest.mark.parametrize("name", CASES)
def test_programs_of_other_tests(name: str) -> None:
    case = CASES[name](N, 6, V, torch.float64)
    _, xs, weights, biases, has_bias, rows, whole, _, sizes, text, *_ = case.call
    given = iter(biases)
    zs = [x @ w + next(given) if has else x @ w for x, w, has in zip(xs, weights, has_bias)]
    tensors = {"logits": iter(zs), "rows": iter(rows), "whole": iter(whole)}
    program = parse(text)
    inputs = [next(tensors[kind]) for kind in program.inputs]
    metas = tuple(meta(t, kind) for kind, t in zip(program.inputs, inputs))
    found = parse(tidied(text, metas, tuple(sizes), torch.device("cpu")))
    close(evaluate(found, inputs, N, sizes), evaluate(program, inputs, N, sizes), 1e-13)
    assert [r._replace(value=Ref(0)) for r in found.results] == [r._replace(value=Ref(0)) for r in program.results]
    assert found.inputs == program.inputs
    assert _passes(found, inputs, sizes) <= _passes(program, inputs, sizes)
    assert json.loads(found.text())


def _passes(program: Program, inputs: list[Tensor], sizes: Any) -> int:
    """Steps that write as many values as there are logits."""
    from lce_inductor.lower.region_values import propagate

    metas = tuple(meta(t, kind) for kind, t in zip(program.inputs, inputs))
    values = propagate(program.text(), N, metas, tuple(sizes), torch.device("cpu"))
    return sum(isinstance(v, Tensor) and v.numel() >= N * V for v in values[len(inputs) :])
