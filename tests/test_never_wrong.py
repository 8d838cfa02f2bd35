"""Programs that came out silently wrong, or crashed where torch.compile works, and neighbours of the same kinds.

Each must give eager's values and gradients. Whether it is rewritten is not asked here (see test_reach.py).
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from corpus.harness import no_codegen_backend
from mutation_cases import SETUP as MUTATE
from oracle import cheap, judge
from text_programs import Text, make_inputs
from torch import nn
from torch.profiler import ProfilerActivity, profile

import lce_inductor

LP = "lp = F.linear(x, w).log_softmax(-1)\n"
Z = "z = F.linear(x, w)\n"

# Losses called as ATen packets, as overloads and as the functions of torch._C._nn: arguments in the schema's order.
SPELLINGS = {
    "aten.nll_loss sum": LP + "return aten.nll_loss(lp, y, None, 2, -100)",
    "aten.nll_loss mean": LP + "return aten.nll_loss(lp, y, None, 1, -100)",
    "aten.nll_loss none": LP + "return aten.nll_loss(lp, y, None, 0, -100)",
    "aten.nll_loss ignore": LP + "return aten.nll_loss(lp, y, None, 1, 3)",
    "aten.nll_loss weight": LP + "return aten.nll_loss(lp, y, classes, 2)",
    "aten.nll_loss keywords": LP + "return aten.nll_loss(lp, y, reduction=2, ignore_index=int(3))",
    "aten.nll_loss.default": LP + "return aten.nll_loss.default(lp, y, None, 2, -100)",
    "aten.nll_loss_nd": LP + "return aten.nll_loss_nd(lp, y, None, 0, -100)",
    "aten.nll_loss_forward": LP + "return aten.nll_loss_forward(lp, y, None, 1, -100)[0]",
    "aten.nll_loss_forward total weight": LP + "return aten.nll_loss_forward(lp, ignored, None, 2, -100)[0] / 7",
    "aten.cross_entropy_loss smoothed": Z + "return aten.cross_entropy_loss(z, y, None, 1, -100, 0.1)",
    "aten.cross_entropy_loss mean": Z + "return aten.cross_entropy_loss(z, y, None, 1, -100, 0.0)",
    "aten.cross_entropy_loss sum": Z + "return aten.cross_entropy_loss(z, y, None, 2)",
    "aten.cross_entropy_loss soft": Z + "return aten.cross_entropy_loss(z, soft, None, 2)",
    "_C._nn.cross_entropy_loss": Z + "return torch._C._nn.cross_entropy_loss(z, y, None, 2, -100, 0.0)",
    "_C._nn.cross_entropy_loss smoothed": Z + "return torch._C._nn.cross_entropy_loss(z, y, classes, 1, 3, 0.2)",
    "_C._nn.nll_loss_nd": LP + "return torch._C._nn.nll_loss_nd(lp, y, None, 2, -100)",
    "_C._nn.nll_loss": LP + "return torch._C._nn.nll_loss(lp, y, None, 2, -100)",
    "_C._nn.nll_loss ignore_index": LP + "return torch._C._nn.nll_loss(lp, y, ignore_index=-1)",
    "aten.nll_loss_forward, its total weight": LP + "return aten.nll_loss_forward(lp, y, None, 1, -100)[1] + lp.mean()",
    "torch.nll_loss": LP + "return torch.nll_loss(lp, y) if hasattr(torch, 'nll_loss') else lp.sum()",
    "size_average": Z + "return F.cross_entropy(z, y, None, False)",
    "reduce": Z + "return F.cross_entropy(z, y, reduce=False)",
    "aten.kl_div": Z + "return aten.kl_div(z.log_softmax(-1), soft.log(), 2, log_target=True)",
    "aten._log_softmax": Z + "return aten.nll_loss(aten._log_softmax(z, 1, False), y, None, 2)",
    "aten.log_softmax.int dtype": Z + "return F.nll_loss(aten.log_softmax.int(z, -1, torch.float32), y)",
    "log_softmax over rows": Z + "return F.nll_loss(z.log_softmax(0), y)",
    "logsumexp over rows": Z + "return z.logsumexp(0).sum()",
    "logsumexp over all": Z + "return z.logsumexp((0, 1))",
    "aten.linear with a bias by keyword": "return aten.cross_entropy_loss(aten.linear(x, w, bias=b), y)",
    "addmm alpha and beta": "return F.cross_entropy(torch.addmm(b, x, w.T, beta=0.5, alpha=2), y)",
    "add alpha": Z + "return F.cross_entropy(torch.add(z, b, alpha=-2), y)",
    "sub alpha": Z + "return F.cross_entropy(z.sub(b, alpha=3), y)",
    "rsub alpha": Z + "return F.cross_entropy(torch.rsub(z, 1.0, alpha=2), y)",
    "div rounding": Z + "return F.cross_entropy(torch.div(z, 0.5, rounding_mode='floor') + z, y)",
    "max of two": Z + "return F.cross_entropy(torch.max(z, const), y)",
    "gather over rows": Z + "return z.log_softmax(-1).gather(0, ids).mean()",
}

# reduce= of scatter, fewer index rows, sources, other dimensions.
TARGETS = {
    "scatter_ add": "torch.full_like(z, 0.1 / 37).scatter_(1, y[:, None], 0.9, reduce='add')",
    "scatter multiply": "torch.full_like(z, 0.1).scatter(1, y[:, None], 3.0, reduce='multiply')",
    "fewer rows": "torch.zeros_like(z).scatter(1, y[:20, None], 1.0)",
    "several per row": "torch.zeros_like(z).scatter(1, many, 0.5)",
    "several per row added": "torch.zeros_like(z).scatter(1, many, 0.5, reduce='add')",
    "scatter_add": "torch.zeros_like(z).scatter_add(1, many, torch.full_like(many, 0.25, dtype=z.dtype))",
    "scatter_reduce": "torch.full_like(z, 0.2).scatter_reduce(1, many, const[:, :3], 'amax')",
    "scatter_reduce without self": "torch.full_like(z, 0.2).scatter_reduce(1, y[:, None], const, 'mean', include_self=False)",
    "scatter of a tensor": "torch.zeros_like(z).scatter(1, y[:, None], const)",
    "scatter over rows": "torch.zeros_like(z).scatter(0, y[None] % 24, 1.0)",
    "scatter into what is not constant": "soft.scatter(1, y[:, None], 0.9)",
    "scattered twice": "torch.zeros_like(z).scatter(1, y[:, None], 0.9).scatter(1, (y[:, None] + 1) % 37, 0.1)",
    "index_put accumulated": "torch.zeros_like(z).index_put((torch.arange(24) // 2, y), torch.tensor(0.5, dtype=z.dtype), accumulate=True)",
    "index_put": "torch.full_like(z, 0.01).index_put((torch.arange(24), y), torch.tensor(0.5, dtype=z.dtype))",
    "one-hot of one row": "F.one_hot(y[:1], 37)",
    "one-hot of one label": "F.one_hot(y[0], 37)",
    "one-hot of more classes": "F.one_hot(y, 40)[:, :37]",
    "one-hot scaled": "F.one_hot(y, 37).to(z.dtype) * 0.9 + 0.1 / 37",
    "eye": "torch.eye(37, dtype=z.dtype)[y]",
}

# An operand that makes more rows or dimensions of the logits.
BROADCASTS = {
    "scale of three dimensions": Z
    + "return (z / torch.full((1, 1, 1), 0.5, dtype=z.dtype)).logsumexp(-1).sum(0).square().sum()",
    "its first": Z + "return F.cross_entropy((z * torch.full((1, 1, 1), 0.5, dtype=z.dtype))[0], y)",
    "one row less numbers of rows": "return (F.linear(x[:1], w) - x[:, :1]).logsumexp(-1).square().sum()",
    "its cross-entropy": "return F.cross_entropy(F.linear(x[:1], w) - x[:, :1], y)",
    "one row times numbers": "return F.cross_entropy(F.linear(x[:1], w) * row[:, None], y)",
    "one row plus logits": "return F.cross_entropy(F.linear(x[:1], w) + F.linear(x, w2), y)",
    "one row expanded": "return F.cross_entropy(F.linear(x[:1], w).expand(24, 37), y)",
    "rows against sequences": Z + "return (z[:6] + row3[..., None]).logsumexp(-1).square().sum()",
    "bias of a batch": Z + "return (z + const[:4, None]).logsumexp(-1).square().sum()",
    "numbers of one sequence": "return (F.linear(x3, w) - row3[:1, :, None]).logsumexp(-1).square().sum()",
    "one class": "return (F.linear(x, w[:1]) + b).logsumexp(-1).sum()",
    "masked to more rows": Z + "return z[:1].masked_fill(mask, -9.0).logsumexp(-1).sum()",
    "where to more rows": Z + "return torch.where(mask_rows[:, None], z[:1], 0.5).logsumexp(-1).square().sum()",
    "labels of one row": Z + "return z.log_softmax(-1).take_along_dim(y[:1, None], -1).mean()",
    "labels of fewer rows": Z + "return z.log_softmax(-1).gather(-1, y[:5, None]).mean()",
    "labels of fewer sequences": "return F.linear(x3, w).log_softmax(-1).gather(-1, y3[:2, :3, None]).mean()",
    "statistics against more rows": Z + "return (z[:1].logsumexp(-1) - row).square().sum()",
    "statistics crossed": Z + "return (z.logsumexp(-1, keepdim=True) - z[:, 3]).square().mean()",
    "vector of logits": "return (F.linear(x[0], w) + row[:, None]).logsumexp(-1).sum()",
}

# Gradients that are cut inside an expression: see test_grad_modes.py for the whole kind.
MODES = {
    "straight-through cap": Z
    + "return F.cross_entropy(30 * z * torch.rsqrt(z.detach() * z.detach() + 900.0), y) + 0.1 * F.cross_entropy(z, y)",
    "norm detached": Z
    + "d = z.detach()\nreturn F.cross_entropy(z * torch.rsqrt(d * d + 4.0), y) + 0.1 * F.cross_entropy(z, y)",
    "norm half detached": Z + "return F.cross_entropy(z * torch.rsqrt(z * z.detach() + 30.0), y)",
    "cap detached inside": Z + "return F.cross_entropy(3 * torch.tanh(z.detach() / 3) + 0 * z, y)",
    "log-softmax by hand": Z + "return F.nll_loss(z - z.logsumexp(-1, keepdim=True).detach(), y)",
    "cast to the same": Z
    + "with torch.no_grad():\n    s = z.to(z.dtype)\nreturn F.cross_entropy(s, y) + 0.01 * F.cross_entropy(z, y)",
    "view": Z
    + "with torch.no_grad():\n    s = z.view(4, 6, 37)\nreturn F.cross_entropy(s.flatten(0, 1), y) + F.cross_entropy(z, y)",
    "reshape to the same": Z
    + "with torch.no_grad():\n    s = z.reshape(24, 37)\nreturn F.cross_entropy(s, y) + F.cross_entropy(z, y)",
    "expand": Z
    + "with torch.no_grad():\n    s = z.expand(24, 37)\nreturn F.cross_entropy(s, y) + z.logsumexp(-1).sum()",
    "transposed weight": "with torch.no_grad():\n    v = w.T\nreturn F.cross_entropy(x @ v, y)",
    "detached weight": "return F.cross_entropy(F.linear(x, w.detach()), y) + 0.1 * F.cross_entropy(F.linear(x, w), y)",
    "detached hidden": "return F.cross_entropy(F.linear(x.detach(), w), y) + 0.1 * F.cross_entropy(F.linear(x, w), y)",
    "bias of detached logits": Z + "return F.cross_entropy(z.detach() + b, y)",
    "bias of detached logits beside": Z + "return F.cross_entropy(z.detach() + b, y) + 0.1 * F.cross_entropy(z, y)",
    "scale of detached logits": Z + "return F.cross_entropy(z.detach() * scale, y)",
    "gain of logits without gradient": "with torch.no_grad():\n    z = F.linear(x, w)\nreturn F.cross_entropy(z * gain, y)",
    "bias of a matmul without gradient": "with torch.no_grad():\n    z = x @ w.T\nreturn F.cross_entropy(z + b, y)",
    "rows of detached logits": Z + "return F.cross_entropy(z.detach() + row[:, None], y, classes)",
    "hidden states reshaped": "with torch.no_grad():\n    h = x3.reshape(-1, 8)\nreturn F.cross_entropy(torch.addmm(b, h, w.T), y)",
    "divided in place": Z + "with torch.no_grad():\n    z.div_(0.7)\nreturn F.cross_entropy(z, y)",
    "masked in place": Z + "with torch.no_grad():\n    z[:, 30:] = -9.0\nreturn F.cross_entropy(z, y.clamp(max=29))",
    "capped in place": Z + "with torch.no_grad():\n    z.div_(3)\nreturn F.cross_entropy(z.tanh() * 3, y)",
    "one-hot product": Z
    + "lp = z.log_softmax(-1)\nwith torch.no_grad():\n    t = lp * F.one_hot(y, 37)\nreturn -t.sum(-1).mean() + F.nll_loss(lp, y)",
    "split": Z
    + "with torch.no_grad():\n    a, b_ = z.split(12)\nreturn F.cross_entropy(a, y[:12]) + F.cross_entropy(z, y)",
    "enabled in disabled": Z
    + "with torch.no_grad(), torch.enable_grad():\n    s = z * 2\nreturn F.cross_entropy(s, y)",
    "soft targets with a gradient": Z + "return -(z.softmax(-1) * F.linear(x, w2).log_softmax(-1)).sum(-1).mean()",
    "soft targets detached": Z + "return -(z.detach().softmax(-1) * F.linear(x, w2).log_softmax(-1)).sum(-1).mean()",
    "its own targets": Z + "return F.cross_entropy(z, z.softmax(-1))",
    "two biases detached": "return (F.linear(x, w, b) + classes).logsumexp(-1).square().mean().detach() * scale",
    "two biases without gradient": "with torch.no_grad():\n    s = (F.linear(x3, w, b) + classes).logsumexp(-1)\nreturn (s.square() * row3).mean()",
    "two biases": "return F.cross_entropy(F.linear(x, w, b) + classes, y)",
    "its own targets detached": Z + "return F.cross_entropy(z, z.detach().softmax(-1))",
}

# Index tensors and others that change after they were read.
MUTATIONS = {
    "rows": "i = picks.clone()\nz = F.linear(x, w)\ns = z[i]\ni.add_(1).remainder_(24)\nreturn F.cross_entropy(s, y[:12]) + 0 * i.sum()",
    "rows of statistics": "i = picks.clone()\nz = F.linear(x, w)\ns = z[i]\ni.zero_()\nreturn s.logsumexp(-1).sum() + 0 * i.sum()",
    "rows by index_select": "i = picks.clone()\ns = F.linear(x, w).index_select(0, i)\ni.zero_()\nreturn s.logsumexp(-1).sum()",
    "rows of an input": "s = F.linear(x, w)[picks]\npicks.zero_()\nreturn s.logsumexp(-1).sum()",
    "rows through a view": "i = picks.clone()\nu = i[2:7]\ns = F.linear(x, w)[i]\nu.zero_()\nreturn s.logsumexp(-1).sum()",
    "rows by an op": "i = picks.clone()\ns = F.linear(x, w)[i]\ntorch.ops.lce_tests.mutate_(i)\nreturn s.logsumexp(-1).square().sum()",
    "labels": "t = y.clone()\nlp = F.linear(x, w).log_softmax(-1)\nr = F.nll_loss(lp, t)\nt.zero_()\nreturn r + 0 * t.sum()",
    "mask": "m = mask_classes.clone()\nz = F.linear(x, w).masked_fill(m, -9.0)\nm.logical_not_()\nreturn z.logsumexp(-1).sum()",
    "temperature": "t = temp.clone()\nz = F.linear(x, w) / t[:, None]\nt.fill_(2.0)\nreturn z.logsumexp(-1).sum()",
    "bias": "c = b.detach().clone()\nz = F.linear(x, w) + c\nc.zero_()\nreturn F.cross_entropy(z, y)",
    "weight": "v = w.detach().clone()\nz = F.linear(x, v)\nv.mul_(2)\nreturn z.logsumexp(-1).sum()",
    "hidden states": "h = x.detach().clone()\nz = F.linear(h, w.detach())\nh.zero_()\nreturn z.logsumexp(-1).sum()",
}
# Inputs written to under no_grad that autograd saves for nothing, and that a backward computing logits again reads.
WRITTEN = {
    "bias": Z.replace("x, w", "x, w, b")
    + "with torch.no_grad():\n    b.add_(1)\nreturn F.cross_entropy(z, y, reduction='none') + 0 * b.sum()",
    "bias through a view": "z = torch.addmm(b, x, w.T)\nwith torch.no_grad():\n    b.view(-1)[1:3].add_(1)\nreturn F.cross_entropy(z, y, reduction='none')",
    "bias of a region": "z = F.linear(x, w, b).clamp(max=1.5)\nwith torch.no_grad():\n    b.mul_(3)\nreturn F.cross_entropy(z, y, reduction='none') ** 2",
    "hidden states of a frozen weight": "z = F.linear(x, w.detach())\nwith torch.no_grad():\n    x.mul_(2)\nreturn F.cross_entropy(z, y, reduction='none') + 0 * x.sum()",
    "weight of frozen hidden states": "z = F.linear(x.detach(), w)\nwith torch.no_grad():\n    w.mul_(2)\nreturn F.cross_entropy(z, y, reduction='none') + 0 * w.sum()",
    "bias of the sum": Z.replace("x, w", "x, w, b")
    + "with torch.no_grad():\n    b.add_(1)\nreturn F.cross_entropy(z, y)",
}
HALVED = "z = F.linear(x3, w)[1]\nz = z[..., ::2]\nz = torch.stack([z, -z], 1)[:, 0]\n"
PROGRAMS = {
    **{f"written: {k}": Text(v) for k, v in WRITTEN.items()},
    "every other class, sizes that are symbols": Text(HALVED + "return z.log_softmax(-1).take_along_dim(torch.full([1] * z.dim(), 2 % 19), -1).mean()", dynamic=True),
    **{f"spelling: {k}": Text(v) for k, v in SPELLINGS.items()},
    **{f"target: {k}": Text(f"{Z}t = {v}\nreturn -(t * z.log_softmax(-1)).sum(-1).mean()") for k, v in TARGETS.items()},
    **{f"kl target: {k}": Text(f"{Z}t = {v}\nreturn F.kl_div(z.log_softmax(-1), t + 0.01, reduction='sum')") for k, v in TARGETS.items() if "scatter" in k},
    **{f"broadcast: {k}": Text(v) for k, v in BROADCASTS.items()},
    **{f"mode: {k}": Text(v) for k, v in MODES.items()},
    **{f"mutation: {k}": Text(v, setup=MUTATE if "lce_tests" in v else "") for k, v in MUTATIONS.items()},
    **{f"mutation without gradients: {k}": Text(v, setup=MUTATE if "lce_tests" in v else "", grad=False) for k, v in MUTATIONS.items()},
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_as_eager(name):
    text = PROGRAMS[name]
    verdict = text.check()
    # With gradients, autograd forbids most mutations, and then both raise.
    assert verdict.kind != "invalid" or name.startswith("mutation:"), f"{verdict}\n{text.body}"
    assert not verdict.failed, f"{verdict}\n{text}"


def _compiled(fn, **settings):
    torch._dynamo.reset()
    return lce_inductor.installed(min_logits_bytes=0, **settings), torch.compile(fn, backend=no_codegen_backend([]))


def test_second_derivatives_raise():
    """As torch.compile alone does, even where the caller allows unused inputs: a None would be taken for zero."""
    x, w, y = make_inputs(("x", "w", "y"), torch.float64)
    on, fn = _compiled(lambda x, w, y: F.cross_entropy(F.linear(torch.tanh(x), w), y))
    with on, cheap():
        loss = fn(x, w, y)
        (g,) = torch.autograd.grad(loss, w, create_graph=True)
        for each in (w, x):
            with pytest.raises(RuntimeError):
                torch.autograd.grad(g.square().sum(), each, allow_unused=True, retain_graph=True)


def test_a_gradient_of_returned_logits_alone_raises():
    """Also where the caller allows unused inputs: a None would be taken for zero."""
    x, w, y = make_inputs(("x", "w", "y"), torch.float64)

    def program(x, w, y):
        z = F.linear(x, w)
        return z, F.cross_entropy(z, y)

    on, fn = _compiled(program)
    with on, cheap():
        for of, allow_unused in itertools.product(((x,), (w,), (x, w)), (False, True)):
            z, _ = fn(x, w, y)
            with pytest.raises(RuntimeError, match="returned by lce_inductor without being computed"):
                torch.autograd.grad(z.sum(), of, allow_unused=allow_unused)


@pytest.mark.parametrize("change", ["weight row", "bias entry", "optimizer step of some rows", "hidden states"])
def test_returned_logits_are_of_the_call_or_raise(change):
    head = nn.Linear(8, 9001, bias=change == "bias entry")
    x, y = torch.randn(30, 8, requires_grad=True), torch.randint(0, 9001, (30,))

    def program(x, y):
        z = head(torch.tanh(x) if change != "hidden states" else x)
        return F.cross_entropy(z, y), z

    expected = program(x, y)[1].detach().clone()
    on, fn = _compiled(program)
    with on, cheap():
        loss, z = fn(x, y)
        if change == "weight row":
            head.weight.data[8999] = 5.0
        elif change == "bias entry":
            head.bias.data[8999] = 5.0
        elif change == "hidden states":
            x.data[7] = 3.0
        else:
            mask = torch.zeros(9001, 1)
            mask[8990:] = 1
            head.weight.register_hook(lambda g: g * mask)
            loss.backward()
            torch.optim.AdamW(head.parameters(), lr=0.1, weight_decay=0.0, fused=True).step()
        try:
            found = z.detach().clone()
        except RuntimeError:
            return  # as documented
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_weight_gradient_in_bf16():
    """Many chunks: each product rounded to bf16 before it is added would be 1.4 times as far off as eager."""
    g = torch.Generator().manual_seed(0)
    w = (torch.randn(2000, 32, generator=g) * 0.02).bfloat16()
    x, y = torch.randn(4096, 32, generator=g).bfloat16(), torch.randint(0, 2000, (4096,), generator=g)

    def gradient(fn, dtype):
        weight = w.to(dtype).requires_grad_()
        (found,) = torch.autograd.grad(fn(x.to(dtype), weight, y), weight)
        return found.double()

    def loss(x, w, y):
        return F.cross_entropy(F.linear(x, w).to(torch.promote_types(w.dtype, torch.float32)), y)

    exact = gradient(loss, torch.float64)
    on, fn = _compiled(loss)
    with on, cheap():
        ours = (gradient(fn, torch.bfloat16) - exact).norm()
    eager = (gradient(loss, torch.bfloat16) - exact).norm()
    assert ours <= 1.25 * eager, f"{(ours / eager).item():.2f} times eager's error"


@pytest.mark.parametrize(
    "settings, turned", [({"returned_logits": "keep"}, False), ({}, True)], ids=["keep", "transposed"]
)
def test_logits_that_exist_anyway_are_not_computed_twice(settings, turned):
    def program(x, w, y):
        z = F.linear(x, w)
        z = z.transpose(1, 2) if turned else z.flatten(0, 1)
        return F.cross_entropy(z, y if turned else y.flatten()), z

    x, y = torch.randn(4, 32, 16), torch.randint(0, 1009, (4, 32))
    w = torch.randn(1009, 16)

    def operations(on, fn):
        with on, cheap(), torch.no_grad():
            fn(x, w, y)
            with profile(activities=[ProfilerActivity.CPU], with_flops=True) as found:
                fn(x, w, y)
        return sum(e.flops for e in found.events())

    ours = operations(*_compiled(program, **settings))
    torch._dynamo.reset()
    alone = operations(cheap(), torch.compile(program, backend=no_codegen_backend([])))
    assert ours <= 1.1 * alone, f"{ours / alone:.2f} times the operations of torch.compile alone"


def test_a_read_after_the_loss_across_a_graph_break():
    """logits[mask] after the loss: the mask's size breaks the graph, and the read runs in the next one."""
    head = nn.Linear(8, 1009, bias=False)

    def step(h, y):
        logits = head(h)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        with torch.no_grad():
            metric = logits[y > 100].mean()
        return loss, metric

    h, y = torch.randn(4, 33, 8, requires_grad=True), torch.randint(0, 1009, (4, 33))
    assert not (verdict := judge(step, [h, y], first=True)).failed, verdict


