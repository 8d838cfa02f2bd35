"""Features of torch around a rewritten head: the head is rewritten, and the numbers are those without the package.

Activation checkpointing, gradient accumulation and symbolic shapes of single graphs are in test_schedule.py and
test_recognize.py; deferred logits have their own files.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from corpus.harness import no_codegen_backend
from harness import Compiled, N, V, assert_as_accurate, head
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import lce_inductor

H = 8
BF16, FP16 = torch.bfloat16, torch.float16


class Model(nn.Module):
    """A body and a head; the loss is part of it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(H, H), nn.Linear(H, V)
        self.options = options

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.head(torch.tanh(self.body(x))), y, **self.options)


def batch(n: int = N, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, H, generator=g), torch.randint(0, V, (n,), generator=g)


def loss_of(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w), y)


def quick(fn: Any, **options: Any) -> Any:
    """torch.compile with Inductor's graph passes, without code generation."""
    return torch.compile(fn, backend=no_codegen_backend([]), **options)


Train = Callable[[Callable[[Any], Any]], list[Tensor]]


def compare(train: Train, rewritten: int = 1, rtol: float = 1e-5, **settings: Any) -> Counter[str]:
    """Run `train` with the given way to compile: without the package, with it, and uncompiled."""
    torch._dynamo.reset()
    counters.clear()
    plain = train(quick)
    assert not counters["lce_inductor"]
    torch._dynamo.reset()
    with lce_inductor.installed(min_logits_bytes=0, **settings):
        found = train(quick)
    counts = Counter(counters["lce_inductor"])
    assert counts["rewritten"] == rewritten and not any(k.startswith("refused") for k in counts), counts
    eager = train(lambda fn, **options: fn)
    for other in (plain, eager):
        torch.testing.assert_close(found, other, rtol=rtol, atol=rtol * 0.1)
    return counts


def grads(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters()]


# -- autocast and loss scaling


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_autocast(dtype, inside):
    """Against fp64, no less accurate than torch.compile alone."""

    def train(compile: Any, wide: bool = False) -> list[Tensor]:
        model = Model().double() if wide else Model()
        x, y = batch()

        def forward(x: Tensor, y: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype, enabled=not wide):
                return model(x, y)

        if inside:
            loss = compile(forward)(x.double() if wide else x, y)
        else:
            run = compile(model)
            with torch.autocast("cpu", dtype, enabled=not wide):
                loss = run(x.double() if wide else x, y)
        loss.backward()
        return [loss.detach(), *grads(model)]

    exact = train(lambda fn: fn, wide=True)
    plain = train(quick)
    torch._dynamo.reset()
    counters.clear()
    with lce_inductor.installed(min_logits_bytes=0):
        found = train(quick)
    assert counters["lce_inductor"]["rewritten"] == 1 and counters["lce_inductor"]["gradients:forward"] == 1
    assert_as_accurate(found, plain, exact, [dtype])


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_grad_scaler(where):
    """fp16 autocast with a loss scale: unscaled gradients, skipped steps and the scale's course are the same."""

    def train(compile: Any) -> list[Tensor]:
        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=2)
        scales = []

        def forward(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
            with torch.autocast("cpu", FP16):
                loss = model(x, y)
            return loss * scale if where == "inside" else loss

        run = compile(forward)
        for i in range(6):
            optimizer.zero_grad()
            scaler.scale(torch.zeros(()))  # makes the scale before the first use
            loss = run(*batch(seed=i), scaler._scale.clone())
            (loss if where == "inside" else scaler.scale(loss)).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        assert len(set(scales)) > 2  # some steps were skipped, some were not
        return [torch.tensor(scales), *(p.detach() for p in model.parameters())]

    def scales_and_weights(compile: Any) -> list[Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return train(compile)

    compare(scales_and_weights, rtol=2e-2)


# -- activation checkpointing, accumulation, several backward calls


class Checkpointed(Model):
    """Head and loss are computed again in the backward; `reentrant` is the older of the two ways."""

    reentrant = False

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x))
        tail = lambda h, y: F.cross_entropy(self.head(h), y)
        return checkpoint(tail, hidden, y, use_reentrant=self.reentrant)


@pytest.mark.parametrize("outside", [False, True], ids=["in the graph", "around the graph"])
def test_checkpoint_around_head_and_loss(outside):
    def train(compile: Any) -> list[Tensor]:
        model = Checkpointed()
        x, y = batch()
        if outside:
            tail = compile(lambda h, y: F.cross_entropy(model.head(h), y))
            loss = checkpoint(tail, torch.tanh(model.body(x)), y, use_reentrant=False)
        else:
            loss = compile(model)(x, y)
        loss.backward()
        return [loss.detach(), *grads(model)]

    compare(train)


