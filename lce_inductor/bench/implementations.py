"""The implementations that are compared: one small function each, which makes a loss for one reduction.

An implementation runs in a process of its own (measure.py), so it may change global settings. What it imports, it
imports inside its function: a peer that is not installed must not disturb the others.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""x [N, H], weight [V, H], target [N] -> a scalar, or [N] with reduction "none"."""


class NotApplied(RuntimeError):
    """What the row's name says does not happen here, so that its figures would be something else's."""


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute the loss.

    Attributes:
        make: reduction -> loss.
        package: (module, distribution) that has to be installed.
        devices, reductions: those that it can run on and compute.
        exists: is it in this version of torch?
        idle: after the first step, why the compiler pass that it is about did nothing; empty if it did its work.
    """

    name: str
    make: Callable[[str], Loss]
    package: tuple[str, str] | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    reductions: tuple[str, ...] = ("mean", "sum", "none")
    exists: Callable[[], bool] = lambda: True
    idle: Callable[[], str] = lambda: ""

    def obstacle(self, device: str) -> str:
        """Why it cannot run here, or nothing."""
        if self.package is not None and importlib.util.find_spec(self.package[0]) is None:
            return f"{self.package[1]} is not installed"
        if not self.exists():
            return f"not in torch {torch.__version__}"
        if device not in self.devices:
            return f"not for {device}"
        return ""

    def version(self) -> str:
        """Name and version of the package behind it, or nothing."""
        return f"{self.package[1]} {importlib.metadata.version(self.package[1])}" if self.package else ""


IMPLEMENTATIONS: dict[str, Implementation] = {}


def implementation(name: str, **about: object) -> Callable[[Callable[[str], Loss]], Callable[[str], Loss]]:
    """Register a function reduction -> loss; `about` are the fields of Implementation."""

    def add(make: Callable[[str], Loss]) -> Callable[[str], Loss]:
        IMPLEMENTATIONS[name] = Implementation(name, make, **about)  # type: ignore[arg-type]
        return make

    return add


def available(device: str) -> list[str]:
    """Names of what can run on this kind of device, in order of registration."""
    return [name for name, entry in IMPLEMENTATIONS.items() if not entry.obstacle(device)]


@implementation("eager")
def eager(reduction: str) -> Loss:
    def loss(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight).float(), target, reduction=reduction)

    return loss


@implementation("torch.compile")
def torch_compile(reduction: str) -> Loss:
    return torch.compile(eager(reduction))


def _not_rewritten() -> str:
    counters = torch._dynamo.utils.counters["lce_inductor"]
    if counters["rewritten"]:
        return ""
    return f"rewrote nothing ({', '.join(f'{k}: {n}' for k, n in counters.items() if n) or 'no head seen'})"


@implementation("lce_inductor", idle=_not_rewritten)
def lce_inductor(reduction: str) -> Loss:
    """torch.compile of the same function with the passes; small heads too, since the user asked for this size."""
    return _installed(reduction)


@implementation("lce_inductor-memory", idle=_not_rewritten)
def lce_inductor_memory(reduction: str) -> Loss:
    return _installed(reduction, prefer="memory")


def _installed(reduction: str, **settings: str) -> Loss:
    from lce_inductor import install

    install(min_logits_bytes=0, **settings)
    return torch_compile(reduction)


def _has_auto_chunker() -> bool:
    import torch._inductor.config

    return hasattr(torch._inductor.config, "auto_chunker")


def _not_chunked() -> str:
    from torch._inductor import metrics

    return "" if getattr(metrics, "num_auto_chunking", 1) else "chunked nothing"


@implementation("auto_chunker", exists=_has_auto_chunker, idle=_not_chunked)
def auto_chunker(reduction: str) -> Loss:
    """Inductor's own pass. Its threshold on V / H is lowered: the default leaves many of these heads alone."""
    import torch._inductor.config

    settings = torch._inductor.config.auto_chunker
    settings.enable = True
    settings.amplify_ratio_threshold = 2
    return torch_compile(reduction)


@implementation("F.linear_cross_entropy", exists=lambda: hasattr(F, "linear_cross_entropy"))
def torch_function(reduction: str) -> Loss:
    options = torch.nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined,unused-ignore]  # without options it is eager
    function = F.linear_cross_entropy  # type: ignore[attr-defined,unused-ignore]
    return lambda x, weight, target: function(x, weight, target, reduction=reduction, options=options)


def _liger(reduction: str, **settings: object) -> Loss:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda x, weight, target: liger_fused_linear_cross_entropy(
        x, weight, target, reduction=reduction, **settings
    )


@implementation("liger", package=("liger_kernel", "liger-kernel"), devices=("cuda",))
def liger(reduction: str) -> Loss:
    return _liger(reduction)


@implementation("liger-c16", package=("liger_kernel", "liger-kernel"), devices=("cuda",))
def liger_c16(reduction: str) -> Loss:
    """Liger with dW summed in fp32 and 16 times its usual chunk: more memory, fewer and larger products."""
    return _liger(reduction, accum_dtype=torch.float32, chunk_mem_const=16)


def _cut(reduction: str, impl: str) -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    return lambda x, weight, target: linear_cross_entropy(x, weight, target, reduction=reduction, impl=impl)


@implementation("cce", package=("cut_cross_entropy", "cut-cross-entropy"), devices=("cuda",))
def cce(reduction: str) -> Loss:
    """Leaves small probabilities out of the gradients."""
    return _cut(reduction, "cce")


@implementation("cce-exact", package=("cut_cross_entropy", "cut-cross-entropy"), devices=("cuda",))
def cce_exact(reduction: str) -> Loss:
    return _cut(reduction, "cce_exact")


@implementation("trl-chunked", package=("trl", "trl"), devices=("cuda",))
def trl_chunked(reduction: str) -> Loss:
    """What SFTTrainer computes its loss by (trl 1.16: loss_type "nll"), without the metrics it asks for as well."""
    from trl.kernels import ChunkedLogProbFunction

    def loss(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        # As trl.trainer.utils.add_fused_lm_head: on a GPU only the rows that count are multiplied.
        counts = target != -100
        arguments = (x[counts], weight, None, target[counts], 1.0, 32768, None, 1.0, ("log_probs",))
        logprobs: Tensor = ChunkedLogProbFunction.apply(*arguments)[0]  # type: ignore[no-untyped-call]
        rows: Tensor = -logprobs.new_zeros(counts.shape).masked_scatter(counts, logprobs)
        if reduction == "none":
            return rows
        return rows.sum() / counts.sum().clamp(min=1) if reduction == "mean" else rows.sum()

    return loss


@implementation("quack", package=("quack", "quack-kernels"), devices=("cuda",), reductions=("mean", "sum"))
def quack(reduction: str) -> Loss:
    # quack (seen in 0.6.5) hashes what its epilogues refer to and has no rule for loggers.
    if not hasattr(logging.Logger, "__quack_semantic_key__"):
        logging.Logger.__quack_semantic_key__ = lambda self: self.name  # type: ignore[attr-defined]
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda x, weight, target: chunked_linear_cross_entropy(x, weight, target, reduction=reduction)
