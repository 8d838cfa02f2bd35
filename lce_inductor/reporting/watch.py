"""From the begin of a compile to its end: what a cached graph does, and the one warning that nothing was found.

A cache hit runs no pass on the joint graph (and from torch 2.12 on none before it). But each cache asks the passes for
their key, which tells that a compile is under way, and Dynamo tells when it is over. The records of a compile that ran
the pass are kept as JSON beside the generated code, in Inductor's cache folder, and found again there when a later
process loads that code. Functions whose graphs are alike share a file of code: records are kept for each function.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import threading
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

from ..config import Config
from . import history
from .records import HeadRecord, collecting, publish

log = logging.getLogger("lce_inductor")

_OPS = re.compile(r"torch\.ops\.lce_inductor\.((?:row_stats(?:_with_grad)?|row_region))\.default\(")


@dataclasses.dataclass
class _Compile:
    """What is known of a compile under way: the code modules loaded before it, the user's function, and what the pass
    saw, if it ran."""

    config: Config
    loaded: int
    compile_id: str = ""
    function: str = ""
    ran: bool = False
    records: list[HeadRecord] = dataclasses.field(default_factory=list)


class _Thread(threading.local):
    now: _Compile | None = None


_thread = _Thread()
_armed = False
# By compile id, the settings of the passes that were there. Dynamo's reset() begins to count anew.
_known: OrderedDict[str, Config] = OrderedDict()
# Logits that graphs returned and no loss has read yet, by classes, bytes, and whether they need a gradient.
_returned: Counter[tuple[str, int, bool]] = Counter()
_lock = threading.Lock()
_KNOWN = 10000
_FUNCTIONS = 100  # whose records are kept beside one file of code


def arm() -> None:
    """Allow one warning; a rewritten head or the warning itself ends that."""
    global _armed
    _armed = True
    _returned.clear()


def disarm() -> None:
    global _armed
    _armed = False


def begin(config: Config) -> None:
    """A compile is under way (does nothing outside one, or if it is explain()'s)."""
    from torch._guards import CompileContext

    if CompileContext.try_get() is None or collecting():
        return
    from torch._dynamo.callback import callback_handler

    heard = _end in callback_handler.end_callbacks  # torch._dynamo.reset() forgets it
    if _thread.now is not None and heard:
        return
    # Where it is forgotten, what is left in `now` is of a compile that was interrupted and will never end.
    _thread.now = _Compile(config, len(_modules()), str(CompileContext.current_compile_id()), _function())
    with _lock:
        if not heard:
            callback_handler.register_end_callback(_end)
            _known.clear()
        _known[_thread.now.compile_id] = config
        if len(_known) > _KNOWN:
            _known.popitem(last=False)


def settings_of(compile_id: str) -> Config | None:
    """The settings of the passes in a compile since Dynamo's last reset; None if they were not there."""
    from torch._dynamo.callback import callback_handler

    return _known.get(compile_id) if _end in callback_handler.end_callbacks else None


def saw(records: list[HeadRecord], config: Config) -> None:
    """The pass ran over a graph and found these heads."""
    begin(config)
    records = records if collecting() else _joined(records)
    told = [r for r in records if r.told]
    if _thread.now is not None:
        _thread.now.ran = True
        _thread.now.records += told
    elif not collecting():  # outside of Dynamo's compiles
        history.graph_compiled("", told, cached=False)
    publish(records, config)


def _joined(records: list[HeadRecord]) -> list[HeadRecord]:
    """A loss over logits as an earlier graph returned them is taken for their loss, so that they are counted once."""
    found = []
    for record in records:
        logits = record.classes, record.logits_bytes, record.trains
        with _lock:
            if record.code == "returned-loss-free" and record.told:
                _returned[logits] += 1
            elif record.code == "no-head":
                joined = _returned[logits] > 0
                _returned[logits] -= joined
                record = dataclasses.replace(record, joined=joined)
        found.append(record)
    return found


def _end(args: Any) -> None:
    now, _thread.now = _thread.now, None
    if now is None or args.callback_trigger.name != "DYNAMO":  # a backward compiled later has no pre-grad pass
        return
    try:
        files = [Path(m.__file__) for m in _modules()[now.loaded :] if hasattr(m, "call") and m.__file__]
        if now.ran:
            if now.records:
                _keep(files, now.function, now.records)
        else:
            now.records = _joined(_kept(files, now.function))
            publish(now.records, now.config, cached=True)
        if now.ran or files:
            history.graph_compiled(now.compile_id, now.records, cached=not now.ran)
        _warn(now)
    except Exception as error:  # a report must never stop a compile
        log.debug("no report: %s: %s", type(error).__name__, error)


def _modules() -> list[Any]:
    """Generated code loaded so far, in order."""
    from torch._inductor.codecache import PyCodeCache

    return PyCodeCache.modules


def _function() -> str:
    """`file:line:name` of the function, or the rest of one, that is being compiled; "" where Dynamo does not say."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        code = InstructionTranslator.current_tx().f_code
        return f"{code.co_filename}:{code.co_firstlineno}:{code.co_name}"
    except (ImportError, AttributeError):
        return ""


def _beside(file: Path) -> Path:
    return file.with_suffix(".lce_inductor.json")


def _keep(files: list[Path], function: str, records: list[HeadRecord]) -> None:
    for file in files:
        found = json.loads(_beside(file).read_text()) if _beside(file).is_file() else {}
        found.pop(function, None)
        found = dict([*found.items()][1 - _FUNCTIONS :]) | {function: [dataclasses.asdict(r) for r in records]}
        unfinished = _beside(file).with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(found))
        unfinished.replace(_beside(file))


def _kept(files: list[Path], function: str) -> list[HeadRecord]:
    """Records beside the first of these files that has some, of this function or else (its lines have moved) of the
    last that became this code; where there are none (a cache that came over the network), what the code itself tells.
    """
    for file in files:
        if _beside(file).is_file():
            found = json.loads(_beside(file).read_text())
            return [HeadRecord(**_tuples(r)) for r in found.get(function) or [*found.values()][-1]]
    texts = [file.read_text() for file in files]
    texts = [text for text in texts if "tangents_1" not in text]  # a backward computes no head of its own
    return [_bare(name) for text in texts for name in _OPS.findall(text)]


def _tuples(record: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}


def _bare(op: str) -> HeadRecord:
    tier = "region" if op == "row_region" else "kernels"
    return HeadRecord("head of unknown line", "?", "?", 0, None, "", "", "", (), (op,), "", tier=tier)


def _warn(now: _Compile) -> None:
    """Say once that a compile that looked like training found heads and rewrote none."""
    if not _armed:
        return
    if any(r.rewritten for r in now.records):
        disarm()
        return
    missed = [r for r in now.records if _missed(r, now.config)]
    if missed:
        disarm()
        record = max(missed, key=lambda r: r.logits_bytes)
        log.warning(
            "install() has rewritten nothing so far, and logits (%s) stay in memory: %s: %s: %s. "
            "print(lce_inductor.explain(fn)(*args)), with what you compile as fn, says more. (Said once.)",
            record.bytes_text(), record.source, record.code, record.explanation,
        )  # fmt: skip


def _missed(record: HeadRecord, config: Config) -> bool:
    """Large logits of a training step that a loss reads, here or outside, not those of a convolution."""
    return (
        record.trains
        and record.logits_bytes >= config.min_logits_bytes
        and (record.kind == "linear" or not record.stop)
    )
