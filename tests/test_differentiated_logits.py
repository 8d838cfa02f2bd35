"""Losses of logits that a compiled model returns beside its own loss: an error, and each remedy that it names."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from corpus.harness import GraphRecord, no_codegen_backend
from deferred_cases import DIFFERENTIATE, B, Model, T, V, batch
from torch import Tensor, nn
from turns import crossed

import lce_inductor
from lce_inductor.reporting import history

SIZES = 32, 32
"""More rows than classes, so that a gradient of the logits is larger than one of the weight."""

ERROR = r'gradient.*inside the compiled function.*lce_inductor\.defer\(.*install\(returned_logits="keep"\)'


def penalty(loss: Tensor, z: Tensor) -> Tensor:
    return loss + 0.1 * z.float().logsumexp(-1).pow(2).mean()


def distillation(loss: Tensor, z: Tensor) -> Tensor:
    teacher = torch.linspace(0, 3, V).softmax(-1).expand(z.shape)
    return loss + F.kl_div(z.float().log_softmax(-1), teacher, reduction="batchmean")


def alone(loss: Tensor, z: Tensor) -> Tensor:
    return penalty(loss.detach(), z)


OUTER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {f.__name__: f for f in (penalty, distillation, alone)}
Call = Callable[[Tensor, Tensor], Tensor]


class Capped(Model):
    """Returns what it makes of the head's output."""

    def forward(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = 3.0 * torch.tanh(self.head(torch.tanh(self.body(x))).float() / 3.0)[:, 1:]
        return F.cross_entropy(logits.reshape(-1, V), target[:, 1:].reshape(-1)), logits


def behind_a_break(model: nn.Module, outer: Any, backend: Any) -> Call:
    def step(x: Tensor, y: Tensor) -> Tensor:
        loss, z = model(x, y)
        torch._dynamo.graph_break()
        return outer(loss, z)

    return torch.compile(step, backend=backend)


def in_eager(model: nn.Module, outer: Any, backend: Any) -> Call:
    compiled = torch.compile(model, backend=backend)
    return lambda x, y: outer(*compiled(x, y))


def compiled_apart(model: nn.Module, outer: Any, backend: Any) -> Call:
    return in_eager(model, torch.compile(outer, backend=backend), backend)


PLACES: dict[str, Callable[..., Call]] = {f.__name__: f for f in (behind_a_break, in_eager, compiled_apart)}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def check(
    model: nn.Module, place: Any, outer: Any, autocast: bool = False, remedy: str = "defer", error: float = 1e-5
) -> list[GraphRecord]:
    """Loss and all gradients with a remedy are eager's, up to that relative error. Returns the compiled graphs."""
    reference, args, graphs = copy.deepcopy(model), batch(*SIZES), []
    settings = {"returned_logits": "keep"} if remedy == "keep" else {}
    with lce_inductor.installed(min_logits_bytes=0, **settings), torch.autocast("cpu", torch.bfloat16, autocast):
        with lce_inductor.defer(model.head) if remedy == "defer" else contextlib.nullcontext():
            loss = place(model, outer, no_codegen_backend(graphs))(*args)
        loss.backward()
        expected = outer(*reference(*args))
        expected.backward()
    torch.testing.assert_close(loss, expected, rtol=error, atol=0)
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) == (not q.requires_grad), name
        if q.grad is not None:
            assert (p.grad - q.grad).norm() <= error * q.grad.norm(), name
    return graphs


def held(graphs: list[GraphRecord]) -> bool:
    return max(g.largest for g in graphs) >= SIZES[0] * SIZES[1] * V


@pytest.mark.parametrize("place, outer", crossed(list(PLACES), list(OUTER)))
def test_without_a_remedy_it_raises(place: str, outer: str) -> None:
    with lce_inductor.installed(min_logits_bytes=0):
        loss = PLACES[place](Model(), OUTER[outer], no_codegen_backend([]))(*batch(*SIZES))
        with pytest.raises(RuntimeError, match=ERROR):
            loss.backward()


