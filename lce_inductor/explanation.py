"""explain(): which heads of a function are rewritten, which are not, and why."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from . import install
from .config import Config, make_config
from .reasons import REASONS
from .report import HeadRecord, attach, collect, size_text

_WIDTH = 58  # of a line of code in the table
_VAGUE = "step_unsupported"  # Dynamo's reason for a graph that ends before a call it could not trace through


@dataclasses.dataclass(frozen=True)
class GraphReport:
    """One graph that torch.compile made.

    Attributes:
        compile_id: as torch's logs name it ("0/0").
        records: its large linears and its losses.
        gradients: heads whose gradients are computed in the "forward" (3 products), or by "recompute" (4).
        break_reason, break_at: why and at which `file:line: code` the graph ends; empty at the function's end.
    """

    compile_id: str
    records: tuple[HeadRecord, ...]
    gradients: dict[str, int]
    break_reason: str = ""
    break_at: str = ""


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What explain() found. print() shows a table; as_dict() and to_json() give the same as data.

    Attributes:
        graphs: in the order in which they were compiled.
        notes: what concerns no single head.
        settings: the settings that the table is for.
    """

    graphs: tuple[GraphReport, ...]
    notes: tuple[str, ...]
    settings: Config

    @property
    def records(self) -> list[HeadRecord]:
        return [record for graph in self.graphs for record in graph.records]

    @property
    def saved_bytes(self) -> int:
        """Bytes of logits that no longer exist, by hint."""
        return sum(r.logits_bytes for r in self.records if r.rewritten)

    @property
    def held_bytes(self) -> int:
        """Bytes of logits that stay, by hint; a loss and its head in two graphs count once."""
        return sum(r.logits_bytes for r in self.records if not r.rewritten and not _counted(r))

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return {
            "saved_bytes": self.saved_bytes,
            "held_bytes": self.held_bytes,
            "settings": dataclasses.asdict(self.settings),
            "notes": list(self.notes),
            "graphs": [dataclasses.asdict(graph) for graph in self.graphs],
        }

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.as_dict(), indent=indent)

    def __str__(self) -> str:
        heads = [r for r in self.records if not _counted(r)]
        done = sum(r.rewritten for r in heads)
        lines = [
            f"lce_inductor.explain: graphs: {len(self.graphs)}; heads rewritten: {done} of {len(heads)}; "
            f"logits saved: {size_text(self.saved_bytes)}, held: {size_text(self.held_bytes)}"
        ]
        if not heads:
            lines.append("no linear that could be a head, and no loss")
        else:
            lines += ["", *_table(self.graphs), *(line for r in self.records for line in _why(r))]
        return "\n".join([*lines, *(line for note in self.notes for line in ("", f"note: {note}"))])

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # a notebook shows the table
        printer.text(str(self))


def explain(fn: Callable[..., Any], **settings: Any) -> Callable[..., Explanation]:
    """Say what becomes of each head and each loss of a function: `print(lce_inductor.explain(fn)(*args))`.

    fn is what you compile: a function, a module, or what torch.compile made of one, whose options= and dynamic=
    are then used. The call compiles it afresh, past all compile caches, through every graph pass of Inductor, but
    generates no code; it takes seconds, and a cached compile of the same settings does what the table says.
    With settings (as install() takes them) the table is for these; without, for what is in force.

    The call runs fn once on args, forward; the backward is traced, not run. The gradients of parameters, buffers
    and generators of random numbers that fn, its modules and args hold are put back afterwards, as are torch's
    compile counters; your compiled code stays in place (before torch 2.13, where a graph breaks, this counts as one
    of its recompilations). What else fn does is done: an optimizer step inside fn steps, and tensors changed in
    place stay changed. It needs the memory of a forward pass.

    Raises:
        ValueError, TypeError: a setting that install() would not take either.
        Whatever fn raises.
    """
    asked = make_config(settings) if settings else None
    target = _Target(fn)

    def run(*args: Any, **kwargs: Any) -> Explanation:
        found = install.hooks(target.options)
        config = asked or install.settings_in(found)
        obstacle = target.obstacle or ("" if config else target.not_in_hooks())
        config = config or install.current_config() or Config()
        recorder = _Recorder({**target.options, **install.with_passes(found, config)})
        with _undisturbed(fn, args, kwargs):
            recorder.run(target, args, kwargs)
        graphs = _across(recorder.reports())
        if obstacle:
            graphs = [_map(g, lambda r: r.refused(obstacle) if r.rewritten else r) for g in graphs]
        notes = recorder.notes()
        if asked is not None and not install.is_installed():
            notes.append("install() is not in force: the table is for install() with these settings")
        explanation = Explanation(tuple(graphs), tuple(notes), config)
        attach("lce_inductor_explain", explanation.as_dict())
        return explanation

    return run


