"""report(): what happened in this process so far, and what reads of deferred logits cost."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Compiled, head
from test_explain import WIDE, told
from test_hints import N, lin, plain
from test_telling import batch, in_thread
from test_watch import warnings_of
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch._inductor.utils import fresh_cache

import lce_inductor
from lce_inductor import explain
from lce_inductor.deferred_logits.tensor import defer_logits
from lce_inductor.reporting import history
from lce_inductor.reporting.records import NOWHERE


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    history.forget()
    yield
    history.forget()


def test_report(installed):
    assert "no graph was compiled with the passes" in str(lce_inductor.report())
    torch.compile(plain)(*batch()).backward()
    torch.compile(lambda x, y: F.cross_entropy(lin(x).erf(), y))(*batch()).backward()
    torch.compile(lambda x, y: F.cross_entropy(lin(x).cumsum(0), y))(*batch()).backward()
    found = lce_inductor.report()
    assert (found.rewritten, found.left_alone, len(found.graphs)) == (2, 1, 3)
    assert (found.saved_bytes, found.held_bytes) == (2 * N * WIDE * 4, N * WIDE * 4)
    data = json.loads(found.to_json())
    assert data == json.loads(json.dumps(found.as_dict()))
    kernels, region, refused = [graph["heads"][0] for graph in data["graphs"]]
    assert (kernels["tier"], kernels["products"], kernels["saved"]) == ("kernels", 2, True), "x needs no gradient"
    assert region["tier"] == "region" and region["steps"] > 5 and region["outcome"] == "rewritten"
    assert (refused["code"], refused["outcome"], refused["saved"]) == ("crossing", "left alone", False)
    assert __file__ in refused["source"]
    text = str(found)
    assert "heads rewritten: 2 of 3" in text and f"program of {region['steps']} steps" in text and "hint: none" in text


def test_report_of_threads_and_of_many(installed, monkeypatch):
    if in_thread(lambda: inductor.joint_custom_pre_pass is not None):
        in_thread(lambda: torch.compile(plain)(*batch()))
        assert [g.thread for g in lce_inductor.report().graphs] == ["worker"]
    history.forget()
    record = told(plain, *batch()).records[0]
    threads = [
        threading.Thread(target=lambda: [history.graph_compiled("0/0", [record], False) for _ in range(300)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = lce_inductor.report()
    assert (len(found.graphs), found.forgotten, found.rewritten) == (1000, 200, 1200)
    assert found.saved_bytes == 1200 * record.logits_bytes


def test_explain_is_not_in_the_report(installed):
    told(plain, *batch())
    assert lce_inductor.report().graphs == ()


def test_reads_of_deferred_logits(caplog):
    """Each is a product of its rows; said once, and counted."""
    caplog.set_level(logging.INFO, logger="lce_inductor")
    x, w, _ = head(n=24, h=8, v=WIDE)
    z = defer_logits(x, w, None, "", torch.float32, torch.float32)
    assert lce_inductor.report().reads == ()
    with torch.no_grad():
        z.softmax(-1)
        for rows in z.split(6):
            rows.softmax(-1)
    (reads,) = lce_inductor.report().reads
    assert (reads.logits, reads.count, reads.rows, reads.products) == ((24, WIDE), 5, 48, 2.0)
    assert reads.bytes == 2 * 24 * WIDE * 4
    assert "were read 5 times by eager code: 2.00 more products" in str(lce_inductor.report())
    said = [r.getMessage() for r in caplog.records if "a read costs a product" in r.getMessage()]
    assert len(said) == 1 and "logits.clone()" in said[0]


def test_reads_of_logits_that_a_compiled_function_returns(installed):
    @torch.compile
    def model(x, y):
        z = lin(x)
        return F.cross_entropy(z, y), z

    _, z = model(*batch())
    with torch.no_grad():
        z.softmax(-1)
    assert [r.products for r in lce_inductor.report().reads] == [1.0]


def test_code_without_a_file(installed, caplog):
    scope: dict[str, Any] = {"F": F}
    exec("def step(x, w, y):\n    return F.cross_entropy(F.linear(x, w).cumsum(0), y)", scope)
    Compiled(scope["step"])(*head())
    (text,) = warnings_of(caplog)
    assert "<string>:2" in text or NOWHERE in text


def test_the_same_logits_in_two_graphs_count_once(installed):
    def fn(x, y):
        z = lin(x)
        torch._dynamo.graph_break()
        return F.cross_entropy(z, y)

    compiled = Compiled(fn)
    with fresh_cache():  # a graph that another test left there is counted as cached
        compiled(*batch())
    assert compiled.refusals == {"returned-loss-free": 1, "no-head": 1}
    assert counters["lce_inductor.heads"] == {"held_bytes": N * WIDE * 4}
    found = lce_inductor.report()
    assert (found.left_alone, found.held_bytes) == (1, N * WIDE * 4) and "heads rewritten: 0 of 1" in str(found)
    z, y = torch.randn(N, WIDE, requires_grad=True), batch()[1]
    Compiled(F.cross_entropy)(z, y)  # other logits
    assert lce_inductor.report().held_bytes == 2 * N * WIDE * 4


def test_rows_of_which_nobody_knows_how_many(installed, caplog):
    """A made-up number is not told as one."""
    caplog.set_level(logging.DEBUG, logger="lce_inductor")

    def fn(x, y):
        some = y > 3
        return F.cross_entropy(lin(x[some]), y[some])

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        Compiled(fn)(*batch())
        (record,) = told(fn, *batch()).records
    assert record.rewritten and record.guessed and record.saved_bytes == 0
    assert "saved_bytes" not in counters["lce_inductor.heads"] and lce_inductor.report().saved_bytes == 0
    assert "unknown size saved" in str(lce_inductor.report()) and "left out" in str(lce_inductor.report())
    assert any("logits, unknown size no longer exist" in r.getMessage() for r in caplog.records)


def test_what_is_no_loss_is_not_called_one(installed):
    """A check and a metric beside the loss."""

    def fn(x, y):
        z = lin(x)
        fine = z.isfinite().all(-1).all()
        right = (z.argmax(-1) == y).sum()
        return F.cross_entropy(z, y), fine, right

    Compiled(fn)(*batch())
    (record,) = lce_inductor.report().records
    assert record.tier == "region" and len(record.losses) == 1 and "F.cross_entropy(z, y)" in record.losses[0]


def test_reads_by_compiled_functions_and_by_explain(installed):
    @torch.compile(backend="aot_eager")
    def metric(z, y):
        return (z.argmax(-1) == y).sum()

    def fn(x, y):
        z = lin(x)
        return F.cross_entropy(z, y), z

    x, y = batch()
    _, z = Compiled(fn)(x, y)
    assert type(z) is not torch.Tensor and not lce_inductor.report().read_by_compiled
    torch._dynamo.reset()
    with torch.no_grad():
        metric(z, y)
    found = lce_inductor.report()
    assert found.read_by_compiled and not found.reads and "compiled functions read deferred logits" in str(found)
    model = torch.compile(fn, backend="inductor")
    explain(lambda x, y: model(x, y)[1].detach().sum())(x, y)
    assert not lce_inductor.report().reads, "that was not the user"


def test_what_eager_runs_makes_no_graph(installed):
    def fn(x, y):
        try:
            z = lin(x)
            torch._dynamo.graph_break()
            return F.cross_entropy(z, y)
        except ZeroDivisionError:
            return x.sum()

    Compiled(fn)(*batch())
    assert "explain() says so" in str(lce_inductor.report())
    text = str(explain(fn)(*batch()))
    assert "nothing is known of what eager code holds" in text and "no head" not in text and "try block" in text
