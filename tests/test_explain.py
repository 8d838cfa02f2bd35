"""explain(): every case named, with a hint that works; nothing of the user's disturbed."""

from __future__ import annotations

import inspect
import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import V, head
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

import lce_inductor
from lce_inductor import Explanation, explain, reasons
from lce_inductor.reasons import REASONS

HERE = __file__
WIDE = 97  # classes of a head that is told from a layer by its width alone


def step(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    logits = F.linear(x, w)
    return F.cross_entropy(logits, y)


def told(fn: Callable[..., Any], *args: Any, **settings: Any) -> Explanation:
    return explain(fn, **{"min_logits_bytes": 0, **settings})(*args)


def codes(explanation: Explanation) -> list[str | None]:
    return [r.code for r in explanation.records]


def line_of(source: str, code: str) -> bool:
    """Does a record name this file and this line of code?"""
    match = re.match(r"(.+?):(\d+): (.*)", source)
    return (
        match is not None and match[1] == HERE and Path(HERE).read_text().split("\n")[int(match[2]) - 1].strip() == code
    )


# -- the object


def test_a_rewritten_head():
    found = told(step, *head())
    (record,) = found.records
    assert record.rewritten and record.trains and line_of(record.source, "logits = F.linear(x, w)")
    assert [line_of(at, "return F.cross_entropy(logits, y)") for at in record.losses] == [True]
    assert (found.saved_bytes, found.held_bytes) == (24 * V * 4, 0)
    assert found.graphs[0].gradients == {"forward": 1, "recompute": 0}
    text = str(found)
    assert "heads rewritten: 1 of 1" in text and "rewritten, 3 products, kernels" in text and "3.5 KiB saved" in text
    assert "tests/test_explain.py:" in text.replace(os.sep, "/") and "hint" not in text


def test_gradients_by_recomputing():
    assert "rewritten, 4 products" in str(told(lambda x, w, y: step(x, w, y) ** 2, *head()))


def test_as_data():
    found = told(step, *head(), chunk_tokens=7)
    data = json.loads(found.to_json())
    assert data == json.loads(json.dumps(found.as_dict()))
    assert data["saved_bytes"] == 24 * V * 4 and data["settings"]["chunk_tokens"] == 7
    (record,) = data["graphs"][0]["records"]
    assert record["code"] is None and record["kind"] == "linear" and record["plan"].startswith("4 chunks")


def test_table_of_long_lines_and_sizes():
    """No row is wider than a terminal; sizes have a unit that fits."""
    x, w, y = torch.randn(512, 4), torch.randn(4096, 4), torch.zeros(512, dtype=torch.long)
    found = told(
        lambda x, w, y: F.cross_entropy(F.linear(x, w, torch.zeros(4096)) * 1.0 * 1.0 * 1.0 * 1.0 * 1.0 * 1.0, y),
        x,
        w,
        y,
    )
    assert max(map(len, str(found).split("\n"))) <= 140 and "..." in str(found) and "8.0 MiB saved" in str(found)


def test_nothing_to_say():
    text = str(told(lambda x: x.sin(), torch.randn(3)))
    assert "no head, and no loss over logits" in text
    assert "no graph" in str(told(lambda x: x, torch.randn(3)))


def test_wrong_settings_and_wrong_fn():
    with pytest.raises(ValueError, match="chunk_tokens = 0"):
        explain(step, chunk_tokens=0)
    with pytest.raises(TypeError, match="unknown setting"):
        explain(step, chunks=1)
    with pytest.raises(TypeError, match="function or a module"):
        explain(3)  # type: ignore[arg-type]


def test_values_are_those_of_the_function():
    """The graphs are really run: code after a break sees right values."""
    seen = []

    def fn(x, w, y):
        loss = step(x, w, y)
        seen.append(loss.item())
        return loss * 2

    x, w, y = head()
    told(fn, x, w, y)
    torch.testing.assert_close(seen, [step(x, w, y).item()])


# -- the cases, each with a hint that works


def broken(x, w, y):
    logits = F.linear(x, w)
    print("thinking")
    return F.cross_entropy(logits, y)


def mended(x, w, y):
    logits = F.linear(x, w)
    if not torch.compiler.is_compiling():
        print("thinking")
    return F.cross_entropy(logits, y)


def test_head_and_loss_in_two_graphs(capsys):
    found = told(broken, *head(v=WIDE))
    assert codes(found) == ["graph-break", "graph-break"] and len(found.graphs) == 2
    linear, loss = found.records
    assert (linear.kind, loss.kind) == ("linear", "loss")
    for record in (linear, loss):
        at, reason = record.stop.split(" (", 1)
        assert line_of(at, 'print("thinking")') and "builtin operator" in reason
    assert line_of(found.graphs[0].break_at, 'print("thinking")')
    assert found.held_bytes == linear.logits_bytes, "the same logits count once"
    text = str(found)
    assert text.count("hint: ") == 1 and "is_compiling()" in linear.hint and 'print("thinking")' in text
    assert codes(told(mended, *head(v=WIDE))) == [None]


def test_a_break_inside_a_called_function():
    """Dynamo tries the callee within its caller first, then as a frame of its own."""

    def loss(logits, y):
        logits = logits * 2
        torch._dynamo.graph_break()
        return F.cross_entropy(logits, y)

    found = told(lambda x, w, y: loss(F.linear(x, w), y), *head(v=WIDE))
    assert set(codes(found)) == {"graph-break"}
    assert all(line_of(r.stop.split(" (")[0], "torch._dynamo.graph_break()") for r in found.records)


def test_a_metric_before_the_break():
    """The head is read without gradient in its own graph, and trained in the next."""

    def fn(x, w, y):
        logits = F.linear(x, w)
        right = (logits.argmax(-1) == y).sum()
        torch._dynamo.graph_break()
        return F.cross_entropy(logits, y), right

    assert codes(told(fn, *head(v=WIDE))) == ["graph-break", "graph-break"]


def gpt2():
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    none = {"bos_token_id": None, "eos_token_id": None}
    shape = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=211, n_positions=32, **none)
    return transformers.GPT2LMHeadModel(shape), torch.randint(0, 211, (2, 16))


