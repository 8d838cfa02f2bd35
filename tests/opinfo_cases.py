"""torch's own samples (OpInfo) of every operation, as operations on the output of a linear.

Each sample's input that looks like logits becomes x @ weight.T of the same shape; a fixed projection of the result makes
the loss. No operation may be taken for another, whatever its arguments.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from oracle import Verdict, judge
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo, SampleInput
from torch.utils._pytree import tree_leaves

H = 3
# Not functions of their arguments: random numbers of other kernels, memory that nobody wrote.
SKIPPED = (
    "empty",
    "empty_like",
    "empty_permuted",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "rand_like",
    "randn_like",
)
INFOS = {
    f"{o.name} {o.variant_test_name}".strip(): o
    for o in op_db
    if torch.float64 in o.dtypes and o.name not in SKIPPED and o.supports_autograd
}
BEFORE = {"logits": lambda z: z, "log_softmax": lambda z: z.log_softmax(-1), "softmax": lambda z: z.softmax(-1)}


class Sample(NamedTuple):
    info: OpInfo
    sample: SampleInput
    before: str
    beside: bool

    def __str__(self) -> str:
        return f"{self.info.formatted_name} behind {self.before}, {self.sample.summary()}, beside a loss: {self.beside}"

    def check(self) -> Verdict:
        sample, op = self.sample, self.info.op
        shape = sample.input.shape
        g = torch.Generator().manual_seed(0)
        x = torch.randn(*shape[:-1], H, generator=g, dtype=torch.float64).requires_grad_()
        weight = (torch.randn(shape[-1], H, generator=g, dtype=torch.float64) * 0.7).requires_grad_()
        before, beside = BEFORE[self.before], self.beside
        args = [a.detach() if isinstance(a, Tensor) else a for a in sample.args]
        kwargs = {k: v.detach() if isinstance(v, Tensor) else v for k, v in sample.kwargs.items()}

        def fn(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
            z = F.linear(x, weight)
            result = op(before(z), *args, **kwargs)
            total = z.logsumexp(-1).square().mean() if beside else z.new_zeros(())
            for r in tree_leaves(result):
                if isinstance(r, Tensor) and not r.is_complex():
                    total = total + (r.double() * torch.arange(1, r.numel() + 1).cos().view(r.shape)).sum()
            return total

        return judge(fn, [x, weight, *args])


def samples(info: OpInfo, rng: random.Random, most: int) -> Iterator[Sample]:
    """Some samples of an operation whose input is a matrix or more."""
    try:
        found = [
            s
            for s in info.sample_inputs("cpu", torch.float64, requires_grad=False)
            if isinstance(s.input, Tensor) and s.input.dim() > 1 and s.input.dtype == torch.float64 and s.input.numel()
        ]
    except Exception:  # samples that need a library that is not there
        return
    for sample in rng.sample(found, min(most, len(found))):
        yield Sample(info, sample, rng.choice(list(BEFORE)), rng.random() < 0.3)


def programs(seed: int) -> Iterator[Sample]:
    rng = random.Random(seed)
    while True:
        names = list(INFOS)
        rng.shuffle(names)
        for name in names:
            yield from samples(INFOS[name], rng, 2)
