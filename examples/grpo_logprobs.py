"""Reinforcement learning: log-probabilities and entropy of each token for a GRPO step, written the usual way.

    python examples/grpo_logprobs.py        a minute on the CPU; a model of Qwen 0.5B's size on a CUDA device
    python examples/grpo_logprobs.py --help

`token_logprobs` is what such trainers do: logits over a temperature, log_softmax, gather, and an entropy. The policy
and the frozen reference model both go through it; DPO needs the same without the entropy. Here a group of
completions is a batch of source files, and the reward counts how many different tokens a completion has.
"""

from __future__ import annotations

import copy
import sys

import torch
from compare import Program, learn, main
from data import Batches
from options import Sizes
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

SIZES = {
    "cpu": Sizes(steps=12, batch=8, block=128, layers=2, heads=4, embd=128, vocab_size=32_768, learning_rate=1e-4),
    "cuda": Sizes(steps=50, batch=8, block=2048, layers=24, heads=14, embd=896, vocab_size=50_257, learning_rate=1e-5),
}
TEMPERATURE, CLIP, KL_WEIGHT, ENTROPY_WEIGHT = 0.9, 0.2, 0.04, 0.01


def token_logprobs(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each token given those before it, and the entropy there: both [batch, time - 1]."""
    logits = model(input_ids=tokens).logits[:, :-1] / TEMPERATURE
    logprobs = logits.log_softmax(-1)
    taken = logprobs.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return taken, entropy


def build(sizes: Sizes, batches: Batches, device: torch.device) -> Program:
    config = Qwen2Config(
        vocab_size=batches.vocab_size,
        hidden_size=sizes.embd,
        intermediate_size=4 * sizes.embd,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=2,
        use_cache=False,
    )
    policy = Qwen2ForCausalLM(config).to(device)
    reference = copy.deepcopy(policy).requires_grad_(False)
    logprobs = torch.compile(token_logprobs)
    optimizer = learn(policy, sizes)

    def step() -> Tensor:
        tokens, _ = batches.next(device)
        rewards = torch.stack([_variety(row) for row in tokens])
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        with torch.no_grad():
            reference_taken, _ = logprobs(reference, tokens)
        taken, entropy = logprobs(policy, tokens)
        ratio = (taken - taken.detach()).exp()
        gain = torch.min(ratio * advantages[:, None], ratio.clamp(1 - CLIP, 1 + CLIP) * advantages[:, None])
        away = reference_taken - taken
        kl = away.exp() - away - 1
        loss = (KL_WEIGHT * kl - gain - ENTROPY_WEIGHT * entropy).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Program(step, nn.ModuleList([policy, reference]), optimizer, falls=False)


def _variety(tokens: Tensor) -> Tensor:
    """The share of different tokens in a completion."""
    return torch.tensor(tokens.unique().numel() / tokens.numel(), device=tokens.device)


if __name__ == "__main__":
    sys.exit(main(__file__, __doc__, build, SIZES))
