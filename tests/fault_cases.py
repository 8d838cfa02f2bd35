"""Programs and faults for test_faults.py: one program per rule, and an exception at any call inside the package."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
import torch.nn.functional as F
from harness import V
from torch import Tensor
from torch.fx import Graph
from turns import EVERYTHING

import lce_inductor

Loss = Callable[[Tensor, Tensor], Tensor]
ROOT = Path(lce_inductor.__file__).parent

ce = F.cross_entropy


def _class(y: Tensor) -> Tensor:
    return y.clamp(min=0)[:, None]


# a loss of logits [24, V] and target [24] by what it is about; together they ask every rule
BY_RULE: dict[str, Loss] = {
    "classes cut off": lambda z, y: ce(z[:, :30], y.clamp(max=29)),
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
    "copy of maxima": lambda z, y: ce(z - torch.zeros(len(z), 1).copy_(z.detach().amax(-1, True)), y),
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
    # What goes with a softmax: a sum of its probabilities by some function of the logits.
    **{
        name: lambda z, y, f=f: ce(z, y) + 1e-3 * f(z).float().square().mean()
        for name, f in {
            "all": lambda z: (z > -9).all(-1) * z.sum(-1),
            "any": lambda z: (z > 9).any(-1) * z.sum(-1),
            "several dims": lambda z: (
                ((z.view(24, 1, V) > 9).any((1, 2)) | (z.view(24, 1, V) > 9).all((1, 2))) * z.sum(-1)
            ),
            "amin": lambda z: z.amin(-1),
            "min": lambda z: z.min(-1).values,
            "argmin": lambda z: z.gather(1, z.argmin(-1, keepdim=True)),
            "argsort": lambda z: z.gather(1, torch.ops.aten.argsort.default(z, -1)[:, :2]),
            "cat": lambda z: torch.cat([z[:, :4], z[:, 7:]], -1),
            "clamp by a tensor": lambda z: torch.clamp(z, max=z.detach().mean(-1, keepdim=True)),
            "constant_pad_nd": lambda z: F.pad(z, (1, 2)),
            "copy": lambda z: torch.zeros(24, V).copy_(z),
            "empty": lambda z: torch.empty(24, V).copy_(z),
            "cummax": lambda z: z.cummax(-1).values,
            "cummin": lambda z: z.cummin(-1).values,
            "cumprod": lambda z: z.detach().cumprod(-1) * z,
            "cumsum": lambda z: z.cumsum(-1),
            "logcumsumexp": lambda z: z.detach().logcumsumexp(-1) * z,
            "erf": lambda z: z.erf(),
            "flip": lambda z: z.flip(-1) * z,
            "index": lambda z: z[:, torch.tensor([3, 4])],
            "index_put": lambda z: torch.ops.aten.index_put.default(z, [None, torch.tensor([3, 4])], z.new_zeros(())),
            "index of classes": lambda z: z.index_select(1, torch.tensor([3, 4])),
            "kthvalue": lambda z: z.kthvalue(3, -1).values,
            "median": lambda z: z.median(-1).values,
            "mode": lambda z: z.mode(-1).values,
            "sort": lambda z: z.sort(-1).values * z,
            "sort, stable": lambda z: z.sort(dim=-1, stable=True).values * z,
            "topk": lambda z: z.topk(4, -1).values,
            "vector_norm": lambda z: torch.linalg.vector_norm(z, dim=-1),
            "norm": lambda z: torch.ops.aten.norm.ScalarOpt_dim(z.detach(), 2, [1]) * z.sum(-1),
            "logical_not": lambda z: z.detach().bool().logical_not() * z,
            "masked_fill by a tensor": lambda z: z.masked_fill(z > 1, torch.ones(())),
            "nan_to_num": lambda z: z.nan_to_num(),
            "new_full": lambda z: z.new_full(z.shape, 2.0) * z + z.new_zeros(z.shape),
            "ones": lambda z: torch.ones(24, V) * z + torch.zeros(24, V),
            "ones by row": lambda z: z.detach().exp() * torch.ones(24, V) + torch.zeros(24, V) * z,
            "prod": lambda z: z.detach().prod(-1) * z.sum(-1),
            "prod of all": lambda z: z.detach().tanh().prod() * z.sum(-1),
            "max of all": lambda z: z.detach().max() * z.sum(-1) + z.detach().min(),
            "relu": lambda z: z.relu(),
            "reshape, as it stands": lambda z: torch.ops.aten.reshape.default(z, [4, 6, V]),
            "scatter, reduced": lambda z: z.detach().scatter(1, z.detach()[:, :2].argsort(-1), 2.0, reduce="add") * z,
            "scatter of a tensor, reduced": lambda z: (
                z.detach().scatter(1, z.detach()[:, :2].argsort(-1), z.detach()[:, :2], reduce="add") * z
            ),
            "scatter_reduce": lambda z: (
                z.detach().scatter_reduce(1, z.detach()[:, :2].argsort(-1), z.detach()[:, :2], "amax") * z
            ),
            "select of a class": lambda z: z[:, 3] + z.unsqueeze(1)[:, 0, 4],
            "select_scatter": lambda z: torch.select_scatter(z, torch.zeros(24), 1, 3),
            "slice_scatter": lambda z: torch.slice_scatter(z, torch.zeros(24, 2), 1, 3, 5),
            "split of classes": lambda z: z.split([20, V - 20], -1)[1],
            "squeeze, everything": lambda z: z.unsqueeze(0).squeeze(),
            "std": lambda z: z.std(-1),
            "var": lambda z: z.var(-1),
            "var_mean": lambda z: torch.var_mean(z, -1)[0],
            "softmax, all banned": lambda z: torch.ops.aten._safe_softmax.default(z.detach(), -1) * z,
            "empty_like": lambda z: torch.empty_like(z).fill_(2.0) * z,
            "new_empty": lambda z: z.new_empty(z.shape).fill_(2.0) * z,
            "new_empty_strided": lambda z: z.new_empty_strided(z.shape, z.stride()).fill_(2.0) * z,
            "mean, kept": lambda z: z.mean(-1, keepdim=True),
            "unsafe index": lambda z: torch.ops.aten._unsafe_index.Tensor(z, [None, torch.tensor([3, 4])]),
        }.items()
    },
    "mean of classes": lambda z, y: ce(z, y) + z.mean(-1).mean(),
    "minus a number": lambda z, y: ce(torch.ops.aten.sub.Scalar(torch.ops.aten.div.Scalar(z, 2), 1), y),
    "rsub, as it stands": lambda z, y: ce(torch.ops.aten.rsub.Scalar(z, 1), y),
    "log-probabilities by hand": lambda z, y: (z - z.logsumexp(-1)[:, None]).gather(1, _class(y)).mean(),
    "squeezed in between": lambda z, y: (
        (z - z.amax(-1, keepdim=True).squeeze(1).unsqueeze(1)).exp().sum(-1).log().sum()
    ),
    "half": lambda z, y: ce(z.bfloat16().float(), y),
    "permuted": lambda z, y: ce(z.view(4, 6, V).permute(0, 2, 1), y.view(4, 6), label_smoothing=0.1),
    "zeros_like": lambda z, y: -(z.log_softmax(-1) * torch.zeros_like(z).scatter(1, _class(y), 1.0)).sum(-1).mean(),
}


# Rules for ops that AOTAutograd traces as others, or that stand where no program needs them: for graphs made by hand.
NEVER_ASKED = (
    "fact _c10d_functional.all_reduce.default",  # test_collectives.py
    "fact _c10d_functional.wait_tensor.default",
    "fact aten.argsort.default",
    "fact aten.lift_fresh_copy.default",
    "fact aten.ones.default",
    "fact aten.reshape.default",
    "fact aten.zeros.default",
    "step aten.permute.default",
    "step aten.rsub.Scalar",
    "step aten.squeeze.dim",
    "step aten.unsqueeze.default",
    "step prims.fma.default",
)


def of_rule(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The program of that name, of x, weight and target."""
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


