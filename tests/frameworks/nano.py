"""nanoGPT and nanochat: their models, compiled as their training scripts do it. They are repositories, not packages."""

from __future__ import annotations

import sys
from typing import Any

import torch

from .measure import BATCH, H, Run, T, V, case, source_folder


def batches() -> list[Any]:
    g = torch.Generator().manual_seed(1)
    return list(torch.randint(0, V, (3, 2, BATCH, T), generator=g))


@case("nanoGPT", source="karpathy/nanoGPT")
def nanogpt(run: Run) -> None:
    sys.path.insert(0, str(source_folder("karpathy/nanoGPT")))
    from model import GPT, GPTConfig

    torch.manual_seed(0)
    made = GPT(GPTConfig(block_size=T, vocab_size=V, n_layer=1, n_head=2, n_embd=H, dropout=0.0))
    run.begin()
    call = torch.compile(made)
    for tokens, labels in batches():
        _, loss = call(tokens, labels)
        run.step(loss, made)


@case("nanochat", source="karpathy/nanochat")
def nanochat(run: Run) -> None:
    sys.path.insert(0, str(source_folder("karpathy/nanochat")))
    from nanochat.gpt import GPT, GPTConfig

    torch.manual_seed(0)
    made = GPT(GPTConfig(sequence_len=T, vocab_size=V, n_layer=1, n_head=2, n_kv_head=2, n_embd=2 * H))
    made.init_weights()
    run.begin()
    call = torch.compile(made, dynamic=False)
    for tokens, labels in batches():
        run.step(call(tokens, labels), made)
