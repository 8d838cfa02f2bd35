"""DistributedDataParallel: a GPT on several processes, each with its own batches.

    torchrun --nproc-per-node 2 examples/ddp.py         two processes on the CPU (gloo), or two GPUs (nccl)
    python examples/ddp.py                              one process

The first process prints the table: memory, speed and losses are its own.
"""

from __future__ import annotations

import sys

import torch
from compare import Program, distributed, learn, main
from data import Batches
from gpt import GPT, GPTConfig
from options import Sizes
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

SIZES = {
    "cpu": Sizes(steps=12, batch=16, block=128, layers=2, heads=4, embd=128, vocab_size=32_768, learning_rate=1e-3),
    "cuda": Sizes(
        steps=100, batch=16, block=1024, layers=12, heads=12, embd=768, vocab_size=50_257, learning_rate=3e-4
    ),
}


def build(sizes: Sizes, batches: Batches, device: torch.device) -> Program:
    config = GPTConfig(batches.vocab_size, sizes.block, sizes.layers, sizes.heads, sizes.embd)
    model = GPT(config).to(device)
    parallel = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    compiled = torch.compile(parallel)
    optimizer = learn(model, sizes)

    def step() -> Tensor:
        loss = compiled(*batches.next(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Program(step, model, optimizer)


if __name__ == "__main__":
    with distributed():
        code = main(__file__, __doc__, build, SIZES)
    sys.exit(code)
