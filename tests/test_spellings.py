"""The spellings of a linear and its cross-entropy: each is rewritten, and computes what it computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from harness import (
    Compiled,
    N,
    V,
    check_against_eager,
    check_graph,
    check_results,
    fresh,
    head,
    inference_graph,
    joint_graph,
    results,
    rewrite,
    targets,
)
from torch import Tensor, nn
from turns import crossed, one_of

from lce_inductor.ops import schema  # noqa: F401  (registers the ops)

Fn = Callable[..., Tensor]


def three(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """x [4, 6, H] and target [4, 6]."""
    return x.detach().reshape(4, 6, -1).requires_grad_(x.requires_grad), target.reshape(4, 6)


# Ways to write the product: x, weight, bias -> logits.
PRODUCTS: dict[str, Fn] = {
    "linear": lambda x, w, b: F.linear(x, w),
    "linear bias": lambda x, w, b: F.linear(x, w, b),
    "linear keywords": lambda x, w, b: F.linear(weight=w, input=x, bias=b),
    "@ T": lambda x, w, b: x @ w.T,
    "@ mT": lambda x, w, b: x @ w.mT,
    "@ t()": lambda x, w, b: x @ w.t(),
    "@ torch.t": lambda x, w, b: x @ torch.t(w),
    "@ transpose": lambda x, w, b: x @ w.transpose(0, 1),
    "@ transpose negative": lambda x, w, b: x @ torch.transpose(w, -1, -2),
    "@ permute": lambda x, w, b: x @ w.permute(1, 0),
    "matmul": lambda x, w, b: torch.matmul(x, w.T),
    "matmul method": lambda x, w, b: x.matmul(w.T),
    "mm": lambda x, w, b: torch.mm(x, w.T),
    "mm method": lambda x, w, b: x.mm(w.t()),
    "addmm": lambda x, w, b: torch.addmm(b, x, w.T),
    "addmm method": lambda x, w, b: b.addmm(x, w.T),
    "einsum": lambda x, w, b: torch.einsum("nh,vh->nv", x, w),
    "einsum spaces": lambda x, w, b: torch.einsum("n h, v h -> n v", x, w),
    "einsum list": lambda x, w, b: torch.einsum("ab,cb->ac", [x, w]),
    "einsum transposed": lambda x, w, b: torch.einsum("nh,hv->nv", x, w.T),
}

# Ways to get from logits [N, V] to other logits.
SHAPES: dict[str, Fn] = {
    "float": lambda z: z.float(),
    "to": lambda z: z.to(torch.float32),
    "to keyword": lambda z: z.to(dtype=torch.float32),
    "to device and dtype": lambda z: z.to("cpu", torch.float32),
    "type": lambda z: z.type(torch.float32),
    "contiguous": lambda z: z.contiguous(),
    "clone": lambda z: z.clone(),
    "view": lambda z: z.view(-1, V),
    "view size": lambda z: z.view(-1, z.size(-1)),
    "view shape": lambda z: z.view(-1, z.shape[-1]),
    "reshape": lambda z: z.reshape(N, V),
    "reshape tuple": lambda z: z.reshape((N, V)),
    "torch.reshape": lambda z: torch.reshape(z, (-1, V)),
    "flatten": lambda z: z.view(4, 6, V).flatten(0, 1),
    "torch.flatten": lambda z: torch.flatten(z.view(4, 6, V), end_dim=-2),
    "unsqueeze, squeeze": lambda z: z.unsqueeze(0).squeeze(0),
    "all": lambda z: z.float().contiguous().view(4, 6, V).flatten(0, 1).clone(),
}

# Ways to write the loss: logits [N, V], target [N], class weights [V] -> loss.
LOSSES: dict[str, Fn] = {
    f"{loss} {' '.join(options)} {reduction}": lambda z, y, c, loss=loss, options=options, reduction=reduction: (
        F.cross_entropy(z, y, **_options(options, c), reduction=reduction)
        if loss == "ce"
        else F.nll_loss(z.log_softmax(-1), y, **_options(options, c), reduction=reduction)
    )
    for loss, choices in (
        ("ce", ((), ("weight",), ("label_smoothing",), ("weight", "label_smoothing"), ("ignore_index",))),
        ("nll", ((), ("weight", "ignore_index"))),
    )
    for options in choices
    for reduction in ("mean", "sum", "none")
} | {
    "positional": lambda z, y, c: F.cross_entropy(z, y, c, None, -100, None, "sum"),
    "keywords": lambda z, y, c: F.cross_entropy(target=y, input=z),
    "legacy sum": lambda z, y, c: F.cross_entropy(z, y, size_average=False),
    "legacy none": lambda z, y, c: F.cross_entropy(z, y, reduce=False),
    "ignore valid class": lambda z, y, c: F.cross_entropy(z, y.clamp(min=0), ignore_index=0),
    "log_softmax dim": lambda z, y, c: F.nll_loss(F.log_softmax(z, dim=1), y),
    "torch.log_softmax": lambda z, y, c: F.nll_loss(torch.log_softmax(z, -1), y),
    "log_softmax float": lambda z, y, c: F.nll_loss(F.log_softmax(z, -1, dtype=torch.float32), y),
    "log_softmax view": lambda z, y, c: F.nll_loss(z.log_softmax(-1).view(-1, V), y.view(-1)),
    "twice log_softmax": lambda z, y, c: F.cross_entropy(F.log_softmax(z, -1), y),
    "two losses": lambda z, y, c: F.cross_entropy(z, y) + 2 * F.cross_entropy(z, y.roll(1), reduction="sum"),
    "two class weights": lambda z, y, c: F.cross_entropy(z, y, c, label_smoothing=0.1) + F.cross_entropy(z, y, c * 2),
    "mask": lambda z, y, c: (F.cross_entropy(z, y, reduction="none") * (y > 3)).sum() / (y > 3).sum(),
    "bool index of the loss": lambda z, y, c: F.cross_entropy(z, y, reduction="none").mul(c.sum()).mean(),
}


def _options(names: tuple[str, ...], classes: Tensor) -> dict[str, object]:
    return {n: {"weight": classes, "label_smoothing": 0.1, "ignore_index": 5}[n] for n in names}


def spellings() -> dict[str, tuple[Fn, list[Tensor]]]:
    """name -> (function of x, weight, bias, target, class weights; its arguments)"""
    x, w, y = head()
    b = torch.randn(V).requires_grad_()
    c = torch.rand(V) + 0.1
    found: dict[str, tuple[Fn, list[Tensor]]] = {}
    for name, product in PRODUCTS.items():
        fn = lambda x, w, b, y, c, product=product: F.cross_entropy(product(x, w, b), y)
        found[name] = (fn, [x, w, b, y, c])
    for name, shape in SHAPES.items():
        fn = lambda x, w, b, y, c, shape=shape: F.cross_entropy(shape(F.linear(x, w)), y)
        found[name] = (fn, [x, w, b, y, c])
    for name, loss in LOSSES.items():
        fn = lambda x, w, b, y, c, loss=loss: loss(F.linear(x, w, b), y, c)
        found[name] = (fn, [x, w, b, y.clamp(min=0) if "ignore_index" in name else y, c])
    x3, y3 = three(x, y)
    for name, fn in MORE_DIMENSIONS.items():
        found[name] = (fn, [x3, w, b, y3, c])
    return found


# x [4, 6, H], target [4, 6]
MORE_DIMENSIONS: dict[str, Fn] = {
    "flat": lambda x, w, b, y, c: F.cross_entropy(F.linear(x, w, b).view(-1, V), y.view(-1)),
    "einsum 3d": lambda x, w, b, y, c: F.cross_entropy(torch.einsum("bth,vh->btv", x, w).flatten(0, 1), y.flatten()),
    "matmul 3d": lambda x, w, b, y, c: F.cross_entropy((x @ w.T).reshape(-1, V), y.reshape(-1)),
    "x flat before": lambda x, w, b, y, c: F.cross_entropy(F.linear(x.reshape(-1, 8), w), y.reshape(-1)),
    "transpose": lambda x, w, b, y, c: F.cross_entropy(F.linear(x, w, b).transpose(1, 2), y),
    "permute": lambda x, w, b, y, c: F.cross_entropy(F.linear(x, w).permute(0, 2, 1), y, reduction="none"),
    "permute smoothing": lambda x, w, b, y, c: F.cross_entropy(
        F.linear(x, w).permute(0, 2, 1), y, c, reduction="none", label_smoothing=0.1
    ),
    "log_softmax permute": lambda x, w, b, y, c: F.nll_loss(F.linear(x, w).log_softmax(-1).permute(0, 2, 1), y),
    "rows swapped": lambda x, w, b, y, c: F.cross_entropy(
        F.linear(x, w).transpose(0, 1).reshape(-1, V), y.transpose(0, 1).reshape(-1), c, reduction="none"
    ),
    "shift": lambda x, w, b, y, c: F.cross_entropy(F.linear(x, w)[:, :-1].reshape(-1, V), y[:, 1:].reshape(-1)),
    "shift contiguous": lambda x, w, b, y, c: F.cross_entropy(
        F.linear(x, w)[..., :-1, :].contiguous().view(-1, V), y[..., 1:].contiguous().view(-1)
    ),
    "last position": lambda x, w, b, y, c: F.cross_entropy(F.linear(x, w)[:, -1], y[:, -1]),
    "steps": lambda x, w, b, y, c: F.cross_entropy(F.linear(x, w)[1:, ::2].flatten(0, 1), y[1:, ::2].flatten()),
    "two heads of rows": lambda x, w, b, y, c: (lambda z: F.cross_entropy(z[0], y[0]) + F.cross_entropy(z[1], y[1]))(
        F.linear(x, w)
    ),
}

SPELLINGS = spellings()


@pytest.mark.parametrize("name", SPELLINGS)
def test_compiled(name, installed):
    """Every spelling is rewritten, with eager's numbers, and no tensor of N * V elements in either half."""
    fn, args = SPELLINGS[name]
    compiled = check_against_eager(fn, args, fullgraph=True)
    assert compiled.counts["rewritten"] == 1 and not compiled.refusals
    assert compiled.largest < N * V


