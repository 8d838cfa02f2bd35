"""DeferredLogits as compiled functions return and take them."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from corpus.harness import no_codegen_backend
from deferred_cases import DIFFERENTIATE, B, H, Model, T, V, batch, close, pair, real
from torch import Tensor, nn
from torch._dynamo.utils import counters

import lce_inductor
from lce_inductor.deferred_logits.tensor import DeferredLogits


@pytest.fixture
def deferring() -> Iterator[None]:
    with lce_inductor.installed(min_logits_bytes=0):
        yield


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_compiled(dynamic: bool, bias: bool, deferring: None) -> None:
    model = Model(bias)
    compiled = torch.compile(model, dynamic=dynamic)
    for sizes in [(B, T), (B + 1, T + 2)] if dynamic else [(B, T)]:
        args = batch(*sizes)
        loss, z = compiled(*args)
        expected_loss, expected = model(*args)
        assert isinstance(z, DeferredLogits) and z.requires_grad and z.shape == expected.shape
        close(real(z), expected.detach())
        close(loss.detach(), expected_loss.detach())
        loss.backward()
        close(real(z), expected.detach())  # the backward overwrites nothing that they need
        grads = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        expected_loss.backward()
        close(grads, [p.grad for p in model.parameters()])
        model.zero_grad()
    assert counters["lce_inductor"]["rewritten"] >= 1


def test_nothing_of_their_size_in_the_graphs(deferring: None) -> None:
    graphs: list[Any] = []
    model = Model()
    loss, z = torch.compile(model, backend=no_codegen_backend(graphs))(*batch(64, 64))
    assert isinstance(z, DeferredLogits)
    loss.backward()
    assert max(g.largest for g in graphs) <= 64 * 64 * H
    assert len(graphs) == 2


class ViewModel(Model):
    """Weight, bias and hidden states are views of what the compiled graph is given."""

    def forward(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(x[:, 1:], self.head.weight[:-3], self.head.bias[:-3])
        return F.cross_entropy(logits.reshape(-1, V - 3), target[:, 1:].reshape(-1) % (V - 3)), logits


@pytest.mark.parametrize("model", [Model, ViewModel])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_notices_writes(model: Any, mode: Any, dynamic: bool, deferring: None) -> None:
    """Also where the graph returns a view of its input, which has a version counter of its own."""
    model, args = model(), batch()
    compiled = torch.compile(model, dynamic=dynamic)
    written = [model.head.weight, model.head.bias, *([args[0]] if isinstance(model, ViewModel) else [])]
    for t in written:
        with mode():
            _, z = compiled(*args)
            assert isinstance(z, DeferredLogits) and z.requires_grad == torch.is_grad_enabled()
            close(real(z), model(*args)[1].detach())
        expected = model(*args)[1].detach()
        with torch.no_grad():
            t[-1] += 1  # of a ViewModel's weight, a part that the head does not read: either is right
        try:
            close(real(z), expected)
            assert model is not Model
        except RuntimeError as error:
            assert "changed since" in str(error)
        with torch.no_grad():
            t[0] += 1
        with pytest.raises(RuntimeError, match="changed since"):
            z.sum()


def test_compiled_notices_fused_optimizers(deferring: None) -> None:
    model, args = Model(), batch()
    compiled, optimizer = torch.compile(model), torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(2):
        loss, z = compiled(*args)
        loss.backward()
        kept = z.detach().clone()
        optimizer.step()
        with pytest.raises(RuntimeError, match=r"optimizer\.step"):
            z.argmax(-1)
        assert kept.isfinite().all()


@pytest.mark.parametrize("name", DIFFERENTIATE)
def test_compiled_gradient_raises(name: str, deferring: None) -> None:
    loss, z = torch.compile(Model(), backend=no_codegen_backend([]))(*batch())
    extra = DIFFERENTIATE[name](z)
    with pytest.raises(RuntimeError, match=r'gradient.*returned_logits="keep"'):
        (loss + extra).backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compiled_under_autocast(dtype: torch.dtype, deferring: None) -> None:
    model, args = Model(), batch()
    with torch.autocast("cpu", dtype=dtype):
        _, z = torch.compile(model, backend=no_codegen_backend([]))(*args)
        _, expected = model(*args)
    assert isinstance(z, DeferredLogits) and z.dtype == expected.dtype == dtype
    close(real(z), expected.detach())


def test_returned_beside_their_hidden_states(deferring: None) -> None:
    class Both(Model):
        def forward(self, x: Tensor, target: Tensor) -> tuple[Tensor, ...]:
            hidden = torch.tanh(self.body(x))
            logits = self.head(hidden)
            return F.cross_entropy(logits.view(-1, V), target.view(-1)), logits, hidden, logits

    model, args = Both(), batch()
    loss, z, hidden, again = torch.compile(model)(*args)
    for t in (z, again):
        assert isinstance(t, DeferredLogits) and not t.x.requires_grad
        close(real(t), model(*args)[1].detach())
    (loss + hidden.sum()).backward()
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    expected = model(*args)
    (expected[0] + expected[2].sum()).backward()
    close(found, [p.grad for p in model.parameters()])
    with torch.no_grad():
        hidden.add_(1)
    with pytest.raises(RuntimeError, match="hidden states"):
        z.sum()


def test_frozen_model_needs_no_barrier(deferring: None) -> None:
    model = Model().requires_grad_(False)
    _, z = torch.compile(model, backend=no_codegen_backend([]))(*batch())
    assert isinstance(z, DeferredLogits) and not z.requires_grad


def test_freed_with_their_last_reference(deferring: None) -> None:
    _, z = torch.compile(Model())(*batch())
    reference = weakref.ref(z)
    gc.disable()
    try:
        del z
        assert reference() is None
    finally:
        gc.enable()


# -- given to other compiled functions


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("grad", [True, False])
def test_input_of_another_compiled_function(dynamic: bool, grad: bool, recwarn: pytest.WarningsRecorder) -> None:
    def metrics(z: Tensor) -> tuple[Tensor, ...]:
        return z.float().logsumexp(-1).mean(), z.argmax(-1), z[:, -1], z * 2

    with torch.set_grad_enabled(grad):
        z, expected, (x, weight, _) = pair()
        compiled = torch.compile(metrics, dynamic=dynamic, backend=no_codegen_backend([]))
        found = compiled(z)
        close([t.detach() for t in found], [t.detach() for t in metrics(expected)])
    if grad:
        for i in (0, 2, 3):
            with pytest.raises(RuntimeError, match=r'returned_logits="keep"'):
                (x.sum() + compiled(z)[i].sum()).backward()
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(Exception, match="changed since"):
        compiled(z)
    assert not [w for w in recwarn if "DeferredLogits" in str(w.message)]


def test_views_of_them_as_inputs() -> None:
    views = [lambda z: z[:, -1], lambda z: z.transpose(1, 2), lambda z: z.detach(), lambda z: z[..., :9]]
    for view in views:
        torch._dynamo.reset()
        z, expected, _ = pair()
        found = torch.compile(lambda y: y * 2, backend=no_codegen_backend([]))(view(z))
        close(found.detach(), 2 * view(expected).detach())


def test_returned_through_a_graph_break(deferring: None) -> None:
    def run(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        loss, z = model(x, target)
        torch._dynamo.graph_break()
        return loss * 2, z

    model, args = Model(), batch()
    loss, z = torch.compile(run, backend=no_codegen_backend([]))(*args)
    assert isinstance(z, DeferredLogits)
    close(real(z), model(*args)[1].detach())
    loss.backward()


# -- caches

SCRIPT = """
    import torch
    import lce_inductor
    from deferred_cases import Model, batch
    from lce_inductor.deferred_logits.tensor import DeferredLogits
    from torch._dynamo.utils import counters

    lce_inductor.install(min_logits_bytes=0)
    torch.manual_seed(0)
    model, args = Model(), batch()
    loss, z = torch.compile(model)(*args)
    assert isinstance(z, DeferredLogits) and z.requires_grad
    loss.backward()
    torch.testing.assert_close(z.detach().clone(), model(*args)[1].detach())
    try:
        (z.sum() + model.head.weight.sum()).backward()
    except RuntimeError as error:
        assert "keep" in str(error)
    else:
        raise AssertionError("no error")
    with torch.no_grad():
        model.head.weight.add_(1)
    try:
        z.sum()
    except RuntimeError as error:
        assert "changed since" in str(error)
    else:
        raise AssertionError("no error")
    aot, fx = counters["aot_autograd"], counters["inductor"]
    print("hits", aot["autograd_cache_hit"], "misses", aot["autograd_cache_miss"], "saved", aot["autograd_cache_saved"],
          "bypassed", aot["autograd_cache_bypass"] + fx["fxgraph_cache_bypass"])
"""


def test_caches_of_another_process(tmp_path: Path) -> None:
    here = Path(__file__).parent
    env = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
    }
    lines = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(SCRIPT)], env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        lines.append(done.stdout.strip())
    assert lines == ["hits 0 misses 1 saved 1 bypassed 0", "hits 1 misses 0 saved 0 bypassed 0"]


# -- distributed


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}])
@pytest.mark.parametrize("compile_outside", [False, True])
def test_ddp(options: dict[str, bool], compile_outside: bool, one_process: None, deferring: None) -> None:
    model, args = Model(), batch()
    backend = no_codegen_backend([])
    if compile_outside:
        wrapped = torch.compile(nn.parallel.DistributedDataParallel(model, **options), backend=backend)
    else:
        wrapped = nn.parallel.DistributedDataParallel(torch.compile(model, backend=backend), **options)
    for _ in range(2):
        loss, z = wrapped(*args)
        assert isinstance(z, DeferredLogits)  # DDP's clone of its outputs included
        loss.backward()
        close(real(z), model(*args)[1].detach())
    loss, z = wrapped(*args)
    with pytest.raises(RuntimeError, match="gradient"):
        (loss + z.sum()).backward()
