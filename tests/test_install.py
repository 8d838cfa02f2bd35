"""install() and its relatives: what is in Inductor's hooks, before, during and after."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Compiled, head
from torch._inductor import config as inductor
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

import lce_inductor
from lce_inductor import hook_chain as chain
from lce_inductor.passes import DeferPass, HeadsPass

HOOKS = ("pre_grad_custom_pass", "joint_custom_pre_pass")
OURS = {"pre_grad_custom_pass": DeferPass, "joint_custom_pre_pass": HeadsPass}
lists_only = pytest.mark.skipif(not chain.takes_lists(), reason="this torch takes one pass a hook")


class Recorder(CustomGraphPass):
    """A user's pass: notes its name and whether the graph holds our ops when it runs."""

    log: list[tuple[str, bool]] = []

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, graph: Graph) -> None:
        Recorder.log.append((self.name, "lce_inductor" in str(graph)))

    def uuid(self) -> str:
        return self.name


@pytest.fixture(autouse=True)
def empty_hooks() -> Iterator[None]:
    Recorder.log = []
    before = {hook: getattr(inductor, hook) for hook in HOOKS}
    yield
    lce_inductor.uninstall()
    for hook, value in before.items():
        setattr(inductor, hook, value)


def hooks() -> dict[str, Any]:
    return {hook: getattr(inductor, hook) for hook in HOOKS}


def held(hook: str) -> list[Any]:
    """The passes in a hook, whatever holds them."""
    value = getattr(inductor, hook)
    if isinstance(value, chain.Chain):
        return list(value.passes)
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def run() -> Compiled:
    x, w, y = head()
    compiled = Compiled(lambda x, w, y: F.cross_entropy(F.linear(x, w), y))
    torch.testing.assert_close(compiled(x, w, y), F.cross_entropy(F.linear(x, w), y))
    return compiled


def test_install_and_uninstall():
    assert not lce_inductor.is_installed() and lce_inductor.current_config() is None
    lce_inductor.install(min_logits_bytes=0)
    assert lce_inductor.is_installed()
    assert lce_inductor.current_config() == lce_inductor.Config(min_logits_bytes=0)
    for hook, cls in OURS.items():
        assert [type(p) for p in held(hook)] == [cls]
    assert run().counts["rewritten"] == 1
    lce_inductor.uninstall()
    assert not lce_inductor.is_installed() and hooks() == dict.fromkeys(HOOKS)
    assert not run().counts


def test_default_settings_leave_small_heads_alone():
    lce_inductor.install()
    assert run().refusals == {"too-small": 1}


def test_twice_the_same_is_nothing():
    lce_inductor.install(min_logits_bytes=0)
    before = hooks()
    lce_inductor.install(min_logits_bytes=0)
    assert all(hooks()[hook] is before[hook] for hook in HOOKS)
    lce_inductor.uninstall()
    assert hooks() == dict.fromkeys(HOOKS)


def test_other_settings_replace():
    lce_inductor.install()
    lce_inductor.install(min_logits_bytes=0, chunk_tokens=3)
    for hook, cls in OURS.items():
        (ours,) = held(hook)
        assert type(ours) is cls and ours.config.chunk_tokens == 3
    assert run().counts["rewritten"] == 1
    lce_inductor.uninstall()
    assert hooks() == dict.fromkeys(HOOKS)


def test_uninstall_without_install_is_nothing():
    inductor.pre_grad_custom_pass = mine = Recorder("mine")
    lce_inductor.uninstall()
    lce_inductor.uninstall()
    assert inductor.pre_grad_custom_pass is mine


def test_bad_settings_change_nothing():
    lce_inductor.install(min_logits_bytes=0)
    before = hooks()
    for settings, error in (({"min_logits_bytes": -1}, ValueError), ({"nonsense": 1}, TypeError)):
        with pytest.raises(error):
            lce_inductor.install(**settings)
        with pytest.raises(error), lce_inductor.installed(**settings):
            raise AssertionError("not reached")
        with pytest.raises(error):
            lce_inductor.inductor_options(**settings)
    assert all(hooks()[hook] is before[hook] for hook in HOOKS) and lce_inductor.is_installed()


