"""What the user sees: log lines, counters, trace artifacts, names in the generated code."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from corpus.harness import GraphRecord, no_codegen_backend
from harness import Compiled, N, V, head, inference_graph, joint_graph, products
from torch._dynamo.utils import counters

import lce_inductor
from lce_inductor import Config, regions
from lce_inductor.ops import schema  # noqa: F401  (registers the ops)
from lce_inductor.reasons import REASONS
from lce_inductor.reporting import history
from lce_inductor.reporting import records as report


@pytest.fixture
def lines(installed, caplog) -> Iterator[list[str]]:
    """Log lines of the package at debug level, as TORCH_LOGS="+lce_inductor" shows them."""
    caplog.set_level(logging.DEBUG, logger="lce_inductor")
    yield _Lines(caplog)


class _Lines:
    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self.caplog = caplog

    def __iter__(self) -> Iterator[str]:
        return (r.getMessage() for r in self.caplog.records if r.name.startswith("lce_inductor"))

    def text(self) -> str:
        return "\n".join(self)


def loss(x, w, y):
    logits = F.linear(x, w)
    return F.cross_entropy(logits.float(), y)


def records(fn, *args, **settings) -> list[report.HeadRecord]:
    config = Config(**{"min_logits_bytes": 0, **settings})
    trains = any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)
    graph = (joint_graph if trains else inference_graph)(fn, *args).graph
    found = report.records_of(regions.decide(graph, config), config, set())
    return [r for r in found if r.told]


def test_a_rewritten_head(lines):
    """Source line, sizes, bytes, plan, nodes replaced and inserted, and the number of products."""
    Compiled(loss)(*head())
    text = lines.text()
    assert f"rewrote {__file__}:" in text and "logits = F.linear(x, w)" in text
    assert f"{N}x{V} logits" in text and "no longer exist" in text and "1 chunks of 24 tokens" in text
    removed = [line for line in lines if line.startswith("  - ")]
    added = [line for line in lines if line.startswith("  + ")]
    assert any("aten.mm" in r for r in removed) and any("gather" in r for r in removed)
    assert any("row_stats" in a for a in added)
    assert "(3 products)" in text and "; fused kernels, 3 products)" in text and "4 products" not in text


def test_gradients_by_recomputing(lines):
    Compiled(lambda x, w, y: loss(x, w, y) ** 2)(*head())
    assert "(4 products)" in lines.text() and "; fused kernels, 4 products)" in lines.text()


def test_a_head_that_a_program_computes(lines):
    """No kernel has an erf of the logits: the tier, the steps and the products are named."""
    compiled = Compiled(lambda x, w, y: F.cross_entropy(torch.erf(F.linear(x, w)), y))
    compiled(*head())
    (text,) = (line for line in lines if line.startswith("rewrote"))
    steps = re.search(r"; a program of (\d+) steps, 3 products\)", text)
    assert steps is not None and int(steps[1]) > 5
    sums = counters["lce_inductor.heads"]
    assert sums == {"region": 1, "steps": int(steps[1]), "products": 3, "saved_bytes": N * V * 4}
    assert compiled.gradients == ["forward"]


def test_heads_that_one_program_computes():
    """LoRA on the head, its base frozen: two products, gradients of x by both and of one weight."""
    x, w, y = head()

    def fn(x, w, y, a, b):
        return F.cross_entropy(F.linear(x, w.detach()) + F.linear(F.linear(x, a), b), y)

    compiled = Compiled(fn)
    with lce_inductor.installed(min_logits_bytes=0):
        compiled(x, w, y, torch.randn(2, 8, requires_grad=True), torch.randn(V, 2, requires_grad=True))
    found = lce_inductor.report().records[-2:]
    assert [(r.products, r.together) for r in found] == [(5, 2)] * 2 and "5 products for 2 heads" in found[0].how()
    assert counters["lce_inductor.heads"]["products"] == 5


def test_logits_that_exist_all_the_same():
    """Nothing is called saved that a graph still holds."""
    graph = joint_graph(loss, *head()).graph
    decision = regions.decide(graph, Config(min_logits_bytes=0))
    (record,) = report.records_of(decision, Config(), set(graph.nodes))
    assert record.rewritten and record.held and not record.saved
    assert "exist all the same" in record.lines()[0] and "no longer exist" not in record.lines()[0]
    report.publish([record], Config(min_logits_bytes=0))
    assert counters["lce_inductor.heads"]["held_bytes"] == N * V * 4
    assert "saved_bytes" not in counters["lce_inductor.heads"]


def selected(z, y):
    return z.gather(1, y.clamp(min=0)[:, None])


@pytest.mark.parametrize("read, held, count", {
    "gather": (selected, True, 3),
    "two of a row": (lambda z, y: z[:, [0, 5]], True, 3),
    "gather, squared": (lambda z, y: selected(z, y).square().mean(), False, 3),
    "gather of log_softmax": (lambda z, y: selected(z.log_softmax(1), y), False, 4),
    "logsumexp": (lambda z, y: z.logsumexp(1), False, 4),
}.values())  # fmt: skip
def test_a_gradient_of_the_logits_size_is_told(read, held, count, installed, monkeypatch):
    """The gradient of a gather reads no logits, so that nothing computes it by chunks: the graph has it whole."""
    graphs: list[GraphRecord] = []
    backend = no_codegen_backend(graphs)
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda gm, inputs, **options: backend(gm, inputs))
    history.forget()
    x, w, y = head()
    torch.compile(lambda x, w, y: read(F.linear(x, w), y))(x, w, y).square().sum().backward()
    whole = lce_inductor.report()
    (record,) = whole.records
    assert max(g.largest for g in graphs) == N * V if held else max(g.largest for g in graphs) < N * V
    assert record.rewritten and record.gradient_held == held and record.saved != held
    assert (whole.saved_bytes, whole.held_bytes) == ((0, N * V * 4) if held else (N * V * 4, 0))
    assert record.products == count
    assert ("but a gradient of their size does" in record.lines()[0]) == held
    assert ("a gradient held" in str(whole)) == held


def test_the_gradient_of_a_head_that_is_left_alone_is_not_the_others():
    """Two heads share a weight; what is left in the graph is told of the one that is left alone."""

    def fn(x, w, y):
        return F.cross_entropy(F.linear(x, w), y) + F.linear(x * 2, w).cumsum(0).logsumexp(1).sum()

    graph = joint_graph(fn, *head()).graph
    decision = regions.decide(graph, Config(min_logits_bytes=0))
    rewritten, alone = decision.heads.values()
    assert rewritten.refusal is None and alone.refusal is not None
    existing = set(graph.nodes) - {rewritten.node, *(n for n in rewritten.backward if n not in alone.backward)}
    found = report.records_of(decision, Config(), existing)
    assert [r.gradient_held for r in found] == [False, False] and found[0].saved


def test_a_refused_head(lines):
    """The line of the linear, the line where it stopped, the code, the explanation and the hint."""

    def fn(x, w, y):
        logits = F.linear(x, w)
        spread = logits.detach().histc(9).sum()
        return F.cross_entropy(logits, y) + spread

    Compiled(fn)(*head())
    text, row = lines.text(), REASONS["escape"]
    assert "left" in text and "logits = F.linear(x, w)" in text
    assert "escape at" in text and "spread = logits.detach().histc(9).sum()" in text
    assert row.explanation in text and row.hint in text
    assert "rewrote" not in text


@pytest.mark.parametrize("enabled", [True, False])
def test_quiet_without_torch_logs(enabled, installed, caplog):
    caplog.set_level(logging.DEBUG if enabled else logging.WARNING, logger="lce_inductor")
    Compiled(loss)(*head())
    assert bool([r for r in caplog.records if r.name.startswith("lce_inductor")]) == enabled


def test_counters(installed):
    x, w, y = head()

    def fn(x, w, u, y):
        other = F.linear(x, u)
        return loss(x, w, y) + loss(x * 2, w, y) ** 2 + F.cross_entropy(other, y) + other.detach().histc(9).sum()

    compiled = Compiled(fn)
    compiled(x, w, w.detach() * 2, y)
    assert compiled.counts == {
        "rewritten": 2, "refused:escape": 1, "gradients:forward": 1, "gradients:recompute": 1,
    }  # fmt: skip


def test_layers_of_the_body_are_no_news(lines):
    """A linear that is not wide and reaches no loss by itself is not spoken of."""
    square = torch.randn(8, 8)

    def fn(x, w, y, s):
        return loss(F.relu(F.linear(x, s)), w, y)

    Compiled(fn)(*head(), square)
    assert counters["lce_inductor"] == {"rewritten": 1, "gradients:forward": 1}
    assert "left" not in lines.text()


def test_a_wide_linear_without_a_loss_is_news():
    """Returned, that is: what a loss outside could read. Not where it is anything else than logits."""
    x, w = torch.randn(4, 8), torch.randn(32000, 8)
    assert records(lambda x, w: F.linear(x, w).sin(), x, w) == []
    (record,) = records(lambda x, w: F.linear(x, w) * 2, x, w)
    assert record.code == "returned-loss-free" and record.classes == "32000" and not record.rewritten
    counters.clear()
    report.publish([record], Config(min_logits_bytes=1 << 20))
    assert not counters["lce_inductor"]
    report.publish([record], Config(min_logits_bytes=0))
    assert counters["lce_inductor"] == {"refused:returned-loss-free": 1}


def test_a_wide_layer_before_an_activation_is_no_news():
    """As gated layers of the body are; returned, it could be logits."""
    x, w = torch.randn(4, 8), torch.randn(64, 8)
    assert records(lambda x, w: F.silu(F.linear(x, w)), x, w) == []
    (record,) = records(lambda x, w: F.linear(x, w), x, w)
    assert record.code == "returned-loss-free" and not record.losses


# -- losses that stay in the graph belong to the head whose logits they read


def refused(fn):
    (record,) = records(fn, *head())
    assert not record.rewritten and record.trains
    return record


def test_a_loss_after_what_cannot_be_read():
    def fn(x, w, y):
        z = F.linear(x, w).cumsum(0)
        return F.cross_entropy(z, y)

    record = refused(fn)
    assert record.code == "crossing" and ".cumsum(0)" in record.stop
    (line,) = record.losses
    assert line.endswith("return F.cross_entropy(z, y)")


def test_a_change_in_place_before_the_loss():
    """The logits are lost sight of before the loss; their head is known all the same."""

    def fn(x, w, y):
        z = F.linear(x, w)
        z[3:].cumsum_(0)
        return F.cross_entropy(z, y)

    record = refused(fn)
    assert record.code == "crossing" and "cumsum_" in record.stop and len(record.losses) == 1


def test_a_loss_in_two_steps_is_one():
    def fn(x, w, y):
        z = F.linear(x, w).cumsum(0)
        return F.nll_loss(z.log_softmax(-1), y)

    assert len(refused(fn).losses) == 1


def test_a_loss_without_a_head():
    """Logits from outside, however shaped, and logits of something that is no linear."""
    z, y = torch.randn(4, 6, V, requires_grad=True), torch.zeros(24, dtype=torch.long)
    (record,) = records(lambda z, y: F.cross_entropy(z.float().view(-1, V), y), z, y)
    assert (record.kind, record.code, record.classes, record.stop) == ("loss", "no-head", str(V), "")
    assert record.trains and record.logits_bytes == 24 * V * 4
    x, w = torch.randn(2, 3, 4, 4), torch.randn(V, 3, 1, 1)
    (record,) = records(
        lambda x, w, y: F.cross_entropy(F.conv2d(x, w), y), x, w, torch.zeros(2, 4, 4, dtype=torch.long)
    )
    assert record.code == "foreign-product" and "F.conv2d(x, w)" in record.stop and not record.trains
    counters.clear()
    report.publish([record], Config(min_logits_bytes=0))
    assert counters["lce_inductor"] == {"refused:foreign-product": 1}
    report.publish([record], Config())
    assert counters["lce_inductor"] == {"refused:foreign-product": 1}, "small ones are no news"


def test_every_loss_has_one_head():
    """Two heads of different width, one of them rewritten."""
    x, w, y = head()

    def fn(x, w, u, y):
        return F.cross_entropy(F.linear(x, w), y) + F.cross_entropy(F.linear(x, u).cumsum(0), y.clamp(max=10))

    first, second = sorted(records(fn, x, w, torch.randn(11, 8), y), key=lambda r: r.rewritten)
    assert (first.code, first.classes, len(first.losses)) == ("crossing", "11", 1)
    assert second.rewritten and len(second.losses) == 1


def test_bytes_and_sizes():
    x, w, y = head(dtype=torch.bfloat16)
    (record,) = records(lambda x, w, y: F.cross_entropy(F.linear(x.view(4, 6, 8), w).view(-1, V), y), x, w, y)
    assert record.logits_bytes == N * V * 2
    assert (record.tokens, record.classes) == ("24", str(V)), "the joint graph has the rows in one dimension"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", [{}, {"chunk_tokens": 7}, {"workspace_bytes": 5 * V * 4}], ids=str)
def test_the_plan_in_the_report_is_the_plan_that_runs(settings, dtype):
    x, w, y = (t.detach() for t in head(dtype=dtype))
    (record,) = records(loss, x, w, y, **settings)
    with lce_inductor.installed(min_logits_bytes=0, **settings):
        compiled = Compiled(loss)
        compiled(x, w, y)
        chunks = products(lambda: compiled(x, w, y))
    assert record.plan.startswith(f"{chunks} chunks of ")


def test_dynamic_sizes_are_shown_as_symbols(lines):
    compiled = Compiled(loss, dynamic=True)
    compiled(*head())
    assert any(line.startswith("rewrote") and "s" in line.split("logits")[-2].split("(")[-1] for line in lines)


def test_several_heads_have_a_line_each(lines):
    Compiled(lambda x, w, y: loss(x, w, y) + loss(x * 2, w, y))(*head())
    assert sum(line.startswith("rewrote") for line in lines) == 2


def test_structured_trace(tmp_path, installed, monkeypatch):
    """An artifact that tlparse shows: one JSON record per head."""
    found = []
    import torch._logging._internal

    def trace(name, metadata_fn=lambda: None, *, payload_fn=lambda: None, **more):
        metadata = metadata_fn()
        if isinstance(metadata, dict) and metadata.get("name") == "lce_inductor_heads":
            found.append((name, metadata, payload_fn()))

    monkeypatch.setattr(torch._logging._internal, "trace_structured", trace)
    Compiled(loss)(*head())
    ((name, metadata, payload),) = found
    assert name == "artifact" and metadata["encoding"] == "json"
    (record,) = json.loads(payload if isinstance(payload, str) else json.dumps(payload))
    assert record["code"] is None and record["classes"] == str(V) and Path(__file__).name in record["source"]


def test_names_in_the_generated_code(installed):
    """TORCH_LOGS=output_code shows the ops by name."""
    from torch._inductor.utils import run_and_get_code

    x, w, y = (t.detach() for t in head())
    found, (code,) = run_and_get_code(torch.compile(loss), x, w, y)
    torch.testing.assert_close(found, loss(x, w, y))
    assert "torch.ops.lce_inductor.row_stats" in code
