"""Fuzzed programs by the thousand: python tests/many_fuzz.py --kind arguments --programs 10000 --processes 8

Past failures: each is counted, printed, and saved as a script that shows it. Kinds: grad_modes, arguments, broadcasts,
mutations, opinfo, rows (all: each in turn). Processes run seeds of their own.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import multiprocessing
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

KINDS = {
    "grad_modes": "grad_modes", "arguments": "argument_cases", "broadcasts": "broadcast_cases",
    "mutations": "mutation_cases", "opinfo": "opinfo_cases", "rows": "row_programs",
}  # fmt: skip
BATCH = 100


Job = tuple[str, int, int, float]


def batch(job: Job) -> tuple[Job, Counter[str], list[tuple[str, str]]]:
    """Counts of verdicts, and the failures: what was wrong, and the program."""
    import torch
    from oracle import quiet

    kind, seed, count, until = job
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    quiet()
    counts: Counter[str] = Counter()
    failures = []
    for program in itertools.islice(_programs(kind, seed), count):
        if time.time() > until:
            break
        verdict = program.check()
        counts[verdict.kind] += 1
        counts["rewritten" if verdict.rewritten else "left"] += 1
        if verdict.failed:
            failures.append((f"{verdict.kind}: {verdict.detail}", str(program)))
    return job, counts, failures


def _programs(kind: str, seed: int) -> Iterator[Any]:
    return importlib.import_module(KINDS[kind]).programs(seed)


def main(kind: str = "", argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=[*KINDS, "all"], default=kind or "all")
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no program after so long")
    parser.add_argument("--save", type=Path, help="a folder for the programs that failed")
    options = parser.parse_args(argv)
    start, saved = time.time(), 0
    kinds = list(KINDS) if options.kind == "all" else [options.kind]
    share = -(-options.programs // len(kinds))
    # Kind by kind within a seed, so that a run that ends early has some of each.
    jobs: list[Job] = [
        (k, options.seed + i, min(BATCH, share - at), start + options.seconds)
        for i, at in enumerate(range(0, share, BATCH))
        for k in kinds
    ]
    total: dict[str, Counter[str]] = {k: Counter() for k in kinds}
    # Not concurrent.futures: its max_tasks_per_child deadlocks in Python 3.11. A process is given up after some
    # batches, since Dynamo keeps some of what it compiled.
    with multiprocessing.get_context("spawn").Pool(options.processes, maxtasksperchild=4) as pool:
        for (kind, seed, *_), counts, failures in pool.imap_unordered(batch, jobs):
            if not counts and time.time() > start + options.seconds:
                break  # nor will those that are still to come do anything
            total[kind] += counts
            for what, source in failures:
                saved += 1
                print(f"\n# {kind}, seed {seed}: {what}")
                if options.save:
                    options.save.mkdir(parents=True, exist_ok=True)
                    path = options.save / f"{kind}_{seed}_{saved}.py"
                    path.write_text(f"# {what}\n{source}")
                    print(path)
                else:
                    print(source)
    print()
    for k, counts in total.items():
        print(f"{k}:", ", ".join(f"{v} {n}" for n, v in sorted(counts.items())))
    print(f"{time.time() - start:.0f} s, {saved} failed")
    return saved > 0


if __name__ == "__main__":
    sys.exit(main())
