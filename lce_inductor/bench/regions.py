"""Losses that no fused cross-entropy covers: torch.compile alone, and the same with the head as a row region.

    python -m lce_inductor.bench.regions --shapes 8192x2048x131072,16384x1024x50304
    python -m lce_inductor.bench.regions --shapes 2048x512x32768 --programs "CE + z^2" --dtype float32 --compile-cpu

A step is the loss and all its gradients. Each program is first checked, on a small shape against fp64 and on each shape
against torch.compile alone; then the implementations are timed in shuffled order, step by step.

| column | meaning |
|---|---|
| ms | median of --reps steps |
| added | most memory that a step adds to the inputs at any time, gradients included |
| first | seconds of the first step, compilation included |
| off | largest difference of a gradient from torch.compile's (2-norm, relative) |

`region, rows fixed` has code for one number of rows; `region` has one code for all, which serves the last chunk too.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass

from ..config import Config, make_config
from ..graph.write import sort
from ..lower import region_compiled as compiled
from ..ops import row_region as _op  # noqa: F401  (defines the op; so does the next)
from ..ops import schema as _ops  # noqa: F401
from ..regions.region import find
from ..regions.write import write
from .arguments import converter, device_name, kind, positive_integer, present
from .implementations import NotApplied
from .measure import current_device, peak_added, timed_ms
from .reference import DTYPES, ERROR_LIMITS, relative_error
from .shapes import Shape, parse_shape

EAGER, ALONE, REGION, FIXED = "eager", "torch.compile", "region", "region, rows fixed"
_SMALL = Shape(192, 64, 1537)
# A gradient's error may be so many times that of torch.compile alone.
_WORSE = 1.25


@dataclasses.dataclass
class Head:
    """What programs read: x [N, H], weight [V, H], a second head, factors of rank 16, targets, numbers for each row."""

    x: Tensor
    weight: Tensor
    x2: Tensor
    weight2: Tensor
    a: Tensor
    b: Tensor
    target: Tensor
    tau: Tensor
    old: Tensor
    advantage: Tensor

    def to(self, dtype: torch.dtype) -> Head:
        return Head(*(t.to(dtype) if t.is_floating_point() else t for t in self.all()))

    def all(self) -> list[Tensor]:
        return [getattr(self, f.name) for f in dataclasses.fields(self)]


Step = Callable[[], list[Tensor]]


def make_head(shape: Shape, dtype: torch.dtype, device: torch.device) -> Head:
    g = torch.Generator(device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*size, device=device, generator=g) * scale).to(dtype)

    N, H, V = shape.N, shape.H, shape.V
    return Head(
        x=normal(N, H), weight=normal(V, H, scale=H**-0.5), x2=normal(N, H), weight2=normal(V, H, scale=H**-0.5),
        a=normal(16, H, scale=H**-0.5), b=normal(V, 16, scale=0.25),
        target=torch.randint(V, (N,), device=device, generator=g),
        tau=torch.rand(N, device=device, generator=g) + 0.5, old=normal(N, dtype=torch.float32).abs().neg() - 8,
        advantage=normal(N, dtype=torch.float32),
    )  # fmt: skip


def _wide(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def _z_loss(h: Head) -> Tensor:
    z = _wide(h.x @ h.weight.t())
    return F.cross_entropy(z, h.target) + 1e-4 * z.square().mean()


def _temperature(h: Head) -> Tensor:
    return F.cross_entropy(_wide(h.x @ h.weight.t()) / h.tau[:, None], h.target)


def _cosface(h: Head) -> Tensor:
    cosine = torch.tanh(_wide(h.x @ h.weight.t()))
    margin = torch.zeros_like(cosine).scatter(1, h.target[:, None], 0.35)
    return F.cross_entropy(8 * (cosine - margin), h.target)


def _kl(h: Head) -> Tensor:
    student = _wide(h.x @ h.weight.t()).log_softmax(-1)
    teacher = _wide(h.x2 @ h.weight2.t()).log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum(-1).mean()


def _lora(h: Head) -> Tensor:
    return F.cross_entropy(_wide(h.x @ h.weight.t() + 2 * ((h.x @ h.a.t()) @ h.b.t())), h.target)


def _grpo(h: Head) -> Tensor:
    z = _wide(h.x @ h.weight.t()) / h.tau[:, None]
    logp = z.log_softmax(-1).gather(-1, h.target[:, None])[:, 0]
    ratio = (logp - h.old).exp()
    gain = torch.min(ratio * h.advantage, ratio.clamp(0.8, 1.2) * h.advantage)
    apart = (h.old - logp).exp() - (h.old - logp) - 1
    return -(gain - 0.04 * apart).mean()


# The loss, and which of the head's tensors are trained.
PROGRAMS: dict[str, tuple[Callable[[Head], Tensor], tuple[str, ...]]] = {
    "CE + z^2": (_z_loss, ("x", "weight")),
    "temperature per row": (_temperature, ("x", "weight")),
    "CosFace": (_cosface, ("x", "weight")),
    "KL of two heads": (_kl, ("x", "weight")),
    "LoRA head": (_lora, ("x", "a", "b")),
    "GRPO": (_grpo, ("x", "weight")),
}


class RegionPass(CustomGraphPass):
    """Every region of a joint graph as a row_region."""

    def __init__(self, config: Config) -> None:
        self.config, self.made, self.problems = config, 0, [""]

    def __call__(self, graph: torch.fx.Graph) -> None:
        found = find(graph)
        self.problems = [f"{p.code}: {p.why}" for p in found.problems.values()]
        for region in found.regions:
            write(graph, found.labels, region, self.config)
        if found.regions:
            sort(graph)
            graph.eliminate_dead_code()
        self.made += len(found.regions)

    def uuid(self) -> str:
        return f"bench regions {self.config.key()}"


def make_step(name: str, impl: str, head: Head, config: Config) -> tuple[Step, Callable[[], None]]:
    """A step that returns the loss and the gradients, and what drops them."""
    loss, trained = PROGRAMS[name]
    leaves = [getattr(head, t).detach().requires_grad_() for t in trained]
    mine = dataclasses.replace(head, **dict(zip(trained, leaves)))
    others = mine.all()

    def flat(*tensors: Tensor) -> Tensor:
        return loss(Head(*tensors))

    done, run = RegionPass(config), flat
    if impl == ALONE:
        run = torch.compile(flat, dynamic=False)
    elif impl != EAGER:
        options: Any = {"joint_custom_pre_pass": done}
        run = torch.compile(flat, dynamic=False, options=options)

    def clear() -> None:
        for t in leaves:
            t.grad = None

    def step() -> list[Tensor]:
        clear()
        with _rows_fixed() if impl == FIXED else contextlib.nullcontext():
            value = run(*others)
            value.backward()
        if impl not in (EAGER, ALONE) and not done.made:
            raise NotApplied(f"{name}: no region was made: {', '.join(done.problems)}")
        return [value.detach(), *(t.grad for t in leaves if t.grad is not None)]

    return step, clear


@contextlib.contextmanager
def _rows_fixed() -> Iterator[None]:
    compiled.ANY_ROWS = False
    try:
        yield
    finally:
        compiled.ANY_ROWS = True


def small_errors(name: str, dtype: torch.dtype, device: torch.device, impls: Sequence[str]) -> dict[str, list[float]]:
    """Errors of loss and gradients on a small shape against fp64, in chunks of 80 rows."""
    head = make_head(_SMALL, dtype, device)
    config = make_config({"min_logits_bytes": 0, "chunk_tokens": 80})
    exact = make_step(name, EAGER, head.to(torch.float64), config)[0]()
    found = {}
    for impl in impls:
        _forget()
        found[impl] = [relative_error(a, b) for a, b in zip(make_step(name, impl, head, config)[0](), exact)]
    return found


def _forget() -> None:
    torch._dynamo.reset()
    compiled.clear()
    gc.collect()


def measure(
    name: str, shape: Shape, dtype: torch.dtype, device: torch.device, impls: Sequence[str], args: argparse.Namespace
) -> bool:
    """Print a line for each implementation; False where a result is wrong."""
    head = make_head(shape, dtype, device)
    config = make_config({"min_logits_bytes": 0, "chunk_tokens": args.chunk_tokens})
    steps: dict[str, Callable[[], object]] = {}
    text: dict[str, list[str]] = {impl: [] for impl in impls}
    right, theirs = True, None
    for impl in impls:
        _forget()
        step, clear = make_step(name, impl, head, config)
        try:
            start = time.perf_counter()
            found = step()
            seconds = time.perf_counter() - start
            added = peak_added(step, clear, device)
        except torch.OutOfMemoryError:
            print(f"{shape!s:20} {name:20} {impl:20} out of memory", flush=True)
            continue
        if impl == ALONE:
            theirs = [t.cpu() for t in found]
            off = 0.0
        else:
            off = max(relative_error(a.cpu(), b) for a, b in zip(found, theirs)) if theirs is not None else float("nan")
            right &= theirs is None or off <= ERROR_LIMITS[args.dtype]
        del found
        clear()
        text[impl] = [f"added {added / 2**30:6.2f} GiB  first {seconds:5.1f} s  off {off:.1e}"]
        steps[impl] = _freeing(step, clear)
    times: dict[str, list[float]] = {impl: [] for impl in steps}
    order = list(steps)
    for _ in range(args.reps):
        random.shuffle(order)
        for impl in order:
            times[impl].append(timed_ms(steps[impl], device))
    for impl in steps:
        print(f"{shape!s:20} {name:20} {impl:20} {statistics.median(times[impl]):8.2f} ms  {text[impl][0]}", flush=True)
    return right


def _freeing(step: Callable[[], Any], clear: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        step()
        clear()

    return run


def main(argv: Sequence[str]) -> int:
    """1 where something was wrong, 2 for bad arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m lce_inductor.bench.regions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shapes = converter(lambda text: [parse_shape(part) for part in text.split(",")])
    parser.add_argument("--shapes", type=shapes, metavar="NxHxV,...", help="(default: 2048x512x32768 on a CPU)")
    parser.add_argument("--programs", metavar="A,B,...", help=f"of {', '.join(PROGRAMS)} (default: all)")
    parser.add_argument("--dtype", choices=DTYPES, help="(default: cpu float32, cuda bfloat16)")
    parser.add_argument("--device", type=converter(device_name), default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--reps", type=converter(positive_integer), default=9, metavar="INT")
    parser.add_argument("--chunk-tokens", type=converter(positive_integer), metavar="INT", help="(default: the plan's)")
    parser.add_argument("--without-fixed", action="store_true", help=f"leave out {FIXED!r}")
    parser.add_argument("--compile-cpu", action="store_true", help="compile programs on a CPU as well")
    args = parser.parse_args(argv)
    device = current_device(present(parser, args.device))
    on_cuda = kind(str(device)) == "cuda"
    args.dtype = args.dtype or ("bfloat16" if on_cuda else "float32")
    dtype = DTYPES[args.dtype]
    if args.compile_cpu:
        compiled.DEVICES.add("cpu")
    names = args.programs.split(",") if args.programs else list(PROGRAMS)
    for name in names:
        if name not in PROGRAMS:
            parser.error(f"--programs {name}: must be of {', '.join(PROGRAMS)}")
    given = args.shapes or [parse_shape("8192x2048x131072" if on_cuda else "2048x512x32768")]
    has_code = device.type in compiled.DEVICES
    impls = [ALONE, REGION] + ([FIXED] if has_code and not args.without_fixed else [])
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if on_cuda else 'cpu'}, {args.dtype}", flush=True)
    with tempfile.TemporaryDirectory(prefix="lce_bench_") as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # else a region may come from an earlier run
        return 0 if _measure_all(names, given, impls, dtype, device, args) else 1


def _measure_all(
    names: Sequence[str], shapes: Sequence[Shape], impls: Sequence[str], dtype: torch.dtype, device: torch.device,
    args: argparse.Namespace,
) -> bool:  # fmt: skip
    right = True
    for name in names:
        errors = small_errors(name, dtype, device, impls)
        for impl in impls[1:]:
            worst = max(e / max(t, 1e-7) for e, t in zip(errors[impl], errors[ALONE]))
            ok = worst <= _WORSE or max(errors[impl]) <= 1e-5
            right &= ok
            shown = " ".join(f"{e:.1e}" for e in errors[impl])
            print(f"{_SMALL!s:20} {name:20} {impl:20} errors {shown}, {worst:.2f} times alone{'' if ok else '  WRONG'}")
    for shape, name in ((s, n) for s in shapes for n in names):
        ok = measure(name, shape, dtype, device, impls, args)
        right &= ok
        if not ok:
            print(f"{shape!s:20} {name:20} WRONG: gradients differ from torch.compile's", flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return right


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