def test_reentrant_checkpoint_around_a_compiled_head():
    """The first forward runs without gradients, the second with them: two graphs, both rewritten."""

    def train(compile: Any) -> list[Tensor]:
        model = Model()
        x, y = batch()
        tail = compile(lambda h, y: F.cross_entropy(model.head(h), y))
        loss = checkpoint(tail, torch.tanh(model.body(x)), y, use_reentrant=True)
        loss.backward()
        return [loss.detach(), *grads(model)]

    compare(train, rewritten=2)


@pytest.mark.parametrize("gradients", ["auto", "recompute"])
def test_gradient_accumulation(gradients):
    """Four micro-batches into the same .grad, the loss divided outside of the compiled function."""

    def train(compile: Any) -> list[Tensor]:
        model = Model()
        run = compile(model)
        for i in range(4):
            (run(*batch(seed=i)) / 4).backward()
        return grads(model)

    compare(train, gradients=gradients)


@pytest.mark.parametrize("gradients", ["auto", "recompute"])
def test_retain_graph(gradients):
    """The same graph backwards twice, with other cotangents."""

    def train(compile: Any) -> list[Tensor]:
        model = Model()
        loss = compile(model)(*batch())
        loss.backward(retain_graph=True)
        first = grads(model)
        (loss * 3).backward()
        return first + grads(model)

    compare(train, gradients=gradients)


def test_backward_without_retain_graph_twice_raises(installed):
    loss = quick(Model())(*batch())
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


# -- modes


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    """A graph without a backward: statistics only."""

    def train(compile: Any) -> list[Tensor]:
        with mode():
            loss = compile(Model())(*batch())
        assert not loss.requires_grad and loss.is_inference() == (mode is torch.inference_mode)
        return [loss.clone()]

    assert not any(k.startswith("gradients") for k in compare(train))


def test_evaluation_between_training_steps():
    """One compiled model with gradients, without, and with again."""

    def train(compile: Any) -> list[Tensor]:
        model = Model()
        run = compile(model)
        found = []
        for i in range(3):
            with torch.no_grad():
                found.append(run(*batch(seed=10 + i)))
            loss = run(*batch(seed=i))
            loss.backward()
            found.append(loss.detach())
        return found + grads(model)

    compare(train, rewritten=2)


def test_fullgraph():
    def train(compile: Any) -> list[Tensor]:
        model = Model(label_smoothing=0.1)
        loss = compile(model, fullgraph=True)(*batch()) if compile is quick else model(*batch())
        loss.backward()
        return [loss.detach(), *grads(model)]

    compare(train)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_compile_modes(mode, installed):
    """Inductor's own modes, with generated code (CUDA graphs and autotuning are for GPUs)."""
    model, reference = Model(), Model()
    counters.clear()
    run = torch.compile(model, mode=mode)
    for i in range(2):
        loss, expected = run(*batch(seed=i)), reference(*batch(seed=i))
        loss.backward()
        expected.backward()
        torch.testing.assert_close([loss, *grads(model)], [expected, *grads(reference)])
    assert counters["lce_inductor"]["rewritten"] == 1


# -- shapes that change


def compiles(lengths: list[int], mark: bool) -> tuple[int, list[Tensor]]:
    """How many graphs a run over batches of these lengths takes, and the losses."""
    torch._dynamo.reset()
    counters.clear()
    model, losses = Model(), []
    run = quick(model)
    for i, n in enumerate(lengths):
        x, y = batch(n, seed=i)
        if mark:
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(y, 0)
        loss = run(x, y)
        loss.backward()
        losses += [loss.detach(), model.head.weight.grad.clone()]
    return counters["stats"]["unique_graphs"], losses


@pytest.mark.parametrize("mark", [False, True], ids=["automatic", "mark_dynamic"])
def test_changing_lengths(mark):
    """No recompile more than without the package."""
    lengths = [24, 31, 17, 40, 24, 55]
    graphs, plain = compiles(lengths, mark)
    with lce_inductor.installed(min_logits_bytes=0):
        ours, found = compiles(lengths, mark)
        assert counters["lce_inductor"]["rewritten"] == ours and not counters["lce_inductor"]["refused:internal-error"]
    assert graphs == (1 if mark else 2) and ours == graphs
    torch.testing.assert_close(found, plain)


# -- programs made ahead of time


