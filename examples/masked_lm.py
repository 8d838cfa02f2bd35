"""Masked language model: a BERT restores 15% of the tokens of source files.

    python examples/masked_lm.py            a minute on the CPU; the size of BERT base on a CUDA device
    python examples/masked_lm.py --help

The model is transformers' BertForMaskedLM with random weights, and its loss is the one it computes itself. It returns
its logits, as it always does: nobody reads them, so they are never computed.
"""

from __future__ import annotations

import sys

import torch
from compare import Program, learn, main
from data import Batches
from options import Sizes
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

SIZES = {
    "cpu": Sizes(steps=16, batch=16, block=128, layers=2, heads=4, embd=128, vocab_size=32_768, learning_rate=1e-3),
    "cuda": Sizes(steps=100, batch=64, block=512, layers=12, heads=12, embd=768, vocab_size=50_257, learning_rate=1e-4),
}
MASKED = 0.15


def build(sizes: Sizes, batches: Batches, device: torch.device) -> Program:
    config = BertConfig(
        vocab_size=batches.vocab_size + 1,  # one more for the mask
        hidden_size=sizes.embd,
        intermediate_size=4 * sizes.embd,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        max_position_embeddings=sizes.block,
        hidden_dropout_prob=0.0,  # so that the two runs can be compared
        attention_probs_dropout_prob=0.0,
    )
    model = BertForMaskedLM(config).to(device)
    compiled = torch.compile(model)
    optimizer = learn(model, sizes)

    def step() -> Tensor:
        tokens, _ = batches.next(device)
        masked = torch.rand(tokens.shape, device=device) < MASKED
        loss = compiled(
            input_ids=tokens.masked_fill(masked, batches.vocab_size), labels=tokens.masked_fill(~masked, -100)
        ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Program(step, model, optimizer)


if __name__ == "__main__":
    sys.exit(main(__file__, __doc__, build, SIZES))
