"""A head split by classes over several devices, beside one of them alone: time, memory and error of a step.

    torchrun --nproc-per-node 2 -m lce_inductor.bench.ranks --shape 16384x2048x131072 --shape 8192x4096x128256

Each process has a device (NCCL on GPUs, gloo on a CPU) and all rows. `split` is torch's own tensor parallelism:
`ColwiseParallel` for the head and `loss_parallel()` for the loss. `alone` has the whole head on each device, without
parallelism, at the same time. A step is the loss of `x [N, H]`, `weight [V, H]`, `target [N]`, in fp32 of logits in
--dtype, and both gradients. Steps are timed in an order drawn anew for each of --reps rounds, all processes at once.

| column | meaning |
|---|---|
| ms | median of the steps, each as long as the slowest process took |
| added | most memory that a step adds to the inputs in one process, gradients included |
| loss, dX, dW | relative error (2-norm) as in lce_inductor.bench, the largest of the processes; dW of its classes |
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import random
import statistics
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, loss_parallel, parallelize_module

from .. import installed
from .arguments import converter, positive_integer
from .measure import current_device, finish, peak_added, timed_ms
from .reference import DTYPES, ERROR_LIMITS, Inputs, make_inputs, reference, relative_error
from .shapes import Shape, parse_shape
from .table import hardware, print_columns

GIB = 1 << 30
HEADINGS = ("", "ms", "added GiB", "loss", "dX", "dW", "")
SETTINGS: dict[str, dict[str, Any] | None] = {
    "torch.compile": None,
    "lce_inductor": {},
    "lce_inductor-memory": {"prefer": "memory"},
}


@dataclasses.dataclass
class Way:
    """`step` returns a step's loss and leaves gradients in x and weight; `clear` drops them. note: what a pass said."""

    name: str
    step: Callable[[], Tensor]
    clear: Callable[[], None]
    weight: Tensor
    note: str = ""
    added: int = 0
    errors: list[float] = dataclasses.field(default_factory=list)
    times: list[float] = dataclasses.field(default_factory=list)


def whole(t: Tensor) -> Tensor:
    found: Tensor = t.full_tensor() if isinstance(t, DTensor) else t
    return found


def own(t: Tensor) -> Tensor:
    """This process's part."""
    found: Tensor = t.to_local() if isinstance(t, DTensor) else t
    return found