@pytest.mark.parametrize("place, outer, frozen", crossed(list(PLACES), list(OUTER), ["", "head", "body"]))
def test_a_deferred_head_has_gradients(place: str, outer: str, frozen: str) -> None:
    """And no compiled graph holds the logits or their gradient."""
    model = Model(bias=outer != "alone")
    if frozen:
        getattr(model, frozen).requires_grad_(False)
    assert not held(check(model, PLACES[place], OUTER[outer]))


@pytest.mark.parametrize("place, outer", crossed(list(PLACES), list(OUTER)))
def test_a_deferred_head_under_autocast(place: str, outer: str) -> None:
    assert not held(check(Model(), PLACES[place], OUTER[outer], autocast=True, error=1e-2))


@pytest.mark.parametrize("place", PLACES)
def test_what_a_model_makes_of_a_deferred_head_is_held(place: str) -> None:
    """A cast, a cap and a slice stand in the graph that returns them: right, and computed."""
    assert held(check(Capped(), PLACES[place], penalty))


@pytest.mark.parametrize("place", PLACES)
def test_logits_that_are_kept(place: str) -> None:
    assert held(check(Model(), PLACES[place], penalty, remedy="keep"))


@pytest.mark.parametrize("remedy", ["defer", "keep"])
@pytest.mark.parametrize("name", [n for n in DIFFERENTIATE if n != "deepcopy"])  # which eager refuses
def test_whatever_differentiates_them(name: str, remedy: str) -> None:
    """What raises in test_deferred_compiled.py."""
    model = Model()
    reference, args = copy.deepcopy(model), batch()
    settings = {"returned_logits": "keep"} if remedy == "keep" else {}
    with lce_inductor.installed(min_logits_bytes=0, **settings):
        if remedy == "defer":
            lce_inductor.defer(model.head)
        loss, z = torch.compile(model, backend=no_codegen_backend([]))(*args)
        assert z.shape == (B, T, V)
        (loss + DIFFERENTIATE[name](z)).backward()
    loss, z = reference(*args)
    (loss + DIFFERENTIATE[name](z)).backward()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)


def test_the_loss_inside() -> None:
    """The third remedy: a compiled function that calls the model and has both losses."""
    model, args, graphs = Model(), batch(*SIZES), []
    reference = copy.deepcopy(model)
    with lce_inductor.installed(min_logits_bytes=0):
        step = torch.compile(lambda x, y: distillation(*model(x, y)), backend=no_codegen_backend(graphs))
        step(*args).backward()
    distillation(*reference(*args)).backward()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    assert not held(graphs)


def test_a_causal_model_of_transformers() -> None:
    pytest.importorskip("transformers")
    from corpus.hf import text
    from corpus.hf_llama import llama

    def total(out: Any) -> Tensor:
        teacher = torch.linspace(0, 3, out.logits.shape[-1]).softmax(-1).expand(out.logits.shape)
        return out.loss + F.kl_div(out.logits.float().log_softmax(-1), teacher, reduction="batchmean")

    model = llama()
    reference, graphs = copy.deepcopy(model), []
    with lce_inductor.installed(min_logits_bytes=0):
        with pytest.raises(RuntimeError, match=ERROR):
            total(torch.compile(model, backend=no_codegen_backend([]))(**text())).backward()
        model.zero_grad()
        torch._dynamo.reset()
        lce_inductor.defer(model)
        loss = total(torch.compile(model, backend=no_codegen_backend(graphs))(**text()))
        loss.backward()
    expected = total(reference(**text()))
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 1e-5 * q.grad.norm(), name


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}])
@pytest.mark.parametrize("compile_outside", [False, True])
def test_ddp(options: dict[str, bool], compile_outside: bool, one_process: None) -> None:
    """Also where it clones the outputs of the model; a clone that is compiled is real."""

    def place(model: nn.Module, outer: Any, backend: Any) -> Call:
        if compile_outside:
            wrapped = torch.compile(nn.parallel.DistributedDataParallel(model, **options), backend=backend)
        else:
            wrapped = nn.parallel.DistributedDataParallel(torch.compile(model, backend=backend), **options)
        loss = torch.compile(outer, backend=backend)
        return lambda x, y: loss(*wrapped(x, y))

    history.forget()
    graphs = check(Model(), place, penalty)
    assert not lce_inductor.report().reads and held(graphs) == (compile_outside and bool(options))
