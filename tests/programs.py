"""Random programs: a head, steps that keep its output logits, losses, and a way to train.

What no list of spellings foresees is how the rules work together. A `Program` is plain data that prints as itself, so a
failing one is pasted into `test_programs.py` as it stands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

B, T, H, V = 4, 6, 8, 23
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


class Inputs(NamedTuple):
    """The leaves of a program: x [B, T, H], weights [V, H], bias [V], an adapter's [2, H] and [V, 2], labels [B, T],
    a number per row [B, T], one per class [V], and one."""

    x: Tensor
    weight: Tensor
    other_weight: Tensor
    bias: Tensor
    down: Tensor
    up: Tensor
    labels: Tensor
    rows: Tensor
    classes: Tensor
    number: Tensor


def inputs(dtype: torch.dtype, batch: int = B, frozen: frozenset[str] = frozenset()) -> Inputs:
    """Random leaves; those named in `frozen` take no gradient."""
    g = torch.Generator().manual_seed(batch)

    def rand(name: str, *shape: int) -> Tensor:
        t = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
        return t.requires_grad_(name not in frozen)

    labels = torch.randint(0, V, (batch, T), generator=g)
    return Inputs(
        rand("x", batch, T, H), rand("weight", V, H), rand("other_weight", V, H), rand("bias", V), rand("down", 2, H),
        rand("up", V, 2), labels, rand("rows", batch, T), rand("classes", V), rand("number"),
    )  # fmt: skip


HEADS: dict[str, Callable[[Inputs], Tensor]] = {
    "linear": lambda i: F.linear(i.x, i.weight),
    "bias": lambda i: F.linear(i.x, i.weight, i.bias),
    "matmul": lambda i: i.x @ i.weight.T,
    "matmul and bias": lambda i: torch.matmul(i.x, i.weight.t()) + i.bias,
    "einsum": lambda i: torch.einsum("bth,vh->btv", i.x, i.weight),
    "flat addmm": lambda i: torch.addmm(i.bias, i.x.reshape(-1, H), i.weight.t()).view(*i.x.shape[:2], V),
    "tied": lambda i: F.linear(i.x + F.embedding(i.labels, i.weight), i.weight),
    "adapter": lambda i: F.linear(i.x, i.weight) + 0.5 * F.linear(F.linear(i.x, i.down), i.up),
    "body before": lambda i: F.linear(torch.tanh(F.linear(i.x, i.weight[:H])), i.weight),
}


class Rows(NamedTuple):
    """Logits and what goes along with their rows."""

    z: Tensor
    labels: Tensor
    rows: Tensor


class Step(NamedTuple):
    """`where` says on what it applies: "rows": [B, T, V] still; "flat": rows are one dimension; "classes": all V."""

    run: Callable[[Rows, Inputs], Rows]
    where: str = ""


def _values(change: Callable[[Tensor, Inputs], Tensor], where: str = "") -> Step:
    return Step(lambda r, i: r._replace(z=change(r.z, i)), where)


def _in_place(change: Callable[[Tensor], object]) -> Step:
    return Step(lambda r, i: (change(r.z), r)[1])


def _each(change: Callable[[Tensor], Tensor], where: str = "rows") -> Step:
    return Step(lambda r, i: Rows(*map(change, r)), where)


STEPS: dict[str, Step] = {
    "halved": _values(lambda z, i: z * 0.5),
    "negative": _values(lambda z, i: z * -1.5),
    "divided": _values(lambda z, i: z / -2.0),
    "plus": _values(lambda z, i: z + 0.5),
    "minus": _values(lambda z, i: z - 2.0),
    "neg": _values(lambda z, i: -z),
    "capped": _values(lambda z, i: 3.0 * torch.tanh(z / 3.0)),
    "squashed": _values(lambda z, i: 5 * torch.sigmoid(z / 2)),
    "upcast": _values(lambda z, i: z.float() if z.dtype == torch.bfloat16 else z),
    "class bias": _values(lambda z, i: z + i.classes, "classes"),
    "class scale": _values(lambda z, i: z * i.classes, "classes"),
    "masked classes": _values(lambda z, i: z.masked_fill(torch.arange(V) % 5 == 4, -torch.inf), "classes"),
    "hidden classes": _values(lambda z, i: z.masked_fill(torch.arange(V) > 18, -1e9), "classes"),
    "row offset": Step(lambda r, i: r._replace(z=r.z + r.rows[..., None])),
    "maximum taken off": _values(lambda z, i: z - z.max(-1, keepdim=True).values.detach()),
    "trained scale": _values(lambda z, i: z * i.number),
    "temperature": _values(lambda z, i: z / (i.number.detach().abs() + 0.5)),
    "copy": _values(lambda z, i: z.clone()),
    "halved in place": _in_place(lambda z: z.mul_(-0.5)),
    "divided in place": _in_place(lambda z: z.div_(2.0)),
    "plus in place": _in_place(lambda z: z.add_(0.5)),
    "first classes": Step(lambda r, i: r._replace(z=r.z[..., :20], labels=r.labels.clamp(max=19)), "classes"),
    "last classes": Step(lambda r, i: r._replace(z=r.z[..., 3:], labels=(r.labels - 3).clamp(min=0)), "classes"),
    "flat": Step(lambda r, i: Rows(r.z.reshape(-1, r.z.shape[-1]), r.labels.reshape(-1), r.rows.reshape(-1)), "rows"),
    "shifted": Step(lambda r, i: Rows(r.z[:, :-1], r.labels[:, 1:], r.rows[:, 1:]), "rows"),
    "part of the batch": _each(lambda t: t[1:]),
    "swapped": _each(lambda t: t.transpose(0, 1)),
    "last position": _each(lambda t: t[:, -1]),
    "some rows": _each(lambda t: t[[0, 1, 1]], "flat"),
    "half of the rows": _each(lambda t: t.chunk(2)[1], "flat"),
}


def _flat(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return z.reshape(-1, z.shape[-1]), t.reshape(-1)


def _picked(z: Tensor, t: Tensor) -> Tensor:
    return z.gather(-1, t[..., None])[..., 0]


def _columns(z: Tensor) -> Tensor:
    return torch.linspace(0.5, 1, z.shape[-1], dtype=z.dtype)


def _categorical(z: Tensor, t: Tensor) -> Tensor:
    policy = torch.distributions.Categorical(logits=z, validate_args=False)
    return policy.log_prob(t).mean() + 0.1 * policy.entropy().sum()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda z, t: F.cross_entropy(*_flat(z, t)),
    "sum": lambda z, t: F.cross_entropy(*_flat(z, t), reduction="sum", ignore_index=4),
    "all ignored": lambda z, t: F.cross_entropy(_flat(z, t)[0], torch.full_like(_flat(z, t)[1], -100), reduction="sum"),
    "weighted rows": lambda z, t: (
        F.cross_entropy(*_flat(z, t), reduction="none") * torch.arange(t.numel(), dtype=z.dtype)
    ).sum(),
    "masked mean": lambda z, t: (
        (F.cross_entropy(*_flat(z, t), reduction="none") * (t.reshape(-1) > 3)).sum() / (t > 3).sum().clamp(min=1)
    ),
    "focal": lambda z, t: (lambda ce: ((1 - (-ce).exp()) ** 2 * ce).mean())(
        F.cross_entropy(*_flat(z, t), reduction="none")
    ),
    "reweighted": lambda z, t: (lambda ce: (ce * (-ce).exp().detach()).mean())(
        F.cross_entropy(*_flat(z, t), reduction="none")
    ),
    "smoothed": lambda z, t: F.cross_entropy(*_flat(z, t), label_smoothing=0.2),
    "class weights": lambda z, t: F.cross_entropy(*_flat(z, t), _columns(z)),
    "smoothed class weights": lambda z, t: F.cross_entropy(*_flat(z, t), _columns(z), label_smoothing=0.1),
    "one row": lambda z, t: F.cross_entropy(_flat(z, t)[0][0], _flat(z, t)[1][0]),
    "three rows": lambda z, t: F.cross_entropy(_flat(z, t)[0][1:4], _flat(z, t)[1][1:4]),
    "nll": lambda z, t: F.nll_loss(F.log_softmax(_flat(z, t)[0], -1), _flat(z, t)[1]),
    "z-loss": lambda z, t: F.cross_entropy(*_flat(z, t)) + 0.1 * z.logsumexp(-1).square().mean(),
    "picked": lambda z, t: _picked(z, t).square().sum(),
    "picked log-probability": lambda z, t: _picked(z.log_softmax(-1), t).exp().mean(),
    "picked probability": lambda z, t: _picked(z.softmax(-1), t).log().sum(),
    "one-hot": lambda z, t: -(F.one_hot(t, z.shape[-1]) * z.log_softmax(-1)).sum(-1).mean(),
    "by hand": lambda z, t: _picked(z - z.logsumexp(-1, keepdim=True), t).sum(),
    "ratio": lambda z, t: (lambda lp: (lp - lp.detach()).exp().mean())(_picked(z, t) - z.logsumexp(-1)),
    "logsumexp": lambda z, t: torch.logsumexp(z, -1).square().mean(),
    "log of a sum": lambda z, t: z.exp().sum(-1).log().mean(),
    "entropy": lambda z, t: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean(),
    "categorical": _categorical,
    "poly": lambda z, t: (F.one_hot(t, z.shape[-1]) * z.softmax(-1)).sum(-1).square().sum(),
    "max": lambda z, t: z.max(-1).values.sum(),
    "accuracy": lambda z, t: (z.argmax(-1) == t).to(z.dtype).mean(),
    "class sum": lambda z, t: z.sum(-1).square().sum(),
    "class mean": lambda z, t: z.mean(-1).square().sum(),
    "weighted log-probabilities": lambda z, t: (z.log_softmax(-1) * _columns(z)).sum(-1).mean(),
    "norm": lambda z, t: z.square().mean(),  # has no rule
}
MODES = ("", "", "", "detached", "no_grad", "after log_softmax")
SECONDS = ("", "", "", "same weight", "other weight", "reference")
SCALES = ("", "", "halved", "trained", "outside")
BACKWARDS = ("once", "once", "once", "twice", "accumulated")
OUTPUTS = ("loss", "loss", "parts", "logits")


class Program(NamedTuple):
    """losses: (name, mode). second: a second head; with "reference" its picked log-probabilities, without a gradient,
    are taken from the first's. between: the logits change in place between two losses. scale: of the loss."""

    steps: tuple[str, ...] = ()
    losses: tuple[tuple[str, str], ...] = (("mean", ""),)
    between: bool = False
    head: str = "linear"
    second: str = ""
    scale: str = ""
    backward: str = "once"
    outputs: str = "loss"
    frozen: frozenset[str] = frozenset()
    dtype: str = "fp64"
    dynamic: bool = False

    @property
    def heads(self) -> int:
        return 2 if self.second else 1

    def __call__(self, i: Inputs) -> tuple[Tensor, ...]:
        """The loss and what else the program returns."""
        r = Rows(HEADS[self.head](i), i.labels, i.rows)
        first = r.z
        for name in self.steps:
            r = STEPS[name].run(r, i)
        z, t = r.z, r.labels
        total = i.x.sum() * 0.01
        parts = []
        for k, (name, mode) in enumerate(self.losses):
            if k and self.between:
                z.mul_(0.5)
            if mode == "no_grad":
                with torch.no_grad():
                    part = LOSSES[name](z, t)
            else:
                seen = {"detached": z.detach, "after log_softmax": lambda: z.log_softmax(-1)}.get(mode)
                part = LOSSES[name](z if seen is None else seen(), t)
            parts.append(part.detach())
            total = total + part
        if self.second == "reference":
            with torch.no_grad():
                reference = _picked(F.linear(i.x, i.other_weight).log_softmax(-1), i.labels)
            total = total - F.logsigmoid(_picked(first.log_softmax(-1), i.labels).sum() - reference.sum())
        elif self.second:
            weight = i.weight if self.second == "same weight" else i.other_weight
            total = total + 0.3 * F.cross_entropy(*_flat(F.linear(i.x * 2, weight), i.labels))
        if self.scale in ("halved", "trained"):
            total = total * (0.5 if self.scale == "halved" else i.number)
        return (total, *(parts if self.outputs == "parts" else ()), *((first,) if self.outputs == "logits" else ()))

    def train(self, fn: Callable[[Inputs], tuple[Tensor, ...]], dtype: torch.dtype) -> list[Tensor | None]:
        """Outputs of fn and the gradients of all leaves, after as many calls as the program makes."""
        leaves = inputs(dtype, frozen=self.frozen)
        calls = [leaves, leaves._replace(x=leaves.x.detach().flip(0))] if self.backward == "accumulated" else [leaves]
        found: list[Tensor | None] = []
        for call in calls:
            outputs = fn(call)
            loss = outputs[0] * 4 if self.scale == "outside" else outputs[0]
            found += [o.detach() + 0 for o in outputs]
            if loss.requires_grad:
                if self.backward == "twice":
                    loss.backward(retain_graph=True)
                loss.backward()
        if self.dynamic:  # another number of rows
            with torch.no_grad():
                found += [o.detach() + 0 for o in fn(inputs(dtype, B + 2, self.frozen))]
        return [*found, *(t.grad for t in leaves if t.requires_grad)]


