"""Programs of row regions written by hand, with the loss in plain PyTorch that each of them computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import lce_inductor.ops.row_region
from lce_inductor.lower.region_arguments import Arguments
from lce_inductor.spec.program import Program, Ref, Result, Rows, Step, Sym


class Builder:
    """add("aten.exp.default", z) appends a step and returns its value."""

    def __init__(self, *kinds: str) -> None:
        self.kinds, self.steps, self.results = kinds, [], []

    def inputs(self) -> list[Ref]:
        return [Ref(i) for i in range(len(self.kinds))]

    def add(self, op: str, *args: Any, **kwargs: Any) -> Ref:
        self.steps.append(Step(op, args, kwargs))
        return Ref(len(self.kinds) + len(self.steps) - 1)

    def result(self, kind: str, value: Ref, dtype: torch.dtype, sizes: tuple[Any, ...], other: int = -1) -> None:
        self.results.append(Result(kind, value, dtype, sizes, other))

    def program(self) -> Program:
        return Program(self.kinds, tuple(self.steps), tuple(self.results))


@dataclasses.dataclass(frozen=True)
class Case:
    """A program with its inputs, and what it computes as a loss.

    Attributes:
        call: the op's arguments before chunk_tokens.
        loss: of xs, weights, biases, rows, whole, all as autograd shall differentiate them: [N], its gradient is `g`.
        expect: the results, from what `loss` and its gradients are: values, g_x, g_w, g_b (lists) -> results.
    """

    call: tuple[Any, ...]
    loss: Callable[..., Tensor]
    g: Tensor
    expect: Callable[..., list[Tensor]]

    def run(self, chunk_tokens: int = 0, workspace_bytes: int = 1 << 30) -> list[Tensor]:
        return torch.ops.lce_inductor.row_region(*self.call, chunk_tokens, workspace_bytes)

    def arguments(self, chunk_tokens: int = 0, workspace_bytes: int = 1 << 30) -> Arguments:
        return lce_inductor.ops.row_region._arguments(*self.call, chunk_tokens, workspace_bytes)

    def reference(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """The results by autograd, in a dtype."""
        _, xs, weights, biases, has_bias, rows, whole, *_ = self.call

        def leaves(ts: Sequence[Tensor]) -> list[Tensor]:
            return [t.detach().to(dtype).requires_grad_() for t in ts]

        def wide(ts: Sequence[Tensor]) -> list[Tensor]:
            return [t.to(dtype) if t.is_floating_point() else t for t in ts]

        xs, weights, biases = leaves(xs), leaves(weights), leaves(biases)
        given = iter(biases)
        zs = [x @ w + next(given) if has else x @ w for x, w, has in zip(xs, weights, has_bias)]
        values = self.loss(zs, wide(rows), wide(whole))
        leaf = [*xs, *weights, *biases]
        grads = torch.autograd.grad(values, leaf, self.g.to(values.dtype), allow_unused=True)
        k = len(xs)
        return self.expect(values.detach(), grads[:k], grads[k : 2 * k], grads[2 * k :])


def close(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    assert len(found) == len(expected)
    for i, (f, e) in enumerate(zip(found, expected)):
        assert f.shape == e.shape, (i, f.shape, e.shape)
        error = (f.double() - e.double()).norm().item()
        assert error <= tolerance * max(e.double().norm().item(), 1e-30), (i, error / e.double().norm().item())


def random(dtype: torch.dtype, device: str, *shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=g, dtype=torch.float64) * scale).to(dtype).to(device)


def compute(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _wide(b: Builder, z: Ref, dtype: torch.dtype) -> Ref:
    return z if compute(dtype) is dtype else b.add("prims.convert_element_type.default", z, compute(dtype))


def _narrow(b: Builder, z: Ref, dtype: torch.dtype) -> Ref:
    return z if compute(dtype) is dtype else b.add("prims.convert_element_type.default", z, dtype)


def _log_softmax(b: Builder, z: Ref) -> Ref:
    top = b.add("aten.amax.default", z, (1,), True)
    low = b.add("aten.sub.Tensor", z, top)
    total = b.add("aten.sum.dim_IntList", b.add("aten.exp.default", low), (1,), True)
    return b.add("aten.sub.Tensor", low, b.add("aten.log.default", total))


def cross_entropy(
    N: int, H: int, V: int, dtype: torch.dtype, device: str = "cpu", bias: bool = False, symbolic: bool = False
) -> Case:
    """-log p of a target plus 1e-2 mean z^2, a mask of classes added; logits, targets, g, x, a mask [V]."""
    b, c = Builder("logits", "rows", "rows", "rows", "whole"), compute(dtype)
    z0, y, g, _, mask = b.inputs()
    v: Any = Sym(0) if symbolic else V
    z = b.add("aten.add.Tensor", _wide(b, z0, dtype), mask)
    logp = _log_softmax(b, z)
    picked = b.add("aten.squeeze.dim", b.add("aten.gather.default", logp, 1, y), 1)
    square = b.add("aten.sum.dim_IntList", b.add("aten.pow.Tensor_Scalar", z, 2), (1,))
    square = b.add("aten.mul.Scalar", b.add("aten.div.Scalar", square, v), 1e-2)
    value = b.add("aten.sub.Tensor", square, picked)
    flat = b.add("aten.full.default", (Rows(), v), 0, dtype=c)
    hot = b.add("aten.scatter.value", flat, 1, y, 1.0)
    part = b.add("aten.sub.Tensor", b.add("aten.exp.default", logp), hot)
    other = b.add("aten.div.Scalar", b.add("aten.mul.Scalar", z, 2e-2), v)
    dz = b.add("aten.mul.Tensor", b.add("aten.add.Tensor", part, other), g)
    dz = _narrow(b, dz, dtype)
    b.result("row", value, c, ())
    b.result("dx", dz, dtype, (H,), 0)
    b.result("dw", dz, dtype, (v, H), 2)
    if bias:
        b.result("sum", dz, dtype, (v,))
    x, w = random(dtype, device, N, H), random(dtype, device, V, H, scale=H**-0.5)
    y_ = torch.randint(0, V, (N, 1), generator=torch.Generator().manual_seed(1)).to(device)
    g_, m = random(c, device, N, 1).abs() + 0.5, random(c, device, V, scale=0.1)
    biases = [random(dtype, device, V, seed=5)] if bias else []

    def loss(zs: list[Tensor], rows: list[Tensor], whole: list[Tensor]) -> Tensor:
        z = zs[0].to(compute(zs[0].dtype)) + whole[0]
        return 1e-2 * z.square().mean(1) - z.log_softmax(1).gather(1, y_)[:, 0]

    def expect(values: Tensor, dx: Any, dw: Any, db: Any) -> list[Tensor]:
        return [values, dx[0], dw[0].t(), *db]

    text = b.program().text()
    call = (N, [x], [w.t()], biases, [bias], [y_, g_, x], [m], [w], [V] if symbolic else [], text)
    return Case(call, loss, g_[:, 0], expect)


def divergence(N: int, H: int, V: int, dtype: torch.dtype, device: str = "cpu", trained: int = 2) -> Case:
    """sum p2 (log p2 - log p1) of heads of hidden sizes H and H + 1, the first or both trained."""
    b, c = Builder("logits", "logits", "rows", "rows", "rows"), compute(dtype)
    z1, z2, g, *_ = b.inputs()
    l1, l2 = _log_softmax(b, _wide(b, z1, dtype)), _log_softmax(b, _wide(b, z2, dtype))
    p1, p2 = b.add("aten.exp.default", l1), b.add("aten.exp.default", l2)
    apart = b.add("aten.sub.Tensor", l2, l1)
    value = b.add("aten.sum.dim_IntList", b.add("aten.mul.Tensor", p2, apart), (1,))
    dz1 = b.add("aten.mul.Tensor", b.add("aten.sub.Tensor", p1, p2), g)
    inner = b.add("aten.sub.Tensor", apart, b.add("aten.unsqueeze.default", value, 1))
    dz2 = b.add("aten.mul.Tensor", b.add("aten.mul.Tensor", p2, inner), g)
    dz2, dz1 = _narrow(b, dz2, dtype), _narrow(b, dz1, dtype)
    b.result("row", value, c, ())
    for k, (dz, h) in enumerate(((dz1, H), (dz2, H + 1))[:trained]):
        b.result("dx", dz, dtype, (h,), k)
        b.result("dw", dz, dtype, (V, h), k + 1)
    xs = [random(dtype, device, N, h, seed=h) for h in (H, H + 1)]
    ws = [random(dtype, device, V, h, scale=h**-0.5, seed=h) for h in (H, H + 1)]
    g_ = random(c, device, N, 1).abs() + 0.5

    def loss(zs: list[Tensor], rows: list[Tensor], whole: list[Tensor]) -> Tensor:
        l1, l2 = (z.to(compute(z.dtype)).log_softmax(1) for z in zs)
        return (l2.exp() * (l2 - l1)).sum(1)

    def expect(values: Tensor, dx: Any, dw: Any, db: Any) -> list[Tensor]:
        return [values, dx[0], dw[0].t(), dx[1], dw[1].t()][: 1 + 2 * trained]

    call = (N, xs, [w.t() for w in ws], [], [False] * 2, [g_, *xs], [], ws, [], b.program().text())
    return Case(call, loss, g_[:, 0], expect)


def distillation(N: int, H: int, V: int, dtype: torch.dtype, device: str = "cpu") -> Case:
    """The same with a teacher that is not trained."""
    return divergence(N, H, V, dtype, device, trained=1)


def soft_targets(N: int, H: int, V: int, dtype: torch.dtype, device: str = "cpu") -> Case:
    """-sum t log p with t [N, V] given, and three columns of z for each row [N, 3]; bias, and dz in fp32 for fp64."""
    b, c = Builder("logits", "rows", "rows", "rows", "rows"), compute(dtype)
    z0, t, index, g, _ = b.inputs()
    z = _wide(b, z0, dtype)
    logp = _log_softmax(b, z)
    value = b.add("aten.neg.default", b.add("aten.sum.dim_IntList", b.add("aten.mul.Tensor", logp, t), (1,)))
    picked = b.add("aten.gather.default", z, 1, index)
    total = b.add("aten.sum.dim_IntList", t, (1,), True)
    dz = b.add("aten.sub.Tensor", b.add("aten.mul.Tensor", b.add("aten.exp.default", logp), total), t)
    dz = _narrow(b, b.add("aten.mul.Tensor", dz, g), dtype)
    b.result("row", value, c, ())
    b.result("row", picked, c, (3,))
    b.result("dx", dz, dtype, (H,), 0)
    b.result("dw", dz, dtype, (V, H), 3)
    b.result("sum", dz, c, (V,))
    x, w = random(dtype, device, N, H), random(dtype, device, V, H, scale=H**-0.5)
    t_ = random(c, device, N, V, seed=3).softmax(1)
    index_ = torch.randint(0, V, (N, 3), generator=torch.Generator().manual_seed(1)).to(device)
    g_, bias = random(c, device, N, 1).abs() + 0.5, random(dtype, device, V, seed=5)
    kept: list[Tensor] = []

    def loss(zs: list[Tensor], rows: list[Tensor], whole: list[Tensor]) -> Tensor:
        z = zs[0].to(compute(zs[0].dtype))
        kept.append(z.detach().gather(1, index_))
        return -(z.log_softmax(1) * rows[0]).sum(1)

    def expect(values: Tensor, dx: Any, dw: Any, db: Any) -> list[Tensor]:
        return [values, kept[-1], dx[0], dw[0].t(), db[0]]

    call = (N, [x], [w.t()], [bias], [True], [t_, index_, g_, x], [], [w], [], b.program().text())
    return Case(call, loss, g_[:, 0], expect)


def squares(N: int, H: int, V: int, dtype: torch.dtype, device: str = "cpu") -> Case:
    """sum z^2 / 2: dz is z itself. Its first column comes out as well, a view of it."""
    b = Builder("logits", "rows")
    z, _ = b.inputs()
    value = b.add("aten.sum.dim_IntList", b.add("aten.mul.Tensor", z, b.add("aten.mul.Scalar", z, 0.5)), (1,))
    column = b.add("aten.slice.Tensor", z, 1, 0, 1)
    b.result("row", value, dtype, ())
    b.result("row", column, dtype, (1,))
    b.result("dx", z, dtype, (H,), 0)
    b.result("dw", z, dtype, (V, H), 0)
    x, w = random(dtype, device, N, H), random(dtype, device, V, H, scale=H**-0.5)
    kept: list[Tensor] = []

    def loss(zs: list[Tensor], rows: list[Tensor], whole: list[Tensor]) -> Tensor:
        kept.append(zs[0].detach()[:, :1])
        return zs[0].square().sum(1) / 2

    def expect(values: Tensor, dx: Any, dw: Any, db: Any) -> list[Tensor]:
        return [values, kept[-1], dx[0], dw[0].t()]

    call = (N, [x], [w.t()], [], [False], [x], [], [w], [], b.program().text())
    return Case(call, loss, torch.ones(N, device=device, dtype=dtype), expect)


def log_probability(N: int, H: int, V: int, dtype: torch.dtype, device: str = "cpu") -> Case:
    """log p of a target, whose gradient autograd adds to zeros at one place of each row."""
    b, c = Builder("logits", "rows", "rows", "rows"), compute(dtype)
    z, y, g, _ = b.inputs()
    logp = _log_softmax(b, _wide(b, z, dtype))
    picked = b.add("aten.gather.default", logp, 1, y)
    zeros = b.add("aten.full.default", (Rows(), V), 0, dtype=c)
    there = b.add("aten.scatter_add.default", zeros, 1, y, g)
    total = b.add("aten.sum.dim_IntList", there, (1,), True)
    all_of_it = b.add("aten.mul.Tensor", b.add("aten.exp.default", logp), total)
    dz = _narrow(b, b.add("aten.sub.Tensor", there, all_of_it), dtype)
    b.result("row", picked, c, (1,))
    b.result("dx", dz, dtype, (H,), 0)
    b.result("dw", dz, dtype, (V, H), 2)
    x, w = random(dtype, device, N, H), random(dtype, device, V, H, scale=H**-0.5)
    y_ = torch.randint(0, V, (N, 1), generator=torch.Generator().manual_seed(1)).to(device)
    g_ = random(c, device, N, 1)

    def loss(zs: list[Tensor], rows: list[Tensor], whole: list[Tensor]) -> Tensor:
        return zs[0].to(compute(zs[0].dtype)).log_softmax(1).gather(1, y_)

    def expect(values: Tensor, dx: Any, dw: Any, db: Any) -> list[Tensor]:
        return [values, dx[0], dw[0].t()]

    return Case((N, [x], [w.t()], [], [False], [y_, g_, x], [], [w], [], b.program().text()), loss, g_, expect)


CASES = {f.__name__: f for f in (cross_entropy, divergence, distillation, soft_targets, squares, log_probability)}
