"""One run of a function for explain(): Dynamo and all of Inductor's graph passes, with interpreted graphs for code."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

from .. import install
from ..config import Config
from ..reasons import REASONS
from ..reporting.records import HeadRecord, collect
from . import in_force

_VAGUE = "step_unsupported"  # Dynamo's reason for a graph that ends before a call it could not trace through


@dataclasses.dataclass(frozen=True)
class GraphReport:
    """One graph that torch.compile made.

    Attributes:
        compile_id: as torch's logs name it ("0/0").
        records: its heads, and its losses over logits that no head of its computes.
        gradients: heads whose gradients are computed in the "forward" (3 products), or by "recompute" (4).
        break_reason, break_at: why and at which `file:line: code` the graph ends; empty at the function's end.
    """

    compile_id: str
    records: tuple[HeadRecord, ...]
    gradients: dict[str, int]
    break_reason: str = ""
    break_at: str = ""

    def mapped(self, change: Callable[[HeadRecord], HeadRecord]) -> GraphReport:
        return dataclasses.replace(self, records=tuple(map(change, self.records)))


@dataclasses.dataclass(frozen=True)
class Target:
    """What to run, and how the user's own torch.compile compiles it: backend None where it does not."""

    fn: Callable[..., Any]
    backend: Any = None
    dynamic: bool | None = None

    @property
    def inductor(self) -> bool:
        return self.backend is None or getattr(self.backend, "compiler_name", "") == "inductor"

    @property
    def options(self) -> dict[str, Any]:
        return dict(getattr(self.backend, "config", {})) if self.inductor else {}


def target_of(fn: Callable[..., Any]) -> Target:
    """Raises TypeError for what cannot be compiled."""
    import torch
    from torch._dynamo.eval_frame import OptimizedModule, innermost_backend, innermost_fn

    if not callable(fn):
        raise TypeError(f"explain() takes a function or a module, got {type(fn).__name__}")
    context: Any = None
    if isinstance(fn, OptimizedModule):
        fn, context = fn._orig_mod, fn.dynamo_ctx
    elif isinstance(fn, torch.nn.Module) and fn._compiled_call_impl is not None:
        context = _context(fn._compiled_call_impl)
        fn = fn._call_impl
    elif in_force.is_compiled(fn):
        fn, context = innermost_fn(fn), _context(fn)
    backend = innermost_backend(context.callback) if context is not None else None
    return Target(fn, backend, getattr(context, "_dynamic", None))


def _context(fn: Any) -> Any:
    """The torch.compile context of a compiled function, which keeps it in its closure."""
    cells = dict(zip(fn.__code__.co_freevars, fn.__closure__ or ()))
    return cells["self"].cell_contents if "self" in cells else None


