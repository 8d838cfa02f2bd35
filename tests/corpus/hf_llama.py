"""One architecture in the 22 settings in which people train it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .hf import ROWS, B, Setup, T, V, ids, model, plain, text, tiny

BF16 = torch.bfloat16


def llama(**config: Any) -> nn.Module:
    config.setdefault("use_cache", False)
    return tiny("llama", **config)


@model("llama")
def default() -> Setup:
    return plain(llama(), text())


@model("llama bf16, attention mask")
def bf16() -> Setup:
    mask = torch.ones(B, T, dtype=torch.long)
    mask[0, -5:] = 0
    return plain(llama(dtype=BF16), {**text(), "attention_mask": mask}, dtype=BF16)


@model("llama use_cache")
def use_cache() -> Setup:
    return plain(llama(use_cache=True), text())


@model("llama num_items_in_batch tensor")
def num_items_tensor() -> Setup:
    return plain(llama(), {**text(), "num_items_in_batch": torch.tensor(38)})


@model("llama num_items_in_batch int")
def num_items_int() -> Setup:
    return plain(llama(), {**text(), "num_items_in_batch": 38})


@model("llama shift_labels")
def shift_labels() -> Setup:
    inputs = text()
    return plain(llama(), {**inputs, "shift_labels": F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()})


@model("llama wrapped, loss only")
def wrapped() -> Setup:
    lm = llama()

    def step(input_ids: Tensor, labels: Tensor) -> Tensor:
        return lm(input_ids=input_ids, labels=labels).loss

    return Setup(step, lm, text())


@model("llama whole step with backward")
def whole_step() -> Setup:
    lm = llama()

    def step(input_ids: Tensor, labels: Tensor) -> Tensor:
        loss = lm(input_ids=input_ids, labels=labels).loss
        loss.backward()
        return loss.detach()

    return Setup(step, lm, text(), backward=False)


@model("llama autocast around the compiled model")
def autocast_outside() -> Setup:
    return plain(llama(), text(), dtype=BF16, autocast=True)


@model("llama autocast in the compiled function")
def autocast_inside() -> Setup:
    lm = llama()

    def step(input_ids: Tensor, labels: Tensor) -> Any:
        with torch.autocast("cpu", dtype=BF16):
            return lm(input_ids=input_ids, labels=labels)

    return Setup(step, lm, text(), dtype=BF16)


@model("llama gradient checkpointing")
def checkpointing() -> Setup:
    lm = llama()
    lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return plain(lm, text())


@model("llama frozen head")
def frozen_head() -> Setup:
    lm = llama()
    lm.lm_head.weight.requires_grad_(False)
    return plain(lm, text())


@model("llama LoRA on q, v")
def lora() -> Setup:
    return _peft(["q_proj", "v_proj"])


@model("llama LoRA on the head")
def lora_head() -> Setup:
    return _peft(["q_proj", "lm_head"])


def _peft(targets: list[str]) -> Setup:
    from peft import LoraConfig, get_peft_model

    lm = get_peft_model(llama(), LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in lm.named_parameters():
            if "lora_B" in name:  # zeros at first, which would hide mistakes
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return plain(lm, text())


@model("llama logits_to_keep")
def logits_to_keep() -> Setup:
    inputs = text()
    return plain(llama(), {**inputs, "labels": inputs["labels"][:, -20:], "logits_to_keep": 20}, rows=B * 20)


@model("llama evaluation")
def evaluation() -> Setup:
    return plain(llama().eval(), text(), grad=False)


@model("llama lengths 24, 31, 40")
def lengths() -> Setup:
    return plain(llama(), text(24), more=(text(31), text(40)))


@model("llama dynamic=True")
def dynamic() -> Setup:
    return plain(llama(), text(24), more=(text(33),), dynamic=True)


@model("llama tied embeddings")
def tied() -> Setup:
    return plain(llama(tie_word_embeddings=True), text())


@model("llama with Trainer's label smoother")
def label_smoother() -> Setup:
    from transformers.trainer_pt_utils import LabelSmoother

    lm, smoother = llama(), LabelSmoother(epsilon=0.1)

    def step(input_ids: Tensor, labels: Tensor) -> Tensor:
        return smoother(lm(input_ids=input_ids), labels, shift_labels=True)

    return Setup(step, lm, text(), rows=B * (T - 1))


@model("llama through accelerate's autocast")
def accelerated() -> Setup:
    from accelerate.utils.operations import convert_outputs_to_fp32

    lm = llama()
    forward = torch.autocast("cpu", dtype=BF16)(lm.forward)

    def step(input_ids: Tensor, labels: Tensor) -> Any:
        return convert_outputs_to_fp32(forward)(input_ids=input_ids, labels=labels)

    return Setup(step, lm, text(), dtype=BF16)


@model("llama token classification")
def token_classification() -> Setup:
    lm = tiny("llama", "AutoModelForTokenClassification", num_labels=V, use_cache=False)
    return plain(lm, {"input_ids": ids(), "labels": ids()}, rows=ROWS)
