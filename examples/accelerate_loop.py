"""A training loop with accelerate: a causal LM in bf16, its logits returned and never read.

    python examples/accelerate_loop.py      a minute on the CPU; a Llama of 1B size on a CUDA device
    python examples/accelerate_loop.py --help

The model is transformers' LlamaForCausalLM with random weights. accelerate converts what a model returns to fp32, and
leaves logits that nobody computed uncomputed.
"""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator
from compare import Program, learn, main
from data import Batches
from options import Sizes
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {
    "cpu": Sizes(steps=12, batch=8, block=256, layers=2, heads=4, embd=128, vocab_size=32_768, learning_rate=1e-3),
    "cuda": Sizes(steps=50, batch=4, block=4096, layers=16, heads=32, embd=2048, vocab_size=50_257, learning_rate=1e-4),
}


def build(sizes: Sizes, batches: Batches, device: torch.device) -> Program:
    accelerator = Accelerator(mixed_precision="bf16", cpu=device.type == "cpu")
    config = LlamaConfig(
        vocab_size=batches.vocab_size,
        hidden_size=sizes.embd,
        intermediate_size=4 * sizes.embd,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        max_position_embeddings=sizes.block,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    optimizer = learn(model, sizes)
    model, optimizer = accelerator.prepare(model, optimizer)
    compiled = torch.compile(model)

    def step() -> Tensor:
        tokens, _ = batches.next(device)
        outputs = compiled(input_ids=tokens, labels=tokens)
        accelerator.backward(outputs.loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return outputs.loss.detach()

    return Program(step, model, optimizer, bf16=True)


if __name__ == "__main__":
    sys.exit(main(__file__, __doc__, build, SIZES))
