"""One of two processes of test_distributed.py: trains a small model in every way that torch.distributed has.

    python distributed_worker.py RANK STORE DEVICE [SCENARIO ...]

Each scenario runs one step on half of a batch and compares loss and gradients with those of one uncompiled process on
the whole batch. Prints a JSON object: scenario -> what the passes did, and the largest relative error.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from corpus.harness import no_codegen_backend
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, loss_parallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import lce_inductor

N, H, V, LAYERS, WORLD = 32, 16, 128, 3, 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(H, 4 * H), nn.Linear(4 * H, H)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class HeadAndLoss(nn.Module):
    def __init__(self, classes: int, reduction: str) -> None:
        super().__init__()
        self.head = nn.Linear(H, classes)
        self.reduction = reduction

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(self.head(x).float(), y, reduction=self.reduction)
        return loss if loss.dim() == 0 else loss.square().sum()


class Model(nn.Module):
    def __init__(self, classes: int = V, reduction: str = "mean") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.tail = HeadAndLoss(classes, reduction)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.tail(x, y)


class Setting:
    """Where this process is, and how it compiles."""

    def __init__(self, rank: int, device: str) -> None:
        self.rank, self.device = rank, torch.device(device, rank) if device == "cuda" else torch.device(device)
        self.mesh: DeviceMesh = init_device_mesh(device, (WORLD,))
        self.graphs = 0
        inner = torch._dynamo.lookup_backend("inductor") if device == "cuda" else no_codegen_backend([])

        def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
            self.graphs += 1
            return inner(gm, inputs)

        self.backend = backend

    def compile(self, fn: Any, **options: Any) -> Any:
        return torch.compile(fn, backend=self.backend, **options)

    def model(self, **options: Any) -> Model:
        return Model(**options).to(self.device)

    def batch(self, classes: int = V) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(1)
        x, y = torch.randn(N, H, generator=g), torch.randint(0, classes, (N,), generator=g)
        if classes != V:
            y[::5] = -100
        return x.to(self.device), y.to(self.device)

    def part(self) -> tuple[Tensor, Tensor]:
        """This rank's rows: as many in each."""
        rows = slice(self.rank * N // WORLD, (self.rank + 1) * N // WORLD)
        x, y = self.batch()
        return x[rows], y[rows]


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def step(run: Callable[..., Tensor], model: nn.Module, args: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Loss and gradients of one step; the second of two, so that what a first step leaves behind would show."""
    for _ in range(2):
        for p in model.parameters():
            p.grad = None
        loss = run(*args)
        loss.backward()
    return [whole(loss.detach()), *(whole(p.grad).float() for p in model.parameters())]


def ddp(s: Setting, buckets: float, inside: bool = False, **options: Any) -> list[Tensor]:
    model = s.model()
    if inside:
        wrapped = run = DistributedDataParallel(s.compile(model), **options)
    else:
        wrapped = DistributedDataParallel(model, bucket_cap_mb=buckets, **options)
        run = s.compile(wrapped)
    # DDPOptimizer wants a first bucket no larger than the others.
    with mock.patch.object(dist, "_DEFAULT_FIRST_BUCKET_BYTES", min(1 << 20, int(buckets * 2**20))):
        return step(run, wrapped, s.part())


def fsdp(s: Setting, per_block: bool, reshard: bool = True, mixed: bool = False) -> list[Tensor]:
    model = s.model()
    if per_block:
        for block in model.blocks:
            block.compile(backend=s.backend)
        model.tail.compile(backend=s.backend)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if mixed else None
    options: dict[str, Any] = {"mesh": s.mesh, "reshard_after_forward": reshard}
    if policy is not None:
        options["mp_policy"] = policy
    for module in [*model.blocks, model.tail]:
        fully_shard(module, **options)
    fully_shard(model, **options)
    return step(model if per_block else s.compile(model), model, s.part())


def tensor_parallel(s: Setting, sharded_loss: bool) -> list[Tensor]:
    """The head split by classes; every rank has the whole batch."""
    if sharded_loss:
        return vocabulary_parallel(s)
    model = s.model()
    parallelize_module(model.tail, s.mesh, {"head": ColwiseParallel(output_layouts=Replicate())})
    return step(s.compile(model), model, s.batch())


def vocabulary_parallel(s: Setting, bf16: bool = False, sequence: bool = False, **options: Any) -> list[Tensor]:
    """The head and its loss split by classes. sequence: the layers before have a part of the rows each."""
    model = s.model(**options)
    layouts = {"input_layouts": Shard(0)} if sequence else {}
    plan = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False, **layouts)
    parallelize_module(model.tail, s.mesh, {"head": plan})
    batch = s.batch(options.get("classes", V))
    run = s.compile(model)
    with loss_parallel(), torch.autocast(s.device.type, torch.bfloat16, enabled=bf16):
        found = step(run, model, (s.part()[0] if sequence else batch[0], batch[1]))
    for gradient in found[1:-2] if sequence else []:
        dist.all_reduce(gradient)
    return found


class VocabularyParallel(torch.autograd.Function):
    """The loss of each row, as Megatron-LM has it: the logits are split by classes."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor, first: int) -> Tensor:
        top = z.max(dim=-1)[0]
        dist.all_reduce(top, op=dist.ReduceOp.MAX)
        z = z - top.unsqueeze(-1)
        outside = (y < first) | (y >= first + z.shape[-1])
        local = y.clone() - first
        local[outside] = 0
        picked = z[torch.arange(len(y), device=y.device), local].clone()
        picked[outside] = 0.0
        dist.all_reduce(picked)
        exps = z.exp()
        total = exps.sum(-1)
        dist.all_reduce(total)
        ctx.save_for_backward(exps / total.unsqueeze(-1), outside, local)
        return total.log() - picked

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        p, outside, local = ctx.saved_tensors
        dz = p.clone()
        dz[torch.arange(len(dz), device=dz.device), local] -= 1.0 - outside.to(dz.dtype)
        return dz * g.unsqueeze(-1), None, None


class Everywhere(torch.autograd.Function):
    """What every rank goes on with: its gradients are added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        g = g.clone()
        dist.all_reduce(g)
        return g


def by_hand(s: Setting) -> list[Tensor]:
    """The same without DTensor: each rank has its classes as plain parameters, and calls torch.distributed itself."""
    model = s.model()
    count = V // WORLD
    here = slice(s.rank * count, (s.rank + 1) * count)
    head = model.tail.head
    head.weight, head.bias = (nn.Parameter(p.detach()[here].clone()) for p in (head.weight, head.bias))

    def fn(x: Tensor, y: Tensor) -> Tensor:
        for block in model.blocks:
            x = block(x)
        return VocabularyParallel.apply(head(Everywhere.apply(x)).float(), y, here.start).mean()

    found = step(s.compile(fn), model, s.batch())
    shards = [DTensor.from_local(t, s.mesh, [Shard(0)]).full_tensor() for t in found[-2:]]
    return [*found[:-2], *shards]


def replicated(s: Setting) -> list[Tensor]:
    """A head whose weight is a DTensor that every rank has as a whole."""
    model = s.model()
    for name in ("weight", "bias"):
        t = DTensor.from_local(getattr(model.tail.head, name).detach(), s.mesh, [Replicate()])
        setattr(model.tail.head, name, nn.Parameter(t))

    def fn(x: Tensor, y: Tensor) -> Tensor:
        for block in model.blocks:
            x = block(x)
        return model.tail(DTensor.from_local(x, s.mesh, [Replicate()]), DTensor.from_local(y, s.mesh, [Replicate()]))

    return step(s.compile(fn), model, s.batch())


# scenario -> how to run it, and whether its gradients are computed in the forward, or recomputed in the backward
SCENARIOS: dict[str, tuple[Callable[[Setting], list[Tensor]], str]] = {
    "ddp": (lambda s: ddp(s, 25), "auto"),
    "ddp, recomputed": (lambda s: ddp(s, 25), "recompute"),
    "ddp split by DDPOptimizer": (lambda s: ddp(s, 0.004), "auto"),
    "ddp split by DDPOptimizer, recomputed": (lambda s: ddp(s, 0.004), "recompute"),
    "ddp static graph": (lambda s: ddp(s, 25, static_graph=True), "auto"),
    "ddp gradients as views": (lambda s: ddp(s, 25, gradient_as_bucket_view=True), "auto"),
    "ddp around a compiled model": (lambda s: ddp(s, 25, inside=True), "auto"),
    "fsdp2 whole model": (lambda s: fsdp(s, per_block=False), "auto"),
    "fsdp2 whole model, recomputed": (lambda s: fsdp(s, per_block=False), "recompute"),
    "fsdp2 whole model, not resharded": (lambda s: fsdp(s, per_block=False, reshard=False), "auto"),
    "fsdp2 whole model, bf16": (lambda s: fsdp(s, per_block=False, mixed=True), "auto"),
    "fsdp2 per block": (lambda s: fsdp(s, per_block=True), "auto"),
    "fsdp2 per block, recomputed": (lambda s: fsdp(s, per_block=True), "recompute"),
    "fsdp2 per block, not resharded": (lambda s: fsdp(s, per_block=True, reshard=False), "auto"),
    "fsdp2 per block, bf16": (lambda s: fsdp(s, per_block=True, mixed=True), "auto"),
    "tensor-parallel head": (lambda s: tensor_parallel(s, sharded_loss=False), "auto"),
    "tensor-parallel head, loss_parallel": (lambda s: tensor_parallel(s, sharded_loss=True), "auto"),
    "loss_parallel, bf16": (lambda s: vocabulary_parallel(s, bf16=True), "auto"),
    "loss_parallel, rows of each rank": (lambda s: vocabulary_parallel(s, sequence=True), "auto"),
    "loss_parallel, uneven": (lambda s: vocabulary_parallel(s, **UNEVEN), "auto"),
    "loss_parallel, uneven, of each row": (lambda s: vocabulary_parallel(s, **UNEVEN_ROWS), "auto"),
    "Megatron's loss": (by_hand, "auto"),
    "replicated DTensor head": (replicated, "auto"),
}
# Of other models than the rest: not as many classes on each rank, ignored labels.
UNEVEN, UNEVEN_ROWS = {"classes": 131, "reduction": "sum"}, {"classes": 131, "reduction": "none"}
OTHER_MODELS = {"loss_parallel, uneven": UNEVEN, "loss_parallel, uneven, of each row": UNEVEN_ROWS}


def measure(s: Setting, name: str) -> dict[str, Any]:
    """What the passes did, and the largest error of a loss or gradient relative to its norm."""
    (run, gradients), options = SCENARIOS[name], OTHER_MODELS.get(name, {})
    model = s.model(**options)
    expected = step(model, model, s.batch(options.get("classes", V)))
    s.graphs = 0
    torch._dynamo.reset()
    counters.clear()
    with lce_inductor.installed(min_logits_bytes=0, gradients=gradients):
        found = run(s)
    counts = Counter(counters["lce_inductor"])
    loss = found[0].clone()
    dist.all_reduce(loss)
    found[0] = loss / WORLD
    errors = [((f - e).norm() / e.norm()).item() for f, e in zip(found, expected, strict=True)]
    return {"counts": dict(counts), "error": max(errors), "graphs": s.graphs}


def main(rank: int, store: str, device: str) -> None:
    warnings.simplefilter("ignore")
    backend = "nccl" if device == "cuda" else "gloo"
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=120)
    )
    setting = Setting(rank, device)
    found: dict[str, Any] = {}
    for name in sys.argv[4:] or SCENARIOS:
        try:
            found[name] = measure(setting, name)
        except Exception:  # the other scenarios go on
            found[name] = {"raised": traceback.format_exc()[-2000:]}
    print("\n" + json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
