"""Tiny randomly initialised transformers models: the setup that every case of hf_llama.py and hf_models.py uses.

Nothing is downloaded: models come from a configuration object. This module is not imported by the package's
__init__, since transformers is an optional extra of the tests.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from torch import Tensor, nn
from torch._dynamo.utils import counters

from .harness import GraphRecord, no_codegen_backend, relative_error

B, T, V = 2, 24, 211
ROWS = B * T


@dataclasses.dataclass
class Setup:
    """A step to compile and its inputs.

    Attributes:
        step: called with `inputs`; a model's forward or a function around it.
        module: whose parameters' gradients are compared.
        inputs: keyword arguments of the first call; `more` those of later calls of the same compiled step.
        rows: rows of the logits that the loss reads; `classes` their number of classes.
        grad: False for evaluation; `dynamic` as in torch.compile.
        backward: False where the step calls backward itself.
        autocast: call the step under autocast to bf16.
        dtype: sets the tolerance.
    """

    step: Callable[..., Any]
    module: nn.Module
    inputs: dict[str, Any]
    more: Sequence[dict[str, Any]] = ()
    rows: int = ROWS
    classes: int = V
    grad: bool = True
    dynamic: bool | None = None
    backward: bool = True
    autocast: bool = False
    dtype: torch.dtype = torch.float32


@dataclasses.dataclass
class Outcome:
    """What a run gave: relative errors by name against eager, and what became of the heads."""

    errors: dict[str, float]
    counts: Counter[str]
    graphs: list[GraphRecord]
    setup: Setup

    @property
    def largest(self) -> GraphRecord:
        return max(self.graphs, key=lambda g: g.largest)

    @property
    def limit(self) -> int:
        return self.setup.rows * self.setup.classes

    @property
    def codes(self) -> list[str]:
        return sorted(k.removeprefix("refused:") for k in self.counts if k.startswith("refused:"))


MODELS: dict[str, Callable[[], Setup]] = {}


def model(name: str) -> Callable[[Callable[[], Setup]], Callable[[], Setup]]:
    """Register a function that makes a Setup."""

    def add(make: Callable[[], Setup]) -> Callable[[], Setup]:
        if name in MODELS:
            raise ValueError(f"two models are called {name!r}")
        MODELS[name] = make
        return make

    return add


def configured(kind: str, **config: Any) -> Any:
    """A configuration with small sizes and without dropout; None takes a size away that a kind does not have."""
    import transformers

    sizes = {
        "vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    chosen = {k: v for k, v in {**sizes, **config}.items() if v is not None}
    settings = transformers.AutoConfig.for_model(kind, **chosen)
    _no_dropout(settings)
    return settings


def tiny(kind: str, auto: str = "AutoModelForCausalLM", dtype: torch.dtype | None = None, **config: Any) -> nn.Module:
    """A model of an Auto class with small sizes, in training mode, without dropout."""
    import transformers

    return finish(getattr(transformers, auto).from_config(configured(kind, **config)), dtype)


def finish(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Random weights of a size that gives varied predictions; no dropout, so that eager is a reference."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * (0.7 / p.shape[-1] ** 0.5))
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    module.train()
    return module.to(dtype) if dtype is not None else module


def _no_dropout(config: Any) -> None:
    for name, value in list(vars(config).items()):
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
        elif name.endswith("_config") and hasattr(value, "to_dict"):
            _no_dropout(value)


def ids(length: int = T, batch: int = B, classes: int = V) -> Tensor:
    """Token ids that are no special token."""
    return torch.randint(3, classes, (batch, length), generator=torch.Generator().manual_seed(1))


def text(length: int = T, batch: int = B, classes: int = V) -> dict[str, Tensor]:
    """input_ids and labels, some of them ignored."""
    tokens = ids(length, batch, classes)
    labels = tokens.clone()
    labels[:, :3] = -100
    return {"input_ids": tokens, "labels": labels}


def masked(length: int = T, batch: int = B) -> dict[str, Tensor]:
    """Inputs of a masked language model: two thirds of the labels are asked for."""
    tokens = ids(length, batch)
    asked = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(2)) < 0.66
    return {"input_ids": tokens, "labels": tokens.masked_fill(~asked, -100), "attention_mask": torch.ones_like(tokens)}


def plain(module: nn.Module, inputs: dict[str, Any], **settings: Any) -> Setup:
    """The model's own forward is the step."""
    return Setup(module, module, inputs, **settings)


def run(setup: Setup, package: Any, **config: Any) -> Outcome:
    """Run eagerly, then compiled with `package` installed (None: without), and compare."""
    calls = [setup.inputs, *setup.more]
    expected = [_call(setup, setup.step, inputs) for inputs in calls]
    records: list[GraphRecord] = []
    torch._dynamo.reset()
    counters.clear()
    errors: dict[str, float] = {}
    with (
        inductor_config.patch(fx_graph_cache=False),
        functorch_config.patch(enable_autograd_cache=False),
    ):
        if package is not None:
            package.install(**{"min_logits_bytes": 0, **config})
        try:
            compiled = torch.compile(setup.step, backend=no_codegen_backend(records), dynamic=setup.dynamic)
            for number, (inputs, wanted) in enumerate(zip(calls, expected, strict=True)):
                found = _call(setup, compiled, inputs)
                assert found.keys() == wanted.keys()
                errors.update({f"call {number}: {k}": e for k, e in _errors(found, wanted).items()})
        finally:
            if package is not None:
                package.uninstall()
    return Outcome(errors, Counter(counters["lce_inductor"]), records, setup)


def _errors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Relative errors; of a gradient, relative to no less than a thousandth of all gradients together.

    Some gradients are zero but for rounding: a bias on the keys of an attention moves no softmax.
    """
    gradients = [g.double().norm().square() for k, g in wanted.items() if k.startswith("gradient")]
    everything = torch.stack(gradients).sum().sqrt().item() if gradients else 0.0
    result = {}
    for name, value in found.items():
        error, norm = relative_error(value, wanted[name]), wanted[name].double().norm().item()
        least = 1e-3 * everything if name.startswith("gradient") else 0.0
        result[name] = error * norm / max(norm, least, 1e-30)
    return result


def _call(setup: Setup, step: Callable[..., Any], inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Loss, logits where they are returned, and gradients of all parameters."""
    setup.module.zero_grad()
    with torch.set_grad_enabled(setup.grad), torch.autocast("cpu", dtype=torch.bfloat16, enabled=setup.autocast):
        out = step(**inputs)
    loss = out if isinstance(out, Tensor) else out["loss"]
    results = {"loss": loss.detach()}
    if setup.grad and setup.backward:
        loss.backward()
    if not isinstance(out, Tensor) and out.get("logits") is not None:
        results["logits"] = out["logits"].detach() + 0
    for name, p in setup.module.named_parameters():
        if p.grad is not None:
            results[f"gradient of {name}"] = p.grad.clone()
    return results
