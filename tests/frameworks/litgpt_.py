"""litgpt: its training loops, its model and its chunked loss."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from .measure import BATCH, H, Run, T, V, case, recipe

DEFER = "lce_inductor.defer(model.lm_head), before torch.compile(model)"


def config(kind: Any = None, block_size: int = T, **more: Any) -> Any:
    from litgpt import Config

    return (kind or Config)(
        **more, name="tiny", block_size=block_size, vocab_size=V, padded_vocab_size=V, n_layer=1, n_head=2, n_embd=H, rotary_percentage=1.0,
        norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", intermediate_size=2 * H, bias=False,
    )  # fmt: skip


def rows(count: int, length: int) -> Tensor:
    return torch.randint(3, V, (count, length), generator=torch.Generator().manual_seed(1))


def pretrain(run: Run, compile: bool) -> None:
    import lightning as L
    from litgpt import GPT, pretrain
    from litgpt.args import EvalArgs, TrainArgs

    fabric = L.Fabric(accelerator="cpu", devices=1)
    model = GPT(config())
    run.defer(model.lm_head)
    if compile:
        model = torch.compile(model)
    model = fabric.setup(model)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    run.gradients_at_steps(optimizer)
    run.watch(pretrain, "chunked_cross_entropy")
    optimizer = fabric.setup_optimizers(optimizer)
    loader = fabric.setup_dataloaders(torch.utils.data.DataLoader(rows(3 * BATCH, T + 1), BATCH))
    state = {"model": model, "optimizer": optimizer, "train_dataloader": loader, "iter_num": 0, "step_count": 0}
    train = TrainArgs(
        save_interval=None, log_interval=1, global_batch_size=BATCH, micro_batch_size=BATCH, max_tokens=3 * BATCH * T,
        max_norm=1.0, min_lr=0.0, lr_warmup_steps=1,
    )  # fmt: skip
    pretrain.fit(
        fabric, 1, state, loader, loader, Path(tempfile.mkdtemp()), None, train, EvalArgs(interval=100, max_iters=1)
    )


@case("litgpt pretrain", "litgpt lightning", line=DEFER)
def compiled(run: Run) -> None:
    pretrain(run, compile=True)


@case("litgpt pretrain, not compiled", "litgpt lightning", line="lce_inductor.defer(model.lm_head)")
def eager(run: Run) -> None:
    pretrain(run, compile=False)


def finetune(run: Run, script: Any, model: Any, length: int) -> dict[str, Any]:
    """What `fit` of one of its scripts takes, but for the model and what belongs to it."""
    import lightning as L
    from litgpt.args import EvalArgs, TrainArgs

    fabric = L.Fabric(accelerator="cpu", devices=1)
    model = fabric.setup(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-2)
    run.gradients_at_steps(optimizer)
    run.watch(script, "chunked_cross_entropy")
    run.enter_context(mock.patch.object(script, "Tokenizer"))  # for text that it generates
    run.enter_context(mock.patch.object(script, "generate_example"))
    counts = {k: torch.ones(1, dtype=torch.long) for k in ("raw", "raw_plus_prompt_template")}
    data = [{"input_ids": r, "labels": r, "token_counts": counts} for r in rows(4 * BATCH, length)]
    loader = fabric.setup_dataloaders(torch.utils.data.DataLoader(data, BATCH))
    folder = Path(tempfile.mkdtemp())
    train = TrainArgs(
        save_interval=None, log_interval=1, global_batch_size=BATCH, micro_batch_size=BATCH, epochs=1, max_steps=3,
        lr_warmup_steps=1,
    )  # fmt: skip
    return {
        "fabric": fabric, "train_dataloader": loader, "val_dataloader": loader, "devices": 1, "checkpoint_dir": folder,
        "out_dir": folder, "train": train, "eval": EvalArgs(interval=100, max_iters=1), "data": None,
        "model": model, "optimizer": fabric.setup_optimizers(optimizer), "scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer),
    }  # fmt: skip


@case("litgpt finetune full", "litgpt lightning", line="lce_inductor.defer(model.lm_head)")
def full(run: Run) -> None:
    from litgpt import GPT
    from litgpt.finetune import full

    model = GPT(config())
    run.defer(model.lm_head)
    given = finetune(run, full, model, T)
    state = {k: given.pop(k) for k in ("model", "optimizer", "scheduler")}
    full.fit(state=state | {"iter_num": 0, "step_count": 0}, resume=None, **given)


LONG = 256  # its head is called for 128 tokens at a time


@case(
    "litgpt finetune LoRA, head in chunks", "litgpt lightning", line="lce_inductor.defer(model.lm_head.linear)",
    logits=BATCH * 128 * V,
)  # fmt: skip
def lora(run: Run) -> None:
    from litgpt import lora as model_home
    from litgpt.finetune import lora

    torch.manual_seed(0)
    model = model_home.GPT(config(model_home.Config, block_size=LONG, lora_r=2, lora_query=True, lora_value=True))
    model_home.mark_only_lora_as_trainable(model)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)  # else A has no gradient
    run.defer(model.lm_head.linear)
    lora.fit(**finetune(run, lora, model, LONG))


@case("recipe: litgpt", "litgpt lightning", line="see docs/recipes/litgpt.md")
def page(run: Run) -> None:
    recipe(run, "litgpt")
