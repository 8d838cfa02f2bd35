"""Losses that read the logits row by row in forms that are less common: rewritten, and no logits held.

Whether their results are right is asserted too.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from corpus.harness import GraphRecord, no_codegen_backend
from oracle import cheap, fresh, judge
from text_programs import N, T, Text, V, make_inputs
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import lce_inductor

Z = "z = F.linear(x, w)\n"
Z3 = "z = F.linear(x3, w)\n"
FUNCTION = """
class CE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, y):
        p = torch.softmax(z, -1)
        ctx.save_for_backward(p, y)
        return -p.gather(-1, y.unsqueeze(-1)).squeeze(-1).log()

    @staticmethod
    def backward(ctx, g):
        p, y = ctx.saved_tensors
        return (p - F.one_hot(y, p.size(-1))) * g.unsqueeze(-1), None
"""
PARALLEL = """
class CE(torch.autograd.Function):
    # as Megatron's vocabulary-parallel cross-entropy, of one rank
    @staticmethod
    def forward(ctx, z, y):
        z = z - z.max(dim=-1)[0].unsqueeze(-1)
        predicted = z.gather(-1, y.unsqueeze(-1)).squeeze(-1)
        e = z.exp()
        total = e.sum(dim=-1)
        ctx.save_for_backward(e / total.unsqueeze(-1), y)
        return total.log() - predicted

    @staticmethod
    def backward(ctx, g):
        p, y = ctx.saved_tensors
        grad = p.clone()
        grad.scatter_add_(-1, y.unsqueeze(-1), -torch.ones_like(y, dtype=p.dtype).unsqueeze(-1))
        return grad * g.unsqueeze(-1), None
