"""Which compiled code a call would run: whether it exists already, and which passes it was compiled with."""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any, NamedTuple

from ..config import Config
from ..reporting import watch

_LOOKED_AT = 5000  # objects, on the search for compiled parts


class State(NamedTuple):
    """compiled: is there code that a call with these arguments would run? settings: of the passes that made it, None if
    there were none. other_arguments: there is code, but none for these; at_limit: and Dynamo will make none."""

    compiled: bool = False
    settings: Config | None = None
    other_arguments: bool = False
    at_limit: bool = False


def state_of(target: Any, args: Any, kwargs: Any, limit: int) -> State:
    """The code that Dynamo holds for a compiled function. limit: of recompilations, the user's."""
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
    from torch._dynamo.eval_frame import innermost_backend

    function, given = _root(target.fn, args, kwargs)
    if function is None:
        return State()
    every = _debug_get_cache_entry_list(function.__code__)
    entries = [e for e in every if innermost_backend(e.backend) == target.backend]
    fitting = [e for e in entries if _fits(e, given)]
    if not fitting:
        return State(other_arguments=bool(entries), at_limit=_at_limit(every, given, limit))
    return State(True, watch.settings_of(str(fitting[0].compile_id)))


def _root(fn: Any, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """The Python function whose frame Dynamo compiles first, and its local variables at the start."""
    import torch

    owner = getattr(fn, "__self__", None)
    if isinstance(owner, torch.nn.Module) and getattr(fn, "__name__", "") in (
        "_call_impl",
        "__call__",
        "_wrapped_call_impl",
    ):
        fn = owner
    function: Any = fn.forward if isinstance(fn, torch.nn.Module) else fn
    if isinstance(function, types.MethodType):
        function, args = function.__func__, (function.__self__, *args)
    if not isinstance(function, types.FunctionType):
        return None, {}
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return None, {}
    bound.apply_defaults()
    given = dict(bound.arguments)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        try:
            given[name] = cell.cell_contents
        except ValueError:  # not set yet
            continue
    return function, given


def _at_limit(entries: Any, given: dict[str, Any], limit: int) -> bool:
    """Does Dynamo leave a further call to eager? It counts the entries of the same objects."""
    from torch._dynamo import cache_size, config

    frame: Any = types.SimpleNamespace(f_locals=given)
    own = sum(cache_size._has_same_id_matched_objs(frame, e) for e in entries)
    return own >= limit or len(entries) >= config.accumulated_recompile_limit


def _fits(entry: Any, given: dict[str, Any]) -> bool:
    try:
        return bool(entry.guard_manager.check(given))
    except Exception:  # a guard on something that only the frame has
        return False


def is_compiled(fn: Any) -> bool:
    """Did torch.compile make this? (Not torch.compiler.disable, which marks what it makes in the same way.)"""
    import torch
    from torch._dynamo.eval_frame import OptimizedModule

    if isinstance(fn, torch.nn.Module):
        return isinstance(fn, OptimizedModule) or fn._compiled_call_impl is not None
    return (
        isinstance(fn, types.FunctionType)
        and "_torchdynamo_orig_callable" in vars(fn)
        and not vars(fn).get("_torchdynamo_disable")
    )


def holds_compiled(fn: Any) -> bool:
    """Does a function reach something that is compiled by itself: through its closure, its globals, the modules and the
    object that it belongs to?"""
    todo, seen = [fn], {id(fn)}
    keep = []  # ids are of living objects
    while todo and len(seen) < _LOOKED_AT:
        now = todo.pop()
        keep.append(now)
        if is_compiled(now):
            return True
        for other in _reached(now):
            if id(other) not in seen:
                seen.add(id(other))
                todo.append(other)
    return False


def _reached(thing: Any) -> list[Any]:
    import torch

    if isinstance(thing, types.MethodType):
        return [thing.__self__, thing.__func__]
    if isinstance(thing, functools.partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if isinstance(thing, types.FunctionType):
        if thing.__module__ is not None and thing.__module__.split(".")[0] in ("torch", "lce_inductor"):
            return []
        values = [thing.__globals__.get(name) for name in _names(thing.__code__)]
        for cell in thing.__closure__ or ():
            try:
                values.append(cell.cell_contents)
            except ValueError:
                continue
        return [v for v in values if _worth(v)]
    if isinstance(thing, (list, tuple)):
        return [v for v in thing[:100] if _worth(v)]
    if isinstance(thing, dict):
        return [v for v in list(thing.values())[:100] if _worth(v)]
    if isinstance(thing, (type, types.ModuleType, torch.Tensor)) or not hasattr(thing, "__dict__"):
        return []
    found = [v for v in vars(thing).values() if _worth(v)]
    call = getattr(type(thing), "forward" if isinstance(thing, torch.nn.Module) else "__call__", None)
    return [*found, *([call] if isinstance(call, types.FunctionType) else [])]


def _worth(value: Any) -> bool:
    return value is not None and not isinstance(value, (str, bytes, int, float, types.ModuleType, type))


def _names(code: types.CodeType) -> list[str]:
    found = list(code.co_names)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            found += _names(inner)
    return found