@pytest.mark.parametrize("name", one_of(2, [*SPELLINGS]))
def test_graph(name):
    """The rewritten joint graph gives the values and gradients of the one that it was."""
    fn, args = SPELLINGS[name]
    traced = joint_graph(fn, *args)
    assert check_graph(traced) in (["kernels"], ["region"])
    assert traced.largest() < N * V or "weight" in name  # class weights, broadcast and picked from, are the user's


@pytest.mark.parametrize(
    "name, dtype",
    crossed(
        ["linear", "float", "ce  none", "nll  mean", "log_softmax float", "shift"],
        [torch.float64, torch.float32, torch.bfloat16, torch.float16],
    ),
    ids=str,
)
def test_dtypes(name, dtype, installed):
    """The loss keeps the dtype the user's graph gave it."""
    fn, args = SPELLINGS[name]
    args = [a.detach().to(dtype).requires_grad_(a.requires_grad) if a.is_floating_point() else a for a in args]
    assert check_against_eager(fn, args).counts["rewritten"] == 1


# -- modules


class Model(nn.Module):
    """Leaf modules in a symbolic trace."""

    def __init__(self, bias: bool = True, **loss: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, V, bias=bias)
        self.loss = nn.CrossEntropyLoss(**loss)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.head(self.norm(x)), target)


