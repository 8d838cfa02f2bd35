"""Faults: whatever fails inside the package leaves a working compile, and whatever fails around it leaves it working."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from corpus.harness import no_codegen_backend
from fault_cases import (
    BY_RULE,
    NEVER_ASKED,
    WHOLE,
    WHOLE_TOO,
    Fault,
    Injected,
    anatomy,
    by_row,
    copied,
    in_place,
    inject,
    of_rule,
    returned,
    several_losses,
    two_heads,
)  # fmt: skip
from harness import Compiled, assert_same_bits, fresh, head, joint_graph, results
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule
from turns import EVERYTHING, crossed

import lce_inductor
from lce_inductor import Config, passes, regions
from lce_inductor import hook_chain as chain
from lce_inductor.regions.aten_ops import RULES
from lce_inductor.regions.fused import _STEPS


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "internal-error" in r.getMessage()]


# -- an exception inside a pass


TABLES: dict[str, dict[Any, Any]] = {"fact": RULES, "step": _STEPS}
EVERY = [f"{table} {op}" for table, rules in TABLES.items() for op in rules]


@functools.cache
def graphs() -> dict[str, GraphModule]:
    """Joint graphs of all programs, and again without what Inductor decomposes, where that is another graph."""
    found = {}
    for name in BY_RULE:
        for decompose in (True, False) if name in WHOLE_TOO else (True,):
            gm = joint_graph(of_rule(name), *fresh(head()), decompose=decompose).gm
            found[name if decompose else f"{name}, whole"] = gm
    return found


@functools.cache
def asked() -> dict[str, str]:
    """Rule -> a program on whose way it is asked."""
    found: dict[str, str] = {}
    now = ""

    def noting(rule: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def note(*args: Any) -> Any:
            found.setdefault(rule, now)
            return real(*args)

        return note

    with contextlib.ExitStack() as stack:
        for table, rules in TABLES.items():
            stack.enter_context(mock.patch.dict(rules, {op: noting(f"{table} {op}", rules[op]) for op in rules}))
        for name, gm in graphs().items():
            now = name
            passes.HeadsPass(Config(min_logits_bytes=0))(copied(gm.graph))
    return found


def test_every_rule_has_a_program():
    assert set(EVERY) - set(asked()) == set(NEVER_ASKED)


def break_rule(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise Injected("out of luck")

    table, op = rule.split(" ", 1)
    rules = TABLES[table]
    monkeypatch.setitem(rules, next(o for o in rules if str(o) == op), broken)


@pytest.mark.parametrize("rule", [r for r in EVERY if r not in NEVER_ASKED])
def test_an_exception_inside_a_rule(rule, monkeypatch, caplog):
    """One warning with the code, one count, and the graph as it was."""
    graph = copied(graphs()[asked()[rule]].graph)
    before = anatomy(graph)
    break_rule(rule, monkeypatch)
    counters.clear()
    caplog.clear()
    passes.HeadsPass(Config(min_logits_bytes=0))(graph)
    assert anatomy(graph) == before
    graph.lint()
    assert counters["lce_inductor"] == {"refused:internal-error": 1}
    (warning,) = warnings_of(caplog)
    assert "heads" in warning and "Injected: out of luck" in warning


@pytest.mark.parametrize(
    "rule",
    ["fact aten.gather.default", "fact aten.amax.default", "fact aten.sum.dim_IntList", "fact aten.slice.Tensor",
     "step aten.exp.default", "step aten.log.default"],
)  # fmt: skip
def test_a_compile_with_a_broken_rule(rule, monkeypatch, caplog):
    """The bits of torch.compile alone."""
    fn = of_rule(asked()[rule].removesuffix(", whole"))
    plain = results(Compiled(fn), fresh(head()))
    break_rule(rule, monkeypatch)
    caplog.clear()
    with lce_inductor.installed(min_logits_bytes=0):
        compiled = Compiled(fn)
        assert_same_bits(results(compiled, fresh(head())), plain)
    assert compiled.counts == {"refused:internal-error": 1} and len(warnings_of(caplog)) == 1


PACKAGE = ("regions", "schedule", "graph", "spec/epilogue.py", "lower/plan.py", "reasons.py", "passes.py")


# The largest graphs take minutes.
STATIC, DYNAMIC = (WHOLE, [two_heads, by_row]) if EVERYTHING else ([in_place, returned], [by_row])


# The pass, which runs for the others below, decides as well.
@pytest.mark.parametrize("fn", [fn for fn in WHOLE if EVERYTHING or fn not in (*STATIC, *DYNAMIC)])
def test_an_exception_at_every_function_of_the_decision(fn):
    """It changes nothing, whether it comes to its end or not."""
    graph = joint_graph(fn, *fresh(head())).graph
    assert (
        inject(graph, lambda g: regions.decide(g, Config(min_logits_bytes=0)), PACKAGE, 60 if EVERYTHING else 15) > 100
    )


@pytest.mark.parametrize("fn, dynamic", [*((fn, False) for fn in STATIC), *((fn, True) for fn in DYNAMIC)])
def test_an_exception_at_every_function_of_the_pass(fn, dynamic, monkeypatch):
    """In the joint graph of a compile, which goes on afterwards with the right numbers."""
    seen: list[Any] = []

    def run(self: Any, graph: Graph) -> None:
        try:
            with mock.patch.object(passes.records, "records_of", lambda *args: []):  # after it was done: see below
                seen.append(inject(graph, lambda g: real(self, g), PACKAGE, 20))
        except AssertionError as error:  # which the pass would turn into a warning
            seen.append(error)
        counters.clear()
        real(self, graph)

    real = passes.HeadsPass.run
    monkeypatch.setattr(passes.HeadsPass, "run", run)
    with lce_inductor.installed(min_logits_bytes=0):
        compiled = Compiled(fn, dynamic=dynamic)
        found = compiled(*(args := head()))
        loss = found[0] if isinstance(found, tuple) else found
        loss.backward()
        expected = fresh(args)
        reference = fn(*expected)
        reference = reference[0] if isinstance(reference, tuple) else reference
        reference.backward()
    torch.testing.assert_close([loss, args[0].grad, args[1].grad], [reference, expected[0].grad, expected[1].grad])
    assert compiled.counts["rewritten"] and not compiled.refusals
    (faults,) = seen
    assert isinstance(faults, int), faults
    assert faults > 150


def test_an_exception_in_the_report(monkeypatch, caplog, installed):
    """Telling what was done fails after it was done: the rewritten graph is right."""

    def broken(*args: Any) -> Any:
        raise Injected("nothing to say")

    monkeypatch.setattr(passes.records, "records_of", broken)
    fn = of_rule("cross_entropy")
    torch.testing.assert_close(results(Compiled(fn), fresh(head())), results(fn, fresh(head())))
    assert len(warnings_of(caplog)) == 1


# -- an interrupted compile


@pytest.mark.parametrize("stage, at", [("regions", 5), ("regions", 1100), ("graph", 40), ("schedule", 40)])
def test_an_interrupt_propagates_and_the_next_compile_works(stage, at, installed):
    compiled = Compiled(several_losses)
    fault = Fault(at, stage, error=KeyboardInterrupt)
    with fault.armed(), pytest.raises(KeyboardInterrupt):
        compiled(*fresh(head()))
    assert fault.raised
    torch.testing.assert_close(results(compiled, fresh(head())), results(several_losses, fresh(head())))
    assert compiled.gradients[-1] == "forward" and not compiled.refusals


# -- out of memory inside the op


@pytest.fixture
def frozen() -> Iterator[None]:
    gc.collect()
    gc.freeze()  # what is there already need not be looked at in each collection
    yield
    gc.unfreeze()


def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def out_of_memory(run: Callable[[list[torch.Tensor]], Any], at: int) -> tuple[bool, Any]:
    """Runs on fresh arguments with a fault at one call of the CPU implementation; nothing of them may stay alive."""
    args = fresh(head())
    alive = [weakref.ref(t) for t in args]
    fault = Fault(
        at,
        "lower/head_cpu.py",
        "ops/row_region.py",
        "spec/epilogue.py",
        "lower/plan.py",
        "lower",
        error=torch.OutOfMemoryError,
    )
    found = None
    try:
        with fault.armed():
            found = run(args)
    except torch.OutOfMemoryError:
        assert fault.raised
    del args
    gc.collect()
    assert not any(r() is not None for r in alive)
    return fault.raised, found


@pytest.mark.parametrize("gradients, fn", crossed(["auto", "recompute"], [several_losses, by_row]))
def test_out_of_memory_inside_the_op(gradients, fn, frozen):
    """At one call in nine that the implementation makes (in three, with LCE_EVERYTHING=1), in the forward and in the
    backward: torch's own exception, nothing kept alive, and the next step has the same bits."""
    with lce_inductor.installed(min_logits_bytes=0, chunk_tokens=7, gradients=gradients):
        compiled = Compiled(fn)
        expected = results(compiled, fresh(head()))
    assert compiled.counts["rewritten"] == 1
    at, counts = 0, []
    while True:
        raised, found = out_of_memory(lambda args: results(compiled, args), at)
        if not raised:
            break
        counts.append(tensors())
        at += 3 if EVERYTHING else 9
    assert at > 15 and len(set(counts)) == 1
    assert_same_bits(found, expected)


