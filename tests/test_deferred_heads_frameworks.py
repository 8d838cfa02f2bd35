"""What frameworks do with logits that they hold in eager, at the heads of lce_inductor.defer()."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from corpus.harness import no_codegen_backend
from torch import Tensor, nn

import lce_inductor
from lce_inductor.deferred_heads.logits import PendingLogits
from lce_inductor.reporting import history

B, T, H, V = 2, 7, 8, 101


@pytest.fixture(autouse=True)
def quick(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No code generation; a report of this test alone."""
    backend = no_codegen_backend([])
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda gm, inputs, **options: backend(gm, inputs))
    history.forget()


def selected(z: Tensor, y: Tensor) -> Tensor:
    return z.gather(-1, y[..., None]).squeeze(-1)


def smoothed(z: Tensor, y: Tensor) -> Tensor:
    """transformers' LabelSmoother."""
    transformers = pytest.importorskip("transformers")
    return transformers.trainer_pt_utils.LabelSmoother(epsilon=0.1)({"logits": z}, y.clone(), shift_labels=True)


def rows_one_by_one(z: Tensor, y: Tensor) -> Tensor:
    """TRL's and verl's logits in fp32 or wider."""
    return (selected(z, y) - torch.stack([torch.logsumexp(row, dim=-1) for row in z])).square().mean()


def rows_of_chunks(z: Tensor, y: Tensor) -> Tensor:
    """OpenRLHF's, with a temperature."""
    z.div_(0.7)
    flat, lse = z.reshape(-1, V), torch.zeros(B * T, dtype=z.dtype)
    for start in range(0, B * T, 4):
        lse[start : start + 4] = torch.logsumexp(flat[start : start + 4], dim=-1)
    return (selected(z, y) - lse.view(B, T)).square().mean()


def smoothed_images(z: Tensor, y: Tensor) -> Tensor:
    """timm's LabelSmoothingCrossEntropy."""
    log_probs = F.log_softmax(z.flatten(0, 1), dim=-1)
    nll = -log_probs.gather(dim=-1, index=y.reshape(-1, 1)).squeeze(1)
    return (0.9 * nll - 0.1 * log_probs.mean(dim=-1)).mean()


# A loss, and how many functions are compiled for it.
LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    "label smoothing": (smoothed, 2),
    "rows one by one": (rows_one_by_one, 1),
    "rows of chunks": (rows_of_chunks, 2),  # the last chunk is smaller
    "smoothed images": (smoothed_images, 2),
    "softmax": (lambda z, y: -torch.softmax(z, -1).gather(-1, y[..., None]).log().mean(), 1),
    "softcapped and selected": (lambda z, y: selected(-(30 * torch.tanh(z / 30)), y).square().mean(), 0),
    "several of a row": (lambda z, y: z.gather(2, torch.stack([y, y.flip(0)], -1)).square().mean(), 0),
    "over rows": (lambda z, y: z.logsumexp(1).square().mean() + z.gather(0, y[:1, :, None] % 2).mean(), 0),
    "over all": (lambda z, y: z.log_softmax(-1).mean() + z.sum(-1).square().mean() + z.softmax(1)[0].mean(), 0),
}
READ = {"over rows", "over all"}


def both(loss: Any, dtype: torch.dtype = torch.float64, bias: bool = True) -> list[list[Tensor]]:
    """The loss and its gradients, of a head under defer() and of the same head in eager."""
    head = nn.Linear(H, V, bias=bias, dtype=dtype)
    plain = copy.deepcopy(head)
    lce_inductor.defer(head)
    x, y, found = torch.randn(B, T, H, dtype=dtype), torch.randint(0, V, (B, T)), []
    for h in (head, plain):
        given = x.clone().requires_grad_()
        z = h(given)
        assert isinstance(z, PendingLogits) == (h is head)
        value = loss(z, y)
        value.backward()
        found.append([value, given.grad, *(p.grad for p in h.parameters())])
    return found


@pytest.mark.parametrize("name", LOSSES)
def test_eager_losses(name: str) -> None:
    loss, compiled = LOSSES[name]
    ours, plain = both(loss)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    report = lce_inductor.report()
    assert report.left_alone == 0 and report.rewritten == compiled
    assert bool(report.reads) == (name in READ)


