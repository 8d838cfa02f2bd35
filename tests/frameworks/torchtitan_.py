"""torchtitan: its Llama, its compilation of blocks and of the loss."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from .measure import Run, case

BATCH, T, V = 4, 128, 2048
LOGITS = BATCH * T * V
POSITIONS = torch.arange(T).expand(BATCH, T)


def model(run: Run) -> Any:
    """The debug model that torchtitan ships, with one layer. On a CPU flex attention has no backward: torch's own."""
    from torchtitan.models.common.attention import FlexAttention
    from torchtitan.models.llama3 import llama3_configs

    def attention(self: Any, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    run.enter_context(mock.patch.object(FlexAttention, "forward", attention))
    torch.manual_seed(0)
    config = llama3_configs["debugmodel"](attn_backend="flex")
    made = dataclasses.replace(config, layers=config.layers[:1]).build()
    made.init_states()
    return made


def batches() -> list[Any]:
    g = torch.Generator().manual_seed(1)
    return list(torch.randint(0, V, (3, 2, BATCH, T), generator=g))


def train(run: Run, loss: Any, compile_config: Any) -> None:
    from torchtitan.distributed import ParallelDims
    from torchtitan.distributed.compile import apply_compile

    made = model(run)
    run.defer(made.lm_head)
    if compile_config.enable:
        dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, world_size=1)
        apply_compile(made, compile_config=compile_config, parallel_dims=dims)
    loss_fn = loss.build(compile_config=compile_config)
    if hasattr(loss_fn, "set_lm_head"):
        loss_fn.set_lm_head(made.lm_head)
        made._skip_lm_head = True
    for tokens, labels in batches():
        value, _ = loss_fn(made(tokens, POSITIONS), labels, torch.tensor(BATCH * T))
        run.step(value, made)


DEFER = "lce_inductor.defer(model.lm_head)"


@case("torchtitan Llama, apply_compile, CrossEntropyLoss", "torchtitan", line=DEFER, logits=LOGITS)
def compiled(run: Run) -> None:
    from torchtitan.components.loss import CrossEntropyLoss
    from torchtitan.config import CompileConfig

    train(run, CrossEntropyLoss.Config(), CompileConfig(enable=True))


@case("torchtitan Llama, no compile", "torchtitan", line=DEFER, logits=LOGITS)
def eager(run: Run) -> None:
    from torchtitan.components.loss import CrossEntropyLoss
    from torchtitan.config import CompileConfig

    train(run, CrossEntropyLoss.Config(), CompileConfig(enable=False))


@case("torchtitan Llama, apply_compile, ChunkedLossWrapper", "torchtitan", line=DEFER, logits=LOGITS)
def chunked(run: Run) -> None:
    from torchtitan.components.loss import ChunkedLossWrapper
    from torchtitan.config import CompileConfig

    train(run, ChunkedLossWrapper.Config(), CompileConfig(enable=True))


@case("torchtitan compute_logprobs", "torchtitan", line=DEFER + "; torch.compile(compute_logprobs)", logits=LOGITS)
def logprobs(run: Run) -> None:
    from torchtitan.components.loss import compute_logprobs

    compute_logprobs = torch.compile(compute_logprobs)
    made = model(run)
    run.defer(made.lm_head)
    for tokens, labels in batches():
        logprobs, entropy = compute_logprobs(made(tokens, POSITIONS), labels, return_entropy=True)
        run.step(-logprobs.mean(), made)
        run.loss(entropy.mean())
