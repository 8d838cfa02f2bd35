"""Programs and faults for test_faults.py: one program per rule, and an exception at any call inside the package."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from harness import V
from torch import Tensor

import lce_inductor

Loss = Callable[[Tensor, Tensor], Tensor]
ROOT = Path(lce_inductor.__file__).parent

ce = F.cross_entropy


def _class(y: Tensor) -> Tensor:
    return y.clamp(min=0)[:, None]


# rule -> a loss of logits [24, V] and target [24] on whose way the rule is asked
BY_RULE: dict[str, Loss] = {
    "acos": lambda z, y: ce(torch.acos(z.tanh() * 0.9), y),
    "add": lambda z, y: ce(z + 1, y),
    "amax": lambda z, y: z.amax(-1).sum(),
    "arccos": lambda z, y: ce(torch.arccos(z.tanh() * 0.9), y),
    "argmax": lambda z, y: ce(z, y) + (z.argmax(-1) == y).float().mean(),
    "broadcast_tensors": lambda z, y: (
        torch.broadcast_tensors(_class(y), z.log_softmax(-1))[1].gather(1, _class(y)).mean()
    ),
    "cast": lambda z, y: ce(z.float(), y),
    "chunk": lambda z, y: ce(z.chunk(2)[0], y[:12]),
    "clamp": lambda z, y: ce(z.clamp(-1, 1), y),
    "clip": lambda z, y: ce(z.clip(-1, 1), y),
    "cross_entropy": lambda z, y: ce(z, y),
    "detach": lambda z, y: ce(z, y) + z.detach().logsumexp(-1).mean(),
    "div": lambda z, y: ce(z / 2, y),
    "exp": lambda z, y: z.exp().sum(-1).log().sum(),
    "expand": lambda z, y: ce(z.expand(24, V), y),
    "flatten": lambda z, y: ce(z.unflatten(0, (4, 6)).flatten(0, 1), y),
    "full_like": lambda z, y: -(z.log_softmax(-1) * torch.full_like(z, 0.1).scatter(1, _class(y), 0.9)).sum(-1).mean(),
    "gather": lambda z, y: z.log_softmax(-1).gather(1, _class(y)).mean(),
    "getitem": lambda z, y: ce(z[:-1], y[1:]),
    "index_select": lambda z, y: ce(z.index_select(0, torch.arange(9)), y[:9]),
    "kl_div": lambda z, y: F.kl_div(z.log_softmax(-1), torch.full_like(z, 1 / V), reduction="batchmean"),
    "log": lambda z, y: F.nll_loss(z.softmax(-1).log(), y),
    "log_softmax": lambda z, y: F.nll_loss(z.log_softmax(-1), y),
    "logsumexp": lambda z, y: z.logsumexp(-1).mean(),
    "mT": lambda z, y: ce(z.mT.mT, y),
    "masked_fill": lambda z, y: ce(z.masked_fill(torch.arange(V) > 30, -torch.inf), y.clamp(max=30)),
    "max": lambda z, y: z.max(-1).values.sum(),
    "mean": lambda z, y: z.mean(-1).square().mean(),
    "movedim": lambda z, y: ce(z.view(4, 6, V).movedim(-1, 1), y.view(4, 6)),
    "mul": lambda z, y: ce(z * 0.5, y),
    "narrow": lambda z, y: ce(z.narrow(0, 0, 9), y[:9]),
    "neg": lambda z, y: ce(-z, y),
    "nll_loss": lambda z, y: F.nll_loss(z.log_softmax(-1), y),
    "ones_like": lambda z, y: -(z.log_softmax(-1) * torch.ones_like(z)).sum(-1).mean(),
    "permute": lambda z, y: ce(z.view(4, 6, V).permute(0, 2, 1), y.view(4, 6)),
    "pow": lambda z, y: ce(z * torch.rsqrt(z.pow(2) + 4), y),
    "reshape": lambda z, y: ce(z.view(4, 6, V).reshape(-1, V), y),
    "rsqrt": lambda z, y: ce(z * torch.rsqrt(z.square() + 4), y),
    "rsub": lambda z, y: ce(torch.rsub(z, 1), y),
    "same": lambda z, y: ce(z.clone(), y),
    "scatter": lambda z, y: -(z.log_softmax(-1) * torch.zeros_like(z).scatter(1, _class(y), 1.0)).sum(-1).mean(),
    "select": lambda z, y: ce(z.view(4, 6, V).select(1, 2), y.view(4, 6)[:, 2]),
    "sigmoid": lambda z, y: ce(torch.sigmoid(z), y),
    "slice": lambda z, y: ce(torch.ops.aten.slice.Tensor(z, 0, 0, 9), y[:9]),
    "softmax": lambda z, y: F.nll_loss(z.softmax(-1).log(), y),
    "split": lambda z, y: ce(z.split(12)[0], y[:12]),
    "square": lambda z, y: ce(z * torch.rsqrt(z.square() + 4), y),
    "squeeze": lambda z, y: ce(z.unsqueeze(0).squeeze(0), y),
    "stack": lambda z, y: ce(torch.stack([z[:12], z[12:]]).view(-1, V), y),
    "sub": lambda z, y: ce(z - 1, y),
    "sum": lambda z, y: z.sum(-1).square().mean(),
    "t": lambda z, y: ce(z.t().t(), y),
    "take_along_dim": lambda z, y: z.log_softmax(-1).take_along_dim(_class(y), 1).mean(),
    "tanh": lambda z, y: ce(torch.tanh(z), y),
    "transpose": lambda z, y: ce(z.view(4, 6, V).transpose(1, 2), y.view(4, 6)),
    "unbind": lambda z, y: ce(z.view(2, 12, V).unbind(0)[0], y[:12]),
    "unflatten": lambda z, y: ce(z.unflatten(0, (4, 6)).flatten(0, 1), y),
    "unsqueeze": lambda z, y: ce(z.unsqueeze(0).squeeze(0), y),
    "zeros_like": lambda z, y: -(z.log_softmax(-1) * torch.zeros_like(z).scatter(1, _class(y), 1.0)).sum(-1).mean(),
}


def of_rule(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The program of a rule, of x, weight and target."""
    return lambda x, w, y: BY_RULE[name](F.linear(x, w), y)