def test_out_of_memory_with_generated_code(frozen):
    options = lce_inductor.inductor_options(min_logits_bytes=0, chunk_tokens=7)
    compiled = torch.compile(of_rule("cross_entropy"), options=options)
    expected = results(compiled, fresh(head()))
    counts = []
    for at in (0, 5, 10):
        raised, _ = out_of_memory(compiled_step := lambda args: results(compiled, args), at)
        assert raised
        counts.append(tensors())
    assert len(set(counts)) == 1
    assert_same_bits(compiled_step(fresh(head())), expected)


# -- threads and processes


def test_two_threads_compile_in_turns():
    """From torch 2.13 on the hooks belong to a thread: each installs. torch keeps parts of a trace in globals
    (torch.fx.traceback), so that compiles at the very same moment can fail without this package; they take turns."""
    turn = threading.Lock()
    barrier = threading.Barrier(2)
    wrong: list[Any] = []
    Compiled(of_rule("sum"))(*head())  # torch 2.11 dies when the first compile of a process is not the main thread's
    torch._dynamo.reset()
    counters.clear()

    def work(names: list[str]) -> None:
        try:
            lce_inductor.install(min_logits_bytes=0)
            barrier.wait(60)
            for name in names:
                with turn:
                    args = fresh(head())
                    loss = torch.compile(of_rule(name), backend=no_codegen_backend([]))(*args)
                    loss.backward()
                    expected = fresh(head())
                    reference = of_rule(name)(*expected)
                    reference.backward()
                    torch.testing.assert_close(
                        [loss, args[0].grad, args[1].grad], [reference, *(t.grad for t in expected[:2])]
                    )
        except BaseException as error:
            wrong.append(error)

    lists = [["cross_entropy", "getitem", "logsumexp"], ["gather", "transpose", "mul"]]
    threads = [threading.Thread(target=work, args=(names,)) for names in lists]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not wrong and not any(t.is_alive() for t in threads)
    assert counters["lce_inductor"]["rewritten"] == 6 and not counters["lce_inductor"]["refused:internal-error"]
    lce_inductor.uninstall()


