"""FSDP2 (fully_shard): a Llama whose parameters, gradients and optimizer state are spread over the processes.

    torchrun --nproc-per-node 2 examples/fsdp2.py       two processes on the CPU (gloo), or two GPUs (nccl)
    python examples/fsdp2.py                            one process

The first process prints the table: memory, speed and losses are its own.

The hooks of each sharded layer break the graph, and torch.compile leaves a function with a broken loop to eager
execution. So the loop over the layers must not stand in the function that has head and loss. In transformers it does
not: LlamaForCausalLM calls LlamaModel, and what follows that call is one graph.
"""

from __future__ import annotations

import sys

import torch
from compare import Program, distributed, learn, main
from data import Batches
from options import Sizes
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {
    "cpu": Sizes(steps=12, batch=16, block=128, layers=2, heads=4, embd=128, vocab_size=32_768, learning_rate=1e-3),
    "cuda": Sizes(
        steps=100, batch=16, block=1024, layers=12, heads=12, embd=768, vocab_size=50_257, learning_rate=3e-4
    ),
}


def build(sizes: Sizes, batches: Batches, device: torch.device) -> Program:
    config = LlamaConfig(
        vocab_size=batches.vocab_size,
        hidden_size=sizes.embd,
        intermediate_size=4 * sizes.embd,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        max_position_embeddings=sizes.block,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(device)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    compiled = torch.compile(model)
    optimizer = learn(model, sizes)

    def step() -> Tensor:
        tokens, _ = batches.next(device)
        loss = compiled(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Program(step, model, optimizer)


if __name__ == "__main__":
    with distributed():
        code = main(__file__, __doc__, build, SIZES)
    sys.exit(code)
