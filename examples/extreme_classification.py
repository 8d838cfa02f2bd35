"""Extreme classification: a bag of tokens, and a class among a hundred thousand (a million on a CUDA device).

    python examples/extreme_classification.py       a minute on the CPU
    python examples/extreme_classification.py --help

The text is the tokens before a place in a source file; the class is the pair of tokens that follows it, hashed. With a
million classes the head is nearly the whole model, and its logits are nearly all of a step's memory.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from compare import Program, learn, main
from data import Batches
from options import Sizes
from torch import Tensor, nn

CLASSES_PER_TOKEN = 25
SIZES = {
    "cpu": Sizes(steps=10, batch=2048, block=16, layers=1, heads=1, embd=64, vocab_size=4000, learning_rate=1e-2),
    "cuda": Sizes(steps=100, batch=4096, block=32, layers=1, heads=1, embd=512, vocab_size=40_000, learning_rate=1e-3),
}


class Classifier(nn.Module):
    def __init__(self, words: int, classes: int, hidden: int) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(words, hidden, mode="mean")
        self.hidden = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, classes)

    def forward(self, text: Tensor, label: Tensor) -> Tensor:
        """text int64 [batch, time], label int64 [batch] -> the mean loss."""
        return F.cross_entropy(self.out(F.relu(self.hidden(self.words(text)))), label)


def build(sizes: Sizes, batches: Batches, device: torch.device) -> Program:
    classes = CLASSES_PER_TOKEN * batches.vocab_size
    model = Classifier(batches.vocab_size, classes, sizes.embd).to(device)
    compiled = torch.compile(model)
    optimizer = learn(model, sizes)

    def step() -> Tensor:
        tokens, _ = batches.next(device)
        text, after = tokens[:, :-2], tokens[:, -2:]
        label = (after[:, 0] * batches.vocab_size + after[:, 1]) % classes
        loss = compiled(text, label)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Program(step, model, optimizer, rows=sizes.batch, classes=classes, unit="texts")


if __name__ == "__main__":
    sys.exit(main(__file__, __doc__, build, SIZES))
