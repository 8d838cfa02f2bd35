"""Views of pending logits for which there is no rule: they wait, so that a write to one is refused and never lost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lce_inductor
from lce_inductor.deferred_heads.logits import PendingLogits
from lce_inductor.deferred_logits.tensor import DeferredLogits
from lce_inductor.reporting import history

B, T, H, V = 2, 7, 8, 12

VIEWS: dict[str, Callable[[Tensor], Any]] = {
    "a class": lambda z: z[..., 3],
    "a class by select": lambda z: torch.select(z, -1, 3),
    "every other class": lambda z: z[..., ::2],
    "narrow": lambda z: z.narrow(-1, 2, 5),
    "flat": lambda z: z.view(-1),
    "classes in two": lambda z: z.unflatten(-1, (3, 4)),
    "rows and classes in one": lambda z: z.flatten(1),
    "mT": lambda z: z.mT,
    "diagonal": lambda z: z.diagonal(dim1=1, dim2=2),
    "expand": lambda z: z.expand(3, B, T, V),
    "windows": lambda z: z.unfold(-1, 4, 2),
    "chunks": lambda z: z.chunk(3, dim=-1),
    "unbind": lambda z: z.unbind(-1),
    "of a view": lambda z: z[..., ::2].mT[0],
    "of log-probabilities": lambda z: z.log_softmax(-1)[..., 3],
    "itself on the CPU": lambda z: z.cpu(),
}


@pytest.fixture
def heads(installed: None) -> tuple[nn.Module, nn.Module]:
    history.forget()
    head = nn.Linear(H, V, dtype=torch.float64)
    plain = copy.deepcopy(head)
    lce_inductor.defer(head)
    return head, plain


def tensors(found: Any) -> list[Tensor]:
    return list(found) if isinstance(found, tuple | list) else [found]


@pytest.mark.parametrize("name", VIEWS)
def test_values_and_gradients_are_eagers(name: str, heads: tuple[nn.Module, nn.Module]) -> None:
    x, found = torch.randn(B, T, H, dtype=torch.float64), []
    for head in heads:
        given = x.clone().requires_grad_()
        views = tensors(VIEWS[name](head(given)))
        assert all(isinstance(v, PendingLogits) == (head is heads[0]) for v in views)
        loss = sum((v.square() * (n + 1)).sum() + v.exp().mean() for n, v in enumerate(views))
        loss.backward()
        found.append([*(v.detach() + 0 for v in views), given.grad, *(p.grad for p in head.parameters())])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("grad", [True, False])
def test_writes_are_refused(name: str, grad: bool, heads: tuple[nn.Module, nn.Module]) -> None:
    with torch.set_grad_enabled(grad):
        view = tensors(VIEWS[name](heads[0](torch.randn(B, T, H, dtype=torch.float64))))[0]
        with pytest.raises(RuntimeError, match=r"cannot write to them: write to logits\.clone\(\)"):
            view.fill_(0.0)


def test_a_view_is_computed_once(heads: tuple[nn.Module, nn.Module]) -> None:
    """As eager's variable, and unlike logits, of which nothing is kept."""
    view = heads[0](torch.randn(B, T, H, dtype=torch.float64)).mT
    assert (view.exp() > 0).all() and view.std() > 0
    (reads,) = lce_inductor.report().reads
    assert reads.count == 1


def test_in_a_compiled_function(heads: tuple[nn.Module, nn.Module]) -> None:
    def loss(z: Tensor) -> Tensor:
        return z.logsumexp(1).square().mean()

    x = torch.randn(B, T, H, dtype=torch.float64)
    ours = torch.compile(loss, backend="aot_eager")(heads[0](x).mT)
    torch.testing.assert_close(ours, loss(heads[1](x).mT))
    for name in ("a class", "every other class", "chunks"):
        view, plain = (tensors(VIEWS[name](head(x)))[0] for head in heads)
        torch.testing.assert_close(torch.compile(torch.sin, backend="aot_eager")(view), plain.sin())


def test_functions_that_make_no_view_read(heads: tuple[nn.Module, nn.Module]) -> None:
    z = heads[0](torch.randn(B, T, H, dtype=torch.float64))
    found = [
        z.exp(),
        z[..., torch.tensor([1, 2])],
        z.view(torch.int64),
        z.sum(),
        z.sort(-1).values,
        z.unbind(-1)[0] + 1,
    ]
    assert not any(isinstance(t, PendingLogits) for t in found)
    with pytest.raises(IndexError):
        z.select(-1, V)


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "logits": lambda z: z,
    "rows": lambda z: z[1:, 2:],
    "classes": lambda z: z[..., 5:],
    "transposed": lambda z: z.transpose(1, 2),
    "transposed and scaled": lambda z: z.transpose(1, 2) / 2,
    "rows transposed": lambda z: z.transpose(0, 1),
    "every other class": lambda z: z[..., 5::2],
    "mT of classes": lambda z: z[..., 3:].mT,
    "log-probabilities": lambda z: z.log_softmax(-1)[..., 5:],
    "kept": lambda z: read(z.log_softmax(-1))[..., 5:],
    "view of kept": lambda z: read(z.log_softmax(-1))[..., 5:].mT,
    "expanded": lambda z: z.expand(3, B, T, V),
    "expanded and scaled": lambda z: z.expand(3, B, T, V) * 2,
}


