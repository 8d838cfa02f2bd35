"""Jobs in processes of their own, one after another or in turns.

In turns, all of them are there at once, ready to be timed, and take one step after another in an order drawn anew for
each round: neither drift nor what the device did just before favours one. A process that has no turn has no work for
the device, and holds no memory there but its inputs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch

OK, OUT_OF_MEMORY, WRONG, FAILED = "ok", "out of memory", "WRONG", "failed"
IN_TURNS = "--in-turns"
T = TypeVar("T")


def run_isolated(module: str, job: Any, cache_dir: Path, timeout_s: float | None = None) -> dict[str, Any]:
    """Give a job, a dataclass, to `python -m module JOB RESULT` and return what it writes to the file RESULT.

    Without a result, a status and a detail that say how the process ended.
    """
    with Isolated(module, job, cache_dir, timeout_s) as process:
        return process.result()


def run_in_turns(
    module: str,
    jobs: Sequence[Any],
    cache_dir: Path,
    rounds: int,
    timeout_s: float | None = None,
    starting: Callable[[Any], object] = lambda job: None,
) -> list[dict[str, Any]]:
    """What run_isolated returns, of each job; their steps are timed in turns. `starting` is called before each one."""
    with contextlib.ExitStack() as stack:
        processes = []
        for job in jobs:
            starting(job)
            processes.append(stack.enter_context(Isolated(module, job, cache_dir, timeout_s, in_turns=True)))
            processes[-1].answer()
        order, alive = random.Random(0), [p for p in processes if p.ready]
        for _ in range(rounds):
            order.shuffle(alive)
            for process in alive:
                process.turn()
        return [process.result() for process in processes]


class Isolated:
    """A process at work on a job. in_turns: it says when it is ready, and waits for its turns."""

    def __init__(
        self, module: str, job: Any, cache_dir: Path, timeout_s: float | None = None, in_turns: bool = False
    ) -> None:
        self.timeout_s, self.late, self.ready = timeout_s, False, False
        self.folder = tempfile.TemporaryDirectory(prefix="lce_bench_")
        self.file, self.log = Path(self.folder.name) / "row.json", Path(self.folder.name) / "log.txt"
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache_dir), "KINETO_LOG_LEVEL": "99"}
        command = [sys.executable, "-m", module, json.dumps(dataclasses.asdict(job)), str(self.file)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE} if in_turns else {}
        command += [IN_TURNS] if in_turns else []
        with self.log.open("w") as output:
            streams = {"stdout": output, "stderr": output} | pipes
            self.process = subprocess.Popen(command, env=environment, text=True, **streams)

    def __enter__(self) -> Isolated:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in filter(None, (self.process.stdin, self.process.stdout)):
            with contextlib.suppress(OSError):
                pipe.close()
        self.folder.cleanup()

    @contextlib.contextmanager
    def _in_time(self) -> Iterator[None]:
        def give_up() -> None:
            self.late = True
            self.process.kill()

        timer = threading.Timer(self.timeout_s, give_up) if self.timeout_s is not None else None
        if timer is not None:
            timer.start()
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()

    def answer(self) -> None:
        """Wait until it says that it is ready for a turn, or until it ends."""
        assert self.process.stdout is not None
        with self._in_time():
            self.ready = bool(self.process.stdout.readline())

    def turn(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it ended: result() says how
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            self.answer()

    def result(self) -> dict[str, Any]:
        """What it wrote, once it has ended; without that, a status and a detail that say how it ended."""
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        with self._in_time():
            code = self.process.wait()
        if self.file.exists():
            found: dict[str, Any] = json.loads(self.file.read_text())
            return found
        if self.late:
            return {"status": FAILED, "detail": f"no result after {self.timeout_s:g} s"}
        if code == -signal.SIGKILL:
            return {"status": OUT_OF_MEMORY, "detail": "killed, as the system does when memory runs out"}
        last = self.log.read_text(errors="replace").strip().splitlines()[-1:]
        return {"status": FAILED, "detail": f"exit code {code}: {' '.join(last)}"}


# -- in such a process


def write_result(path: Path, row: Any) -> None:
    """What result() reads: a row without its job. Renamed at the end, since the reader may come at any time."""
    fields = dataclasses.asdict(row)
    del fields["job"]
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(fields))
    unfinished.replace(path)


_turns: TextIO | None = None  # where to say that this process is ready, if it is given turns


def main(arguments: Sequence[str], work: Callable[[dict[str, Any], Path], None]) -> None:
    """The arguments that Isolated gives: call work(job's fields, result's path)."""
    global _turns
    job, result, *more = arguments
    if IN_TURNS in more:
        _turns = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever else is printed
    work(json.loads(job), Path(result))


def repeated(step: Callable[[], T], reps: int, clear: Callable[[], object]) -> list[T]:
    """What step() returns, so many times, or, if this process is given turns, in each of them.

    The first step of a turn is not counted: its allocations and clocks are those that another process left. `clear`
    drops what a step leaves.
    """
    if _turns is None:
        return [step() for _ in range(reps)]
    found: list[T] = []
    while True:
        clear()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        _turns.write("ready\n")
        _turns.flush()
        if not sys.stdin.readline():
            return found
        step()
        found.append(step())
