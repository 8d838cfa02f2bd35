"""The command line of the examples: sizes that fit the device, and errors that say what is allowed."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from data import SMALLEST_VOCABULARY, default_cache_dir

# One step compiles, one warms up, one is profiled: the speed needs at least two more.
FEWEST_STEPS = 5


@dataclasses.dataclass(frozen=True)
class Sizes:
    steps: int
    batch: int
    block: int
    layers: int
    heads: int
    embd: int
    vocab_size: int
    learning_rate: float


# CPU: two minutes on two cores. Training amplifies rounding: at a learning rate of 3e-3, two runs that differ only
# in their number of threads end up with losses 1e-3 apart; at 1e-3 it is below 1e-5.
# CUDA: GPT-2 small with GPT-2's own vocabulary size.
DEFAULTS = {
    "cpu": Sizes(steps=40, batch=16, block=256, layers=2, heads=4, embd=128, vocab_size=32_768, learning_rate=1e-3),
    "cuda": Sizes(
        steps=200, batch=16, block=1024, layers=12, heads=12, embd=768, vocab_size=50_257, learning_rate=3e-4
    ),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """A checked command line."""

    sizes: Sizes
    device: str
    seed: int
    min_logits_bytes: int | None
    corpus_mb: float | None
    cache_dir: Path
    control: bool
    masked: float
    out: Path
    json: Path | None


def parse(
    argv: list[str],
    name: str = "train_gpt",
    description: str = "Train a small GPT twice under torch.compile, without and with lce_inductor, and compare.",
    defaults: Mapping[str, Sizes] = DEFAULTS,
) -> Options:
    """Read the command line; a wrong value ends the program with code 2 and says what is allowed.

    Args:
        name, description: of the example.
        defaults: its sizes, for "cpu" and "cuda".
    """
    parser = _parser(name, description, defaults)
    args = parser.parse_args(argv)
    kind = args.device.split(":")[0]
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        # Of the processes that torchrun starts, each takes a device of its own.
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if kind == "cuda" else "cpu"
    if kind == "cuda":
        args.device = _cuda_device(parser, args.device)
    default = defaults[kind]
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Sizes)}
    sizes = dataclasses.replace(default, **{name: value for name, value in given.items() if value is not None})
    if sizes.embd % sizes.heads:
        parser.error(f"--embd {sizes.embd} must be a multiple of --heads {sizes.heads}")
    for flag, path in (("--out", args.out), ("--json", args.json)):
        if path is not None and not path.resolve().parent.is_dir():
            parser.error(f"{flag} {path}: there is no folder {path.resolve().parent}")
    if args.out.suffix != ".png":
        parser.error(f"--out {args.out}: must end in .png")
    return Options(
        sizes=sizes,
        device=args.device,
        seed=args.seed,
        min_logits_bytes=args.min_logits_bytes,
        corpus_mb=args.corpus_mb,
        cache_dir=args.cache_dir,
        control=getattr(args, "control", False),
        masked=getattr(args, "masked", 0.0),
        out=args.out,
        json=args.json,
    )


def _parser(name: str, description: str, defaults: Mapping[str, Sizes]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{name}.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def size(flag: str, low: int, what: str) -> None:
        name = flag.removeprefix("--").replace("-", "_")
        by_device = ", ".join(f"{device} {getattr(sizes, name)}" for device, sizes in defaults.items())
        parser.add_argument(flag, type=_integer(low), metavar="INT", help=f"{what} (default: {by_device})")

    parser.add_argument("--device", type=_device, default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    size("--steps", FEWEST_STEPS, "training steps of each run")
    size("--batch", 1, "sequences per step")
    size("--block", 2, "tokens per sequence")
    size("--layers", 1, "transformer blocks")
    size("--heads", 1, "attention heads")
    size("--embd", 1, "width of the model")
    size("--vocab-size", SMALLEST_VOCABULARY, "tokens of the vocabulary that is trained on the text")
    parser.add_argument(
        "--learning-rate",
        type=_positive,
        metavar="X",
        help=f"AdamW (default: cpu {defaults['cpu'].learning_rate}, cuda {defaults['cuda'].learning_rate})",
    )
    parser.add_argument("--seed", type=_integer(0), default=0, metavar="INT", help="weights and batches (default: 0)")
    parser.add_argument(
        "--min-logits-bytes",
        type=_integer(0),
        metavar="INT",
        help="passed to install(): smaller heads are left alone (default: install()'s own)",
    )
    parser.add_argument("--corpus-mb", type=_positive, metavar="X", help="use only so many megabytes of text")
    parser.add_argument(
        "--cache-dir", type=Path, default=default_cache_dir(), help="where the tokens are kept (default: %(default)s)"
    )
    if defaults is DEFAULTS:
        parser.add_argument(
            "--control",
            action="store_true",
            help="a third run, without lce_inductor from weights a millionth larger: how far that parts the losses",
        )
    if name == "loss_curves":
        parser.add_argument(
            "--masked",
            type=_share,
            default=0.0,
            metavar="X",
            help="mask about this share of each sequence's targets, from its beginning, as fine-tuning masks prompts",
        )
    parser.add_argument("--out", type=Path, default=Path(f"{name}.png"), help="picture (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write every number to this file")
    return parser


def _integer(low: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"{text!r}: must be an integer >= {low}")
        return value

    return convert


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number > 0")
    return value


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number >= 0 and < 1")
    return value


def _device(text: str) -> str:
    kind, _, index = text.partition(":")
    if text in ("auto", "cpu", "cuda") or (kind == "cuda" and index.isdecimal()):
        return text
    raise argparse.ArgumentTypeError(f"{text!r}: must be auto, cpu, cuda or cuda:N")


def _cuda_device(parser: argparse.ArgumentParser, text: str) -> str:
    """With an index, because torch.device("cuda") and a tensor's own "cuda:0" are not equal."""
    if not torch.cuda.is_available():
        parser.error(f"--device {text}: this PyTorch ({torch.__version__}) sees no CUDA device")
    index = int(text.partition(":")[2] or 0)
    if index >= torch.cuda.device_count():
        parser.error(f"--device {text}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return f"cuda:{index}"
