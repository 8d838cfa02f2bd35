"""Random programs by the thousand: python tests/many_programs.py --programs 10000 --processes 8

As test_random_programs, without stopping at a failure or shrinking it: each is printed as it stands, ready for
test_programs_that_once_went_wrong. Batches of 500 run in processes of their own, each with the next seed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import logging
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

BATCH = 500


def batch(seed: int, count: int) -> tuple[int, list[str], float]:
    """How many programs ran, those that failed with their errors, and seconds of processor time."""
    import gc

    import torch
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from programs import Program, programs
    from test_programs import check

    import lce_inductor

    torch.set_num_threads(1)
    logging.getLogger("lce_inductor").setLevel(logging.ERROR)
    gc.freeze()
    gc.set_threshold(200_000, 20, 20)  # what a compile leaves is large, and most of it goes without cycles
    ran, failed = 0, []

    @seeded(seed)
    @settings(
        max_examples=count, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(programs())
    def run(p: Program) -> None:
        nonlocal ran
        ran += 1
        torch.manual_seed(0)
        try:
            check(p)
        except Exception as error:
            failed.append(f"{p}\n    {type(error).__name__}: {str(error)[:1000]}")
        finally:
            lce_inductor.uninstall()
            torch._dynamo.reset()

    run()
    return ran, failed, time.process_time()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", type=int, default=10_000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1, help="of the first batch")
    arguments = parser.parse_args()
    os.environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()
    starts = range(0, arguments.programs, BATCH)
    total, wrong, processor = 0, 0, 0.0
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(arguments.processes, context, max_tasks_per_child=1) as pool:
        jobs = [
            pool.submit(batch, arguments.seed + i, min(BATCH, arguments.programs - s)) for i, s in enumerate(starts)
        ]
        for job in concurrent.futures.as_completed(jobs):
            ran, failed, seconds = job.result()
            total, wrong, processor = total + ran, wrong + len(failed), processor + seconds
            print(
                *failed, f"{total} programs, {wrong} failed, {processor:.0f} s of processor time", sep="\n", flush=True
            )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