class Parts(nn.Module):
    """log-softmax and negative log-likelihood as modules, on [4, 6] rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Sequential(nn.Linear(8, V), nn.Identity(), nn.Flatten(0, 1), nn.LogSoftmax(-1))
        self.loss = nn.NLLLoss(torch.rand(V), ignore_index=3, reduction="sum")

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.head(x.reshape(4, 6, 8)), target.clamp(min=0))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, 8)
        self.head = nn.Linear(8, V, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.embedding(target.clamp(min=0)) + x), target)


class Several(nn.Module):
    """Three heads, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads = nn.ModuleList(nn.Linear(8, V) for _ in range(3))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        loss = sum(F.cross_entropy(head(x), target) * (i + 1) for i, head in enumerate(self.heads))
        return loss + F.cross_entropy(self.heads[0](x.roll(1, 0)), target)


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "plain": (Model, 1),
    "no bias": (lambda: Model(bias=False), 1),
    "sum": (lambda: Model(reduction="sum"), 1),
    "none": (lambda: Model(reduction="none"), 1),
    "everything": (lambda: Model(weight=torch.rand(V), ignore_index=-100, label_smoothing=0.1), 1),
    "parts": (Parts, 1),
    "tied": (Tied, 1),
    "several": (Several, 4),
}


def module_results(fn: Callable[..., Tensor], module: nn.Module, x: Tensor, y: Tensor) -> list[Tensor | None]:
    module.zero_grad()
    found = results(fn, fresh([x, y]))
    return [*found, *(p.grad.clone() for p in module.parameters())]


@pytest.mark.parametrize("name", MODELS)
def test_modules(name, installed):
    x, _, y = head()
    build, heads = MODELS[name]
    module = build()
    expected = module_results(module, module, x, y)
    compiled = Compiled(module)
    found = module_results(compiled, module, x, y)
    assert compiled.counts["rewritten"] == heads
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)


# -- dynamic shapes


@pytest.mark.parametrize("name", ["linear", "@ T", "view size", "ce label_smoothing mean", "flat", "shift", "permute"])
def test_dynamic_shapes_add_no_recompile(name):
    """The same number of graphs with and without the passes, and eager's numbers at every size."""
    import lce_inductor

    fn, args = SPELLINGS[name]
    sizes = [1, 2, 3]

    def grown(times: int) -> list[Tensor]:
        return [
            (torch.cat([a.detach()] * times) if i in (0, 3) else a.detach()).requires_grad_(a.requires_grad)
            for i, a in enumerate(args)
        ]

    def graphs(check: bool) -> int:
        compiled = Compiled(fn, dynamic=True)
        for times in sizes:
            inputs = grown(times)
            found = results(compiled, fresh(inputs))
            if check:
                check_results(fn, inputs, found)
                assert compiled.largest < N * V * min(times, 1)
        return len(compiled.graphs)

    without = graphs(check=False)
    with lce_inductor.installed(min_logits_bytes=0):
        assert graphs(check=True) == without


