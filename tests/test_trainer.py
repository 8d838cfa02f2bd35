"""Hugging Face's Trainer, as it is: training never reads the logits, evaluation reads what eager would have given."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpus.harness import no_codegen_backend
from torch import Tensor
from turns import EVERYTHING

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState  # noqa: E402

import lce_inductor  # noqa: E402
from lce_inductor.deferred_logits import rules as deferred_rules  # noqa: E402
from lce_inductor.deferred_logits.tensor import DeferredLogits  # noqa: E402

V, T, BATCH = 211, 12, 4


def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=T,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def data(rows: int) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [{"input_ids": ids, "labels": ids.clone()} for ids in torch.randint(0, V, (rows, T), generator=g)]


class Trainer(transformers.Trainer):
    """Remembers the type of the logits of every step, and how often they were computed."""

    seen: list[type]

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        self.seen.append(type(outputs["logits"]))
        return (loss, outputs) if return_outputs else loss


@pytest.fixture(autouse=True)
def deferring() -> Iterator[None]:
    with lce_inductor.installed(min_logits_bytes=0):
        yield


def trainer(tmp_path: Path, module: Any, compile: bool = True, bf16: bool = False, **options: Any) -> Trainer:
    # torch_compile=True of an earlier Trainer stays in force through these.
    AcceleratorState._reset_state(True)
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH, max_steps=3,
        torch_compile=compile, bf16=bf16, use_cpu=True, report_to=[], save_strategy="no", logging_steps=1,
        disable_tqdm=True, learning_rate=1e-2, optim="adamw_torch_fused", seed=0, **options.pop("arguments", {}),
    )  # fmt: skip
    made = Trainer(module, arguments, train_dataset=data(3 * BATCH), eval_dataset=data(BATCH + 2), **options)
    made.seen = []
    return made


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the deferred logits that were computed."""
    found: list[torch.Size] = []
    head = DeferredLogits.head

    def record(z: DeferredLogits) -> Any:
        found.append(z.shape)
        return head(z)

    monkeypatch.setattr(DeferredLogits, "head", record)
    return found


@pytest.mark.parametrize("bf16", [False, True])
def test_training_and_evaluation(
    bf16: bool, tmp_path: Path, computed: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    if bf16 and not EVERYTHING:  # all of Inductor's passes; its C++ is compiled in fp32 alone
        compile = torch.compile
        monkeypatch.setattr(torch, "compile", lambda model, **_: compile(model, backend=no_codegen_backend([])))
    metrics: list[Any] = []
    rows = BATCH if bf16 else BATCH + 2  # the smaller last batch costs a compilation more

    def accuracy(prediction: Any) -> dict[str, float]:
        metrics.append(prediction)
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    made = trainer(tmp_path, model(), bf16=bf16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.train()
    assert set(made.seen) == {DeferredLogits} and computed == []

    # A Trainer evaluates the model that it has trained uncompiled: not what is to be seen here.
    trained = model()
    trained.load_state_dict(made.model.state_dict())
    made = trainer(tmp_path, trained, bf16=bf16, compute_metrics=accuracy)
    result = made.evaluate(data(rows))
    assert set(made.seen) == {DeferredLogits} and computed != []
    (prediction,) = metrics
    assert isinstance(prediction.predictions, np.ndarray)
    assert (prediction.predictions.shape, prediction.predictions.dtype) == ((rows, T, V), np.float32)

    eager = trainer(tmp_path, made.model, compile=False, bf16=bf16, compute_metrics=accuracy)
    expected = eager.predict(data(rows))
    tolerance = 2e-2 if bf16 else 1e-5
    np.testing.assert_allclose(prediction.predictions, expected.predictions, rtol=tolerance, atol=tolerance)
    assert result["eval_loss"] == pytest.approx(expected.metrics["test_loss"], rel=tolerance)


def test_losses_are_those_of_eager(tmp_path: Path) -> None:
    found = []
    for compile, kind in ((True, DeferredLogits), (False, Tensor)):
        made = trainer(tmp_path, model(), compile=compile)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made.train()
        assert set(made.seen) == {kind}
        found.append([entry["loss"] for entry in made.state.log_history if "loss" in entry])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_argmax_of_the_logits_by_chunks(
    tmp_path: Path, computed: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deferred_rules, "CHUNK_BYTES", 8 * V * 4)
    options = {
        "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
        "compute_metrics": lambda p: {"accuracy": float((p.predictions == p.label_ids).mean())},
        "arguments": {"eval_accumulation_steps": 1},
    }
    module = model()
    made = trainer(tmp_path, module, **options)
    found = made.predict(data(BATCH + 2))
    eager = trainer(tmp_path, module, compile=False, **options).predict(data(BATCH + 2))
    assert np.array_equal(found.predictions, eager.predictions) and found.predictions.shape == (BATCH + 2, T)
    assert computed == [torch.Size([BATCH, T, V]), torch.Size([2, T, V])]


def test_accelerate_operations() -> None:
    """What evaluation loops call: gather, pad_across_processes, conversions, nested functions of Trainer."""
    from accelerate import Accelerator
    from accelerate.utils import convert_to_fp32, recursively_apply, send_to_device
    from transformers.trainer_pt_utils import nested_concat, nested_detach, nested_numpify, nested_truncate

    module, batch = model().bfloat16(), torch.stack([d["input_ids"] for d in data(2)])
    out = torch.compile(module)(input_ids=batch, labels=batch)
    expected = module(input_ids=batch, labels=batch).logits.detach().float()
    accelerator = Accelerator(cpu=True)
    assert isinstance(out.logits, DeferredLogits)

    def same(z: Tensor) -> bool:
        return torch.allclose(z.detach().float().clone(), expected, rtol=2e-2, atol=2e-2)

    detached = nested_detach(out.logits)
    assert not detached.requires_grad and same(detached)
    assert same(accelerator.gather(out.logits)) and same(accelerator.gather_for_metrics(detached))
    assert same(accelerator.pad_across_processes(detached, dim=1, pad_index=-100))
    assert same(convert_to_fp32(out)["logits"]) and same(send_to_device(out, "cpu")["logits"])
    assert same(recursively_apply(lambda t: t.to(torch.float32), out)["logits"])
    both = nested_concat(convert_to_fp32(detached), convert_to_fp32(detached), padding_index=-100)
    assert both.shape == (4, T, V) and same(both[:2]) and same(nested_truncate(both, 2))
    wider = nested_concat(detached[:, :5], detached, padding_index=-100)
    assert wider.shape == (4, T, V) and (wider[:2, 5:] == -100).all()
    assert np.array_equal(nested_numpify(detached.float()), nested_numpify(detached.float().clone()))
