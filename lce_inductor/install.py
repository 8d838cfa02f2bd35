"""install() and uninstall(): the one place that touches Inductor's hooks."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

from .config import Config, make_config
from .reporting import watch

_HOOKS = ("pre_grad_custom_pass", "joint_custom_pre_pass")


@dataclasses.dataclass
class _Installed:
    config: Config
    before: dict[str, Any]
    after: dict[str, Any]
    thread: int


_lock = threading.RLock()
_installed: _Installed | None = None


def install(**settings: Any) -> None:
    """Rewrite linear -> cross-entropy heads in every later torch.compile of this process.

    Keyword arguments are the fields of Config. Installing twice with the same settings does nothing;
    other settings replace the earlier ones. Passes already in Inductor's hooks keep running, before ours.
    From torch 2.13 on, Inductor's configuration belongs to a thread: install in the one that compiles.

    Raises:
        ValueError: a setting has a value that is not allowed.
        TypeError: a setting does not exist.
    """
    global _installed
    config = make_config(settings)
    with _lock:
        if _installed is not None:
            if _installed.config == config and is_installed():
                return
            uninstall()
        from torch._inductor import config as inductor

        before = {hook: _without(value) for hook, value in hooks().items()}
        after = with_passes(before, config)
        for hook, value in after.items():
            setattr(inductor, hook, value)
        _installed = _Installed(config, before, after, threading.get_ident())
        watch.arm()


def uninstall() -> None:
    """Take the passes out again. Hooks that nobody touched since install() get back the very object they held;
    from others only our passes are removed."""
    global _installed
    with _lock:
        from torch._inductor import config as inductor

        # Also if not installed: another package may have put back hooks of a time when we were, or another
        # thread, with hooks of its own, may have uninstalled last.
        state = _installed
        for hook in _HOOKS:
            now = getattr(inductor, hook)
            untouched = state is not None and now is state.after[hook] and _unchanged(now, state.before[hook])
            setattr(inductor, hook, state.before[hook] if state is not None and untouched else _without(now))
        _installed = None
        watch.disarm()


def is_installed() -> bool:
    """Are the passes in Inductor's hooks right now (from torch 2.13 on: in this thread)?"""
    return _installed is not None and settings_in(hooks()) == _installed.config and defers(hooks())


def current_config() -> Config | None:
    """The settings in force, or None."""
    return _installed.config if _installed is not None else None


@contextlib.contextmanager
def installed(**settings: Any) -> Iterator[None]:
    """install() for the length of a with-block; whatever was installed before is back afterwards."""
    earlier = _installed.config if _installed is not None else None
    install(**settings)
    try:
        yield
    finally:
        uninstall()
        if earlier is not None:
            install(**dataclasses.asdict(earlier))


def inductor_options(**settings: Any) -> dict[str, Any]:
    """Options for one function: `torch.compile(model, options=lce_inductor.inductor_options())`.

    `options=` replaces the hooks for that function, so the passes in the hooks now are included.
    """
    return with_passes(hooks(), make_config(settings))


def hooks(options: dict[str, Any] | None = None) -> dict[str, Any]:
    """What Inductor's hooks hold in a compile with these options."""
    from torch._inductor import config as inductor

    return {hook: getattr(inductor, hook) for hook in _HOOKS} | {
        hook: value for hook, value in (options or {}).items() if hook in _HOOKS
    }


def with_passes(found: dict[str, Any], config: Config) -> dict[str, Any]:
    """The hooks with our passes, of these settings, behind those of others."""
    passes = _passes(config)
    return {hook: _join(_without(value), passes[hook]) for hook, value in found.items()}


def settings_in(found: dict[str, Any]) -> Config | None:
    """The settings of the pass that rewrites heads, in these hooks; None if it is missing."""
    return _settings(found["joint_custom_pre_pass"])


def defers(found: dict[str, Any]) -> bool:
    """Do these hooks hold the pass for returned logits, with the settings of the other?"""
    return _settings(found["pre_grad_custom_pass"]) == settings_in(found)


def _settings(hook: Any) -> Config | None:
    from .passes import _Pass

    return next((p.config for p in _items(hook) if isinstance(p, _Pass)), None)


def installed_elsewhere() -> bool:
    """Are the hooks of this thread those of nobody, though another thread has installed the passes?"""
    state = _installed
    return state is not None and state.thread != threading.get_ident() and settings_in(hooks()) is None


def _passes(config: Config) -> dict[str, Any]:
    from . import passes

    return {"pre_grad_custom_pass": passes.DeferPass(config), "joint_custom_pre_pass": passes.HeadsPass(config)}


def _items(value: Any) -> list[Any]:
    """The passes in a hook's value, in order."""
    from .hook_chain import Chain

    if value is None:
        return []
    if isinstance(value, Chain):
        return list(value.passes)
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _build(items: list[Any]) -> Any:
    """A hook's value for these passes: torch 2.13 takes lists, earlier versions one callable."""
    from .hook_chain import Chain, takes_lists

    if len(items) <= 1:
        return items[0] if items else None
    return items if takes_lists() else Chain(tuple(items))


def _join(value: Any, ours: Any) -> Any:
    return _build([*_items(value), ours])


def _without(value: Any) -> Any:
    """The hook's value with our passes taken out; the value itself if there are none."""
    from .passes import _Pass

    items = _items(value)
    rest = [p for p in items if not isinstance(p, _Pass)]
    return value if len(rest) == len(items) else _build(rest)


def _unchanged(now: Any, before: Any) -> bool:
    """A user may append to the list that install() made."""
    return len(_items(now)) == len(_items(before)) + 1