def test_gpt2_of_transformers():
    """The class has no loss type of its own; the hint is the line that mends it."""
    model, ids = gpt2()
    found = explain(torch.compile(model), min_logits_bytes=0)(ids, labels=ids)
    assert codes(found) == ["graph-break", "graph-break"]
    record = found.records[0]
    assert "self.loss_function(" in record.stop and "logging.Logger" in record.stop
    (hint,) = re.findall(r"set (model\.\w+ = \S+) ", record.hint)
    exec(hint)
    found = explain(torch.compile(model), min_logits_bytes=0)(ids, labels=ids)
    assert len(found.graphs) == 1 and "graph-break" not in codes(found)


def test_gpt2_of_transformers_as_the_hint_says():
    model, ids = gpt2()
    model.loss_type = "ForCausalLM"
    assert codes(explain(torch.compile(model), min_logits_bytes=0)(ids, labels=ids)) == [None]


def test_loss_outside_the_compiled_function():
    model = nn.Linear(8, WIDE)
    x, y = torch.randn(24, 8), torch.arange(24)
    found = told(model, x)
    assert codes(found) == ["loss-outside"] and "compile the function that calls" in str(found)
    assert codes(told(lambda x, y: F.cross_entropy(model(x), y), x, y)) == [None]
    with torch.no_grad():  # generation: nobody wants a loss
        assert codes(told(model, x)) == ["returned-loss-free"]


def test_a_loss_without_a_head():
    z, y = torch.randn(24, WIDE, requires_grad=True), torch.arange(24)
    found = told(lambda z, y: F.cross_entropy(z, y), z, y)
    assert codes(found) == ["no-head"] and found.held_bytes == 24 * WIDE * 4
    assert line_of(found.records[0].source, "found = told(lambda z, y: F.cross_entropy(z, y), z, y)")


