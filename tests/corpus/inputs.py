"""Inputs of the cases, by parameter name, from a fixed seed."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Dims:
    """Sizes. V is prime and equals no other size, so a tensor's element count tells what it is.

    H is smaller than any number of rows in use: weight [V, H] stays below the limit from which a tensor counts as
    held logits.
    """

    B: int = 2
    T: int = 12
    H: int = 8
    V: int = 101
    K: int = 3


Make = Callable[[Dims, torch.Generator], Tensor]


def leaf(name: str, dims: Dims, dtype: torch.dtype, stored: torch.dtype, frozen: bool, plain: bool) -> Tensor:
    """The input called `name`, rounded to `dtype` and stored as `stored`.

    Activations are leaves that require grad; parameters are nn.Parameters (sizes static to Dynamo) unless `plain`;
    constants and indices need no gradient.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    for kind in (_INDICES, _CONSTANTS, _ACTIVATIONS, _PARAMETERS):
        if name in kind:
            value = kind[name](dims, generator)
            break
    else:
        raise KeyError(f"no input is called {name!r}")
    if kind is _INDICES:
        return value
    value = value.to(dtype).to(stored)
    if kind is _CONSTANTS or frozen:
        return value
    if kind is _PARAMETERS and not plain:
        return torch.nn.Parameter(value)
    return value.requires_grad_()


def _randn(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


def _rand(g: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=g, dtype=torch.float64)


def _labels(d: Dims, g: torch.Generator, ignore: int | None) -> Tensor:
    labels = torch.randint(d.V, (d.B, d.T), generator=g)
    if ignore is not None:
        labels[torch.rand(labels.shape, generator=g) < 0.2] = ignore
        labels[0, -1] = ignore
    return labels


def _mask(d: Dims, g: torch.Generator) -> Tensor:
    lengths = torch.arange(d.B) % 3 + d.T - 3
    return torch.arange(d.T)[None, :] < lengths[:, None]


def _spread(d: Dims) -> float:
    """Standard deviation of weights that gives logits one of 1.5: predictions that differ, none saturated."""
    return 1.5 / d.H**0.5


_ACTIVATIONS: dict[str, Make] = {
    "h": lambda d, g: _randn(g, d.B, d.T, d.H),
    "h2": lambda d, g: _randn(g, d.B, d.T, d.H),
    "h_tbh": lambda d, g: _randn(g, d.T, d.B, d.H),
    "x": lambda d, g: _randn(g, d.B * d.T, d.H),
    "keys": lambda d, g: _randn(g, d.V, d.H) * _spread(d),
    "aux": lambda d, g: _randn(g),
}
_PARAMETERS: dict[str, Make] = {
    "weight": lambda d, g: _randn(g, d.V, d.H) * _spread(d),
    "weight2": lambda d, g: _randn(g, d.V, d.H) * _spread(d),
    "weight3": lambda d, g: _randn(g, d.V, d.H) * _spread(d),
    "weight_t": lambda d, g: _randn(g, d.H, d.V) * _spread(d),
    "weight_wide": lambda d, g: _randn(g, 2 * d.V, d.H) * _spread(d),
    "weight_padded": lambda d, g: _randn(g, d.V + 3, d.H) * _spread(d),
    "weight_body": lambda d, g: _randn(g, d.H, d.H) * _spread(d),
    "bias": lambda d, g: _randn(g, d.V),
    "bias_padded": lambda d, g: _randn(g, d.V + 3),
    "bias_row": lambda d, g: _randn(g, 1, d.V),
    "gain": lambda d, g: 1 + 0.2 * _randn(g, d.V),
    "scale": lambda d, g: 1.3 + 0.1 * _randn(g),
    "log_scale": lambda d, g: 0.1 * _randn(g),
    "lora_a": lambda d, g: _randn(g, 4, d.H),
    "lora_b": lambda d, g: _randn(g, d.V, 4) * 0.3,
    "wide_weight": lambda d, g: _randn(g, d.V, 12) * (1.5 / 12**0.5),
}
_CONSTANTS: dict[str, Make] = {
    "teacher_h": lambda d, g: _randn(g, d.B, d.T, d.H),
    "teacher_weight": lambda d, g: _randn(g, d.V, d.H) * _spread(d),
    "logits_bias": lambda d, g: _randn(g, 1, d.V),
    "class_weight": lambda d, g: _rand(g, d.V) + 0.5,
    "token_weight": lambda d, g: _rand(g, d.B, d.T) + 0.1,
    "temperature": lambda d, g: _rand(g) * 0.2 + 0.8,
    "row_temperature": lambda d, g: _rand(g, d.B, 1, 1) + 0.5,
    "advantage": lambda d, g: _randn(g, d.B),
    "old_logp": lambda d, g: -4.5 + 0.3 * _randn(g, d.B, d.T - 1),
    "ref_logp": lambda d, g: -4.5 + 0.3 * _randn(g, d.B, d.T - 1),
    "lam": lambda d, g: 0.3 + 0.2 * _rand(g),
    "wide_h": lambda d, g: _randn(g, d.B, d.T, 12),
    "row_temperatures": lambda d, g: _rand(g, d.B, d.T) + 0.5,
    "top_logits": lambda d, g: _randn(g, d.B, d.T, 20).sort(-1, descending=True).values,
    "soft": lambda d, g: _randn(g, d.B, d.T, d.V).softmax(-1),
}
_INDICES: dict[str, Make] = {
    "labels": lambda d, g: _labels(d, g, -100),
    "labels_minus1": lambda d, g: _labels(d, g, -1),
    "labels_pad0": lambda d, g: _labels(d, g, 0),
    "labels_int32": lambda d, g: _labels(d, g, -100).int(),
    "targets": lambda d, g: _labels(d, g, None),
    "targets2": lambda d, g: _labels(d, g, None),
    "targets_tb": lambda d, g: _labels(d, g, None).t().contiguous(),
    "codes": lambda d, g: torch.randint(d.V, (d.B, d.T, d.K), generator=g),
    "input_ids": lambda d, g: torch.randint(d.V, (d.B, d.T), generator=g),
    "mask": _mask,
    "num_items": lambda d, g: torch.tensor(d.B * d.T - 5),
    "picks": lambda d, g: torch.randperm(d.B * d.T, generator=g)[: d.B * d.T - 6],
    "positions": lambda d, g: torch.stack([torch.randperm(d.T, generator=g)[: d.T - 2] for _ in range(d.B)]),
    "class_mask": lambda d, g: torch.rand(d.V, generator=g) < 0.1,
    "allowed": lambda d, g: torch.rand(d.B, d.T, d.V, generator=g) < 0.9,
    "top_ids": lambda d, g: _randn(g, d.B, d.T, d.V).topk(20, -1).indices,
    "keep_classes": lambda d, g: torch.randperm(d.V, generator=g)[: d.V - 4].sort().values,
    "arange_labels": lambda d, g: torch.arange(d.B * d.T),
}
