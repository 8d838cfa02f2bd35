"""The recognise stage: which graphs it rewrites, into what, and that they compute what they computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from harness import (
    Compiled,
    N,
    V,
    aten_graph,
    check_against_eager,
    check_results,
    dynamo_graph,
    fresh,
    head,
    largest,
    listing,
    results,
    rewrite,
    symbolic_graph,
    targets,
)
from torch import Tensor, nn

from lce_inductor import Config
from lce_inductor.ops import schema  # noqa: F401  (registers the ops)
from lce_inductor.recognize import recognize

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
    "one row": lambda z, y, c: F.cross_entropy(z[0], y[0]),
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

# What an ATen graph loses: einsum, losses over [B, V, T] and label smoothing with class weights are decomposed there
# into operations without a rule.
NOT_IN_ATEN = {n for n in PRODUCTS if n.startswith("einsum")} | {
    "einsum 3d", "transpose", "permute", "permute smoothing", "log_softmax permute", "two class weights",
    *(f"ce weight label_smoothing {reduction}" for reduction in ("mean", "sum", "none")),
}  # fmt: skip

SPELLINGS = spellings()


@pytest.mark.parametrize("name", SPELLINGS)
def test_compiled(name, installed):
    """Every spelling is rewritten, with eager's numbers, and no tensor of N * V elements in either half."""
    fn, args = SPELLINGS[name]
    compiled = check_against_eager(fn, args, fullgraph=True)
    assert compiled.counts["rewritten"] == 1 and not compiled.refusals
    assert compiled.largest < N * V


@pytest.mark.parametrize("name", SPELLINGS)
def test_dynamo_graph(name):
    """The rewritten torch-level graph runs as it stands, and autograd through it gives eager's gradients."""
    fn, args = SPELLINGS[name]
    gm = dynamo_graph(lambda x, w, b, y, c: fn(x, w, b, y, c), *args)
    order = [n.target.removeprefix("L_").removesuffix("_") for n in gm.graph.find_nodes(op="placeholder")]
    assert rewrite(gm) == ["rewritten"]

    def run(x, w, b, y, c):
        return gm(*(dict(zip("xwbyc", (x, w, b, y, c)))[name] for name in order))

    check_results(fn, args, results(run, fresh(args)))
    values = [dict(zip("xwbyc", args))[name] for name in order]
    assert largest(gm, *values) < N * V