def test_marked_dynamic_stays_dynamic(installed):
    """mark_dynamic raises if anything specialises the dimension."""
    x, w, y = head()
    compiled = Compiled(lambda x, w, y: F.cross_entropy(F.linear(x, w), y))
    for n in (N, N - 1, 5):
        xs, ys = x.detach()[:n].clone().requires_grad_(), y[:n].clone()
        torch._dynamo.mark_dynamic(xs, 0)
        torch._dynamo.mark_dynamic(ys, 0)
        torch.testing.assert_close(compiled(xs, w, ys), F.cross_entropy(F.linear(xs, w), ys))
    assert compiled.counts["rewritten"] == 1


def test_dynamic_vocabulary(installed):
    """V as a symbol: the divisor of label smoothing has to follow it."""
    x, w, y = head()
    compiled = Compiled(lambda x, w, y: F.cross_entropy(F.linear(x, w), y, label_smoothing=0.1), dynamic=True)
    for v in (37, 50, 61):
        weight = torch.cat([w, w]).detach()[:v].clone()
        torch.testing.assert_close(compiled(x, weight, y), F.cross_entropy(F.linear(x, weight), y, label_smoothing=0.1))
    assert compiled.counts["rewritten"] == 1


# -- what must survive a rewrite


def test_the_rest_of_the_graph_is_untouched():
    """Everything upstream and downstream stays; nothing of the head does."""
    x, w, y = head()

    def fn(x, w, y):
        h = torch.tanh(x * 2)
        loss = F.cross_entropy(F.linear(h, w), y)
        return loss.exp() + h.sum()

    traced = joint_graph(fn, x, w, y)
    assert rewrite(traced) == ["rewritten"]
    left = targets(traced.gm)
    assert "aten.tanh" in left and left.count("aten.exp") == 1 and left.count("aten.sum") >= 2
    assert not {"aten.mm", "aten.gather", "aten.amax"} & set(left)


def test_new_nodes_carry_the_users_source_line():
    x, w, y = head()
    traced = joint_graph(lambda x, w, y: F.cross_entropy(F.linear(x, w), y), x, w, y)
    rewrite(traced, schedule=False)
    ours = [n for n in traced.graph.nodes if "row_stats" in str(n.target)]
    assert len(ours) == 2
    for node in ours:
        assert "test_spellings.py" in node.meta["stack_trace"]


def test_the_loss_keeps_its_value_of_the_trace():
    """Later passes read shape and dtype from the metadata."""
    x, w, y = head(dtype=torch.bfloat16)
    traced = joint_graph(lambda x, w, y: F.cross_entropy(F.linear(x, w), y, reduction="none") * 2, x, w, y)
    (before,) = traced.graph.find_nodes(op="output")
    before = [a.meta["val"] for a in before.args[0] if a is not None]
    rewrite(traced)
    (after,) = traced.graph.find_nodes(op="output")
    after = [a.meta["val"] for a in after.args[0] if a is not None]
    assert [(v.dtype, v.shape) for v in after] == [(v.dtype, v.shape) for v in before]


@pytest.mark.parametrize("how", [joint_graph, inference_graph])
def test_a_second_run_changes_nothing(how):
    x, w, y = head()
    traced = how(lambda x, w, y: F.cross_entropy(F.linear(x, w), y), x, w, y)
    rewrite(traced)
    once = str(traced.graph)
    assert rewrite(traced) == [] and str(traced.graph) == once


def test_other_linears_are_left_alone():
    x, w, y = head()

    def fn(x, w, y, v):
        h = F.relu(F.linear(x, v))
        return F.cross_entropy(F.linear(F.linear(h, v), w), y)

    traced = joint_graph(fn, x, w, y, torch.randn(8, 8, requires_grad=True))
    before = targets(traced.gm).count("aten.mm")
    assert rewrite(traced) == ["rewritten"] and targets(traced.gm).count("aten.mm") == before - 3


def test_one_head_refused_another_rewritten(installed):
    x, w, y = head()

    def fn(x, w, y, u):
        return F.cross_entropy(F.linear(x, w), y) + F.linear(x, u).cumsum(0).cumsum(1).sin().sum()

    compiled = check_against_eager(fn, [x, w, y, w.detach().clone().requires_grad_()])
    assert compiled.counts["rewritten"] == 1
