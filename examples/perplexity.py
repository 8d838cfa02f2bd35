"""Evaluation: the perplexity of a GPT on source files, under no_grad.

    python examples/perplexity.py           half a minute on the CPU; GPT-2 small on a CUDA device
    python examples/perplexity.py --help

Without gradients only the losses of single tokens are needed, and one chunk of logits at a time. The weights are random
here, so the perplexity is about the size of the vocabulary; the picture shows the loss of each batch.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from compare import Program, main
from data import Batches
from gpt import GPT, GPTConfig
from options import Sizes
from torch import Tensor

SIZES = {
    "cpu": Sizes(steps=12, batch=16, block=256, layers=2, heads=4, embd=128, vocab_size=32_768, learning_rate=1.0),
    "cuda": Sizes(steps=50, batch=32, block=1024, layers=12, heads=12, embd=768, vocab_size=50_257, learning_rate=1.0),
}


def build(sizes: Sizes, batches: Batches, device: torch.device) -> Program:
    config = GPTConfig(batches.vocab_size, sizes.block, sizes.layers, sizes.heads, sizes.embd)
    model = GPT(config).to(device).eval()

    @torch.compile
    def token_losses(tokens: Tensor, targets: Tensor) -> Tensor:
        logits = model(tokens)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")

    @torch.no_grad()
    def step() -> Tensor:
        tokens, targets = batches.next(device)
        return token_losses(tokens, targets).sum() / (targets != -1).sum()

    return Program(step, model, falls=False)


if __name__ == "__main__":
    sys.exit(main(__file__, __doc__, build, SIZES))
