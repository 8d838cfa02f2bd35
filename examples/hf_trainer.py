"""Hugging Face Trainer: fine-tuning a causal LM with torch_compile=True in bf16, its logits returned.

    python examples/hf_trainer.py           a minute on the CPU; a Llama of 1B size on a CUDA device
    python examples/hf_trainer.py --help

The Trainer compiles the model itself. The weights are random, since nothing is downloaded.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from compare import Program, main
from data import Batches
from options import Sizes
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

SIZES = {
    "cpu": Sizes(steps=12, batch=8, block=256, layers=2, heads=4, embd=128, vocab_size=32_768, learning_rate=1e-3),
    "cuda": Sizes(steps=50, batch=4, block=4096, layers=16, heads=32, embd=2048, vocab_size=50_257, learning_rate=1e-4),
}


class Mark(TrainerCallback):
    """Tells the comparison when a step ended."""

    def __init__(self, mark: Callable[[], None]) -> None:
        self.mark = mark

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.mark()


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
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),
        max_steps=sizes.steps - 1,
        per_device_train_batch_size=sizes.batch,
        learning_rate=sizes.learning_rate,
        torch_compile=True,
        bf16=True,
        use_cpu=device.type == "cpu",
        logging_steps=1,
        disable_tqdm=True,
        save_strategy="no",
        report_to=[],
    )
    rows = [row for _ in range(sizes.steps) for row in batches.next(torch.device("cpu"))[0]]
    dataset = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(LlamaForCausalLM(config), arguments, train_dataset=dataset)
    trainer.remove_callback(PrinterCallback)

    def train(steps: int, mark: Callable[[], None]) -> list[Tensor]:
        trainer.add_callback(Mark(mark))
        trainer.train()
        return [torch.tensor(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]

    def step() -> Tensor:
        """One more of the Trainer's own steps, to see its memory."""
        batch = {"input_ids": torch.stack(rows[: sizes.batch]), "labels": torch.stack(rows[: sizes.batch])}
        _, items = trainer.get_batch_samples(iter([batch]), 1, device)
        loss = trainer.training_step(trainer.model_wrapped, batch, items)
        trainer.optimizer.step()
        trainer.model.zero_grad()
        return loss.detach()

    return Program(step, trainer.model, trainer.create_optimizer(), train, bf16=True)


if __name__ == "__main__":
    sys.exit(main(__file__, __doc__, build, SIZES))