@pytest.mark.parametrize("name", ["label smoothing", "softcapped and selected"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes_are_eagers(name: str, dtype: torch.dtype) -> None:
    """Also those that autocast makes."""

    def loss(z: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return LOSSES[name][0](z, y)

    ours, plain = both(loss, dtype)
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    for a, b in zip(ours, plain, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("call", [
    lambda z, y: z.gather(-1, y[..., None] + V), lambda z, y: z.gather(-1, y), lambda z, y: z.logsumexp(5),
    lambda z, y: z.log_softmax(4), lambda z, y: z.softmax(-1).gather(-1, y),
])  # fmt: skip
def test_bad_input_is_eagers_error(call: Callable[[Tensor, Tensor], Tensor]) -> None:
    head, x, y = nn.Linear(H, V), torch.randn(B, T, H), torch.randint(0, V, (B, T))
    with pytest.raises(Exception) as expected:
        call(head(x), y)
    lce_inductor.defer(head)
    with pytest.raises(type(expected.value)):
        call(head(x), y)


@pytest.mark.parametrize("grad", [True, False])
def test_rows_of_every_length(grad: bool) -> None:
    """torchtune's, of a policy and of a reference without gradients; the rows are not all of a batch."""
    head = nn.Linear(H, V)
    plain = copy.deepcopy(head)
    lce_inductor.defer(head)
    with torch.set_grad_enabled(grad):
        for t in (T, T - 2, T - 1):
            x, y = torch.randn(B, t, H), torch.randint(0, V, (B, t - 1, 1))
            for read in (lambda z: torch.gather(F.log_softmax(z[:, :-1] / 0.7, dim=-1), 2, y), lambda z: z.argmax(-1)):
                torch.testing.assert_close(read(head(x)), read(plain(x)))
    report = lce_inductor.report()
    assert (report.rewritten, report.left_alone) == (2, 0)
    assert all(reads.pending for reads in report.reads)


def test_a_helper_of_unknown_sizes() -> None:
    """verl compiles its entropy with dynamic=True; the gradient of each row is another."""

    def entropy(z: Tensor) -> Tensor:
        return torch.logsumexp(z, -1) - torch.sum(F.softmax(z, dim=-1) * z, dim=-1)

    helper = torch.compile(entropy, dynamic=True)
    ours, plain = both(lambda z, y: (helper if isinstance(z, PendingLogits) else entropy)(z / 0.7).square().mean())
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    (record,) = lce_inductor.report().records
    assert record.rewritten


def jensen_shannon(z: Tensor, teacher: Tensor) -> Tensor:
    """TRL's generalized_jsd_loss."""
    ours, theirs = F.log_softmax(z / 0.9, dim=-1), F.log_softmax(teacher / 0.9, dim=-1)
    mixture = torch.logsumexp(torch.stack([ours, theirs]), dim=0)
    found = F.kl_div(mixture, theirs, reduction="none", log_target=True)
    return (found + F.kl_div(mixture, ours, reduction="none", log_target=True)).mean()


def test_log_probabilities_are_computed_once() -> None:
    """A divergence reads those of student and teacher twice each: one product of each head, and eager's gradients."""
    teacher = nn.Linear(H, V, dtype=torch.float64).requires_grad_(False)
    known = torch.randn(B, T, H, dtype=torch.float64)
    lce_inductor.defer(teacher)
    ours, plain = both(lambda z, y: jensen_shannon(z, teacher(known)))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    # The teacher's are pending in eager's way, too.
    assert sum(reads.products for reads in lce_inductor.report().reads) == 3


def test_numbers_of_log_probabilities_that_are_there() -> None:
    """Behind a read, gather and sum compile nothing; in another grad mode they are read anew."""

    def loss(z: Tensor, y: Tensor) -> Tensor:
        p = z.log_softmax(-1)
        with torch.no_grad():
            entropy = -(p.exp() * p).sum()
        return -(p.exp() * p).sum() - selected(p, y).sum() + p[..., :9].sum() + entropy

    ours, plain = both(loss)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    report = lce_inductor.report()
    assert sum(reads.count for reads in report.reads) == 2 and not report.records


def test_kept_log_probabilities_are_not_those_of_another_step() -> None:
    head, x = nn.Linear(H, V), torch.randn(T, H)
    lce_inductor.defer(head)
    log_probs = head(x).log_softmax(-1)
    assert log_probs.exp().sum(-1).allclose(torch.ones(T))
    with torch.no_grad():
        head.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="weight of their head changed since"):
        log_probs.exp()


def test_reports_name_the_line_that_calls_a_loss() -> None:
    """And not the one of the package that compiles it."""
    head, y = nn.Linear(H, V), torch.randint(0, V, (T,))
    lce_inductor.defer(head)
    nn.CrossEntropyLoss()(head(torch.randn(T, H)), y)  # the first line
    head(torch.randn(T, H)).logsumexp(-1).sum().backward()  # the second line
    first, second = lce_inductor.report().records
    for record, line in ((first, "the first line"), (second, "the second line")):
        assert record.rewritten
        for source in (record.source, *record.losses):
            assert source.startswith(__file__) and source.endswith(line), source


def test_errors_of_metrics_name_what_helps_there() -> None:
    """Detached logits of a head under defer() are deferred as a compiled model's; install() has no setting for them."""
    head = nn.Linear(H, V)
    lce_inductor.defer(head)
    found = head(torch.randn(T, H)).detach()
    errors = [lambda: found.data_ptr(), lambda: found.add_(1), lambda: found.share_memory_(), lambda: found.sum()]
    with torch.no_grad():
        head.weight.add_(1)
    for call in errors:
        with pytest.raises(
            RuntimeError, match=r"a head under lce_inductor\.defer.*defer\(\.\.\.\)\.remove\(\)"
        ) as error:
            call()
        assert "returned" not in str(error.value)
