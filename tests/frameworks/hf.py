"""Hugging Face: Trainer, accelerate, peft."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
from torch import Tensor, nn

from .measure import BATCH, H, Run, T, V, case


def llama(**more: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=H, intermediate_size=2 * H, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=4 * T, pad_token_id=0, bos_token_id=1, eos_token_id=2, **more,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def texts(rows: int, seed: int = 1, length: int = T) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [{"input_ids": t, "labels": t.clone()} for t in torch.randint(3, V, (rows, length), generator=g)]


def batch(seed: int = 1, length: int = T) -> dict[str, Tensor]:
    rows = texts(BATCH, seed, length)
    return {k: torch.stack([r[k] for r in rows]) for k in rows[0]}


ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": BATCH, "per_device_eval_batch_size": BATCH, "max_steps": 3, "use_cpu": True, "report_to": [],
    "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "learning_rate": 1e-2, "optim": "sgd", "seed": 0, "max_grad_norm": 0.0,
}  # fmt: skip


def fresh_accelerate() -> None:
    """torch_compile=True of an earlier Trainer stays in force through these."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]


def train(run: Run, trainer: Any) -> None:
    """trainer.train(), its losses and gradients."""
    import transformers

    class Gradients(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            run.gradients_of(kwargs["model"])

    trainer.add_callback(Gradients())
    run.watch(trainer, "training_step")
    trainer.train()


def trainer(run: Run, model: nn.Module, defer: bool, **more: Any) -> Any:
    import transformers

    fresh_accelerate()
    length = more.pop("length", T)
    if defer:
        run.defer(model)
    options = {k: more.pop(k) for k in ("compute_metrics", "preprocess_logits_for_metrics") if k in more}
    arguments = transformers.TrainingArguments(tempfile.mkdtemp(), **{**ARGUMENTS, "bf16": False, **more})
    return transformers.Trainer(
        model, arguments, train_dataset=texts(3 * BATCH, length=length), eval_dataset=texts(2 * BATCH, 2), **options
    )


DEFER = "lce_inductor.defer(model)"


@case("Trainer", "transformers accelerate", line=DEFER)
def plain(run: Run) -> None:
    train(run, trainer(run, llama(), defer=True))


@case("Trainer, torch_compile=True", "transformers accelerate")
def compiled(run: Run) -> None:
    train(run, trainer(run, llama(), defer=False, torch_compile=True))


# So long that logits are larger than what oneDNN's products of bf16 take for themselves.
LONG = 3 * T


@case(
    "Trainer, bf16=True", "transformers accelerate", line=DEFER, dtype=torch.bfloat16, logits=BATCH * LONG * V
)  # fmt: skip
def bf16(run: Run) -> None:
    train(run, trainer(run, llama(), defer=True, bf16=True, length=LONG))


@case("Trainer, gradient accumulation and checkpointing", "transformers accelerate", line=DEFER)
def accumulation(run: Run) -> None:
    more = {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    train(run, trainer(run, llama(), defer=True, **more))


@case("Trainer, label_smoothing_factor", "transformers accelerate", line=DEFER)
def smoothed(run: Run) -> None:
    train(run, trainer(run, llama(), defer=True, label_smoothing_factor=0.1))


@case("Trainer, label_smoothing_factor, torch_compile=True", "transformers accelerate", line=DEFER)
def smoothed_compiled(run: Run) -> None:
    train(run, trainer(run, llama(), defer=True, label_smoothing_factor=0.1, torch_compile=True))


@case("Trainer.evaluate()", "transformers accelerate", line=DEFER)
def evaluate(run: Run) -> None:
    run.loss(trainer(run, llama(), defer=True, prediction_loss_only=True).evaluate()["eval_loss"])


@case("Trainer.evaluate(), accuracy by argmax", "transformers accelerate", line=DEFER)
def accuracy(run: Run) -> None:
    found = trainer(
        run, llama(), defer=True, preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        compute_metrics=lambda p: {"accuracy": float((p.predictions == p.label_ids).mean())},
    ).evaluate()  # fmt: skip
    run.loss(found["eval_loss"], found["eval_accuracy"])


@case("accelerate", "accelerate transformers", line="lce_inductor.defer(model), before prepare()")
def accelerate(run: Run) -> None:
    from accelerate import Accelerator

    fresh_accelerate()
    model = llama()
    run.defer(model)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    loader = torch.utils.data.DataLoader(texts(4 * BATCH), BATCH)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for inputs in loader:
        with accelerator.accumulate(model):
            loss = model(**inputs).loss
            accelerator.backward(loss)
            run.loss(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                run.gradients_of(model)
            optimizer.step()
            optimizer.zero_grad()


def lora(run: Run, targets: list[str], defer: bool, **more: Any) -> None:
    import peft

    model = llama()
    if defer:
        run.defer(model)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, lora_dropout=0.0)
    train(run, trainer(run, peft.get_peft_model(model, config), defer=False, **more))


@case("peft, LoRA on attention", "peft transformers accelerate", line=DEFER)
def lora_on_attention(run: Run) -> None:
    lora(run, ["q_proj", "v_proj"], defer=True)


@case("peft, LoRA on attention, torch_compile=True", "peft transformers accelerate")
def lora_on_attention_compiled(run: Run) -> None:
    lora(run, ["q_proj", "v_proj"], defer=False, torch_compile=True)


@case("peft, LoRA on lm_head, torch_compile=True", "peft transformers accelerate")
def lora_on_head_compiled(run: Run) -> None:
    lora(run, ["q_proj", "lm_head"], defer=False, torch_compile=True)


@case("peft, LoRA on lm_head, loss alone", "peft transformers", line="torch.compile(lambda **b: model(**b).loss)")
def lora_on_head_loss(run: Run) -> None:
    """The user's loop: what is compiled returns no logits."""
    import peft

    config = peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False, lora_dropout=0.0)
    model = peft.get_peft_model(llama(), config)
    run.begin()
    call = torch.compile(lambda **batch: model(**batch).loss)
    for seed in range(3):
        run.step(call(**batch(seed)), model)


def gpt2(run: Run, defer: bool, line: bool) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=V, n_embd=H, n_layer=1, n_head=2, n_positions=T, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    model = transformers.GPT2LMHeadModel(config)
    if line:  # also without the package: Trainer counts the labels of such a model in another way
        model.loss_type = "ForCausalLM"
    train(run, trainer(run, model, defer=defer, torch_compile=True))


@case("Trainer, torch_compile=True, GPT-2", "transformers accelerate")
def gpt2_plain(run: Run) -> None:
    gpt2(run, defer=False, line=False)


@case(
    "Trainer, torch_compile=True, GPT-2, loss_type", "transformers accelerate", line='model.loss_type = "ForCausalLM"'
)
def gpt2_line(run: Run) -> None:
    gpt2(run, defer=False, line=True)


@case("Trainer, torch_compile=True, GPT-2, defer", "transformers accelerate", line=DEFER)
def gpt2_deferred(run: Run) -> None:
    gpt2(run, defer=True, line=False)


def smoother(run: Run) -> None:
    made = trainer(run, llama(), defer=True, label_smoothing_factor=0.1)
    if run.ours:
        made.label_smoother = torch.compile(made.label_smoother)
    train(run, made)


case(
    "Trainer, label_smoothing_factor, compiled", "transformers accelerate",
    line=DEFER + "; trainer.label_smoother = torch.compile(trainer.label_smoother)",
)(smoother)  # fmt: skip


def float8(run: Run, whole: bool) -> None:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    model = llama()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    run.begin()
    only = None if whole else lambda module, name: name != "lm_head"
    convert_to_float8_training(model, config=Float8LinearConfig(emulate=True), module_filter_fn=only)
    call = torch.compile(model)
    for seed in range(3):
        run.step(call(**batch(seed, LONG)).loss, model)


@case("torchao float8 (emulated)", "torchao transformers", dtype=torch.bfloat16, logits=BATCH * LONG * V)
def float8_whole(run: Run) -> None:
    float8(run, whole=True)


@case(
    "torchao float8 (emulated), head left out", "torchao transformers", dtype=torch.bfloat16, logits=BATCH * LONG * V,
    line='module_filter_fn=lambda module, name: name != "lm_head"',
)  # fmt: skip
def float8_without_head(run: Run) -> None:
    float8(run, whole=False)
