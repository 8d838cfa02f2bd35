"""Text that every machine has: the standard library's own sources, as tokens of a byte-level BPE or as names."""

from __future__ import annotations

import hashlib
import os
import random
import re
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import tokenizers
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

END_OF_FILE = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # the 256 bytes and END_OF_FILE
_ENCODE_AT_ONCE = 64


def default_cache_dir() -> Path:
    """The user's cache directory, or a temporary one where the former cannot be written."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    wanted = base / "lce_inductor_examples"
    try:
        wanted.mkdir(parents=True, exist_ok=True)
    except OSError:
        wanted = Path(tempfile.gettempdir()) / "lce_inductor_examples"
    return wanted


class Corpus:
    """Python sources below `root`, in an order that is random and always the same.

    The order is shuffled so that the first megabytes are a fair sample of all.

    Raises:
        FileNotFoundError: there is no Python source below `root`.
    """

    def __init__(self, root: Path, megabytes: float | None) -> None:
        found = sorted(p for p in root.rglob("*.py") if not {"site-packages", "dist-packages"} & set(p.parts))
        if not found:
            raise FileNotFoundError(f"no Python sources under {root}: the standard library is not there as text")
        random.Random(0).shuffle(found)
        self.root = root
        self.files: list[Path] = []
        self.bytes = 0
        for path in found:
            if megabytes is not None and self.bytes >= megabytes * 1e6:
                break
            self.files.append(path)
            self.bytes += path.stat().st_size

    def texts(self) -> Iterator[str]:
        for path in self.files:
            # Some of the standard library's tests are deliberately not UTF-8.
            yield path.read_text("utf-8", errors="replace")

    def key(self) -> str:
        """Changes when the files or their sizes do."""
        digest = hashlib.sha256()
        for path in self.files:
            digest.update(f"{path.relative_to(self.root)}:{path.stat().st_size}\n".encode())
        return digest.hexdigest()


def stdlib_corpus(megabytes: float | None = None) -> Corpus:
    return Corpus(Path(sysconfig.get_path("stdlib")), megabytes)


class TokenStore:
    """Where the tokens of one corpus and one vocabulary size are kept between runs.

    `tokens.pt` holds {"tokens": int32 [T], "vocab_size": int, "end_of_file": int}. `kind` is what a token is.
    """

    def __init__(self, corpus: Corpus, vocab_size: int, cache_dir: Path, kind: str = "") -> None:
        what = f"{corpus.key()}:{vocab_size}:{tokenizers.__version__}{kind}"
        self.path = cache_dir / hashlib.sha256(what.encode()).hexdigest()[:16] / "tokens.pt"

    def exists(self) -> bool:
        return self.path.exists()

    def save(self, tokens: Tensor, vocab_size: int, end_of_file: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"tokens": tokens, "vocab_size": vocab_size, "end_of_file": end_of_file}
        # Rename at the end: a run that is stopped half way must not leave half a file behind.
        unfinished = self.path.with_suffix(f".{os.getpid()}")
        torch.save(content, unfinished)
        unfinished.replace(self.path)


def train_tokenizer(corpus: Corpus, vocab_size: int) -> Tokenizer:
    """Byte-level BPE with at most `vocab_size` tokens (fewer if the text has no more pairs to merge)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_FILE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.texts(), trainer)
    return tokenizer


def encode(corpus: Corpus, tokenizer: Tokenizer) -> Iterator[tuple[int, Tensor]]:
    """Yield (number of files, their tokens as int32 [T]); each file ends with END_OF_FILE."""
    end = tokenizer.token_to_id(END_OF_FILE)
    texts = list(corpus.texts())
    for start in range(0, len(texts), _ENCODE_AT_ONCE):
        group = tokenizer.encode_batch(texts[start : start + _ENCODE_AT_ONCE])
        ids = [token for encoding in group for token in (*encoding.ids, end)]
        yield len(group), torch.tensor(ids, dtype=torch.int32)


def name_ids(corpus: Corpus, most: int) -> tuple[Tensor, int]:
    """The names in each file in their order, as int32 [T], and how many different ones there are.

    0 stands at the end of each file; the `most` - 1 most frequent names count from 1, others are left out.
    """
    files = [re.findall(r"[^\W\d]\w+", text) for text in corpus.texts()]
    counts = Counter(name for names in files for name in names)
    number = {name: i for i, (name, _) in enumerate(counts.most_common(most - 1), start=1)}
    ids = [i for names in files for i in (*(number[name] for name in names if name in number), 0)]
    return torch.tensor(ids, dtype=torch.int32), len(number) + 1


class Batches:
    """Random windows of the tokens; the same seed gives the same batches.

    masked: about this share of each window, its beginning, is given and not to be predicted, as prompts are.

    Raises:
        ValueError: the text is shorter than one window.
    """

    def __init__(self, path: Path, batch: int, block: int, seed: int, masked: float = 0.0) -> None:
        content = torch.load(path, weights_only=True)
        self.tokens: Tensor = content["tokens"]
        self.end_of_file: int = content["end_of_file"]
        self.vocab_size: int = content["vocab_size"]
        self.batch = batch
        self.block = block
        self.masked = masked
        self.random = torch.Generator().manual_seed(seed)
        if self.tokens.numel() <= block + 1:
            raise ValueError(f"block = {block}: the text has only {self.tokens.numel()} tokens")

    def next(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return (idx, targets), both int64 [batch, block]; the target is -1 where nothing can be predicted."""
        starts = torch.randint(self.tokens.numel() - self.block, (self.batch, 1), generator=self.random)
        window = self.tokens[starts + torch.arange(self.block + 1)].long()
        idx, targets = window[:, :-1].contiguous(), window[:, 1:].contiguous()
        # What follows the end of a file is the beginning of an unrelated one.
        targets[idx == self.end_of_file] = -1
        if self.masked:
            prompt = self.masked + 0.2 * (2 * torch.rand(self.batch, 1, generator=self.random) - 1)
            targets[torch.arange(self.block) < (prompt * self.block).clamp(max=self.block - 1)] = -1
        return idx.to(device), targets.to(device)
