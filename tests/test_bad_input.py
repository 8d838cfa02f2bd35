"""Bad input: the exception or the value that eager or torch.compile gives, and never a read outside the weight."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Compiled, N, V, fresh, head, joint_graph, rewrite
from torch import Tensor, nn

import lce_inductor
from lce_inductor.ops import schema  # noqa: F401  (registers the ops)
from lce_inductor.spec.statistics import NO_TARGET

Outcome = tuple[str, Any]


def outcome(fn: Callable[..., Any], *args: Any) -> Outcome:
    """What a call gives: its results, or the type of its exception (the original one, if Dynamo wrapped it)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loss = fn(*args)
            if loss.requires_grad:
                loss.sum().backward()
            leaves = [t.grad for t in args if isinstance(t, Tensor) and t.requires_grad]
            return "value", (loss.detach(), loss.requires_grad, *leaves)
        except Exception as error:
            return type(error).__name__, str(error)


def same(a: Outcome, b: Outcome) -> bool:
    if a[0] != b[0] or a[0] != "value":
        return a[0] == b[0]
    try:
        torch.testing.assert_close(a[1], b[1], equal_nan=True)
    except AssertionError:
        return False
    return True


def check(ours: Outcome, eager: Outcome, plain: Outcome) -> None:
    """As eager, or as torch.compile without the package where the two differ (it takes int32 labels)."""
    good = same(ours, eager) or same(ours, plain)
    assert good, "\n".join(f"{who}: {how} {str(what)[:200]}" for who, (how, what) in _named(ours, eager, plain))


def _named(ours: Outcome, eager: Outcome, plain: Outcome) -> list[tuple[str, Outcome]]:
    return [("ours", ours), ("eager", eager), ("torch.compile", plain)]


def arguments() -> tuple[Tensor, Tensor, Tensor]:
    x, w, y = head()
    return x, w, y.clamp(min=0)


def at(value: int, n: int = 1) -> Tensor:
    """Labels of which n have this value."""
    y = arguments()[2]
    y[3 : 3 + n] = value
    return y


