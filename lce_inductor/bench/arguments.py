"""What the benchmarks' command lines have in common: converters that say what is allowed, and the device."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def converter(convert: Callable[[str], T]) -> Callable[[str], T]:
    """A converter whose ValueError argparse shows as it is."""

    def wrapped(text: str) -> T:
        try:
            return convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return wrapped


def positive_integer(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{text!r}: must be an integer >= 1")
    return int(text)


def share(text: str) -> float:
    """A part of a whole, from 0 to below 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{text!r}: must be a number from 0 to below 1")
    return value


def device_name(text: str) -> str:
    kind, _, index = text.partition(":")
    if text in ("auto", "cpu", "cuda") or (kind == "cuda" and index.isdecimal()):
        return text
    raise ValueError(f"{text!r}: must be auto, cpu, cuda or cuda:N")


def present(parser: argparse.ArgumentParser, text: str) -> str:
    """The device by its full name, with an index if it is one of several."""
    if text == "cpu" or (text == "auto" and not torch.cuda.is_available()):
        return "cpu"
    index = int(text.partition(":")[2] or 0)
    if index >= torch.cuda.device_count():
        parser.error(f"--device {text}: this PyTorch ({torch.__version__}) sees {torch.cuda.device_count()} of them")
    return f"cuda:{index}"


def kind(device: str) -> str:
    return device.partition(":")[0]