def test_two_threads_rewrite_at_once():
    """The package's own part of a compile, at the very same moment on different graphs, each with fake values of its own
    as each compile has: what one thread alone finds."""
    names = ["cross_entropy", "getitem", "logsumexp", "gather", "transpose", "masked_fill", "clamp"]

    def find(name: str, traced: dict[str, GraphModule]) -> list[str]:
        graph = copied(traced[name].graph)
        passes.HeadsPass(Config(min_logits_bytes=0))(graph)
        return [str(n.target) for n in graph.nodes]

    theirs = [{name: joint_graph(of_rule(name), *fresh(head())).gm for name in names} for _ in range(2)]
    alone = {name: find(name, theirs[0]) for name in names}
    counters.clear()
    wrong: list[Any] = []

    def work(order: list[str], traced: dict[str, GraphModule]) -> None:
        for name in order * 10:
            found = find(name, traced)
            if found != alone[name]:
                wrong.append((name, found))

    threads = [threading.Thread(target=work, args=each) for each in zip((names, names[::-1]), theirs)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        [thread.start() for thread in threads]
        for thread in threads:
            thread.join(120)
    finally:
        sys.setswitchinterval(before)
    assert not wrong and counters["lce_inductor"]["rewritten"] == 2 * 10 * len(names)
    assert not torch.fx.experimental._config.backed_size_oblivious  # in torch 2.11 a setting of all threads


FORKED = """
    import json, os, sys
    import torch
    from fault_cases import of_rule
    from harness import Compiled, fresh, head, results
    import lce_inductor

    def close(compiled, name):
        torch.testing.assert_close(results(compiled, fresh(head())), results(of_rule(name), fresh(head())))

    lce_inductor.install(min_logits_bytes=0)
    before = Compiled(of_rule("cross_entropy"))
    with torch.no_grad():  # autograd's threads do not survive a fork
        close(before, "cross_entropy")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with torch.no_grad():
                close(before, "cross_entropy")  # compiled by the parent
            after = Compiled(of_rule("gather"))
            close(after, "gather")
            lce_inductor.uninstall()
            code = 0 if after.counts["rewritten"] == 1 else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    after = Compiled(of_rule("sum"))
    close(after, "sum")
    print(json.dumps([status, after.counts["rewritten"], lce_inductor.is_installed()]))
"""


def test_fork():
    """A child compiles and runs with what its parent installed; what it uninstalls stays installed in the parent."""
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(lce_inductor.__file__).parent.parent)])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORKED)], capture_output=True, text=True, timeout=240,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [0, 1, True]