def _mean(x, w, y, pick):
    keep = y % 3 > 0
    z = F.linear(x, w).log_softmax(-1)
    return -(pick(z, torch.where(keep, y, -7)) * keep).sum()


# Errors and crashes where torch.compile alone works.
CRASHES = {
    "an index from the end": lambda x, w, y: _mean(x, w, y, lambda z, i: z[torch.arange(24), i]),
    "an index from the end, masked by where": lambda x, w, y: (
        lambda z: torch.where(y > 9, z[torch.arange(24), y - 20], 0).sum()
    )(F.linear(x, w)),
    "an index from the end of its own head": lambda x, w, y: (
        F.linear(x, w).logsumexp(-1).sum() - F.linear(x, w)[torch.arange(24), y - 37].sum()
    ),
    "a class of an unbind": lambda x, w, y: (lambda z: z.logsumexp(-1).sum() + z.unbind(1)[3].sum())(F.linear(x, w)),
    "groups of an unbind": lambda x, w, y: sum(
        F.cross_entropy(z, y % 12) for z in F.linear(x, w[:36]).view(24, 3, 12).unbind(1)
    ),
}


@pytest.mark.parametrize("name", CRASHES)
def test_as_torch_compile(name):
    args = make_inputs(("x", "w", "y"), torch.float64)
    assert not (verdict := judge(CRASHES[name], args)).failed, verdict
    assert verdict.rewritten


def test_an_index_out_of_bounds_from_the_end_raises():
    x, w, y = make_inputs(("x", "w", "y"), torch.float64)
    on, fn = _compiled(lambda x, w, i: F.linear(x, w).log_softmax(-1)[torch.arange(24), i].sum())
    with on, cheap(), pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        fn(x, w, y - 38)


@pytest.mark.parametrize(
    "what", [lambda z: z[-1:], lambda z: z[..., :5], lambda z: z.argmax(-1)], ids=["row", "classes", "largest"]
)
def test_logits_that_nobody_differentiates_behind_a_break(what):
    """The next graph sends zeros back for what it returned."""

    def step(x, w, y):
        z = F.linear(x, w)
        rows = F.cross_entropy(z, y, reduction="none")
        return rows[y % 2 > 0].sum(), what(z)

    assert not (verdict := judge(step, make_inputs(("x", "w", "y"), torch.float64), first=True)).failed, verdict
