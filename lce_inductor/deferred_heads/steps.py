"""What waits with pending logits: functions of each row by itself, which are applied once the product is there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

STEPS: dict[str, Callable[..., Tensor]] = {
    "to": lambda z, dtype: z.to(dtype),
    "mul": torch.mul,
    "div": torch.div,
    "tanh": torch.tanh,
    "neg": torch.neg,
    "softmax": lambda z, dtype: torch.softmax(z, -1, dtype=dtype),
    "log_softmax": lambda z, dtype: torch.log_softmax(z, -1, dtype=dtype),
    "classes": lambda z, start, stop: z[..., start:stop],
    "permute": torch.permute,
    "view": lambda z, view: view(z),
}


@dataclasses.dataclass(frozen=True)
class View:
    """A view of the logits, once they are computed: torch's function, or the name of an attribute, and of several
    results which. Compile caches pickle it."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    index: int | None = None

    def __call__(self, z: Tensor) -> Tensor:
        out = getattr(z, self.func) if isinstance(self.func, str) else self.func(z, *self.args, **self.kwargs)
        view: Tensor = out if self.index is None else out[self.index]
        return view

    def __hash__(self) -> int:  # slices have none
        return hash((self.func, self.index, repr(self.args)))


@dataclasses.dataclass(frozen=True)
class Step:
    """A key of STEPS, and the function's other arguments."""

    name: str
    args: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class Spec:
    """How the logits follow from x, weight and bias. Guards compare it; AOTAutograd's cache takes it into its key.

    compute_dtype: of the linear layer. dtype: of the logits. steps: what acts on the layer's result, in order. needs:
    which of x, weight and bias get a gradient.
    """

    compute_dtype: torch.dtype
    dtype: torch.dtype
    steps: tuple[Step, ...] = ()
    needs: tuple[bool, bool, bool] = (False, False, False)

    @property
    def moved(self) -> bool:
        """Are the classes no longer in the last dimension, all of a row?"""
        return any(step.name in ("permute", "view") for step in self.steps)

    @property
    def kept(self) -> bool:
        """Are the logits kept once they are computed? Log-probabilities, which losses read several times and autograd
        keeps anyway; and views that eager code would have computed where it made them."""
        return self.normalized or any(step.name == "view" for step in self.steps)

    @property
    def normalized(self) -> bool:
        """Is each row normalized by a softmax?"""
        return any(step.name in ("softmax", "log_softmax") for step in self.steps)

    @property
    def elementwise(self) -> bool:
        """Does each step act on each logit by itself?"""
        return all(step.name in ("to", "mul", "div", "tanh", "neg") for step in self.steps)


def compute(x: Tensor, weight: Tensor, bias: Tensor | None, spec: Spec) -> Tensor:
    """The logits: the product, and what waited for it."""
    dtype = spec.compute_dtype
    # The reader may be under autocast; the logits are those of the moment of the call.
    with torch.autocast(x.device.type, enabled=False):
        # Rows in one dimension: of some of a sequence F.linear may make a batch of products.
        rows = x.to(dtype).reshape(-1, x.shape[-1])
        z = F.linear(rows, weight.to(dtype), None if bias is None else bias.to(dtype))
        z = z.view(*x.shape[:-1], weight.shape[0])
        larger = False
        for step in spec.steps:
            if step.name != "view":
                z, larger = STEPS[step.name](z, *step.args), False
                continue
            z = z if larger else z.contiguous()
            before, z = z.numel(), STEPS[step.name](z, *step.args)
            larger = z.numel() > before
    # In memory as pending logits say that they are: who asks for strides may rely on them.
    return z if larger else z.contiguous()


def compute_classes(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, spec: Spec) -> Tensor:
    """The logits of classes index [..., K] alone, where all steps are elementwise."""
    dtype = spec.compute_dtype
    wide = torch.promote_types(dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        rows = F.embedding(index, weight).to(dtype).to(wide)
        z = (rows @ x.to(dtype).to(wide).unsqueeze(-1)).squeeze(-1)
        if bias is not None:
            z = z + bias[index].to(dtype)
        z = z.to(dtype)
        for step in spec.steps:
            z = STEPS[step.name](z, *step.args)
    return z
