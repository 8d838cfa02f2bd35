"""Encoder-decoder: a T5 reads the first half of a piece of source code and writes the second.

    python examples/seq2seq.py              a minute on the CPU; the size of T5 base on a CUDA device
    python examples/seq2seq.py --help

The model is transformers' T5ForConditionalGeneration with random weights, and its loss is the one it computes itself.
"""

from __future__ import annotations

import sys

import torch
from compare import Program, learn, main
from data import Batches
from options import Sizes
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

SIZES = {
    "cpu": Sizes(steps=16, batch=16, block=256, layers=1, heads=4, embd=128, vocab_size=32_768, learning_rate=1e-3),
    "cuda": Sizes(
        steps=100, batch=32, block=1024, layers=12, heads=12, embd=768, vocab_size=50_257, learning_rate=1e-4
    ),
}


def build(sizes: Sizes, batches: Batches, device: torch.device) -> Program:
    config = T5Config(
        vocab_size=batches.vocab_size,
        d_model=sizes.embd,
        d_kv=sizes.embd // sizes.heads,
        d_ff=4 * sizes.embd,
        num_layers=sizes.layers,
        num_heads=sizes.heads,
        dropout_rate=0.0,  # so that the two runs can be compared
        decoder_start_token_id=batches.end_of_file,
        pad_token_id=batches.end_of_file,
    )
    model = T5ForConditionalGeneration(config).to(device)
    compiled = torch.compile(model)
    optimizer = learn(model, sizes)

    def step() -> Tensor:
        tokens, _ = batches.next(device)
        source, target = tokens.chunk(2, dim=1)
        loss = compiled(input_ids=source, labels=target.contiguous()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Program(step, model, optimizer)


if __name__ == "__main__":
    sys.exit(main(__file__, __doc__, build, SIZES))