class _Target:
    """What to compile, and how the user's own torch.compile would."""

    def __init__(self, fn: Callable[..., Any]) -> None:
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
        elif hasattr(fn, "_torchdynamo_orig_callable"):
            fn, context = innermost_fn(fn), _context(fn)
        backend = innermost_backend(context.callback) if context is not None else None
        self.fn = fn
        self.dynamic = getattr(context, "_dynamic", None)
        inductor = backend is None or getattr(backend, "compiler_name", "") == "inductor"
        self.options: dict[str, Any] = dict(getattr(backend, "config", {})) if inductor else {}
        self.obstacle = "" if inductor else "other-backend"

    def not_in_hooks(self) -> str:
        """The code for passes that are not in this compile's hooks."""
        return "hooks-replaced" if install.settings_in(install.hooks()) else "not-installed"


def _context(fn: Any) -> Any:
    """The torch.compile context of a compiled function, which keeps it in its closure."""
    cells = dict(zip(fn.__code__.co_freevars, fn.__closure__ or ()))
    return cells["self"].cell_contents if "self" in cells else None


class _Recorder:
    """A backend for Dynamo: all of Inductor's graph passes, and interpreted graphs instead of generated code."""

    def __init__(self, patches: dict[str, Any]) -> None:
        self.patches = {**patches, "force_disable_caches": True}
        self.graphs: list[GraphReport] = []
        self.failed = False
        self.cached = 0
        self.breaks: list[str] = []

    def run(self, target: _Target, args: Any, kwargs: Any) -> None:
        import torch
        from torch._dynamo.utils import counters

        def call(*args: Any, **kwargs: Any) -> Any:
            return target.fn(*args, **kwargs)

        # A code object of its own: Dynamo keeps compiled code, and counts recompilations, per code object.
        call.__code__ = call.__code__.replace(co_firstlineno=call.__code__.co_firstlineno)
        # That of functions which fn calls after a graph break is the user's. Torch 2.13 can keep ours apart there;
        # before, each explain() counts as a recompilation of theirs, and must not stop at the limit of these.
        apart = "isolate_recompiles" in inspect.signature(torch._dynamo.eval_frame._optimize).parameters
        own = {"isolate_recompiles": True} if apart else {}
        self.cached = counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
        counters.clear()
        try:
            with torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=1 << 20):
                torch._dynamo.optimize(self, dynamic=target.dynamic, **own)(call)(*args, **kwargs)
        finally:
            self.breaks = list(map(_first_line, counters["graph_break"]))
            _forget(self)

    def __call__(self, gm: Any, inputs: Any) -> Any:
        from torch._guards import CompileContext
        from torch._inductor.compile_fx import compile_fx

        reason = gm.compile_subgraph_reason
        with collect() as found:
            compiled = compile_fx(gm, inputs, inner_compile=_interpreted, config_patches=self.patches)
        self.failed |= bool(found.counts["refused:internal-error"])
        gradients = {k: found.counts[f"gradients:{k}"] for k in ("forward", "recompute")}
        ended = (_first_line(reason.reason), _frame(reason.user_stack)) if reason.graph_break else ("", "")
        here = str(CompileContext.current_compile_id())
        self.graphs.append(GraphReport(here, tuple(found.records), gradients, *ended))
        return compiled

    def notes(self) -> list[str]:
        found = []
        if self.failed:
            row = REASONS["internal-error"]
            found.append(f"{row.code}: {row.explanation}; {row.hint}")
        if not self.graphs:
            found.append("torch.compile made no graph of this: nothing to trace, or Dynamo is switched off")
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


# -- what belongs to several graphs


def _map(graph: GraphReport, change: Callable[[HeadRecord], HeadRecord]) -> GraphReport:
    return dataclasses.replace(graph, records=tuple(map(change, graph.records)))


def _across(graphs: list[GraphReport]) -> list[GraphReport]:
    """Name what no single graph shows: a head and its loss in two graphs, and a loss outside of all."""
    changed: dict[HeadRecord, HeadRecord] = {}
    for i, graph in enumerate(graphs):
        for head in graph.records:
            unread = head.code in ("no-loss", "returned-loss-free") or (head.code == "escape" and not head.losses)
            if head.kind != "linear" or not unread:
                continue
            later = [(j, r) for j in range(i + 1, len(graphs)) for r in graphs[j].records]
            apart = [(j, r) for j, r in later if _homeless(r) and r.classes == head.classes and r not in changed]
            if apart:
                j, loss = apart[0]
                ended = next((g for g in graphs[i:j] if g.break_at), graph)
                stop = f"{ended.break_at} ({ended.break_reason})" if ended.break_at else ""
                for record in (head, loss):
                    changed[record] = _hinted(record.refused("graph-break", stop))
            elif head.trains and head.code == "returned-loss-free":
                changed[head] = head.refused("loss-outside")
    return [_map(g, lambda r: changed.get(r, r)) for g in graphs]


