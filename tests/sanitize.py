"""Every kernel of the package once, on small sizes: compute-sanitizer --tool memcheck python tests/sanitize.py

Seconds. Reads and writes out of bounds are what it is for, so sizes are odd and tails are ragged; the numbers are
checked elsewhere. The other tools of compute-sanitizer (racecheck, initcheck, synccheck) run it, too.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import counting_cases
import rows_cases
from rows_cases import ALL, ALWAYS_OURS, GRADS, Case, Planned

from lce_inductor.lower.device_policy import ANCHORED, ANCHORED_TRITON, KNOWN, POLICIES
from lce_inductor.lower.plan import capabilities
from lce_inductor.spec.statistics import LSE, SUM, TARGET, RowGrads

ROWS = [
    *(Case(N=13, H=33, V=V, K=2, bias=True, class_weight=True, grads=GRADS, dtype=d, chunk_tokens=5)
      for d in rows_cases.DTYPES for V in (1, 65, 1025)),
    Case(N=5, H=16, V=50257, dtype=torch.bfloat16),
    Case(N=13, H=33, V=1025, strided=True, dtype=torch.bfloat16, epilogue=rows_cases.SOFTCAP),
    Case(N=0),
]  # fmt: skip
# What the product leaves, where nothing else needs a pass over the logits.
PLAIN = [
    Case(N=N, H=H, V=V, dtype=d, grads=("lse", "target"), chunk_tokens=chunk)
    for N, H, V, chunk in ((37, 72, 203, 32), (300, 200, 1025, 257))
    for d in (torch.bfloat16, torch.float16)
]
ANCHORED_CASES = [
    Case(N=N, H=H, V=V, K=K, bias=bias, dtype=torch.bfloat16, grads=grads, chunk_tokens=chunk, scale=scale)
    # With two classes each has more rows than one warp of lce_collect takes; H is more than it takes at a time.
    for N, H, V, chunk in ((37, 72, 203, 32), (130, 128, 517, 100), (130, 264, 2, 100))
    for K, grads in ((1, ("lse", "target", "sum")), (0, ("lse",)))
    for bias in (False, True)
    for scale in (3.0, 200.0)  # at 200 rows saturate and are computed again
]

KNOWN_CASES = [
    Case(N=N, H=H, V=V, K=K, bias=bias, class_weight=bias, dtype=torch.bfloat16, grads=grads)
    for N, H, V in ((37, 72, 203), (300, 200, 1025), (1, 8, 65))
    for K, grads in ((1, ("lse", "target", "sum")), (1, ("lse", "target")), (0, ("lse",)))
    for bias in (False, True)
]


def run(case: Case, stats: int, planned: Planned) -> None:
    a, grads = rows_cases.make(case, "cuda")
    mask = (True, True, case.bias)
    found = planned.forward(a, stats)
    planned.with_grad(a, stats, grads, mask)
    plain = RowGrads(grads.lse, None, grads.target, grads.sum, grads.neg_entropy)
    planned.backward(a, found.lse, found.neg_entropy if stats == ALL else None, plain, mask)
    torch.cuda.synchronize()


def main() -> None:
    device = capabilities(torch.device("cuda", torch.cuda.current_device()))
    for case in ROWS:
        run(case, ALL, Planned(device=device))
    for case in rows_cases.IN_BLOCKS:
        run(case, ALL, Planned(device=device, classes=64))
    ran = [f"row kernel: {len(ROWS)} cases, in blocks of classes: {len(rows_cases.IN_BLOCKS)}"]
    if device.capability in POLICIES["cuda"].anchored.capabilities:
        for case in PLAIN:
            run(case, LSE | TARGET, Planned(device=device, policy=ALWAYS_OURS))
        ran.append(f"products of the row kernel on sm_90: {len(PLAIN)} cases")
        for algorithm in (ANCHORED, ANCHORED_TRITON) if device.hopper else (ANCHORED_TRITON,):
            for case in ANCHORED_CASES:
                run(case, LSE | TARGET | SUM, Planned(algorithm, device, ALWAYS_OURS))
            ran.append(f"{algorithm}: {len(ANCHORED_CASES)} cases")
        counts = counting_cases.COUNTS if device.hopper else []
        for count in counts:
            counting_cases.check(Planned(ANCHORED, device, ALWAYS_OURS), counting_cases.SMALL, count, "cuda", 1.25)
        ran.append(f"rows that count, packed: {len(counts)} cases")
        known = KNOWN_CASES if device.hopper else []
        for case in known:
            a, grads = rows_cases.make(case, "cuda")
            lse = torch.full((case.N,), 5.0, dtype=torch.float64, device="cuda")
            for classes in (64, 200, 1024):
                Planned(KNOWN, device, classes=classes).backward(a, lse, None, grads, (True, True, case.bias))
        torch.cuda.synchronize()
        ran.append(f"{KNOWN}: {len(known)} cases")
    print("\n".join(ran))


if __name__ == "__main__":
    main()