def by_row(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """Computed by its own program."""
    z = F.linear(x, w)
    return ce(z.clamp(-3, 3) / (1 + x.detach()[:, :1].abs()), y) + 1e-3 * z[::2].softmax(-1).square().sum()


def returned(x: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    z = F.linear(x, w)
    return ce(z * 0.5, y), z


WHOLE = [capped, several_losses, in_place, two_heads, by_row, returned]


# Programs that ask other rules where nothing is decomposed.
WHOLE_TOO = (
    "acos", "argmax", "broadcast_tensors", "detach", "full_like", "log", "mT", "masked_fill", "movedim", "ones_like",
    "scatter", "all", "several dims", "clamp by a tensor", "cumsum", "index of classes", "vector_norm", "norm",
    "masked_fill by a tensor", "nan_to_num", "new_full", "std", "softmax, all banned", "empty_like", "new_empty",
    "new_empty_strided", "unsafe index",
)  # fmt: skip


def copied(graph: Graph) -> Graph:
    """A copy of a graph with the very values of its nodes, which a deep copy would trace anew."""
    copy = Graph()
    out = copy.graph_copy(graph, {})
    copy.output(out).meta = dict(next(n for n in reversed(graph.nodes) if n.op == "output").meta)
    return copy


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
        self.count(code)

    def count(self, code: CodeType) -> None:
        """A call that went well."""

    @contextlib.contextmanager
    def armed(self) -> Iterator[None]:
        before = sys.getprofile()
        sys.setprofile(self._seen)
        try:
            yield
        finally:
            sys.setprofile(before)


class Calls(Fault):
    """Lets all calls go well, and notes which functions they are of."""

    def __init__(self, *folders: str) -> None:
        super().__init__(-1, *folders)
        self.names: list[str] = []

    def count(self, code: CodeType) -> None:
        self.names.append(f"{Path(code.co_filename).name}:{code.co_firstlineno} {code.co_name}")

    def chosen(self, most: int) -> list[int]:
        """The first call and the last of each function, with LCE_EVERYTHING=1 the second too; and about `most` others."""
        places: dict[str, list[int]] = {}
        for at, name in enumerate(self.names):
            places.setdefault(name, []).append(at)
        found = {at for each in places.values() for at in (*each[: 2 if EVERYTHING else 1], each[-1])}
        return sorted(found | set(range(0, len(self.names), max(len(self.names) // most, 1))))


def anatomy(graph: Graph) -> list[Any]:
    """A graph without the names of its nodes, which a restored graph has new ones of."""
    index = {node: i for i, node in enumerate(graph.nodes)}
    return [(n.op, n.target, *torch.fx.map_arg((n.args, n.kwargs), lambda a: index[a]), sorted(n.meta)) for n in index]


def inject(graph: Graph, run: Callable[[Graph], Any], folders: tuple[str, ...], most: int) -> int:
    """Run a stage again and again on copies of a graph, with an exception at the calls that Calls.chosen() names.
    After each the copy has to be what it was. Returns how many."""
    before, calls = anatomy(graph), Calls(*folders)
    run(copied(graph))  # what is cached is not called again
    with calls.armed():
        run(copied(graph))
    chosen = calls.chosen(most)
    for at in chosen:
        fault, copy = Fault(at, *folders), copied(graph)
        try:
            with fault.armed():
                run(copy)
        except Injected:
            assert anatomy(copy) == before, calls.names[at]
            copy.lint()
        else:
            raise AssertionError(f"the stage went on after {calls.names[at]}")
    return len(chosen)