def test_logits_used_by_something_else():
    def fn(x, w, y):
        logits = F.linear(x, w)
        spread = logits.detach().histc(9).sum()
        return F.cross_entropy(logits, y) + spread

    (record,) = told(fn, *head()).records
    assert record.code == "escape" and line_of(
        record.stop.split(" (nothing")[0], "spread = logits.detach().histc(9).sum()"
    )
    assert record.hint == REASONS["escape"].hint and len(record.losses) == 1

    def without(x, w, y):
        logits = F.linear(x, w)
        return F.cross_entropy(logits, y) + x.detach().histc(9).sum()

    assert codes(told(without, *head())) == [None]


def test_rows_read_together():
    """What follows from several rows of logits at once cannot be computed from some of them."""

    def fn(x, w, y):
        logits = F.linear(x, w)
        total = logits.cumsum(0)
        return F.cross_entropy(total, y)

    (record,) = told(fn, *head()).records
    assert record.code == "crossing" and line_of(record.stop.split(" (")[0], "total = logits.cumsum(0)")
    assert record.hint.startswith("none for a loss that needs all logits")
    assert codes(told(lambda x, w, y: F.cross_entropy(F.linear(x.cumsum(0), w), y), *head())) == [None]


def test_too_small():
    found = explain(step, min_logits_bytes=1 << 20)(*head())
    assert codes(found) == ["too-small"] and f"{24 * V * 4} of {1 << 20} bytes" in str(found)
    assert REASONS["too-small"].hint.startswith("install(min_logits_bytes=0)")
    assert codes(explain(step, min_logits_bytes=0)(*head())) == [None]


@pytest.mark.parametrize("returned, code", [("defer", "too-small"), ("keep", "returned")])
def test_small_logits_that_are_returned(returned, code):
    """They are not deferred because they are small: to say that they have to exist would be untrue."""

    def fn(x, w, y):
        z = F.linear(x, w)
        return F.cross_entropy(z, y), z

    assert codes(explain(fn, min_logits_bytes=1 << 20, returned_logits=returned)(*head())) == [code]


def test_not_installed():
    big = {"min_logits_bytes": 0}
    args = torch.randn(256, 4, requires_grad=True), torch.randn(1 << 16, 4), torch.zeros(256, dtype=torch.long)
    found = explain(step)(*args)
    assert codes(found) == ["not-installed"] and found.held_bytes == 64 << 20
    assert "the table is for install() with these settings" in str(explain(step, **big)(*args))
    lce_inductor.install()
    assert codes(explain(step)(*args)) == [None] and not explain(step)(*args).notes
    assert explain(step, **big)(*args).notes == ()


def test_settings_in_force_are_used(installed):
    assert explain(step)(*head()).settings.min_logits_bytes == 0
    with lce_inductor.installed(min_logits_bytes=0, chunk_tokens=7):
        assert explain(step)(*head()).settings.chunk_tokens == 7


def test_hooks_replaced_by_options(installed):
    mine: list[int] = []

    class Mine(torch._inductor.custom_graph_pass.CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            mine.append(1)

        def uuid(self) -> str:
            return "mine"

    found = explain(torch.compile(step, options={"joint_custom_pre_pass": Mine()}))(*head())
    assert codes(found) == ["hooks-replaced"] and mine == [1] and "leave the hook out of options=" in str(found)
    found = explain(torch.compile(step, options={"pre_grad_custom_pass": Mine()}))(*head())
    assert codes(found) == [None] and mine == [1, 1], "the other hook rewrites heads all the same"
    (note,) = found.notes
    assert "returned logits (pre_grad_custom_pass)" in note
    lce_inductor.uninstall()
    with inductor.patch(pre_grad_custom_pass=Mine()), lce_inductor.installed(min_logits_bytes=0):
        assert codes(explain(torch.compile(step, options={"max_autotune": False}))(*head())) == [None]
    assert mine == [1, 1, 1]


def test_inductor_options():
    compiled = torch.compile(step, options=lce_inductor.inductor_options(min_logits_bytes=0))
    assert codes(explain(compiled)(*head())) == [None]


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
def test_another_backend(backend, installed):
    found = explain(torch.compile(step, backend=backend))(*head())
    assert codes(found) == ["other-backend"] and "'inductor'" in str(found)
    assert codes(explain(torch.compile(step, backend="inductor"))(*head())) == [None]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, V)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.calls.add_(1)
        return F.cross_entropy(self.head(F.dropout(x, 0.5)), y)