class Session:
    """One call of explain(): the graphs, in the order in which they were compiled, of the function and of parts of it
    that are compiled by themselves."""

    def __init__(self, asked: Config | None) -> None:
        self.asked, self.config = asked, asked
        self.graphs: list[GraphReport] = []
        self.failed = self.parts = False
        self.cached = self.limit = 0
        self.breaks: list[str] = []
        self.said: list[str] = []
        self.recorders: dict[Any, tuple[_Recorder, Any]] = {}

    def run(self, target: Target, args: Any, kwargs: Any) -> Any:
        """What fn returns."""
        import torch
        from torch._dynamo.utils import counters

        self.cached = counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
        counters.clear()
        self.limit = torch._dynamo.config.recompile_limit
        try:
            with torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=1 << 20), self._parts():
                self.parts = target.backend is None and in_force.holds_compiled(target.fn)
                if self.parts:
                    results = target.fn(*args, **kwargs)
                    if self.recorders:
                        return results
                    self.parts = False  # it holds compiled parts, but calls none
                return self._whole(target, args, kwargs)
        finally:
            self.breaks = list(map(_first_line, counters["graph_break"]))
            for recorder in [r for r, _ in self.recorders.values()]:
                _forget(recorder)

    def _whole(self, target: Target, args: Any, kwargs: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            return target.fn(*args, **kwargs)

        # A code object of its own: Dynamo keeps compiled code, and counts recompilations, per code object.
        call.__code__ = call.__code__.replace(co_firstlineno=call.__code__.co_firstlineno)
        recorder = self._recorder(target, args, kwargs)
        context = _optimize(recorder, target.dynamic)
        self.recorders[None] = recorder, context
        return context(call)(*args, **kwargs)

    def _recorder(self, target: Target, args: Any, kwargs: Any) -> _Recorder:
        """How this function is compiled: by the passes in the hooks, or by those its compiled code was made with."""
        found = install.hooks(target.options)
        obstacle = "" if target.inductor else "other-backend"
        if self.asked is not None:
            return _Recorder(self, {**target.options, **install.with_passes(found, self.asked)}, obstacle)
        config = install.settings_in(found)
        if target.backend is not None and not obstacle:
            state = in_force.state_of(target, args, kwargs, self.limit)
            if state.at_limit:
                obstacle = "recompile-limit"
            elif state.other_arguments:
                self._say(
                    "compiled code exists, but not for these arguments: the table is for what a call with them "
                    "compiles (Dynamo may then take sizes that differ as symbols)"
                )
            if state.compiled:
                if state.settings is None:
                    obstacle = "compiled-before"
                elif config is not None and state.settings != config:
                    self._say(
                        f"compiled code for these arguments exists already, made with other settings: {state.settings}."
                        " The table is for that code; torch._dynamo.reset() makes the next call compile anew"
                    )
                config = state.settings or config
        if config is None and not obstacle:
            now = install.settings_in(install.hooks())
            obstacle = "hooks-replaced" if now is not None or install.current_config() is not None else "not-installed"
            if install.installed_elsewhere():
                obstacle = "not-installed"
                self._say(
                    "install() was called in another thread; from torch 2.13 on Inductor's hooks belong to a thread"
                )
        elif not obstacle and not install.defers(found):
            self._say("the hook for returned logits (pre_grad_custom_pass) does not hold our pass: none are deferred")
        self.config = config or install.current_config() or Config()
        hooks = found if install.settings_in(found) == self.config else install.with_passes(found, self.config)
        return _Recorder(self, {**target.options, **hooks}, obstacle)

    def _say(self, note: str) -> None:
        if note not in self.said:
            self.said.append(note)

    @contextlib.contextmanager
    def _parts(self) -> Iterator[None]:
        """Compiled functions that are called on the way are compiled by a recorder, too, each as its own torch.compile
        would: Dynamo asks here for the callback of the one that is called."""
        from torch._dynamo import eval_frame

        thread, enter = threading.get_ident(), eval_frame._maybe_set_eval_frame

        def instead(callback: Any) -> Any:
            if threading.get_ident() == thread and hasattr(callback, "_torchdynamo_orig_backend"):
                callback = self._callback(callback, inspect.currentframe().f_back)  # type: ignore[union-attr]
            return enter(callback)

        eval_frame._maybe_set_eval_frame = instead
        try:
            yield
        finally:
            eval_frame._maybe_set_eval_frame = enter

    def _callback(self, callback: Any, frame: Any) -> Any:
        from torch._C._dynamo import eval_frame
        from torch._dynamo.eval_frame import innermost_backend

        backend = innermost_backend(callback)
        if isinstance(backend, _Recorder):
            return callback
        if id(callback) not in self.recorders:
            fn, args, kwargs = (frame.f_locals.get(name) for name in ("fn", "args", "kwargs"))
            recorder = self._recorder(Target(fn, backend), args or (), kwargs or {})
            self.recorders[id(callback)] = recorder, _optimize(recorder, None)
        context = self.recorders[id(callback)][1]
        if hasattr(context, "_isolate_recompiles_id"):
            eval_frame.set_eval_frame_isolate_recompiles_id(context._isolate_recompiles_id)
        return context.callback

    def notes(self) -> list[str]:
        found = list(self.said)
        if self.failed:
            row = REASONS["internal-error"]
            found.append(f"{row.code}: {row.explanation}; {row.hint}")
        if not self.graphs:
            why = "".join(f"; {reason}" for reason in self.breaks)
            found.append(
                "torch.compile made no graph of this: nothing to trace, Dynamo is switched off, or what it cannot "
                f"trace (in a try block, say) leaves the whole function to eager{why}"
            )
        if self.parts:
            found.append("fn is not compiled itself: the table is for the compiled parts that it calls")
        if self.cached:
            found.append(
                "graphs of this process came from the compile caches, without a run of the passes. This table is from "
                "a compile past the caches; cached code of the same settings does the same"
            )
        return found

    def reports(self) -> list[GraphReport]:
        """The graphs; where Dynamo kept a break's reason from the graph, all reasons that it counted."""
        why = "; ".join(self.breaks)
        return [dataclasses.replace(g, break_reason=why) if g.break_reason == _VAGUE else g for g in self.graphs]


def _optimize(recorder: _Recorder, dynamic: bool | None) -> Any:
    """Code of functions that are called after a graph break is the user's. Torch 2.13 can keep ours apart there;
    before, each explain() counts as a recompilation of theirs, and must not stop at the limit of these."""
    import torch

    apart = "isolate_recompiles" in inspect.signature(torch._dynamo.eval_frame._optimize).parameters
    own = {"isolate_recompiles": True} if apart else {}
    return torch._dynamo.optimize(recorder, dynamic=dynamic, **own)


class _Recorder:
    """A backend for Dynamo: all of Inductor's graph passes, and interpreted graphs instead of generated code."""

    def __init__(self, session: Session, patches: dict[str, Any], obstacle: str) -> None:
        self.session, self.obstacle = session, obstacle
        self.patches = {**patches, "force_disable_caches": True}

    def __call__(self, gm: Any, inputs: Any) -> Any:
        from torch._guards import CompileContext
        from torch._inductor.compile_fx import compile_fx

        reason = gm.compile_subgraph_reason
        with collect() as found:
            compiled = compile_fx(gm, inputs, inner_compile=_interpreted, config_patches=self.patches)
        self.session.failed |= bool(found.counts["refused:internal-error"])
        gradients = {k: sum(r.gradients == k for r in found.records) for k in ("forward", "recompute")}
        ended = (_first_line(reason.reason), _frame(reason.user_stack)) if reason.graph_break else ("", "")
        here = str(CompileContext.current_compile_id())
        graph = GraphReport(here, tuple(found.records), gradients, *ended)
        if self.obstacle:
            graph = graph.mapped(lambda r: r.refused(self.obstacle) if r.rewritten else r)
        self.session.graphs.append(graph)
        return compiled


def _interpreted(gm: Any, inputs: Any, **_: Any) -> Any:
    """In place of code generation: the graph itself, which frees each tensor after its last use."""
    import torch
    from torch._inductor.fx_passes.post_grad import view_to_reshape

    view_to_reshape(gm)  # strides may be others than those that were traced

    def run(args: list[Any]) -> Any:
        with torch.no_grad():
            return torch.fx.Interpreter(gm).boxed_run(args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _forget(backend: _Recorder) -> None:
    """Drop the code that Dynamo compiled for this backend, except where it lies beside the user's own."""
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, reset_code
    from torch._dynamo.convert_frame import input_codes
    from torch._dynamo.eval_frame import innermost_backend

    for reference in list(input_codes.seen):
        code = reference()
        entries = _debug_get_cache_entry_list(code) if code is not None else []
        if code is not None and entries and all(innermost_backend(e.backend) is backend for e in entries):
            reset_code(code)


def _first_line(reason: str) -> str:
    return reason.strip().split("\n")[0]


def _frame(stack: Any) -> str:
    """`file:line: code` of the innermost frame of the user's code."""
    frames = [f for f in stack if f.filename != __file__]
    return f"{frames[-1].filename}:{frames[-1].lineno}: {(frames[-1].line or '').strip()}" if frames else ""