# Programs that reach most of what the stages do, of x, weight and target.


def capped(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    z = 5 * torch.tanh(F.linear(x, w)[:, :30].float() / 5)
    return ce(z, y.clamp(max=29), label_smoothing=0.1, reduction="sum") / 7


def several_losses(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    z = F.linear(x, w).view(4, 6, V)
    t = y.view(4, 6)
    first = ce(z[:, :-1].reshape(-1, V), t[:, 1:].reshape(-1))
    return first + 1e-3 * z.logsumexp(-1).square().mean() + z.detach().max(-1).values.mean()


def in_place(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    z = F.linear(x, w)
    z.div_(0.7)
    z[:, 33:] = -torch.inf
    return ce(z, y.clamp(max=32))


def two_heads(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return ce(F.linear(x, w), y) + ce(x.tanh() @ (w * 2).t(), y, reduction="none").sum()


def returned(x: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    z = F.linear(x, w)
    return ce(z * 0.5, y), z


WHOLE = [capped, several_losses, in_place, two_heads, returned]


class Injected(Exception):
    """What a fault raises."""


class Fault:
    """Raises `error` at the entry of the `at`-th call of a function in these folders of the package.

    `calls` counts them; `raised` tells whether it came to that.
    """

    def __init__(self, at: int, *folders: str, error: type[BaseException] = Injected) -> None:
        self.at, self.error, self.calls, self.raised = at, error, 0, False
        self.folders = tuple(str(ROOT / folder) for folder in folders)

    def _seen(self, frame: FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        # A generator is entered once more to be closed, and what it raises then is dropped.
        if event != "call" or not code.co_filename.startswith(self.folders) or code.co_flags & inspect.CO_GENERATOR:
            return
        if self.calls == self.at:
            sys.setprofile(None)
            self.raised = True
            raise self.error(f"at call {self.at}: {code.co_name}")
        self.calls += 1

    @contextlib.contextmanager
    def armed(self) -> Iterator[None]:
        before = sys.getprofile()
        sys.setprofile(self._seen)
        try:
            yield
        finally:
            sys.setprofile(before)