@pytest.mark.parametrize("how", ["module", "compiled", "in place", "method", "partial"])
def test_what_can_be_explained(how, installed):
    import functools

    model = Model()
    if how == "in place":
        model.compile()
    fn = {
        "module": model,
        "compiled": torch.compile(model, dynamic=True),
        "in place": model,
        "method": model.forward,
        "partial": functools.partial(model),
    }[how]
    (record,) = explain(fn)(torch.randn(24, 8), torch.arange(24)).records
    assert record.rewritten and (record.tokens == "24") == (how != "compiled")


def test_a_failing_pass(installed, monkeypatch, caplog):
    monkeypatch.setattr("lce_inductor.regions.decide", lambda *_: 1 / 0)
    found = explain(step)(*head())
    assert "internal-error" in str(found) and found.notes


def test_an_error_of_fn_is_the_users(installed):
    with pytest.raises(ZeroDivisionError):
        explain(lambda x: x * (1 / 0))(torch.randn(3))
    assert codes(explain(step)(*head())) == [None]


# -- nothing is disturbed


def test_state_afterwards(installed):
    model, x, y = Model(), torch.randn(24, 8, requires_grad=True), torch.arange(24)
    model.head.weight.grad = grad = torch.ones(V, 8)
    before = grad.clone()
    counters["lce_inductor"]["rewritten"] = 5
    counts = {k: dict(c) for k, c in counters.items()}
    hooks = inductor.pre_grad_custom_pass, inductor.joint_custom_pre_pass
    states = torch.get_rng_state(), random.getstate()

    def fn(x, y):
        loss = model(x, y)
        random.random()
        loss.backward()
        return loss

    assert None in codes(explain(fn)(x, y))
    assert (
        model.head.weight.grad is grad and torch.equal(grad, before) and model.head.bias.grad is None and x.grad is None
    )
    assert model.calls == 0 and random.getstate() == states[1] and torch.equal(torch.get_rng_state(), states[0])
    assert {k: dict(c) for k, c in counters.items()} == counts
    assert hooks == (inductor.pre_grad_custom_pass, inductor.joint_custom_pre_pass)


def test_compiled_code_stays(installed, capsys):
    """The user's function is not compiled again, and gains no entries that count as its recompilations."""
    graphs = []

    def backend(gm: Any, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    compiled = torch.compile(broken, backend=backend)
    args = head()
    compiled(*args)
    apart = "isolate_recompiles" in inspect.signature(torch._dynamo.eval_frame._optimize).parameters
    for _ in range(10 if apart else 3):  # Dynamo's limit of recompilations is 8; before torch 2.13 these count
        assert len(told(compiled, *args).graphs) == 2
    assert len(graphs) == 2
    compiled(*args)
    assert len(graphs) == 2
    compiled(*head(n=26))
    assert len(graphs) > 2, "and it may still be compiled again"


def test_own_code_is_dropped():
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    told(broken, *head())
    assert _debug_get_cache_entry_list(broken.__code__) == []


# -- the documentation


def test_every_reason_is_in_the_docs():
    """Code, explanation and hint as they are told, and nothing else in their table."""
    page = (Path(lce_inductor.__file__).parent.parent / "docs" / "reasons.md").read_text()
    table = re.search(r"\| reason code \|.*?(\n\n|\Z)", page, re.S)
    assert table is not None
    rows = re.findall(r"^\| `([a-z-]+)` \| (.*) \| (.*) \|$", table[0], re.M)
    assert rows == [tuple(row) for row in reasons.REASONS.values()]


def test_every_reason_is_used():
    """A code that nothing gives says what the library does not do."""
    root = Path(lce_inductor.__file__).parent
    text = "".join(file.read_text() for file in root.rglob("*.py") if file.name != "reasons.py")
    assert [code for code in reasons.REASONS if f'"{code}"' not in text] == []