def read(z: Tensor) -> Tensor:
    assert z.exp().sum() > 0
    return z


def by_strides(q: Tensor) -> Tensor:
    return torch.as_strided(q, q.size(), q.stride(), q.storage_offset())


@pytest.mark.parametrize("name", STRIDED)
def test_strides_are_those_of_the_values(name: str, heads: tuple[nn.Module, nn.Module]) -> None:
    """What reads memory by the strides that a tensor reports finds the tensor's own values."""
    x, found = torch.randn(B, T, H, dtype=torch.float64), []
    for head in heads:
        q = STRIDED[name](head(x))
        (by_strides(q).square() * torch.arange(q.numel()).view(q.shape)).sum().backward()
        compiled = torch.compile(by_strides, backend="aot_eager")
        found.append([by_strides(q), by_strides(q.clone()), compiled(q), *(p.grad for p in head.parameters())])
        assert q.numel() > B * T * V or by_strides(q + 0).stride() == (q + 0).stride()
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours + 0, plain + 0, rtol=1e-9, atol=1e-11)


def test_another_device_is_that_device(heads: tuple[nn.Module, nn.Module]) -> None:
    z = heads[0](torch.randn(B, T, H, dtype=torch.float64))
    for moved in (z.to("meta"), z.to(device="meta"), z.to("meta", torch.float32)):
        assert moved.is_meta and not isinstance(moved, PendingLogits)
    assert z.to("cpu") is z


FLAT: dict[str, Callable[[Tensor], Tensor]] = {
    "ravel": lambda z: z.ravel().view(z.shape),
    "view": lambda z: z.view(-1).view(z.shape),
    "three": lambda z: z.view(-1).view(V, -1).reshape(z.shape),
    "scaled": lambda z: z.div(0.7).flatten().unflatten(0, z.shape),
    "transposed": lambda z: z.transpose(1, 2).reshape(-1).view(z.mT.shape).transpose(1, 2),
}


@pytest.mark.parametrize("name", FLAT)
def test_one_dimension_and_back_is_no_view(name: str, heads: tuple[nn.Module, nn.Module]) -> None:
    x = torch.randn(B, T, H, dtype=torch.float64)
    for head in heads:
        z = FLAT[name](head(x))
        assert not isinstance(z, PendingLogits) or not any(s.name == "view" for s in z.spec.steps)
        (z.square() * torch.arange(z.numel()).view(z.shape)).sum().backward()
    for p, q in zip(*(head.parameters() for head in heads), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_label_smoothing_behind_one_dimension(heads: tuple[nn.Module, nn.Module]) -> None:
    x, y, hooks = torch.randn(B, T, H, dtype=torch.float64), torch.arange(B * T) % V, []
    for t in (T, T - 1, T - 2):
        for head in heads:
            z = head(x[:, :t])
            flat = z.ravel()
            flat.register_hook(lambda g: hooks.append(g.shape))
            F.cross_entropy(flat.view(z.shape).reshape(-1, V), y[: B * t], label_smoothing=0.1).backward()
    for p, q in zip(*(head.parameters() for head in heads), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert hooks[::2] == hooks[1::2] and not lce_inductor.report().reads


def test_what_torch_cannot_compile_reads(heads, monkeypatch, caplog) -> None:
    def fails(*kind: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            tried.append(kind)
            raise torch._dynamo.exc.BackendCompilerFailed(fails, TypeError("Cannot convert"), None)

        return call

    tried: list[Any] = []
    monkeypatch.setattr("lce_inductor.deferred_heads.loss._compiled", fails)
    x, y = torch.randn(T, H, dtype=torch.float64), torch.arange(T)
    for _ in range(2):
        ours, plain = (F.cross_entropy(head(x), y, label_smoothing=0.125) for head in heads)
        torch.testing.assert_close(ours, plain)
    assert len(tried) == 1 and caplog.text.count("cross_entropy of pending logits is not compiled") == 1
    assert lce_inductor.report().reads


@pytest.mark.parametrize("name", ["classes", "every other class", "mT of classes", "rows"])
def test_strides_of_detached_logits(name: str, heads: tuple[nn.Module, nn.Module]) -> None:
    x = torch.randn(B, T, H, dtype=torch.float64)
    ours, plain = (STRIDED[name](head(x).detach()) for head in heads)
    assert type(ours) is DeferredLogits
    torch.testing.assert_close(by_strides(ours) + 0, plain + 0)


@pytest.mark.parametrize(
    "how", [{"non_blocking": True}, {"copy": True}, {"memory_format": torch.contiguous_format}, {}]
)
def test_another_device_whatever_else_is_asked(how, installed):
    head = nn.Linear(8, 37)
    lce_inductor.defer(head)
    z = head(torch.randn(24, 8))
    for found in (z.to("meta", **how), z.to(torch.empty(1, device="meta"), **how), z.to("meta", torch.float64, **how)):
        assert found.device.type == "meta"