# -- a user's own passes

VALUES: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "function": lambda: lambda graph: Recorder.log.append(("function", False)),
    "pass": lambda: Recorder("first"),
    **(
        {
            "list": lambda: [Recorder("first"), Recorder("second")],
            "tuple": lambda: (Recorder("first"), Recorder("second")),
            "empty list": lambda: [],
        }
        if chain.takes_lists()
        else {}
    ),
}


@pytest.mark.parametrize("name", VALUES)
def test_uninstall_gives_back_the_very_object(name):
    before = {hook: VALUES[name]() for hook in HOOKS}
    for hook, value in before.items():
        setattr(inductor, hook, value)
    for settings in ({}, {"min_logits_bytes": 0}, {"min_logits_bytes": 0}):
        lce_inductor.install(**settings)
    lce_inductor.uninstall()
    assert all(getattr(inductor, hook) is before[hook] for hook in HOOKS)


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", VALUES)
def test_passes_before_ours_keep_running(name, hook):
    """Once per graph, in their order, before ours; a list of the user's is not changed."""
    value = VALUES[name]()
    copy = list(value) if isinstance(value, list) else value
    setattr(inductor, hook, value)
    lce_inductor.install(min_logits_bytes=0)
    assert run().counts["rewritten"] == 1
    expected = {"function": ["function"], "pass": ["first"], "list": ["first", "second"], "tuple": ["first", "second"]}
    assert Recorder.log == [(n, False) for n in expected.get(name, [])]
    assert value == copy


@lists_only
def test_passes_appended_later_run_after_ours():
    inductor.joint_custom_pre_pass = [Recorder("before")]
    lce_inductor.install(min_logits_bytes=0)
    inductor.joint_custom_pre_pass.append(Recorder("after"))
    assert run().counts["rewritten"] == 1
    assert Recorder.log == [("before", False), ("after", True)]
    lce_inductor.uninstall()
    assert [p.name for p in held("joint_custom_pre_pass")] == ["before", "after"]


@lists_only
def test_a_list_around_ours():
    """A user builds a new list out of the installed value."""
    lce_inductor.install(min_logits_bytes=0)
    first, last = Recorder("first"), Recorder("last")
    inductor.joint_custom_pre_pass = [first, *held("joint_custom_pre_pass"), last]
    assert lce_inductor.is_installed()
    run()
    assert [name for name, _ in Recorder.log] == ["first", "last"]
    lce_inductor.uninstall()
    assert held("joint_custom_pre_pass") == [first, last]


def test_a_hook_overwritten_after_install():
    """Another package sets the hook and takes ours out: that shows, and install() puts it back."""
    lce_inductor.install(min_logits_bytes=0)
    inductor.joint_custom_pre_pass = theirs = Recorder("theirs")
    assert not lce_inductor.is_installed()
    lce_inductor.install(min_logits_bytes=0)
    assert lce_inductor.is_installed()
    assert [type(p) for p in held("joint_custom_pre_pass")] == [Recorder, HeadsPass]
    assert [type(p) for p in held("pre_grad_custom_pass")] == [DeferPass]
    lce_inductor.uninstall()
    assert inductor.joint_custom_pre_pass is theirs and inductor.pre_grad_custom_pass is None


def test_a_hook_emptied_after_install():
    lce_inductor.install(min_logits_bytes=0)
    inductor.pre_grad_custom_pass = None
    lce_inductor.uninstall()
    assert hooks() == dict.fromkeys(HOOKS)


def test_inside_a_config_patch():
    """Installed inside a patch, uninstalled outside of it, and the other way round."""
    mine = Recorder("mine")
    with inductor.patch(joint_custom_pre_pass=mine):
        lce_inductor.install(min_logits_bytes=0)
        assert [type(p) for p in held("joint_custom_pre_pass")] == [Recorder, HeadsPass]
    assert not lce_inductor.is_installed()
    lce_inductor.uninstall()
    assert hooks() == dict.fromkeys(HOOKS)

    lce_inductor.install(min_logits_bytes=0)
    with inductor.patch(joint_custom_pre_pass=mine):
        assert not lce_inductor.is_installed()
    assert lce_inductor.is_installed()