def make_way(impl: str, inputs: Inputs, mesh: DeviceMesh | None) -> Way:
    """Compiled, and its first step done: what was installed is not needed any more."""
    head = nn.Linear(1, 1, bias=False, device=inputs.x.device)
    head.weight = nn.Parameter(inputs.weight.detach())
    if mesh is not None:
        parallelize_module(head, mesh, ColwiseParallel(output_layouts=Shard(-1), use_local_output=False))
    name = f"{'alone' if mesh is None else 'split'}, {impl}"

    def loss(x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(head(x).float(), target)

    # Compiled code is found by the code that it was compiled from, so that each way needs code of its own.
    code = loss.__code__.replace(co_name=name)
    run = torch.compile(types.FunctionType(code, loss.__globals__, name, None, loss.__closure__), dynamic=False)

    def step() -> Tensor:
        with loss_parallel() if mesh is not None else contextlib.nullcontext():
            value: Tensor = run(inputs.x, inputs.target)
            value.backward()
        return value.detach()

    def clear() -> None:
        inputs.x.grad = head.weight.grad = None

    way, settings = Way(name, step, clear, head.weight), SETTINGS[impl]
    counters = torch._dynamo.utils.counters["lce_inductor"]
    counters.clear()
    with installed(min_logits_bytes=0, **settings) if settings is not None else contextlib.nullcontext():
        clear()
        step()
    if settings is not None and not counters["rewritten"]:
        way.note = f"left alone ({', '.join(k for k, n in counters.items() if n) or 'no head seen'})"
    return way


def measure(shape: Shape, impls: Sequence[str], dtype: str, device: torch.device, reps: int) -> list[list[str]]:
    """Lines of the table, in the order of HEADINGS."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    inputs = make_inputs(shape, DTYPES[dtype], device, "mean", peaked=False)
    mesh = init_device_mesh(device.type, (ranks,))
    ways = [make_way(impl, inputs, m) for m in (None, mesh) for impl in impls]
    loss, dx, dw = reference(inputs, "mean", gradients=True)
    for way in ways:
        way.clear()
        value = whole(way.step())
        assert inputs.x.grad is not None and way.weight.grad is not None
        part = dw.chunk(ranks)[rank] if isinstance(way.weight, DTensor) else dw
        pairs = ((value, loss), (whole(inputs.x.grad), dx), (own(way.weight.grad), part))
        way.errors = [relative_error(*pair) for pair in pairs]
    del loss, dx, dw
    for way in ways:
        for other in ways:
            other.clear()
        way.added = peak_added(way.step, way.clear, device)
        way.clear()
    order = random.Random(0)
    turns = list(ways)
    for _ in range(reps):
        order.shuffle(turns)
        for way in turns:
            way.clear()
            finish(device)
            dist.barrier()
            way.times.append(timed_ms(way.step, device))
            way.clear()
    return [_line(way, dtype, device) for way in ways]


def _line(way: Way, dtype: str, device: torch.device) -> list[str]:
    figures = torch.tensor([*way.times, way.added / GIB, *way.errors], dtype=torch.float64, device=device)
    figures.nan_to_num_(nan=torch.inf)  # a maximum may lose a NaN
    dist.all_reduce(figures, op=dist.ReduceOp.MAX)
    *times, added, loss, dx, dw = figures.tolist()
    errors = [f"{e:.1e}" for e in (loss, dx, dw)]
    if not all(e <= ERROR_LIMITS[dtype] for e in (loss, dx, dw)):
        return [way.name, "", "", *errors, "WRONG"]
    return [way.name, f"{statistics.median(times):.2f}", f"{added:.2f}", *errors, way.note]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node 2 -m lce_inductor.bench.ranks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--shape", type=converter(parse_shape), action="append", required=True, metavar="NxHxV", help="may be repeated")
    add("--impl", default="torch.compile,lce_inductor", metavar="A,B,...", help=f"of {', '.join(SETTINGS)}")
    add("--dtype", choices=DTYPES, default="bfloat16", help="(default: bfloat16)")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--reps", type=converter(positive_integer), default=9, metavar="INT", help="steps timed (default: 9)")
    return parser


def main(argv: Sequence[str]) -> int:
    """Measure what the arguments ask for; 1 if a result was wrong, 2 for bad arguments."""
    parser = _parser()
    args = parser.parse_args(argv)
    impls = list(dict.fromkeys(args.impl.split(",")))
    if unknown := [impl for impl in impls if impl not in SETTINGS]:
        parser.error(f"--impl {unknown[0]}: must be of {', '.join(SETTINGS)}")
    if "LOCAL_RANK" not in os.environ:
        parser.error("start it by torchrun, which says which process is which")
    device = current_device("cpu" if args.device == "cpu" else f"cuda:{os.environ['LOCAL_RANK']}")
    backend, own_gpu = ("gloo", None) if device.type == "cpu" else ("nccl", device)
    dist.init_process_group(backend, device_id=own_gpu)
    wrong = False
    for shape in args.shape:
        lines = measure(shape, impls, args.dtype, device, args.reps)
        wrong = wrong or any(line[-1] == "WRONG" for line in lines)
        if dist.get_rank() == 0:
            title = f"N={shape.N} H={shape.H} V={shape.V}, {args.dtype}, {dist.get_world_size()} processes, "
            print_columns(title + f"{hardware(str(device))}, torch {torch.__version__}", [HEADINGS, *lines])
    dist.destroy_process_group()
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