# -- install() and uninstall() at odd times


class During(CustomGraphPass):
    """A pass of the user's that does something in the middle of a compile."""

    def __init__(self, do: Callable[[], Any]) -> None:
        self.do, self.calls = do, 0

    def __call__(self, graph: Graph) -> None:
        self.calls += 1
        self.do()

    def uuid(self) -> str:
        return "during"


CHANGES: dict[str, Callable[[], Any]] = {
    "install": lambda: lce_inductor.install(min_logits_bytes=0, chunk_tokens=5),
    "install the same": lambda: lce_inductor.install(min_logits_bytes=0),
    "uninstall": lce_inductor.uninstall,
    "uninstall and install": lambda: (lce_inductor.uninstall(), lce_inductor.install(min_logits_bytes=0)),
}


@pytest.mark.parametrize("hook", ["pre_grad_custom_pass", "joint_custom_pre_pass"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_during_a_compile(change, hook):
    """The compile at hand ends with the right numbers; the next one sees what was asked for."""
    mine = During(CHANGES[change])
    setattr(inductor, hook, mine)
    try:
        lce_inductor.install(min_logits_bytes=0)
        fn = of_rule("cross_entropy")
        compiled = Compiled(fn)
        torch.testing.assert_close(results(compiled, fresh(head())), results(fn, fresh(head())))
        assert mine.calls == 1 and not compiled.refusals
        assert lce_inductor.is_installed() == (change != "uninstall")
        mine.do = lambda: None
        again = Compiled(fn)
        again(*fresh(head()))
        assert again.counts["rewritten"] == lce_inductor.is_installed()
        lce_inductor.uninstall()
        assert getattr(inductor, hook) is mine
    finally:
        setattr(inductor, hook, None)


class Other:
    """Another package that puts a pass into a hook, and its uninstall() puts back what it found."""

    def __init__(self, hook: str) -> None:
        self.hook, self.mine = hook, During(lambda: None)

    def install(self) -> None:
        self.before = getattr(inductor, self.hook)
        items = [] if self.before is None else list(self.before) if isinstance(self.before, list) else [self.before]
        setattr(inductor, self.hook, [*items, self.mine] if chain.takes_lists() else chain.Chain((*items, self.mine)))

    def uninstall(self) -> None:
        setattr(inductor, self.hook, self.before)


@pytest.mark.parametrize("hook", ["pre_grad_custom_pass", "joint_custom_pre_pass"])
def test_another_package_leaves_first(hook):
    """It came before us and takes our pass with it; uninstall() finds nothing and leaves nothing."""
    other = Other(hook)
    other.install()
    lce_inductor.install(min_logits_bytes=0)
    other.uninstall()
    assert not lce_inductor.is_installed()
    lce_inductor.uninstall()
    assert getattr(inductor, hook) is None


@pytest.mark.parametrize("hook", ["pre_grad_custom_pass", "joint_custom_pre_pass"])
def test_another_package_leaves_last(hook):
    """It came after us and puts our pass back after uninstall(): one more uninstall() removes it for good."""
    other = Other(hook)
    try:
        lce_inductor.install(min_logits_bytes=0)
        other.install()
        lce_inductor.uninstall()
        assert getattr(inductor, hook) in (other.mine, [other.mine])
        other.uninstall()
        lce_inductor.uninstall()
        assert getattr(inductor, hook) in (None, [])
    finally:
        setattr(inductor, hook, None)