@pytest.mark.parametrize("ours_in", ["all", "one"])
def test_other_hooks_are_not_ours(ours_in):
    others = ("joint_custom_post_pass", "post_grad_custom_pre_pass", "post_grad_custom_post_pass")
    before = {hook: getattr(inductor, hook) for hook in others}
    lce_inductor.install()
    assert {hook: getattr(inductor, hook) for hook in others} == before


# -- scopes


def test_context_manager():
    with lce_inductor.installed(min_logits_bytes=0):
        assert lce_inductor.is_installed() and run().counts["rewritten"] == 1
    assert not lce_inductor.is_installed() and hooks() == dict.fromkeys(HOOKS)


def test_context_manager_restores_the_outer_settings():
    lce_inductor.install(min_logits_bytes=0, chunk_tokens=5)
    with lce_inductor.installed(chunk_tokens=9), lce_inductor.installed(gradients="recompute"):
        assert lce_inductor.current_config() == lce_inductor.Config(gradients="recompute")
    assert lce_inductor.current_config() == lce_inductor.Config(min_logits_bytes=0, chunk_tokens=5)
    lce_inductor.uninstall()
    assert hooks() == dict.fromkeys(HOOKS)


def test_context_manager_with_the_same_settings_keeps_them():
    lce_inductor.install(min_logits_bytes=0)
    with lce_inductor.installed(min_logits_bytes=0):
        pass
    assert lce_inductor.is_installed()


def test_context_manager_after_an_error():
    mine = inductor.joint_custom_pre_pass = Recorder("mine")
    with pytest.raises(KeyError), lce_inductor.installed():
        raise KeyError
    assert inductor.joint_custom_pre_pass is mine


def test_options_for_one_function():
    """torch.compile(options=...) for one function; nothing is installed, other functions are as before."""
    x, w, y = head()
    mine = inductor.pre_grad_custom_pass = Recorder("mine")
    options = lce_inductor.inductor_options(min_logits_bytes=0)
    assert set(options) == set(HOOKS) and not lce_inductor.is_installed()
    fn = lambda x, w, y: F.cross_entropy(F.linear(x, w), y)
    from torch._dynamo.utils import counters

    counters.clear()
    loss = torch.compile(fn, options=options)(x, w, y)
    torch.testing.assert_close(loss, fn(x, w, y))
    assert counters["lce_inductor"]["rewritten"] == 1
    assert ("mine", False) in Recorder.log
    assert inductor.pre_grad_custom_pass is mine and inductor.joint_custom_pre_pass is None
    assert run().counts == {}


def test_options_replace_what_is_installed():
    """Ours once, with the options' settings."""
    lce_inductor.install(chunk_tokens=5)
    options = lce_inductor.inductor_options(chunk_tokens=9)
    for hook, cls in OURS.items():
        (ours,) = [options[hook]] if isinstance(options[hook], cls) else options[hook]
        assert type(ours) is cls and ours.config.chunk_tokens == 9
    assert lce_inductor.current_config().chunk_tokens == 5


def test_threads():
    """From torch 2.13 on, Inductor's configuration belongs to a thread: is_installed() tells of the thread that asks."""
    lce_inductor.install(min_logits_bytes=0)
    found = []

    def work() -> None:
        found.append(lce_inductor.is_installed() == all(held(hook) for hook in HOOKS))
        lce_inductor.install(min_logits_bytes=0)
        found.append(lce_inductor.is_installed() and [len(held(hook)) for hook in HOOKS] == [1, 1])

    for _ in range(3):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found == [True] * 6
    assert lce_inductor.is_installed() and [len(held(hook)) for hook in HOOKS] == [1, 1]
    lce_inductor.uninstall()
    assert hooks() == dict.fromkeys(HOOKS)


# -- several passes where torch takes one


