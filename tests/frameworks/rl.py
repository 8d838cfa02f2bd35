"""Log-probability helpers of verl and OpenRLHF, behind a tiny model's head."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .hf import LONG, batch, llama
from .measure import BATCH, Run, T, V, case, file_of


def train(run: Run, loss: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype = torch.float32) -> None:
    model = llama().to(dtype)
    run.defer(model)
    for seed in range(3):
        ids = batch(seed, T if dtype == torch.float32 else LONG)["input_ids"]
        run.step(loss(model(ids).logits, torch.roll(ids, -1, 1)), model)


DEFER = "lce_inductor.defer(model)"


def verl() -> Any:
    import verl.utils.torch_functional

    return verl.utils.torch_functional


@case("verl logprobs_from_logits", "verl", line=DEFER)
def verl_logprobs(run: Run) -> None:
    train(run, lambda logits, labels: -verl().logprobs_from_logits(logits, labels).mean())


@case("verl logprobs_from_logits, bf16", "verl", line=DEFER, dtype=torch.bfloat16, logits=BATCH * LONG * V)
def verl_logprobs_bf16(run: Run) -> None:
    train(run, lambda logits, labels: -verl().logprobs_from_logits(logits, labels).mean(), torch.bfloat16)


@case("verl logprobs_from_logits, compiled", "verl", line=DEFER + "; torch.compile(logprobs_from_logits)")
def verl_logprobs_compiled(run: Run) -> None:
    function = torch.compile(verl().logprobs_from_logits)
    train(run, lambda logits, labels: -function(logits, labels).mean())


@case("verl entropy_from_logits, as its engines compile it", "verl", line=DEFER)
def verl_entropy(run: Run) -> None:
    function = torch.compile(verl().entropy_from_logits, dynamic=True)
    train(run, lambda logits, labels: -function(logits / 0.7).mean())


@case("verl entropy_from_logits_with_chunking, as its engines compile it", "verl", line=DEFER)
def verl_entropy_chunks(run: Run) -> None:
    function = torch.compile(verl().entropy_from_logits_with_chunking, dynamic=True)
    train(run, lambda logits, labels: -function(logits.flatten(0, 1), chunk_size=64).mean())


def openrlhf() -> Any:
    deepspeed = sys.modules.setdefault("deepspeed", types.ModuleType("deepspeed"))  # its sources need a compiler
    deepspeed.__spec__ = importlib.machinery.ModuleSpec("deepspeed", None)
    return file_of("openrlhf", "openrlhf/models/utils.py")


@case("OpenRLHF log_probs_from_logits", "openrlhf", line=DEFER)
def openrlhf_logprobs(run: Run) -> None:
    utils = openrlhf()
    train(run, lambda logits, labels: -utils.log_probs_from_logits(logits, labels, temperature=0.7).mean())


@case("OpenRLHF compute_entropy", "openrlhf", line=DEFER)
def openrlhf_entropy(run: Run) -> None:
    utils = openrlhf()
    train(run, lambda logits, labels: -utils.compute_entropy(logits).mean())
