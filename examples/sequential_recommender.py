"""Sequential recommender: the next item of each session among a large catalogue, with the full softmax.

    python examples/sequential_recommender.py       a minute on the CPU; a larger catalogue on a CUDA device
    python examples/sequential_recommender.py --help

A session is a source file, its items are the names in it. The model is a SASRec (Kang and McAuley, 2018) without
negative samples: a causal Transformer whose output is scored against the embeddings of all items.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from compare import Program, learn, main
from data import Batches, TokenStore, name_ids, stdlib_corpus
from options import Options, Sizes
from rich.console import Console
from torch import Tensor, nn

SIZES = {
    "cpu": Sizes(steps=16, batch=32, block=64, layers=2, heads=2, embd=64, vocab_size=50_000, learning_rate=3e-3),
    "cuda": Sizes(steps=100, batch=64, block=200, layers=2, heads=4, embd=256, vocab_size=500_000, learning_rate=1e-3),
}


class SASRec(nn.Module):
    def __init__(self, items: int, length: int, layers: int, heads: int, width: int) -> None:
        super().__init__()
        self.items = nn.Embedding(items, width)
        self.positions = nn.Embedding(length, width)
        nn.init.normal_(self.items.weight, std=width**-0.5)
        # Without dropout, so that the two runs can be compared.
        block = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length), persistent=False)

    def forward(self, session: Tensor, following: Tensor) -> Tensor:
        """session and following item at each place, int64 [batch, time] -> the mean loss; -1 does not count."""
        x = self.items(session) + self.positions.weight
        scores = self.blocks(x, mask=self.mask, is_causal=True) @ self.items.weight.T
        return F.cross_entropy(scores.transpose(1, 2), following, ignore_index=-1)


def prepare_sessions(options: Options, console: Console) -> Path:
    """Number the names in the standard library's files, once per corpus and size of the catalogue."""
    corpus = stdlib_corpus(options.corpus_mb)
    store = TokenStore(corpus, options.sizes.vocab_size, options.cache_dir, "names")
    if not store.exists():
        items, count = name_ids(corpus, options.sizes.vocab_size)
        store.save(items, count, end_of_file=0)
    console.print(f"sessions: {len(corpus.files):,} files, {corpus.bytes / 1e6:.1f} MB")
    return store.path


def build(sizes: Sizes, batches: Batches, device: torch.device) -> Program:
    model = SASRec(batches.vocab_size, sizes.block, sizes.layers, sizes.heads, sizes.embd).to(device)
    compiled = torch.compile(model)
    optimizer = learn(model, sizes)

    def step() -> Tensor:
        loss = compiled(*batches.next(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Program(step, model, optimizer, unit="items")


if __name__ == "__main__":
    sys.exit(main(__file__, __doc__, build, SIZES, prepare_sessions))