def test_chain_runs_in_order_and_is_as_cacheable_as_its_parts():
    a, b = Recorder("a"), Recorder("b")
    both = chain.Chain((a, b))
    both(Graph())
    assert [name for name, _ in Recorder.log] == ["a", "b"]
    assert both.uuid() == ("a", "b") != chain.Chain((b, a)).uuid()
    assert chain.Chain((a, print)).uuid() is None


def test_hooks_of_one_callable(monkeypatch):
    """torch 2.11 and 2.12, on any version."""
    monkeypatch.setattr(chain, "takes_lists", lambda: False)
    mine = {hook: Recorder(hook) for hook in HOOKS}
    for hook, value in mine.items():
        setattr(inductor, hook, value)
    lce_inductor.install(min_logits_bytes=0)
    for hook, cls in OURS.items():
        value = getattr(inductor, hook)
        assert isinstance(value, chain.Chain) and [type(p) for p in value.passes] == [Recorder, cls]
        assert value.uuid() is not None
    assert run().counts == {"rewritten": 1, "gradients:forward": 1}
    assert [name for name, _ in Recorder.log] == list(HOOKS)
    lce_inductor.uninstall()
    assert hooks() == mine


# -- imports, in fresh processes


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(lce_inductor.__file__).parent.parent)
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": root, **environment},
    )  # fmt: skip


def test_import_is_light():
    """It may happen while torch itself is being imported: nothing heavy, and nothing of torch at all."""
    found = python(
        """
        import sys, lce_inductor
        lce_inductor.Config(chunk_tokens=3)
        assert not lce_inductor.is_installed()
        print(sorted(m for m in sys.modules if m.split(".")[0] in ("torch", "triton", "numpy", "transformers")))
        """
    )
    assert found.returncode == 0, found.stderr
    assert ast.literal_eval(found.stdout) == []


def test_without_triton():
    """A CPU path where Triton cannot be imported."""
    found = python(
        """
        import sys
        sys.modules["triton"] = None
        import torch, torch.nn.functional as F, lce_inductor
        from torch._dynamo.utils import counters
        lce_inductor.install(min_logits_bytes=0)
        x, w, y = torch.randn(24, 8, requires_grad=True), torch.randn(37, 8), torch.arange(24)
        fn = lambda x, w, y: F.cross_entropy(F.linear(x, w), y)
        import os, tempfile
        os.chdir(tempfile.mkdtemp())  # not Inductor's cache: the first letters of a hash would be there to import, "z3" too
        loss = torch.compile(fn)(x, w, y)
        loss.backward()
        torch.testing.assert_close(loss, fn(x, w, y))
        print(counters["lce_inductor"]["rewritten"])
        """
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "1"


def test_torch_logs_and_the_users_source_line(tmp_path):
    """TORCH_LOGS imports the package during `import torch`; the log names the line of the user's linear."""
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import torch, torch.nn.functional as F
            import lce_inductor
            lce_inductor.install(min_logits_bytes=0)

            def step(x, w, y):
                logits = F.linear(x, w)  # the head
                return F.cross_entropy(logits, y)

            def over_tokens(x, w, y):
                logits = F.linear(x, w)
                return F.cross_entropy(logits, y) + logits.softmax(0).square().sum()

            args = torch.randn(24, 8), torch.randn(37, 8), torch.arange(24)
            with torch.no_grad():
                for fn in (step, over_tokens):
                    torch.compile(fn)(*args)
            """
        )
    )
    environment = {"TORCH_LOGS": "+lce_inductor", "TORCH_TRACE": str(tmp_path / "trace")}
    found = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300,
        env={**os.environ, **environment, "PYTHONPATH": str(Path(lce_inductor.__file__).parent.parent)},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    trace = "".join(path.read_text() for path in (tmp_path / "trace").iterdir())
    assert trace.count('"name": "lce_inductor_heads"') == 2 and '"code": "crossing"' in trace
    text = found.stderr
    assert "train.py:7: logits = F.linear(x, w)" in text and "24x37 logits" in text
    assert "row_stats" in text and "cross_entropy" in text
    assert "crossing at" in text and "train.py:12" in text and "hint:" in text
