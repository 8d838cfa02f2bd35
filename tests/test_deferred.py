"""DeferredLogits: what it answers as real logits do, and what it refuses."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deferred_cases import CAP, DIFFERENTIATE, READS, B, H, Model, T, V, close, pair, real
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lce_inductor.deferred_logits import rules as deferred_rules
from lce_inductor.deferred_logits.tensor import DeferredLogits, defer_logits

# -- values


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_are_those_of_eager(dtype: torch.dtype) -> None:
    z, expected, _ = pair(dtype)
    assert torch.equal(real(z), expected.detach())
    assert (z.shape, z.dtype, z.device, z.requires_grad) == (expected.shape, dtype, expected.device, True)
    assert (z.stride(), z.is_contiguous(), len(z), z.numel()) == (expected.stride(), True, B, B * T * V)
    assert isinstance(z, Tensor) and z.grad_fn is not None and not z.is_leaf


def test_epilogue_before_or_after_the_cast() -> None:
    z, linear, _ = pair(torch.bfloat16, epilogue=CAP, out=torch.float32)
    assert torch.equal(real(z), (torch.tanh(linear / 3) * 3).float())
    z, linear, _ = pair(torch.bfloat16, epilogue=CAP, out=torch.float32, epilogue_after_cast=True)
    assert torch.equal(real(z), torch.tanh(linear.float() / 3) * 3)
    with pytest.raises(ValueError, match="unknown step"):
        pair(epilogue="sin")


def test_casts_to_the_compute_dtype_as_autocast_does() -> None:
    x, weight = torch.randn(B, H), torch.randn(V, H)
    z = defer_logits(x, weight, None, "", torch.bfloat16, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(real(z), F.linear(x, weight))
    # The reader's autocast does not reach the computation.
    z, expected = defer_logits(x, weight, None, "", torch.float32, torch.float32), F.linear(x, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(real(z), expected)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", READS)
def test_reading(name: str, grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deferred_rules, "CHUNK_BYTES", 4 * V * 4)  # several chunks, the last one smaller
    z, expected, _ = pair()
    with torch.set_grad_enabled(grad):
        found, wanted = READS[name](z), READS[name](expected)
    close(found, wanted)
    flags = [t.requires_grad for t in tree_leaves(wanted)]
    if grad:
        assert [t.requires_grad for t in tree_leaves(found)] == flags


def test_numpy_is_refused_as_eager_refuses_it() -> None:
    z, expected, _ = pair()
    for t in (expected, z):
        with pytest.raises(RuntimeError, match="Can't call numpy"):
            t.numpy()
    with torch.no_grad():
        assert np.array_equal(z.numpy(), expected.numpy())


def test_deepcopy_is_real() -> None:
    z, expected, _ = pair()
    both = copy.deepcopy([z, z])
    assert both[0] is both[1] and not isinstance(both[0], DeferredLogits)
    close(both[0].detach(), expected.detach())


def test_printing_computes_nothing() -> None:
    z, _, (_, weight, _) = pair(torch.bfloat16)
    with torch.no_grad():
        weight.add_(1)  # reading would raise
    text = f"DeferredLogits(size=({B}, {T}, {V}), dtype=torch.bfloat16, device='cpu')"
    assert (repr(z), str(z), f"{z}") == (text, text, text)


# -- memory


class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        real = [t for t in tree_leaves(out) if isinstance(t, Tensor) and not isinstance(t, DeferredLogits)]
        self.elements = max([self.elements, *(t.numel() for t in real)])
        return out


@pytest.mark.parametrize("name", ["argmax", "max", "amax", "logsumexp", "gather", "sum", "mean"])
def test_reductions_hold_one_chunk(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deferred_rules, "CHUNK_BYTES", 4 * V * 4)
    z, *_ = pair()
    with Largest() as seen:
        READS[name](z)
    assert seen.elements <= max(4 * V, V * H)


@pytest.mark.parametrize("name", ["last", "shift", "float", "mask", "index", "new axis", "data", "inferred"])
def test_rows_and_casts_stay_deferred(name: str) -> None:
    z, *_ = pair(torch.bfloat16)
    with Largest() as seen:
        assert isinstance(READS[name](z), DeferredLogits)
    assert seen.elements <= max(B * T * H, V * H)


def test_accelerate_conversion_stays_deferred() -> None:
    operations = pytest.importorskip("accelerate.utils.operations")
    z, expected, _ = pair(torch.bfloat16)
    out = operations.convert_to_fp32({"logits": z})["logits"]
    assert isinstance(out, DeferredLogits) and out.dtype == torch.float32
    assert torch.equal(real(out), expected.float())
    assert torch.equal(real(out.bfloat16()), expected)


def test_nothing_is_kept() -> None:
    z, *_ = pair()
    reference = weakref.ref(z)
    gc.disable()
    try:
        z.softmax(-1), z[:, -1].sum(), z.float().argmax(-1)
        del z
        assert reference() is None  # no reference cycle either
    finally:
        gc.enable()


# -- values of the moment of the call

WRITES: dict[str, Callable[[Tensor], Any]] = {
    "in place": lambda t: t.add_(1e-3),
    "through data": lambda t: t.data.add_(1e-3),
    "through a view": lambda t: t[: t.shape[0] // 2].mul_(1.001),
    "copy_": lambda t: t.copy_(t + 1),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("part", [1, 2])
def test_reading_after_a_write_raises(part: int, write: str) -> None:
    z, _, parts = pair()
    row, cast, flat = z[0], z.double(), z.view(-1, V)
    with torch.no_grad():
        WRITES[write](parts[part])
    for t in (z, row, cast, flat):
        for read in (
            torch.sum,
            lambda t: t.argmax(-1),
            pickle.dumps,
            lambda t: t.detach().numpy(),
            lambda t: t[:1] + 0,
        ):
            with pytest.raises(RuntimeError, match=r'before optimizer.step\(\).*returned_logits="keep"'):
                read(t)


def test_reading_after_the_hidden_states_changed_raises() -> None:
    z, _, (x, *_) = pair()
    row, some = z[0], z[torch.tensor([0, 1])]
    with torch.no_grad():
        x.add_(1)
    for t in (z, row):
        with pytest.raises(RuntimeError, match="hidden states"):
            t.sum()
    some.sum()  # copied before that


def optimizers() -> dict[str, Callable[..., torch.optim.Optimizer]]:
    adamw = torch.optim.AdamW
    return {
        "sgd": lambda p: torch.optim.SGD(p, 1e-3),
        "adamw": lambda p: adamw(p, foreach=False),
        "adamw foreach": lambda p: adamw(p, foreach=True),
        "adamw fused": lambda p: adamw(p, fused=True),  # counts no versions
        "adamw fused, small": lambda p: adamw(p, lr=1e-6, fused=True),
        "adafactor": lambda p: torch.optim.Adafactor(p),
    }


@pytest.mark.parametrize("name", optimizers())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reading_after_an_optimizer_step_raises(name: str, dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.randn(500, 64).mul(0.02).to(dtype))
    optimizer = optimizers()[name]([weight])
    z = defer_logits(torch.randn(4, 64).to(dtype), weight, None, "", dtype, dtype)
    weight.grad = torch.randn_like(weight)
    before = weight.detach().clone()
    optimizer.step()
    if torch.equal(before, weight):
        pytest.skip("the step rounds to nothing")
    with pytest.raises(RuntimeError, match=r"optimizer\.step"):
        z.sum()


def test_replaced_data_leaves_the_values() -> None:
    """What module.to() and module.half() do: the parameter gets other memory, the logits keep theirs."""
    module = Model()
    x = torch.randn(2, H)
    z = defer_logits(x, module.head.weight, None, "", torch.float32, torch.float32)
    expected = F.linear(x, module.head.weight).detach()
    module.double()
    assert torch.equal(real(z), expected)


def test_nan_in_the_weight_is_no_change() -> None:
    weight = torch.randn(V, H)
    weight[0, 0] = float("nan")
    z = defer_logits(torch.randn(2, H), weight, None, "", torch.float32, torch.float32)
    assert z.isnan().sum() == 2


def test_freed_weight() -> None:
    z, _, (_, weight, _) = pair(grad=False)
    weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="freed"):
        z.sum()


# -- gradients


@pytest.mark.parametrize("name", DIFFERENTIATE)
def test_a_gradient_raises(name: str) -> None:
    z, _, (x, *_) = pair()
    loss = DIFFERENTIATE[name](z)
    assert loss.requires_grad
    for total in (x.sum() + loss, loss):
        with pytest.raises(RuntimeError, match=r'gradient.*returned_logits="keep"'):
            total.backward(retain_graph=True)
    z.detach().sum(), z.argmax(-1)  # no gradient, no error


def test_asking_for_their_gradient_raises() -> None:
    z, *_ = pair()
    with pytest.raises(RuntimeError, match="keep"):
        z.retain_grad()
    with pytest.raises(RuntimeError):
        torch.autograd.grad(torch.ones((), requires_grad=True) * 2, z)


def test_without_gradients_nothing_requires_them() -> None:
    z, *_ = pair(grad=False)
    assert not z.requires_grad and z.grad_fn is None
    with torch.no_grad():
        z, *_ = pair()
    assert not z.requires_grad
    with torch.inference_mode():
        z, expected, _ = pair()
        assert torch.equal(real(z), expected)
    assert torch.equal(real(z), expected)


# -- writes

WRITTEN: dict[str, Callable[[Tensor], Any]] = {
    "div_": lambda z: z.div_(2),
    "setitem": lambda z: z.__setitem__((..., 0), -1.0),
    "row": lambda z: z[0].zero_(),
    "classes": lambda z: z[..., 90:].fill_(-1.0),
    "transpose": lambda z: z.transpose(1, 2)[0].div_(2),
    "flat": lambda z: z.view(-1)[3:].zero_(),
    "split": lambda z: z.split(10, dim=-1)[1][0].zero_(),
    "out": lambda z: torch.add(torch.ones(B, T, V), 1, out=z),
    "masked_fill_": lambda z: z.masked_fill_(torch.ones(B, T, 1, dtype=torch.bool), 0.0),
    "foreach": lambda z: torch._foreach_add_([z, torch.ones(2)], 1.0),
    "copy_": lambda z: z.copy_(torch.zeros(B, T, V)),
    "index_put_": lambda z: z.index_put_((torch.tensor([0]),), torch.tensor(0.0)),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_write_raises(name: str) -> None:
    z, *_ = pair()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"write to a copy.*clone"):
        WRITTEN[name](z)
    if name != "out":
        with pytest.raises(RuntimeError, match="inplace" if name == "foreach" else "write to a copy"):
            WRITTEN[name](z)


def test_their_memory_is_refused() -> None:
    z, *_ = pair()
    with pytest.raises(RuntimeError, match="clone"):
        z.data_ptr()
    assert z.clone().data_ptr()


# -- distributed


def test_collectives(one_process: None) -> None:
    z, expected, _ = pair()
    out = torch.empty(B, T, V)
    with torch.no_grad():
        dist.all_gather([out], z.contiguous())
        close(out, expected.detach())
        dist.all_gather_into_tensor(out.zero_(), z)
        close(out, expected.detach())
        for write in (dist.all_reduce, lambda t: dist.broadcast(t, 0), lambda t: dist.reduce(t, 0)):
            with pytest.raises(RuntimeError, match="write to a copy"):
                write(z)


def test_who_looks_for_memory_raises() -> None:
    """Not a crash: there is no memory to share."""
    z, *_ = pair()
    module = torch.nn.Module()
    module.register_buffer("logits", z.detach())
    for share in (z.detach().share_memory_, module.share_memory):
        with pytest.raises(RuntimeError, match="have no memory"):
            share()
    with pytest.raises(RuntimeError):
        z.detach().apply_(lambda v: v)


def test_a_logit_is_formatted() -> None:
    z, expected, _ = pair()
    assert f"{z[0, 0, 0]:.3f} {z.detach()[0, 1, 2]:.2e}" == f"{expected[0, 0, 0]:.3f} {expected[0, 1, 2]:.2e}"