def _homeless(record: HeadRecord) -> bool:
    """A loss over logits that come into the graph from outside."""
    return record.code == "no-head" and not record.stop


def _hinted(record: HeadRecord) -> HeadRecord:
    """Hugging Face models without a loss type of their own warn about it through a logger, inside the graph."""
    if "self.loss_function" not in record.stop:
        return record
    return dataclasses.replace(record, hint='set model.loss_type = "ForCausalLM" before compiling (Hugging Face)')


def _counted(record: HeadRecord) -> bool:
    """Is this the loss of a head that has a record of its own?"""
    return record.kind == "loss" and record.code == "graph-break"


def _first_line(reason: str) -> str:
    return reason.strip().split("\n")[0]


def _frame(stack: Any) -> str:
    """`file:line: code` of the innermost frame of the user's code."""
    frames = [f for f in stack if f.filename != __file__]
    return f"{frames[-1].filename}:{frames[-1].lineno}: {(frames[-1].line or '').strip()}" if frames else ""


# -- the user's state


@contextlib.contextmanager
def _undisturbed(fn: Any, args: Any, kwargs: Any) -> Iterator[None]:
    """Gradients, buffers, random numbers and torch's counters are afterwards what they were."""
    import torch
    from torch._dynamo.utils import counters
    from torch.utils._pytree import tree_leaves

    held = [*tree_leaves((args, kwargs)), *_reached(fn)]
    modules = {m: dict(m._buffers) for root in held if isinstance(root, torch.nn.Module) for m in root.modules()}
    values = {b: b.clone() for found in modules.values() for b in found.values() if b is not None}
    tensors = [t for t in held if isinstance(t, torch.Tensor)] + [p for m in modules for p in m._parameters.values()]
    grads = {t: t.grad for t in tensors if t is not None and t.is_leaf and t.requires_grad}
    counts = {key: Counter(found) for key, found in counters.items()}
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    numpy: Any = sys.modules.get("numpy")
    states = random.getstate(), numpy.random.get_state() if numpy is not None else None
    try:
        for tensor in grads:
            tensor.grad = None
        with torch.random.fork_rng(devices):
            yield
    finally:
        for tensor, grad in grads.items():
            tensor.grad = grad
        with torch.no_grad():
            for module, found in modules.items():
                module._buffers.clear()
                module._buffers.update(found)
            for buffer, value in values.items():
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        counters.clear()
        counters.update(counts)
        random.setstate(states[0])
        if numpy is not None:
            numpy.random.set_state(states[1])


def _reached(fn: Any) -> list[Any]:
    """Objects that a function reads by itself: its own, and those of its closure and its globals."""
    fn = inspect.unwrap(fn)
    found = [fn, getattr(fn, "__self__", None), getattr(fn, "_orig_mod", None)]
    with contextlib.suppress(TypeError, ValueError):  # not a function
        variables = inspect.getclosurevars(getattr(fn, "__func__", fn))
        found += [*variables.nonlocals.values(), *variables.globals.values()]
    return found


# -- the table


def _short(source: str) -> str:
    """`file:line: code` with a path relative to the working directory, or its last parts, in one width."""
    path, colon, rest = source.partition(":")
    inside = os.path.relpath(path) if os.path.isabs(path) else path
    path = inside if not inside.startswith("..") else os.path.join(*path.split(os.sep)[-2:])
    text = path + colon + rest
    return text if len(text) <= _WIDTH else text[: _WIDTH - 3] + "..."


def _outcome(record: HeadRecord, gradients: dict[str, int]) -> str:
    if record.code is not None:
        return record.code
    products = {"forward": "3 products", "recompute": "4 products"}
    return ", ".join(["rewritten", *(text for key, text in products.items() if gradients.get(key))])


def _table(graphs: tuple[GraphReport, ...]) -> list[str]:
    """One row for each linear, with its losses, and for each loss that has none."""
    rows = [("graph", "", "where", "logits", "bytes", "outcome")]
    for index, graph in enumerate(graphs):
        for r in graph.records:
            size = f"{size_text(r.logits_bytes)} {'saved' if r.rewritten else 'held'}"
            logits = f"{r.tokens} x {r.classes}"
            rows.append((str(index), r.kind, _short(r.source), logits, size, _outcome(r, graph.gradients)))
            if r.kind == "linear":
                rows += [("", "loss", _short(source), "", "", "") for source in r.losses if source != r.source]
        if graph.break_at:
            rows.append(("", "break", _short(graph.break_at), "", "", ""))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _why(record: HeadRecord) -> list[str]:
    """The paragraph below the table for what was left alone."""
    if record.rewritten or _counted(record):
        return []
    return [
        "",
        record.source,
        f"  {record.code}: {record.explanation}",
        *([f"  at: {record.stop}"] if record.stop else []),
        f"  hint: {record.hint}",
    ]