def loss(x: Tensor, w: Tensor, y: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(F.linear(x, w), y, **options)


OUT_OF_RANGE = [V, V + 1, -1, -99, -101, 2**31, -(2**31), 2**62, NO_TARGET, NO_TARGET + 1]


@pytest.mark.parametrize("how", ["compiled", "interpreted"])
@pytest.mark.parametrize("value", OUT_OF_RANGE)
def test_target_out_of_range(value, how, installed):
    """eager's exception and message, from the forward, whatever the reduction."""
    x, w, _ = arguments()
    for options in ({}, {"reduction": "none"}, {"reduction": "sum", "label_smoothing": 0.1}):
        fn = lambda x, w, y, options=options: loss(x, w, y, **options)
        with pytest.raises(IndexError, match=f"Target {value} is out of bounds"):
            fn(x, w, at(value))
        if how == "compiled":
            run: Any = Compiled(fn)
        else:
            traced = joint_graph(lambda x, w, y, fn=fn: fn(x, w, y), x, w, at(0))
            assert rewrite(traced) == ["rewritten"]
            run = lambda *args, traced=traced: traced.run(args)
        named = max(value, NO_TARGET + 1)  # the smallest number has a meaning of its own inside
        with pytest.raises(IndexError, match=f"Target {named} is out of bounds"):
            run(x, w, at(value))


def test_target_out_of_range_with_generated_code(installed):
    x, w, _ = arguments()
    compiled = torch.compile(loss)
    torch.testing.assert_close(compiled(x, w, at(0)), loss(x, w, at(0)))
    for value in (V, -1):
        with pytest.raises(IndexError, match=f"Target {value} is out of bounds"):
            compiled(x, w, at(value))
    torch.testing.assert_close(compiled(x, w, at(1)), loss(x, w, at(1)))  # and works on


@pytest.mark.parametrize("value", [V, -1, 2**40, NO_TARGET])
def test_any_value_may_be_the_ignored_one(value, installed):
    """An ignored label is never looked up, wherever it points."""
    x, w, _ = arguments()
    fn = lambda x, w, y: loss(x, w, y, ignore_index=value)
    args = (x, w, at(value, 5))
    assert same(outcome(Compiled(fn), *fresh(args)), outcome(fn, *fresh(args)))


def test_nan_as_a_label(installed):
    """What NaN becomes when it is cast to an integer; inside, the same number means "no target"."""
    x, w, y = arguments()
    fn = lambda x, w, y: loss(x, w, y.long())
    y = y.float().fill_(float("nan"))
    assert outcome(fn, x, w, y)[0] == outcome(Compiled(fn), x, w, y)[0] == "IndexError"


BAD: dict[str, Callable[[], tuple[Any, ...]]] = {
    "int32 target": lambda: (*arguments()[:2], arguments()[2].int()),
    "int16 target": lambda: (*arguments()[:2], arguments()[2].short()),
    "uint8 target": lambda: (*arguments()[:2], arguments()[2].byte()),
    "bool target": lambda: (*arguments()[:2], arguments()[2].bool()),
    "float target": lambda: (*arguments()[:2], arguments()[2].float()),
    "short target": lambda: (*arguments()[:2], arguments()[2][:-1]),
    "long target": lambda: (*arguments()[:2], arguments()[2].repeat(2)),
    "two-dimensional target": lambda: (*arguments()[:2], arguments()[2].view(4, 6)),
    "target column": lambda: (*arguments()[:2], arguments()[2][:, None]),
    "number as target": lambda: (*arguments()[:2], arguments()[2][0]),
    "hidden sizes differ": lambda: (arguments()[0], torch.randn(V, 9), arguments()[2]),
    "weight in another dtype": lambda: (arguments()[0], arguments()[1].detach().double(), arguments()[2]),
    "x in another dtype": lambda: (arguments()[0].detach().bfloat16(), *arguments()[1:]),
    "integer x": lambda: (arguments()[0].detach().long(), *arguments()[1:]),
    "one-dimensional weight": lambda: (arguments()[0], torch.randn(8), arguments()[2]),
    "no target": lambda: (*arguments()[:2], None),
    "all ignored": lambda: (*arguments()[:2], at(-100, N)),
    "no rows": lambda: (arguments()[0].detach()[:0].requires_grad_(), arguments()[1], arguments()[2][:0]),
    "no classes": lambda: (arguments()[0], arguments()[1].detach()[:0], arguments()[2]),
    "no hidden": lambda: (torch.zeros(N, 0), torch.zeros(V, 0, requires_grad=True), arguments()[2]),
    "infinite x": lambda: (arguments()[0].detach() * float("inf"), *arguments()[1:]),
    "NaN in x": lambda: (arguments()[0].detach().index_fill(0, torch.tensor(3), float("nan")), *arguments()[1:]),
    "infinite weight": lambda: (arguments()[0], arguments()[1].detach() * 1e38 * 10, arguments()[2]),
    "huge logits": lambda: (arguments()[0].detach() * 1e4, (arguments()[1].detach() * 1e4).requires_grad_(), arguments()[2]),
    "nothing needs a gradient": lambda: tuple(t.detach() for t in arguments()),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_as_eager_or_as_torch_compile(name, reduction):
    fn = lambda x, w, y: loss(x, w, y, reduction=reduction)
    eager, plain = outcome(fn, *BAD[name]()), outcome(Compiled(fn), *BAD[name]())
    with lce_inductor.installed(min_logits_bytes=0):
        compiled = Compiled(fn)
        ours = outcome(compiled, *BAD[name]())
    check(ours, eager, plain)
    assert "internal-error" not in compiled.refusals


CLASS_WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "too few": lambda: torch.rand(V - 1),
    "too many": lambda: torch.rand(V + 1),
    "a matrix": lambda: torch.rand(V, 1),
    "a number": lambda: torch.rand(()),
    "zeros": lambda: torch.zeros(V),
    "negative": lambda: -torch.rand(V),
    "infinite": lambda: torch.full((V,), float("inf")),
    "NaN": lambda: torch.full((V,), float("nan")),
    "fp64": lambda: torch.rand(V, dtype=torch.float64),
    "integers": lambda: torch.ones(V, dtype=torch.int64),
    "need a gradient": lambda: torch.rand(V, requires_grad=True),
}


@pytest.mark.parametrize("name", CLASS_WEIGHTS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights(name, smoothing):
    fn = lambda x, w, y, c: loss(x, w, y, weight=c, label_smoothing=smoothing)

    def args() -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        return *arguments(), CLASS_WEIGHTS[name]()

    eager, plain = outcome(fn, *args()), outcome(Compiled(fn), *args())
    with lce_inductor.installed(min_logits_bytes=0):
        ours = outcome(Compiled(fn), *args())
    check(ours, eager, plain)


@pytest.mark.parametrize(
    "options", [{"reduction": "avg"}, {"label_smoothing": 1.5}, {"label_smoothing": -0.1}], ids=str
)
def test_bad_options(options):
    """Whoever refuses them without us refuses them with us."""
    fn = lambda x, w, y: loss(x, w, y, **options)
    eager, plain = outcome(fn, *arguments()), outcome(Compiled(fn), *arguments())
    with lce_inductor.installed(min_logits_bytes=0):
        ours = outcome(Compiled(fn), *arguments())
    check(ours, eager, plain)


@pytest.mark.parametrize("ignored", [False, True])
def test_targets_that_eager_takes(ignored):

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, V)
            self.loss = nn.CrossEntropyLoss(ignore_index=7 if ignored else -100)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.loss(self.head(x), y)

    x, _, y = arguments()
    y[2:5] = 7
    module = Model()
    traced = joint_graph(module, x.detach(), y)
    assert rewrite(traced) == ["rewritten"]
    torch.testing.assert_close(traced.run([x, y])[0], module(x, y).detach())


def test_unused_head_with_bad_labels_stays_silent(installed):
    """A loss that nobody reads is dead code for torch.compile; it may not start to raise."""
    x, w, _ = arguments()

    def fn(x, w, y):
        loss(x, w, y)
        return x.sum()

    torch.testing.assert_close(Compiled(fn)(x, w, at(0)), x.sum())


def test_a_module_that_is_no_head_is_named(installed, caplog):
    """Once: what it returns is computed, and nothing waits."""
    conv = nn.Conv1d(4, 8, 1)
    lce_inductor.defer(conv)
    x = torch.randn(2, 4, 5)
    assert all(type(conv(x)) is torch.Tensor for _ in range(2))
    said = [r.getMessage() for r in caplog.records if "calls no F.linear" in r.getMessage()]
    assert said == ["defer(Conv1d): it calls no F.linear, and is computed as always"]
