"""Deferred logits to look at: directly made ones, compiled ones, and ways to read and to differentiate them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lce_inductor.deferred_logits.tensor import DeferredLogits, defer_logits

B, T, H, V = 3, 5, 16, 103
CAP = "div 3.0;tanh;mul 3.0"


class Model(nn.Module):
    """Returns a loss and the logits."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.body = nn.Linear(H, H)
        self.head = nn.Linear(H, V, bias=bias)

    def forward(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(torch.tanh(self.body(x)))
        return F.cross_entropy(logits.float().view(-1, V), target.view(-1)), logits


def batch(b: int = B, t: int = T) -> tuple[Tensor, Tensor]:
    return torch.randn(b, t, H), torch.randint(0, V, (b, t))


def pair(
    dtype: torch.dtype = torch.float32, grad: bool = True, epilogue: str = "", **options: Any
) -> tuple[DeferredLogits, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Deferred logits, eager's, and the tensors that they are made of."""
    x = torch.randn(B, T, H).to(dtype).requires_grad_(grad)
    weight = torch.randn(V, H).to(dtype).requires_grad_(grad)
    bias = torch.randn(V).to(dtype).requires_grad_(grad)
    z = F.linear(x, weight, bias)
    deferred = defer_logits(x, weight, bias, epilogue, dtype, options.pop("out", dtype), **options)
    assert isinstance(deferred, DeferredLogits)
    return deferred, z, (x, weight, bias)


def real(z: Any) -> Any:
    return z.detach().clone() if isinstance(z, DeferredLogits) else z


def close(found: Any, expected: Any) -> None:
    for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        torch.testing.assert_close(real(a), b, check_stride=False)


READS: dict[str, Callable[[Tensor], Any]] = {
    "copy": copy.copy,
    "pickle": lambda z: pickle.loads(pickle.dumps(z)),
    "save": lambda z: _saved(z),
    "cpu": lambda z: z.cpu(),
    "to": lambda z: z.to(torch.float64),
    "float": lambda z: z.float(),
    "bfloat16": lambda z: z.bfloat16(),
    "long": lambda z: z.long(),
    "numpy": lambda z: torch.from_numpy(z.detach().numpy()),
    "numpy forced": lambda z: torch.from_numpy(z.numpy(force=True)),
    "asarray": lambda z: torch.from_numpy(np.asarray(z.detach())),
    "dlpack": lambda z: torch.from_dlpack(z.detach()),
    "tolist": lambda z: torch.tensor(z.tolist()),
    "item": lambda z: torch.tensor(z[0, 1, 2].item()),
    "data": lambda z: z.data,
    "cat": lambda z: torch.cat([z, z]),
    "stack": lambda z: torch.stack([z, z]),
    "last": lambda z: z[:, -1],
    "first": lambda z: z[0],
    "shift": lambda z: z[..., :-1, :].contiguous().view(-1, z.size(-1)),
    "flatten": lambda z: z.flatten(0, 1),
    "flatten all": lambda z: z.reshape(-1),
    "regroup": lambda z: z.view(-1, B, V),
    "inferred": lambda z: z.view(B * T, -1),
    "other view": lambda z: z.view(B, T * V),
    "mask": lambda z: z[torch.arange(B * T).view(B, T) % 2 == 0],
    "index": lambda z: z[torch.tensor([0, 2])],
    "index and class": lambda z: z[torch.tensor([0, 2]), :, 3],
    "classes": lambda z: z[..., :7],
    "new axis": lambda z: z[None],
    "last axis": lambda z: z.unsqueeze(-1),
    "transpose": lambda z: z.transpose(1, 2),
    "split": lambda z: torch.cat(z.reshape(-1, V).split(4)),
    "chunk": lambda z: torch.cat(z.chunk(2, dim=1), dim=1),
    "split classes": lambda z: z.split(10, dim=-1)[1],
    "iterate": lambda z: torch.stack(list(z)),
    "argmax": lambda z: z.argmax(-1),
    "argmax over all": lambda z: z.argmax(),
    "argmax, other axis": lambda z: z.argmax(1),
    "argmax, keepdim": lambda z: z.argmax(2, keepdim=True),
    "max": lambda z: tuple(z.max(-1)),
    "max of all": lambda z: z.max(),
    "amax": lambda z: z.amax((-1,)),
    "amax, two axes": lambda z: z.amax((1, 2)),
    "logsumexp": lambda z: z.logsumexp(-1, keepdim=True),
    "gather": lambda z: z.gather(-1, torch.arange(B * T * 2).view(B, T, 2)),
    "gather, few": lambda z: z.gather(-1, torch.zeros(2, T, 1, dtype=torch.int64)),
    "topk": lambda z: tuple(z.topk(3)),
    "softmax": lambda z: z.softmax(-1),
    "cross entropy": lambda z: F.cross_entropy(z.view(-1, V), torch.arange(B * T)),
    "sum": lambda z: z.sum(),
    "inner": lambda z: z.inner(torch.ones(2, V)),
    "mean": lambda z: z[:, 1:].mean(dtype=torch.float64),
    "add": lambda z: 1 + z,
    "zeros_like": torch.zeros_like,
    "new_zeros": lambda z: z.new_zeros(2, 3),
    "equal": lambda z: torch.tensor(torch.equal(z, z)),
    "allclose": lambda z: torch.tensor(torch.allclose(z, z + 0)),
    "write into another": lambda z: torch.empty(B, T, V).copy_(z.detach()),
}


def _saved(z: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(z, file)
    file.seek(0)
    return torch.load(file)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return (z * z).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


DIFFERENTIATE: dict[str, Callable[[Tensor], Tensor]] = {
    "auxiliary": lambda z: z.float().logsumexp(-1).mean(),
    "loss": lambda z: F.cross_entropy(z.view(-1, V), torch.arange(B * T)),
    "custom function": Square.apply,
    "max": lambda z: z.max(-1).values.sum(),
    "row": lambda z: z[:, -1].sum(),
    "mask": lambda z: z[torch.ones(B, T, dtype=torch.bool)].sum(),
    "clone": lambda z: z.clone().sum(),
    "deepcopy": lambda z: copy.deepcopy(z).sum(),
    "iterate": lambda z: next(iter(z)).sum(),
}
