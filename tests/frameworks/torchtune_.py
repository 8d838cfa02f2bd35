"""torchtune: its decoder and its losses, as its recipes call them."""

from __future__ import annotations

from typing import Any

import torch

from .measure import BATCH, H, Run, T, V, case, file_of

DEFER = "lce_inductor.defer(model.output)"


def model(seed: int = 0) -> Any:
    from torchtune.models.llama2 import llama2

    torch.manual_seed(seed)
    return llama2(
        vocab_size=V, num_layers=1, num_heads=2, num_kv_heads=2, embed_dim=H, max_seq_len=2 * T, intermediate_dim=2 * H
    )


def compiling() -> Any:
    """compile_model and compile_loss; torchtune.training needs a torchao that others are too new for."""
    return file_of("torchtune", "torchtune/training/_compile.py")


def batches() -> list[Any]:
    g = torch.Generator().manual_seed(1)
    return list(torch.randint(0, V, (3, 2, BATCH, T), generator=g))


@case("torchtune full finetune, CEWithChunkedOutputLoss", "torchtune", line=DEFER)
def chunked(run: Run) -> None:
    from torchtune.modules.loss import CEWithChunkedOutputLoss

    made = model()
    run.defer(made.output)
    compiling().compile_model(made, verbose=False)
    loss_fn = compiling().compile_loss(CEWithChunkedOutputLoss(), verbose=False)
    made.set_num_output_chunks(loss_fn.num_output_chunks)
    for tokens, labels in batches():
        run.step(loss_fn(made(tokens), labels), made)


@case("torchtune full finetune, CEWithChunkedOutputLoss, not compiled", "torchtune", line=DEFER)
def chunked_eager(run: Run) -> None:
    from torchtune.modules.loss import CEWithChunkedOutputLoss

    made, loss_fn = model(), CEWithChunkedOutputLoss()
    run.defer(made.output)
    made.set_num_output_chunks(loss_fn.num_output_chunks)
    for tokens, labels in batches():
        run.step(loss_fn(made(tokens), labels), made)


@case("torchtune distillation, ForwardKLLoss", "torchtune", line=DEFER + ", also the teacher's; compile: True")
def distillation(run: Run) -> None:
    from torchtune.modules.loss import ForwardKLLoss

    made, teacher = model(), model(seed=1).requires_grad_(False)
    run.defer(made.output)
    run.defer(teacher.output)
    loss_fn = compiling().compile_loss(ForwardKLLoss(), verbose=False)
    for tokens, labels in batches():
        with torch.no_grad():
            known = teacher(tokens)
        run.step(loss_fn(made(tokens).reshape(-1, V), known.reshape(-1, V), labels.reshape(-1)), made)


@case("torchtune DPO", "torchtune", line=DEFER)
def dpo(run: Run) -> None:
    from torchtune.rlhf import get_batch_log_probs
    from torchtune.rlhf.loss import DPOLoss

    made, reference, loss_fn = model(), model().requires_grad_(False), DPOLoss()
    run.defer(made.output)
    run.defer(reference.output)
    for tokens, _ in batches():
        chosen, rejected = get_batch_log_probs(made(tokens), tokens).chunk(2)
        with torch.no_grad():
            reference_chosen, reference_rejected = get_batch_log_probs(reference(tokens), tokens).chunk(2)
        loss, *_ = loss_fn(chosen, rejected, reference_chosen, reference_rejected)
        run.step(loss.mean(), made)
