"""A step of torchtitan's own Llama: its model, its compilation of blocks and of the loss, its loss, on one device.

The head is not compiled there, so that its logits are found only after `lce_inductor.defer(model.lm_head)`. Parameters
are bf16 (torchtitan's `training.dtype`), without FSDP, which one device has no use for.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


def _causal(self: Any, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
    """torch's attention in place of torchtitan's: q [B, T, heads, size], k and v of as many heads or fewer."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def _stand_in() -> None:
    """For what torchtitan 0.3 asks of torch 2.13 and older versions lack, before it is imported.

    A name for several devices, and an option for masks whose default is what those versions do.
    """
    import torch.distributed.fsdp as fsdp
    import torch.nn.attention.flex_attention as flex

    if not hasattr(fsdp, "DataParallelMeshDims"):
        fsdp.DataParallelMeshDims = object  # type: ignore[attr-defined,assignment,misc,unused-ignore]
    make = flex.create_block_mask
    if "separate_full_blocks" not in inspect.signature(make).parameters:

        def create_block_mask(*args: Any, separate_full_blocks: bool = True, **kwargs: Any) -> Any:
            assert separate_full_blocks
            return make(*args, **kwargs)

        flex.create_block_mask = create_block_mask


def build(sizes: dict[str, Any], device: torch.device, causal: bool) -> Any:
    """The model of `sizes`: a flavor that torchtitan ships, `layers` of it if that is there.

    causal: with torch's causal attention. Else with torchtitan's, which is flex attention and has no backward on a CPU.
    """
    _stand_in()
    from torchtitan.models.common.attention import FlexAttention
    from torchtitan.models.llama3 import llama3_configs
    from torchtitan.tools.utils import set_default_dtype

    if causal:
        FlexAttention.forward = _causal
    config = llama3_configs[sizes["flavor"]](attn_backend="flex")
    if "layers" in sizes:
        config = dataclasses.replace(config, layers=config.layers[: sizes["layers"]])
    with torch.device("meta"), set_default_dtype(torch.bfloat16):
        model = config.build()
    if device.type != "meta":
        model.to_empty(device=device)
        torch.manual_seed(0)
        with torch.no_grad():
            model.init_states(buffer_device=None)
    return model.train()


def prepare(
    model: Any, compiled: bool, chunked: bool, masks: bool
) -> tuple[Callable[[Tensor, Tensor], tuple[Any, ...]], Callable[..., Tensor]]:
    """Compile the model as torchtitan does. chunked: the loss that it trains its Llama by, else the plain one.
    masks: with those of its attention.

    Returns:
        What makes a step's batch of tokens and labels [B, T], and the loss of such a batch.
    """
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
    from torchtitan.config import CompileConfig
    from torchtitan.distributed import ParallelDims
    from torchtitan.distributed.compile import apply_compile

    settings = CompileConfig(enable=compiled)
    if compiled:
        one = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, world_size=1)
        apply_compile(model, compile_config=settings, parallel_dims=one)
    loss_fn = (ChunkedLossWrapper if chunked else CrossEntropyLoss).Config().build(compile_config=settings)
    if chunked:
        loss_fn.set_lm_head(model.lm_head)
        model._skip_lm_head = True

    def batch(tokens: Tensor, labels: Tensor) -> tuple[Any, ...]:
        # Its data loader moves the labels, and its trainer counts them and makes the mask, before a step.
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        mask = model.get_attention_masks(positions=positions) if masks else None
        return tokens, positions, mask, labels, (labels != IGNORED).sum()

    def loss(tokens: Tensor, positions: Tensor, mask: Any, labels: Tensor, count: Tensor) -> Tensor:
        found: Tensor = loss_fn(model(tokens, positions, attention_masks=mask), labels, count)[0]
        return found

    return batch, loss