@st.composite
def programs(draw: Any) -> Program:
    """Programs whose steps fit together."""
    rows, classes, steps = "rows", True, []
    for name in draw(st.lists(st.sampled_from(list(STEPS)), max_size=4)):
        where = STEPS[name].where
        if where not in ("", rows, "classes" if classes else ""):
            continue
        steps.append(name)
        classes = classes and name not in ("first classes", "last classes")
        rows = "flat" if name in ("flat", "last position") else rows
    dtype = draw(st.sampled_from(("fp64", "fp64", "fp64", "fp32", "bf16")))
    # Which of two nearly equal logits is the larger one, rounding decides.
    names = [n for n in LOSSES if dtype == "fp64" or n not in ("max", "accuracy")]
    losses = st.tuples(st.sampled_from(names), st.sampled_from(MODES))
    return Program(
        tuple(steps),
        tuple(draw(st.lists(losses, min_size=1, max_size=2))),
        draw(st.sampled_from((False, False, False, True))),
        draw(st.sampled_from(list(HEADS))),
        draw(st.sampled_from(SECONDS)),
        draw(st.sampled_from(SCALES)),
        draw(st.sampled_from(BACKWARDS)),
        draw(st.sampled_from(OUTPUTS)),
        draw(st.sampled_from([frozenset(), frozenset(), frozenset({"x"}), frozenset({"weight"}), frozenset({"rows"})])),
        dtype,
        draw(st.sampled_from((False, False, True))),
    )