class Returned(Model):
    """Returns the logits, too, as exported models do."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = self.head(torch.tanh(self.body(x)))
        return F.cross_entropy(z, y), z


@pytest.mark.parametrize("strict", [False, True])
def test_export_is_untouched(strict, installed, tmp_path):
    """The exported program holds none of our operations, and can be saved, loaded and run."""
    model, args = Returned(), batch()
    program = torch.export.export(model, args, strict=strict)
    assert "lce_inductor" not in str(program.graph)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2")
    torch.testing.assert_close(loaded.module()(*args), model(*args))
    assert not counters["lce_inductor"]["rewritten"]


def test_an_exported_program_compiles(installed):
    model, args = Model(), batch()
    counters.clear()
    run = quick(torch.export.export(model, args).module())
    torch.testing.assert_close(run(*args), model(*args))
    assert counters["lce_inductor"]["rewritten"] == 1


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any, Any]]:
    """A model compiled ahead of time while the passes are installed."""
    path = tmp_path_factory.mktemp("aoti") / "model.pt2"
    model, args = Model().requires_grad_(False), batch()
    with lce_inductor.installed(min_logits_bytes=0):
        torch._inductor.aoti_compile_and_package(torch.export.export(model, args), package_path=str(path))
    torch.save((args, model(*args)), path.with_suffix(".pt"))
    yield path, args, model(*args)


def test_aot_inductor_here(package):
    path, args, expected = package
    torch.testing.assert_close(torch._inductor.aoti_load_package(str(path))(*args), expected)


def test_aot_inductor_elsewhere(package):
    """In a process that knows nothing of this package, as a C++ runtime does not."""
    script = """
        import sys, torch
        path = sys.argv[1]
        args, expected = torch.load(path.replace("pt2", "pt"))
        torch.testing.assert_close(torch._inductor.aoti_load_package(path)(*args), expected)
        assert "lce_inductor" not in sys.modules
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(package[0])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


# -- inputs that are no plain tensors


class Int8Weight(Tensor):
    """A weight quantized per class; products see it dequantized."""

    @staticmethod
    def __new__(cls, q: Tensor, scale: Tensor) -> Int8Weight:
        return Tensor._make_wrapper_subclass(cls, q.shape, dtype=scale.dtype, device=q.device)

    def __init__(self, q: Tensor, scale: Tensor) -> None:
        self.q, self.scale = q, scale

    def __repr__(self) -> str:  # torch 2.11 shows a graph's tensors, and an inherited one would compute with them
        return f"Int8Weight({list(self.shape)})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["q", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: None, size: Any, stride: Any) -> Int8Weight:
        return Int8Weight(inner["q"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = lambda t: t.q.to(t.scale.dtype) * t.scale if isinstance(t, Int8Weight) else t
        if func is torch.ops.aten.detach.default:
            return Int8Weight(args[0].q, args[0].scale)
        return func(*torch.utils._pytree.tree_map(plain, args), **(kwargs or {}))


def test_a_quantized_weight_is_what_its_products_see(installed):
    """AOTAutograd takes the subclass apart: in the graph it is a product of integers and scales."""
    x, w, y = (t.detach() for t in head())
    scale = w.abs().amax(1, keepdim=True) / 127
    weight = Int8Weight((w / scale).round().to(torch.int8), scale)
    compiled = Compiled(loss_of)
    torch.testing.assert_close(compiled(x, weight, y), loss_of(x, weight, y))
    assert compiled.counts["rewritten"] == 1 and not compiled.refusals


def test_dequantized_weight_is_a_plain_one(installed):
    """A weight that the graph computes from integers."""
    x, w, y = (t.detach() for t in head())
    q, scale = (w * 20).round().to(torch.int8), torch.full((V, 1), 0.05)
    fn = lambda x, q, scale, y: loss_of(x, q.float() * scale, y)
    compiled = Compiled(fn)
    torch.testing.assert_close(compiled(x.requires_grad_(), q, scale, y), fn(x, q, scale, y))
    assert compiled.counts["rewritten"] == 1


@pytest.fixture
def nested(installed: None) -> Compiled:
    """A loss of jagged sequences, compiled and checked."""
    _, w, y = head()
    x = torch.nested.nested_tensor([torch.randn(n, H) for n in (5, 12, 7)], layout=torch.jagged)
    compiled = Compiled(lambda x: F.cross_entropy(F.linear(x, w).values(), y))
    torch.testing.assert_close(compiled(x), loss_of(x.values(), w, y))
    return compiled


def test_nested_hidden_states(nested):
    """AOTAutograd hands over their values as one plain tensor."""
    assert nested.counts["rewritten"] == 1 and not nested.refusals


@pytest.mark.parametrize("what", ["strided", "expanded", "transposed weight", "view with offset"])
def test_strides(what, installed):
    x, w, y = (t.detach() for t in head())
    args = {
        "strided": (torch.randn(N, 2 * H)[:, ::2], w, y),
        "expanded": (x[:1].expand(N, H), w, y),
        "transposed weight": (x, torch.randn(H, V).t(), y),
        "view with offset": (torch.randn(N + 3, H)[3:], torch.randn(V + 2, H)[2:], y),
    }[what]
    compiled = Compiled(loss_of)
    torch.testing.assert_close(compiled(*args), loss_of(*args))
    assert compiled.counts["rewritten"] == 1