@pytest.mark.parametrize("name", SPELLINGS)
def test_aten_graph(name):
    fn, args = SPELLINGS[name]
    gm = aten_graph(lambda x, w, b, y, c: fn(x, w, b, y, c), *(a.detach() for a in args))
    found = rewrite(gm)
    if name not in NOT_IN_ATEN:
        assert found == ["rewritten"]
        assert largest(gm, *args) < N * V
    check_results(fn, args, results(gm, fresh(args)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["linear", "float", "ce  none", "nll  mean", "log_softmax float", "shift"])
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


@pytest.mark.parametrize("how", ["fake", "real", "compiled"])
@pytest.mark.parametrize("name", MODELS)
def test_modules(name, how):
    x, _, y = head()
    build, heads = MODELS[name]
    module = build()
    expected = module_results(module, module, x, y)
    if how == "compiled":
        import lce_inductor

        with lce_inductor.installed(min_logits_bytes=0):
            compiled = Compiled(module)
            found = module_results(compiled, module, x, y)
            assert compiled.counts["rewritten"] == heads
    else:
        gm = symbolic_graph(module, x.detach(), y, fake=how == "fake")
        assert rewrite(gm) == ["rewritten"] * heads
        assert largest(gm, x, y) < N * V
        found = module_results(gm, module, x, y)
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


# -- expected graphs


def before_and_after(gm: torch.fx.GraphModule, **settings: object) -> str:
    before = listing(gm)
    assert rewrite(gm, **settings) == ["rewritten"]
    return f"{before}\n->\n{listing(gm)}\n"


def show(fn: Fn, *args: Tensor) -> str:
    return before_and_after(dynamo_graph(fn, *args))


def test_graph_of_linear_and_cross_entropy():
    x, w, y = head()
    assert_expected_inline(
        show(lambda x, w, y: F.cross_entropy(F.linear(x, w), y), x, w, y),
        """\
linear = linear(x, w)
cross_entropy = cross_entropy(linear, y)
return (cross_entropy)
->
head_stats_default = lce_inductor.head_stats(x, w, None, [y], [-100], None, '', 3, 0, 1073741824)
getitem = getitem(head_stats_default, 0)
getitem_1 = getitem(head_stats_default, 1)
select_int = aten.select.int(getitem_1, -1, 0)
cross_entropy_default = lce_inductor.cross_entropy(getitem, select_int, None, y, None, 'mean', -100, 0.0, 37, torch.float32)
return (cross_entropy_default)
""",
    )


def test_graph_of_bias_weights_and_smoothing():
    x, w, y = head()
    b, c = torch.zeros(V, requires_grad=True), torch.ones(V)
    assert_expected_inline(
        show(lambda x, w, b, y, c: F.cross_entropy(F.linear(x, w, b), y, c, label_smoothing=0.1), x, w, b, y, c),
        """\
linear = linear(x, w, b)
cross_entropy = cross_entropy(linear, y, c, label_smoothing=0.1)
return (cross_entropy)
->
head_stats_default = lce_inductor.head_stats(x, w, b, [y], [-100], c, '', 7, 0, 1073741824)
getitem = getitem(head_stats_default, 0)
getitem_1 = getitem(head_stats_default, 1)
select_int = aten.select.int(getitem_1, -1, 0)
getitem_2 = getitem(head_stats_default, 2)
cross_entropy_default = lce_inductor.cross_entropy(getitem, select_int, getitem_2, y, c, 'mean', -100, 0.1, 37, torch.float32)
return (cross_entropy_default)
""",
    )


def test_graph_of_matmul_with_the_transposed_weight():
    x, w, y = head()
    assert_expected_inline(
        show(lambda x, w, y: F.cross_entropy(x @ w.T, y, reduction="sum"), x, w, y),
        """\
getattr_1 = getattr(w, 'T')
matmul = matmul(x, getattr_1)
cross_entropy = cross_entropy(matmul, y, reduction='sum')
return (cross_entropy)
->
getattr_1 = getattr(w, 'T')
head_stats_default = lce_inductor.head_stats(x, w, None, [y], [-100], None, '', 3, 0, 1073741824)
getitem = getitem(head_stats_default, 0)
getitem_1 = getitem(head_stats_default, 1)
select_int = aten.select.int(getitem_1, -1, 0)
cross_entropy_default = lce_inductor.cross_entropy(getitem, select_int, None, y, None, 'sum', -100, 0.0, 37, torch.float32)
return (cross_entropy_default)
""",
    )


def test_graph_of_matmul_with_a_weight_of_h_times_v():
    x, w, y = head()
    assert_expected_inline(
        show(lambda x, w, y: F.cross_entropy(x @ w, y), x, w.detach().t().contiguous().requires_grad_(), y),
        """\
matmul = matmul(x, w)
cross_entropy = cross_entropy(matmul, y)
return (cross_entropy)
->
t_default = aten.t(w)
head_stats_default = lce_inductor.head_stats(x, t_default, None, [y], [-100], None, '', 3, 0, 1073741824)
getitem = getitem(head_stats_default, 0)
getitem_1 = getitem(head_stats_default, 1)
select_int = aten.select.int(getitem_1, -1, 0)
cross_entropy_default = lce_inductor.cross_entropy(getitem, select_int, None, y, None, 'mean', -100, 0.0, 37, torch.float32)
return (cross_entropy_default)
""",
    )


def test_graph_of_addmm():
    x, w, y = head()
    b = torch.zeros(V, requires_grad=True)
    assert_expected_inline(
        show(lambda x, w, b, y: F.cross_entropy(torch.addmm(b, x, w.t()), y), x, w, b, y),
        """\
t = .t(w)
addmm = addmm(b, x, t)
cross_entropy = cross_entropy(addmm, y)
return (cross_entropy)
->
t = .t(w)
head_stats_default = lce_inductor.head_stats(x, w, b, [y], [-100], None, '', 3, 0, 1073741824)
getitem = getitem(head_stats_default, 0)
getitem_1 = getitem(head_stats_default, 1)
select_int = aten.select.int(getitem_1, -1, 0)
cross_entropy_default = lce_inductor.cross_entropy(getitem, select_int, None, y, None, 'mean', -100, 0.0, 37, torch.float32)
return (cross_entropy_default)
""",
    )


def test_graph_of_einsum():
    x, w, y = head()
    assert_expected_inline(
        show(lambda x, w, y: F.cross_entropy(torch.einsum("nh,vh->nv", x, w), y), x, w, y),
        """\
einsum = einsum('nh,vh->nv', x, w)
cross_entropy = cross_entropy(einsum, y)
return (cross_entropy)
->
head_stats_default = lce_inductor.head_stats(x, w, None, [y], [-100], None, '', 3, 0, 1073741824)
getitem = getitem(head_stats_default, 0)
getitem_1 = getitem(head_stats_default, 1)
select_int = aten.select.int(getitem_1, -1, 0)
cross_entropy_default = lce_inductor.cross_entropy(getitem, select_int, None, y, None, 'mean', -100, 0.0, 37, torch.float32)
return (cross_entropy_default)
""",
    )


def test_graph_of_casts_and_views():
    x, w, y = head()
    x3, y3 = three(x, y)
    assert_expected_inline(
        show(lambda x, w, y: F.cross_entropy(F.linear(x, w).float().contiguous().view(-1, V), y.view(-1)), x3, w, y3),
        """\
linear = linear(x, w)
float_1 = .float(linear)
contiguous = .contiguous(float_1)
view = .view(contiguous, -1, 37)
view_1 = .view(y, -1)
cross_entropy = cross_entropy(view, view_1)
return (cross_entropy)
->
view_1 = .view(y, -1)
head_stats_default = lce_inductor.head_stats(x, w, None, [view_1], [-100], None, '', 3, 0, 1073741824)
getitem = getitem(head_stats_default, 0)
getitem_1 = getitem(head_stats_default, 1)
select_int = aten.select.int(getitem_1, -1, 0)
cross_entropy_default = lce_inductor.cross_entropy(getitem, select_int, None, view_1, None, 'mean', -100, 0.0, 37, torch.float32)
return (cross_entropy_default)
""",
    )


def test_graph_of_a_row_slice():
    x, w, y = head()
    x3, y3 = three(x, y)
    assert_expected_inline(
        show(lambda x, w, y: F.cross_entropy(F.linear(x, w)[:, :-1].reshape(-1, V), y[:, 1:].reshape(-1)), x3, w, y3),
        """\
linear = linear(x, w)
getitem = getitem(linear, (slice(None, None, None), slice(None, -1, None)))
reshape = .reshape(getitem, -1, 37)
getitem_1 = getitem(y, (slice(None, None, None), slice(1, None, None)))
reshape_1 = .reshape(getitem_1, -1)
cross_entropy = cross_entropy(reshape, reshape_1)
return (cross_entropy)
->
getitem_1 = getitem(y, (slice(None, None, None), slice(1, None, None)))
reshape_1 = .reshape(getitem_1, -1)
getitem_2 = getitem(x, (slice(None, None, None), slice(None, -1, None)))
head_stats_default = lce_inductor.head_stats(getitem_2, w, None, [reshape_1], [-100], None, '', 3, 0, 1073741824)
getitem_3 = getitem(head_stats_default, 0)
getitem_4 = getitem(head_stats_default, 1)
select_int = aten.select.int(getitem_4, -1, 0)
cross_entropy_default = lce_inductor.cross_entropy(getitem_3, select_int, None, reshape_1, None, 'mean', -100, 0.0, 37, torch.float32)
return (cross_entropy_default)
""",
    )


def test_graph_of_a_class_dimension_in_the_middle():
    x, w, y = head()
    x3, y3 = three(x, y)
    assert_expected_inline(
        show(lambda x, w, y: F.cross_entropy(F.linear(x, w).transpose(1, 2), y, reduction="none"), x3, w, y3),
        """\
linear = linear(x, w)
transpose = .transpose(linear, 1, 2)
cross_entropy = cross_entropy(transpose, y, reduction='none')
return (cross_entropy)
->
head_stats_default = lce_inductor.head_stats(x, w, None, [y], [-100], None, '', 3, 0, 1073741824)
getitem = getitem(head_stats_default, 0)
getitem_1 = getitem(head_stats_default, 1)
select_int = aten.select.int(getitem_1, -1, 0)
cross_entropy_default = lce_inductor.cross_entropy(getitem, select_int, None, y, None, 'none', -100, 0.0, 37, torch.float32)
return (cross_entropy_default)
""",
    )


def test_graph_of_log_softmax_and_nll_loss():
    x, w, y = head()
    assert_expected_inline(
        show(lambda x, w, y: F.nll_loss(F.log_softmax(F.linear(x, w), -1), y), x, w, y),
        """\
linear = linear(x, w)
log_softmax = log_softmax(linear, -1)
nll_loss = nll_loss(log_softmax, y)
return (nll_loss)
->
head_stats_default = lce_inductor.head_stats(x, w, None, [y], [-100], None, '', 3, 0, 1073741824)
getitem = getitem(head_stats_default, 0)
getitem_1 = getitem(head_stats_default, 1)
select_int = aten.select.int(getitem_1, -1, 0)
cross_entropy_default = lce_inductor.cross_entropy(getitem, select_int, None, y, None, 'mean', -100, 0.0, 37, torch.float32)
return (cross_entropy_default)
""",
    )


def test_graph_of_a_target_computed_after_the_linear():
    """What computes the target moves up to the linear."""
    x, w, y = head()

    def fn(x, w, y):
        z = F.linear(x, w)
        labels = torch.where(y > 3, y, -100)
        return F.cross_entropy(z, labels)

    assert_expected_inline(
        show(fn, x, w, y),
        """\
z = linear(x, w)
gt = gt(y, 3)
labels = where(gt, y, -100)
cross_entropy = cross_entropy(z, labels)
return (cross_entropy)
->
gt = gt(y, 3)
labels = where(gt, y, -100)
head_stats_default = lce_inductor.head_stats(x, w, None, [labels], [-100], None, '', 3, 0, 1073741824)
getitem = getitem(head_stats_default, 0)
getitem_1 = getitem(head_stats_default, 1)
select_int = aten.select.int(getitem_1, -1, 0)
cross_entropy_default = lce_inductor.cross_entropy(getitem, select_int, None, labels, None, 'mean', -100, 0.0, 37, torch.float32)
return (cross_entropy_default)
""",
    )


def test_graph_of_two_losses_on_one_head():
    """One head_stats serves both."""
    x, w, y = head()

    def fn(x, w, y):
        z = F.linear(x, w)
        return F.cross_entropy(z, y) + F.cross_entropy(z, y.roll(1), reduction="sum")

    assert_expected_inline(
        show(fn, x, w, y),
        """\
z = linear(x, w)
cross_entropy = cross_entropy(z, y)
roll = .roll(y, 1)
cross_entropy_1 = cross_entropy(z, roll, reduction='sum')
add = add(cross_entropy, cross_entropy_1)
return (add)
->
roll = .roll(y, 1)
head_stats_default = lce_inductor.head_stats(x, w, None, [y, roll], [-100, -100], None, '', 3, 0, 1073741824)
getitem = getitem(head_stats_default, 0)
getitem_1 = getitem(head_stats_default, 1)
select_int = aten.select.int(getitem_1, -1, 0)
select_int_1 = aten.select.int(getitem_1, -1, 1)
cross_entropy_default = lce_inductor.cross_entropy(getitem, select_int, None, y, None, 'mean', -100, 0.0, 37, torch.float32)
cross_entropy_default_1 = lce_inductor.cross_entropy(getitem, select_int_1, None, roll, None, 'sum', -100, 0.0, 37, torch.float32)
add = add(cross_entropy_default, cross_entropy_default_1)
return (add)
""",
    )


def test_graph_of_leaf_modules():
    x, _, y = head()
    assert_expected_inline(
        before_and_after(symbolic_graph(Model(label_smoothing=0.1), x.detach(), y)),
        """\
norm = self.norm(x)
head = self.head(norm)
loss = self.loss(head, target)
return loss
->
norm = self.norm(x)
head_stats_default = lce_inductor.head_stats(norm, head.weight, head.bias, [target], [-100], None, '', 7, 0, 1073741824)
getitem = getitem(head_stats_default, 0)
getitem_1 = getitem(head_stats_default, 1)
select_int = aten.select.int(getitem_1, -1, 0)
getitem_2 = getitem(head_stats_default, 2)
cross_entropy_default = lce_inductor.cross_entropy(getitem, select_int, getitem_2, target, None, 'mean', -100, 0.1, 37, torch.float32)
return cross_entropy_default
""",
    )


def test_graph_of_aten_operations():
    x, w, y = head()
    gm = aten_graph(lambda x, w, y: F.cross_entropy(F.linear(x, w), y), x.detach(), w.detach(), y)
    assert_expected_inline(
        before_and_after(gm),
        """\
t = aten.t(w_1)
mm = aten.mm(x_1, t)
_log_softmax = aten._log_softmax(mm, 1, False)
nll_loss_forward = aten.nll_loss_forward(_log_softmax, y_1, None, 1, -100)
getitem = getitem(nll_loss_forward, 0)
getitem_1 = getitem(nll_loss_forward, 1)
return getitem
->
t = aten.t(w_1)
head_stats_default = lce_inductor.head_stats(x_1, w_1, None, [y_1], [-100], None, '', 3, 0, 1073741824)
getitem_2 = getitem(head_stats_default, 0)
getitem_3 = getitem(head_stats_default, 1)
select_int = aten.select.int(getitem_3, -1, 0)
cross_entropy_default = lce_inductor.cross_entropy(getitem_2, select_int, None, y_1, None, 'mean', -100, 0.0, 37, torch.float32)
return cross_entropy_default
""",
    )


def test_settings_reach_the_op():
    x, w, y = head()
    gm = dynamo_graph(lambda x, w, y: F.cross_entropy(F.linear(x, w), y), x, w, y)
    recognize(gm.graph, Config(min_logits_bytes=0, chunk_tokens=7, workspace_bytes=12345))
    (stats,) = gm.graph.find_nodes(op="call_function", target=torch.ops.lce_inductor.head_stats.default)
    assert stats.args[-2:] == (7, 12345)


# -- what must survive a rewrite


def test_the_rest_of_the_graph_is_untouched():
    """Everything upstream and downstream stays, in its order."""
    x, w, y = head()

    def fn(x, w, y):
        h = torch.tanh(x * 2)
        loss = F.cross_entropy(F.linear(h, w), y)
        return loss.exp() + h.sum()

    gm = dynamo_graph(fn, x, w, y)
    rest = [t for t in targets(gm) if t not in ("linear", "cross_entropy")]
    rewrite(gm)
    assert [t for t in targets(gm) if t in rest] == rest
    assert "linear" not in targets(gm)


def test_new_nodes_carry_the_users_source_line():
    x, w, y = head()
    gm = dynamo_graph(lambda x, w, y: F.cross_entropy(F.linear(x, w), y), x, w, y)
    rewrite(gm)
    for node in gm.graph.nodes:
        if "lce_inductor" in str(node.target):
            assert "test_recognize.py" in node.meta["stack_trace"]


def test_the_loss_keeps_its_value_of_the_trace():
    """Later passes read shape and dtype from the metadata."""
    x, w, y = head(dtype=torch.bfloat16)
    gm = dynamo_graph(lambda x, w, y: F.cross_entropy(F.linear(x, w), y, reduction="none") * 2, x, w, y)
    rewrite(gm)
    (loss,) = gm.graph.find_nodes(op="call_function", target=torch.ops.lce_inductor.cross_entropy.default)
    assert loss.meta["example_value"].dtype == torch.bfloat16 and loss.meta["example_value"].shape == (N,)


def test_a_second_run_changes_nothing():
    x, w, y = head()
    gm = dynamo_graph(lambda x, w, y: F.cross_entropy(F.linear(x, w), y), x, w, y)
    rewrite(gm)
    once = str(gm.graph)
    assert rewrite(gm) == [] and str(gm.graph) == once


def test_other_linears_are_left_alone():
    x, w, y = head()

    def fn(x, w, y, v):
        h = F.relu(F.linear(x, v))
        return F.cross_entropy(F.linear(F.linear(h, v), w), y)

    square = torch.randn(8, 8, requires_grad=True)
    gm = dynamo_graph(fn, x, w, y, square)
    assert sorted(rewrite(gm)) == ["escape", "escape", "rewritten"] or targets(gm).count("linear") == 2


def test_one_head_refused_another_rewritten(installed):
    x, w, y = head()

    def fn(x, w, y, u):
        return F.cross_entropy(F.linear(x, w), y) + F.linear(x, u).sin().sum()

    compiled = check_against_eager(fn, [x, w, y, w.detach().clone().requires_grad_()])
    assert compiled.counts["rewritten"] == 1