"""
STABLE = """
t = y.unsqueeze(-1)
is_target = torch.arange(z.shape[-1]) == t
picked = z.gather(-1, t)
m = -torch.logsumexp(torch.where(is_target, -float("inf"), z - picked), dim=-1)
"""
ROWS = "torch.stack([torch.logsumexp(r, dim=-1) for r in z])"

# name -> program, and rows of the head that is held if it is not reached
REACHED: dict[str, tuple[Text, int]] = {
    "z-loss": (Text(Z + "return F.cross_entropy(z, y) + 1e-3 * z.logsumexp(-1).square().mean()"), N),
    "selective log-softmax": (Text(Z3 + f"z = z[:, :-1]\npicked = z.gather(-1, y3[:, 1:, None]).squeeze(-1)\nreturn (picked - {ROWS}).mean()"), N - 4),
    "divided in place": (Text(Z + "z.div_(0.7)\nreturn z.log_softmax(-1).gather(1, y[:, None]).mean()"), N),
    "labels masked in place": (Text(Z3 + f"t, z = y3[:, 1:].clone(), z[:, :-1]\nkeep = t != 3\nt[t == 3] = 0\nlogp = torch.gather(z, -1, t[..., None]).squeeze(-1) - {ROWS}\nreturn -(logp * keep).sum(-1).mean()"), N - 4),
    "temperature of each row": (Text(Z + "z = z / temp.unsqueeze(-1)\nreturn torch.gather(z.log_softmax(-1), -1, y.unsqueeze(-1)).mean()"), N),
    "temperature of each row, trained": (Text(Z + "z = z / (row.abs() + 0.5).unsqueeze(-1)\nreturn z.log_softmax(-1).gather(-1, y.unsqueeze(-1)).mean()"), N),
    "temperature of each row, made of its hidden state": (Text(Z + "z = z / (x.square().sum(-1, keepdim=True) + 1)\nreturn F.cross_entropy(z, y)"), N),
    "hidden states scaled and used elsewhere": (Text(Z3 + "t = torch.tanh(x3)\nz = F.linear(t, w) / t.norm(dim=-1, keepdim=True)\nreturn F.cross_entropy(z.flatten(0, 1), y3.flatten()) + t.square().mean()"), N),
    "a gate of each row, made of its hidden state": (Text(Z + "s = F.cross_entropy(z, y, reduction='none')\nreturn (s * torch.sigmoid((x * w[3]).sum(-1))).mean()"), N),
    "hidden states weighted by their loss": (Text(Z + "s = F.cross_entropy(z, y, reduction='none')\nreturn s.mean() + 0.1 * (x * s[:, None].detach()).square().sum()"), N),
    "hidden states times their loss": (Text(Z + "s = F.cross_entropy(z, y, reduction='none')\nreturn (x * s[:, None]).square().mean()"), N),
    "temperature of each sequence": (Text(Z3 + "z = z * weights3[:, :1, None]\nreturn F.cross_entropy(z.flatten(0, 1), y3.flatten())"), N),
    "autograd.Function": (Text(Z + "return CE.apply(z, y).mean()", setup=FUNCTION), N),
    "autograd.Function of tensor-parallel code": (Text(Z + "return (CE.apply(z, y) * weights).sum()", setup=PARALLEL), N),
    "label smoothing scattered": (Text(Z + "with torch.no_grad():\n    t = torch.full_like(z, 0.1 / 36)\n    t.scatter_(1, y.unsqueeze(1), 0.9)\nreturn F.kl_div(z.log_softmax(-1), t, reduction='none').sum() / 24"), N),
    "logsumexp of differences": (Text(Z + STABLE + "return F.softplus(-m).mean()"), N),
    "labels written between two losses": (Text(Z3 + f"loss = F.cross_entropy(z[:, :-1].flatten(0, 1), y3[:, 1:].flatten(), ignore_index=3)\nt, z = y3[:, 1:].clone(), z[:, :-1]\nkeep = t != 3\nt[t == 3] = 0\nlogp = torch.gather(z, -1, t[..., None]).squeeze(-1) - {ROWS}\nreturn loss - (logp * keep).sum(-1).mean()"), N - 4),
    "a number put by a mask": (Text(Z + "z[z < -0.5] = -0.5\nreturn F.cross_entropy(z, y)"), N),
    "slice divided in place": (Text(Z3 + "z = z[:, :-1, :]\nz.div_(0.9)\nreturn (z.logsumexp(-1) - z.gather(-1, y3[:, 1:].unsqueeze(-1)).squeeze(-1)).mean()"), N - 4),
    "slices divided in place": (Text(Z3 + f"z = z[:, :-1, :]\nz = z[:, -4:, :]\nz = z.div_(0.7)\nreturn (z.gather(-1, y3[:, 2:, None]).squeeze(-1) - {ROWS}).mean()"), N - 8),
}  # fmt: skip


def check_reached(fn, args, limit, **options):
    """Rewritten, nothing of the size of the logits made, and nothing refused."""
    torch._dynamo.reset()
    counters.clear()
    records: list[GraphRecord] = []
    with lce_inductor.installed(min_logits_bytes=0), cheap():
        compiled = torch.compile(fn, backend=no_codegen_backend(records), **options)
        for each in args:
            loss = compiled(*fresh(each))
            loss.backward()
    found = counters["lce_inductor"]
    assert found["rewritten"] > 0, dict(found)
    assert not [k for k in found if k.startswith("refused:")], dict(found)
    worst = max(records, key=lambda r: r.largest)
    assert worst.largest < limit, f"{worst.largest_node}: {worst.largest} elements, rows * V = {limit}"


@pytest.mark.parametrize("name", REACHED)
def test_right(name):
    text, _ = REACHED[name]
    for dtype in ("float64", "float32"):
        verdict = text._replace(dtype=dtype).check()
        assert verdict.kind in ("right", "as torch"), f"{verdict}\n{text}"


@pytest.mark.parametrize("name", REACHED)
def test_rewritten(name):
    text, rows = REACHED[name]
    check_reached(text.functions()[0], [text.inputs()], rows * V)


def _gathered(x3, w, y3):
    lp = F.log_softmax(F.linear(x3, w), -1)
    return -torch.gather(lp, -1, y3.unsqueeze(-1)).squeeze(-1).mean()


LENGTHS = [make_inputs(("x3", "w", "y3"), torch.float64, batch) for batch in (4, 6, 9)]


def test_other_lengths_are_right():
    """Dynamo gives the labels a length symbol of their own, which gather() does not tie to that of the logits."""
    assert not (verdict := judge(_gathered, LENGTHS[0], more=LENGTHS[1:])).failed, verdict


def test_other_lengths_are_rewritten():
    """One graph more than with the first length: that the labels are as many is asked for."""
    check_reached(_gathered, LENGTHS, 4 * T * V)
    assert counters["lce_inductor"]["rewritten"] == 2


def test_labels_of_fewer_rows_are_right():
    """What was asked for holds no more: another graph."""

    def fn(x3, w, y3):
        return -torch.gather(F.log_softmax(F.linear(x3, w), -1), -1, y3.unsqueeze(-1)).squeeze(-1).square().mean()

    fewer = [(x, w, y[: len(y) - i % 3]) for i, (x, w, y) in enumerate([*LENGTHS, *LENGTHS])]
    assert not (verdict := judge(fn, fewer[0], more=fewer[1:])).failed, verdict


def _masked(x3, w, y3, mask_rows3):
    z = F.linear(x3, w)
    return F.cross_entropy(z[mask_rows3], y3[mask_rows3], reduction="none").sum() / y3.numel()


@pytest.fixture
def unbacked():
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield


MASKED = make_inputs(("x3", "w", "y3", "mask_rows3"), torch.float64)


def test_rows_of_a_mask_are_right(unbacked):
    assert not (verdict := judge(_masked, MASKED)).failed, verdict


def test_rows_of_a_mask_are_rewritten(unbacked):
    check_reached(_masked, [MASKED], int(MASKED[-1].sum()) * V)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_rows_of_a_mask_with_code(reduction, unbacked):
    """Inductor's own symbols for the number of rows are those that the user's node had."""

    def fn(x3, w, y3, mask_rows3):
        return F.cross_entropy(F.linear(x3, w)[mask_rows3], y3[mask_rows3], reduction=reduction)

    with lce_inductor.installed(min_logits_bytes=0):
        compiled = torch.compile(fn)
        for mask in (MASKED[-1], ~MASKED[-1]):
            ours, theirs = fresh([*MASKED[:3], mask]), fresh([*MASKED[:3], mask])
            found, expected = compiled(*ours), fn(*theirs)
            found.backward()
            expected.backward()
            torch.testing.assert_close([found, ours[0].grad, ours[1].grad], [expected, theirs[0].grad, theirs[1].grad])
    assert counters["lce_inductor"]["rewritten"] == 1


def _checkpointed(x, w, y):
    z = checkpoint(lambda x: F.linear(x, w), x, use_reentrant=False)
    return F.cross_entropy(z, y)


CHECKPOINTED = make_inputs(("x", "w", "y"), torch.float64)


def test_a_checkpointed_head_is_right():
    assert not (verdict := judge(_checkpointed, CHECKPOINTED)).failed, verdict


def test_a_checkpointed_head_is_rewritten():
    check_reached(_checkpointed, [CHECKPOINTED], N * V)


def _in_chunks(x, w, y):
    logits = [F.linear(c, w) for c in x.chunk(8)]
    losses = [F.cross_entropy(z, t, reduction="none") for z, t in zip(logits, y.chunk(8))]
    return torch.cat(losses).sum() / len(y)


CHUNKS = [
    torch.randn(64, 64, requires_grad=True),
    torch.randn(1031, 64, requires_grad=True),
    torch.randint(0, 1031, (64,)),
]


def test_chunks_are_right():
    assert not (verdict := judge(_in_chunks, CHUNKS)).failed, verdict


def _kept(package: bool) -> int:
    """Elements that autograd holds between forward and backward, the inputs left out."""
    torch._dynamo.reset()
    args = fresh(CHUNKS)
    inputs = {t.untyped_storage().data_ptr() for t in args}
    kept: dict[int, int] = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in inputs:
            kept[storage.data_ptr()] = storage.nbytes() // t.element_size()
        return t

    fn = torch.compile(_in_chunks, backend=no_codegen_backend([]))
    with cheap(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        if package:
            with lce_inductor.installed(min_logits_bytes=0):
                fn(*args).backward()
        else:
            fn(*args).backward()
    return sum(kept.values())


def test_chunks_keep_no_more_than_without():
    """One gradient of the weight, not one of each chunk; and that of x, which a fifth more has room for."""
    assert _kept(True) <= 1.2 * _kept(False)


def test_chunks_of_changing_lengths_are_rewritten():
    """The second length makes a symbol of each input's rows, and a chunk's rows a function of one of them."""

    def step(x, w, y):
        parts = zip(x.chunk(3), y.chunk(3))
        return sum(F.cross_entropy(F.linear(h, w), t, reduction="sum") for h, t in parts)

    x, w, y = (
        t if i == 1 else t.repeat(10, *[1] * (t.dim() - 1))
        for i, t in enumerate(make_inputs(("x", "w", "y"), torch.float64))
    )
    x, w = (t.detach().requires_grad_() for t in (x, w))
    args = [[x[:n].detach().requires_grad_(), w, y[:n]] for n in (240, 170, 101, 3)]
    verdict = judge(step, args[0], more=args[1:])
    assert not verdict.failed, verdict
    assert not verdict.refused and verdict.rewritten >= 6, verdict
