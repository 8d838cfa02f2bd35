"""TRL: its trainers, on a tiny model and words of its own."""

from __future__ import annotations

import tempfile
from typing import Any
from unittest import mock

import torch

from .hf import ARGUMENTS, DEFER, fresh_accelerate, llama, train
from .measure import BATCH, Run, T, V, case

PACKAGES = "trl transformers accelerate"
OWN_HEAD = "its own fused head, by chunks of 32768 classes"
METRICS = OWN_HEAD + ", in a second forward for the metrics"


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, V))])}
    made = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    found.chat_template = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    return found


def words(count: int, length: int, seed: int) -> list[str]:
    g = torch.Generator().manual_seed(seed)
    return [" ".join(f"w{i}" for i in row) for row in torch.randint(3, V, (count, length), generator=g).tolist()]


def data(**lengths: int) -> Any:
    from datasets import Dataset

    count = 3 * BATCH
    return Dataset.from_dict({k: words(count, n, i + 1) for i, (k, n) in enumerate(lengths.items())})


PAIRS = {"prompt": T // 2, "chosen": T // 2, "rejected": T // 2}


def fit(
    run: Run, name: str, dataset: Any, home: str = "trl", model: Any = None, options: Any = None, **more: Any
) -> Any:
    """One of TRL's trainers on this data."""
    import importlib

    fresh_accelerate()
    module = importlib.import_module(home)
    model = model or llama()
    run.defer(model)
    config = getattr(module, f"{name}Config")(tempfile.mkdtemp(), **{**ARGUMENTS, "bf16": False, **more})
    trainer = getattr(module, f"{name}Trainer")(
        model=model, args=config, train_dataset=dataset, processing_class=tokenizer(), **(options or {})
    )
    train(run, trainer)


@case("TRL SFT", PACKAGES, line=DEFER, note=OWN_HEAD)
def sft(run: Run) -> None:
    fit(run, "SFT", data(text=T))


@case("TRL SFT, dft", PACKAGES, line=DEFER, note=OWN_HEAD)
def dft(run: Run) -> None:
    fit(run, "SFT", data(text=T), loss_type="dft")


@case("TRL SFT, chunked_nll", PACKAGES, line=DEFER, note=OWN_HEAD)
def chunked_nll(run: Run) -> None:
    fit(run, "SFT", data(text=T), loss_type="chunked_nll")


@case("TRL SFT, label_smoothing_factor", PACKAGES, line=DEFER, note=METRICS)
def sft_smoothed(run: Run) -> None:
    fit(run, "SFT", data(text=T), label_smoothing_factor=0.1)


@case("TRL SFT, torch_compile=True", PACKAGES, note=OWN_HEAD)
def sft_compiled(run: Run) -> None:
    fit(run, "SFT", data(text=T), torch_compile=True)


@case("TRL DPO", PACKAGES, line=DEFER, note=OWN_HEAD, logits=2 * BATCH * T * V)
def dpo(run: Run) -> None:
    fit(run, "DPO", data(**PAIRS), options={"ref_model": llama()})


@case("TRL KTO", PACKAGES, line=DEFER, note=OWN_HEAD)
def kto(run: Run) -> None:
    dataset, options = data(prompt=T // 2, completion=T // 2), {"ref_model": llama()}
    fit(run, "KTO", dataset.add_column("label", [i % 2 == 0 for i in range(len(dataset))]), options=options)


def sampled(run: Run, name: str) -> None:
    """Of rewards that differ, else there is nothing to learn."""
    options = {"reward_funcs": lambda completions, **kwargs: [float(sum(map(ord, c)) % 7) for c in completions]}
    more = {"max_completion_length": 8, "num_generations": BATCH, "max_steps": 1, "beta": 0.0}
    fit(run, name, data(prompt=T // 2), options=options, **more)


@case("TRL GRPO", PACKAGES, line=DEFER, note=OWN_HEAD)
def grpo(run: Run) -> None:
    sampled(run, "GRPO")


@case("TRL RLOO", PACKAGES, line=DEFER, note=OWN_HEAD)
def rloo(run: Run) -> None:
    sampled(run, "RLOO")


@case("TRL ORPO", PACKAGES, line=DEFER, logits=2 * BATCH * T * V)
def orpo(run: Run) -> None:
    fit(run, "ORPO", data(**PAIRS), home="trl.experimental.orpo", max_length=2 * T)


@case("TRL CPO", PACKAGES, line=DEFER, logits=2 * BATCH * T * V)
def cpo(run: Run) -> None:
    fit(run, "CPO", data(**PAIRS), home="trl.experimental.cpo", max_length=2 * T)


def teacher() -> Any:
    """Of other weights than the student's, so that there is something to learn."""
    made = llama()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return made


@case("TRL distillation", PACKAGES, line=DEFER, note=OWN_HEAD)
def distillation(run: Run) -> None:
    options = {"teacher_model": teacher()}
    fit(run, "Distillation", data(prompt=T // 2), options=options, max_completion_length=8, max_steps=1)


def gkd(run: Run, compile: bool, edit: tuple[str, str] = ("", "")) -> None:
    """edit: of the loss's source."""
    import inspect
    import textwrap

    from datasets import Dataset
    from trl.experimental.gkd import GKDTrainer, gkd_trainer

    known = teacher()
    run.defer(known)
    if compile and run.ours:
        source = textwrap.dedent(inspect.getsource(GKDTrainer.generalized_jsd_loss))
        assert edit[0] in source
        found: dict[str, Any] = {}
        exec(source.replace(*edit).removeprefix("@staticmethod\n"), vars(gkd_trainer), found)
        loss = staticmethod(torch.compile(found["generalized_jsd_loss"]))
        run.enter_context(mock.patch.object(GKDTrainer, "generalized_jsd_loss", loss))

    texts = zip(words(3 * BATCH, T // 2, 1), words(3 * BATCH, T // 2, 2))
    chats = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in texts]
    options = {"teacher_model": known}
    fit(
        run, "GKD", Dataset.from_dict({"messages": chats}), home="trl.experimental.gkd", options=options, lmbda=0.0,
        max_length=2 * T,
    )  # fmt: skip


@case("TRL GKD", PACKAGES, line=DEFER + ", also the teacher")
def gkd_eager(run: Run) -> None:
    gkd(run, compile=False)


@case("TRL GKD, compiled loss", PACKAGES, line="torch.compile(GKDTrainer.generalized_jsd_loss)")
def gkd_compiled(run: Run) -> None:
    gkd(run, compile=True)


SUMMED = ("jsd = jsd[mask]", "jsd = jsd.sum(-1)[mask]")


@case("TRL GKD, compiled loss, summed first", PACKAGES, line=f"the same, with {SUMMED[1]} in it")
def gkd_summed(run: Run) -> None:
    gkd(run, compile=True, edit=SUMMED)
