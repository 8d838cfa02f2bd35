"""Random programs on logits: steps that keep them logits, then one or two losses; eager's numbers in fp64.

What no list of spellings foresees is how the rules work together. A program is a number: a failing one is found again by
its number, and `show(number)` lists its steps.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from harness import Compiled, fresh, results
from torch import Tensor

B, T, H, V = 3, 5, 8, 23
Step = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class Rule(NamedTuple):
    """`run` takes logits, target, a number per row, a number per class and a number; `where` says on what it applies."""

    run: Step
    where: str = ""  # "rows": x is [B, T, H] still; "flat": rows are one dimension; "classes": all V classes


def _mul(factor: float) -> Rule:
    return Rule(lambda z, t, r, c, m: (z * factor, t, r))


def _in_place(change: Callable[[Tensor], object]) -> Rule:
    return Rule(lambda z, t, r, c, m: (change(z), (z, t, r))[1])


STEPS: dict[str, Rule] = {
    "halved": _mul(0.5),
    "negative": _mul(-1.5),
    "divided": Rule(lambda z, t, r, c, m: (z / -2.0, t, r)),
    "plus": Rule(lambda z, t, r, c, m: (z + 0.5, t, r)),
    "minus": Rule(lambda z, t, r, c, m: (z - 2.0, t, r)),
    "neg": Rule(lambda z, t, r, c, m: (-z, t, r)),
    "capped": Rule(lambda z, t, r, c, m: (3.0 * torch.tanh(z / 3.0), t, r)),
    "squashed": Rule(lambda z, t, r, c, m: (5 * torch.sigmoid(z / 2), t, r)),
    "class bias": Rule(lambda z, t, r, c, m: (z + c, t, r), "classes"),
    "row offset": Rule(lambda z, t, r, c, m: (z + r[..., None], t, r)),
    "trained scale": Rule(lambda z, t, r, c, m: (z * m, t, r)),
    "copy": Rule(lambda z, t, r, c, m: (z.clone(), t, r)),
    "halved in place": _in_place(lambda z: z.mul_(-0.5)),
    "divided in place": _in_place(lambda z: z.div_(2.0)),
    "plus in place": _in_place(lambda z: z.add_(0.5)),
    "first classes": Rule(lambda z, t, r, c, m: (z[..., :20], t.clamp(max=19), r), "classes"),
    "last classes": Rule(lambda z, t, r, c, m: (z[..., 3:], (t - 3).clamp(min=0), r), "classes"),
    "flat": Rule(lambda z, t, r, c, m: (z.reshape(-1, z.shape[-1]), t.reshape(-1), r.reshape(-1)), "rows"),
    "shifted": Rule(lambda z, t, r, c, m: (z[:, :-1], t[:, 1:], r[:, 1:]), "rows"),
    "part of the batch": Rule(lambda z, t, r, c, m: (z[1:], t[1:], r[1:]), "rows"),
    "swapped": Rule(lambda z, t, r, c, m: (z.transpose(0, 1), t.transpose(0, 1), r.transpose(0, 1)), "rows"),
    "last position": Rule(lambda z, t, r, c, m: (z[:, -1], t[:, -1], r[:, -1]), "rows"),
    "some rows": Rule(lambda z, t, r, c, m: (z[[0, 1, 1]], t[[0, 1, 1]], r[[0, 1, 1]]), "flat"),
}


def _flat(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return z.reshape(-1, z.shape[-1]), t.reshape(-1)


def _picked(z: Tensor, t: Tensor) -> Tensor:
    return z.gather(-1, t[..., None])[..., 0]


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda z, t: F.cross_entropy(*_flat(z, t)),
    "sum": lambda z, t: F.cross_entropy(*_flat(z, t), reduction="sum", ignore_index=4),
    "weighted rows": lambda z, t: (
        F.cross_entropy(*_flat(z, t), reduction="none") * torch.arange(t.numel(), dtype=z.dtype)
    ).sum(),
    "smoothed": lambda z, t: F.cross_entropy(*_flat(z, t), label_smoothing=0.2),
    "class weights": lambda z, t: F.cross_entropy(*_flat(z, t), torch.linspace(0.5, 1, z.shape[-1], dtype=z.dtype)),
    "one row": lambda z, t: F.cross_entropy(_flat(z, t)[0][0], _flat(z, t)[1][0]),
    "three rows": lambda z, t: F.cross_entropy(_flat(z, t)[0][1:4], _flat(z, t)[1][1:4]),
    "nll": lambda z, t: F.nll_loss(F.log_softmax(_flat(z, t)[0], -1), _flat(z, t)[1]),
    "z-loss": lambda z, t: F.cross_entropy(*_flat(z, t)) + 0.1 * z.logsumexp(-1).square().mean(),
    "picked": lambda z, t: _picked(z, t).square().sum(),
    "picked log-probability": lambda z, t: _picked(z.log_softmax(-1), t).exp().mean(),
    "picked probability": lambda z, t: _picked(z.softmax(-1), t).log().sum(),
    "by hand": lambda z, t: _picked(z - z.logsumexp(-1, keepdim=True), t).sum(),
    "ratio": lambda z, t: (_picked(z, t) - z.logsumexp(-1)).exp().mean(),
    "logsumexp": lambda z, t: torch.logsumexp(z, -1).square().mean(),
    "log of a sum": lambda z, t: z.exp().sum(-1).log().mean(),
    "entropy": lambda z, t: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean(),
    "max": lambda z, t: z.max(-1).values.sum(),
    "accuracy": lambda z, t: (z.argmax(-1) == t).to(z.dtype).mean(),
    "class sum": lambda z, t: z.sum(-1).square().sum(),
    "class mean": lambda z, t: z.mean(-1).square().sum(),
}
MODES = ("", "", "", "detached", "no_grad", "after log_softmax")


class Program(NamedTuple):
    steps: tuple[str, ...]
    losses: tuple[tuple[str, str], ...]  # name and mode
    between: bool  # the logits change in place between two losses

    def __call__(self, x: Tensor, w: Tensor, y: Tensor, r: Tensor, c: Tensor, m: Tensor) -> Tensor:
        z, t = F.linear(x, w), y
        for name in self.steps:
            z, t, r = STEPS[name].run(z, t, r, c, m)
        total = x.sum() * 0.01
        for i, (name, mode) in enumerate(self.losses):
            if i and self.between:
                z.mul_(0.5)
            if mode == "no_grad":
                with torch.no_grad():
                    part = LOSSES[name](z, t)
            else:
                seen = {"detached": z.detach, "after log_softmax": lambda z=z: z.log_softmax(-1)}.get(mode)
                part = LOSSES[name](z if seen is None else seen(), t)
            total = total + part
        return total


def program(number: int) -> Program:
    """The random program of this number."""
    rng = random.Random(number)
    rows, classes, steps = "rows", True, []
    for _ in range(rng.randint(0, 4)):
        name = rng.choice(list(STEPS))
        where = STEPS[name].where
        if where not in ("", rows, "classes" if classes else ""):
            continue
        steps.append(name)
        classes = classes and name not in ("first classes", "last classes")
        rows = "flat" if name in ("flat", "last position") else rows
    losses = tuple((rng.choice(list(LOSSES)), rng.choice(MODES)) for _ in range(rng.choice((1, 1, 2))))
    return Program(tuple(steps), losses, rng.random() < 0.25)


def show(number: int) -> str:
    return str(program(number))


def check(fn: Program) -> None:
    g = torch.Generator().manual_seed(0)
    args = [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in ((B, T, H), (V, H))]
    args.append(torch.randint(0, V, (B, T), generator=g))
    args += [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in ((B, T), (V,), ())]
    try:
        expected = results(fn, fresh(args))
    except RuntimeError as error:  # an in-place change that autograd forbids
        assert "inplace operation" in str(error)
        return
    compiled = Compiled(fn)
    found = results(compiled, fresh(args))
    assert "internal-error" not in compiled.refusals, fn
    for f, e in zip(found, expected, strict=True):
        # A number that cancels out of the loss may be cut off instead of getting a zero, and the other way round.
        if f is None and e is None:
            continue
        f, e = (t if t is not None else torch.zeros_like(o) for t, o in ((f, e), (e, f)))
        torch.testing.assert_close(f, e, rtol=1e-8, atol=1e-8, equal_nan=True, msg=str(fn))


@pytest.mark.parametrize("number", range(60))
def test_random_program(number, installed):
    check(program(number))


@pytest.mark.parametrize(
    "found_wrong",
    [
        Program(("row offset", "divided"), (("picked", "detached"),), False),
        Program(("swapped",), (("one row", ""), ("logsumexp", "")), False),
        Program(("swapped", "minus"), (("three rows", ""), ("max", "no_grad")), False),
        Program(("part of the batch", "halved"), (("sum", ""), ("picked", "")), True),
        Program(("last position", "trained scale"), (("weighted rows", "after log_softmax"), ("nll", "no_grad")), True),
        Program(("flat", "minus"), (("mean", ""), ("picked probability", "after log_softmax")), True),
    ],
    ids=str,
)
def test_programs_that_once_went_wrong(found_wrong, installed):
    check(found_wrong)
