"""litgpt: its training loops, its model and its chunked loss."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from .measure import BATCH, H, Run, T, V, case

DEFER = "lce_inductor.defer(model.lm_head), before torch.compile(model)"


def config() -> Any:
    from litgpt import Config

    return Config(
        name="tiny", block_size=T, vocab_size=V, padded_vocab_size=V, n_layer=1, n_head=2, n_embd=H, rotary_percentage=1.0,
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


@case("litgpt finetune full", "litgpt lightning", line="lce_inductor.defer(model.lm_head)")
def finetune(run: Run) -> None:
    import lightning as L
    from litgpt import GPT
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.finetune import full

    fabric = L.Fabric(accelerator="cpu", devices=1)
    model = GPT(config())
    run.defer(model.lm_head)
    model = fabric.setup(model)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    run.gradients_at_steps(optimizer)
    run.watch(full, "chunked_cross_entropy")
    optimizer = fabric.setup_optimizers(optimizer)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    counts = {k: torch.ones(1, dtype=torch.long) for k in ("raw", "raw_plus_prompt_template")}
    data = [{"input_ids": r, "labels": r, "token_counts": counts} for r in rows(4 * BATCH, T)]
    loader = fabric.setup_dataloaders(torch.utils.data.DataLoader(data, BATCH))
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "iter_num": 0, "step_count": 0}
    train = TrainArgs(
        save_interval=None, log_interval=1, global_batch_size=BATCH, micro_batch_size=BATCH, epochs=1, max_steps=3,
        lr_warmup_steps=1,
    )  # fmt: skip
    folder = Path(tempfile.mkdtemp())
    run.enter_context(mock.patch.object(full, "Tokenizer"))  # for the text that it generates every 100 steps
    full.fit(fabric, state, loader, loader, 1, None, folder, folder, train, EvalArgs(interval=100, max_iters=1), None)
