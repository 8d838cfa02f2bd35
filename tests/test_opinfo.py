"""torch's own samples of its losses (OpInfo of the installed torch), run through the rewrite.

Logits are made by a linear layer with the identity as weight, so that a sample of F.cross_entropy or F.nll_loss becomes
one of a head; F.linear_cross_entropy, where torch has it, is called as it is. A sample is rewritten unless its targets
are probabilities or its classes are not the rows' last dimension; either way it gives eager's numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from harness import Compiled, InDouble, assert_as_accurate, fresh, results
from torch import Tensor
from torch._dynamo.utils import counters
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo, SampleInput
from torch.utils._pytree import tree_map_only
from turns import EVERYTHING

Fn = Callable[..., Tensor]


def on_identity(loss: Fn) -> Fn:
    """A loss of logits [N, C, ...] or [C], as one of hidden states [..., H = C] and the weight [C, C]."""

    def fn(logits: Tensor, head: Tensor, target: Tensor, **options: Any) -> Tensor:
        dim = min(1, logits.dim() - 1)
        z = F.linear(logits.movedim(dim, -1), head).movedim(-1, dim)
        return loss(z, target, **options)

    return fn


def log_softmax_nll(z: Tensor, target: Tensor, **options: Any) -> Tensor:
    return F.nll_loss(F.log_softmax(z, min(1, z.dim() - 1)), target, **options)


ADAPTERS: dict[str, Fn] = {
    "nn.functional.cross_entropy": on_identity(F.cross_entropy),
    "nn.functional.nll_loss": on_identity(log_softmax_nll),
}
if hasattr(F, "linear_cross_entropy"):
    ADAPTERS["nn.functional.linear_cross_entropy"] = F.linear_cross_entropy
INFOS = {o.name: o for o in op_db if o.name in ADAPTERS and not o.variant_test_name}


def arguments(info: OpInfo, sample: SampleInput) -> tuple[list[Any], dict[str, Any]]:
    """What the adapter of a sample gets."""
    args = [sample.input, *sample.args]
    if "linear" not in info.name:
        x = sample.input
        classes = x.shape[min(1, x.dim() - 1)]
        args.insert(1, torch.eye(classes, dtype=x.dtype, requires_grad=True))
    return args, sample.kwargs


def check(info: OpInfo, sample: SampleInput, compile: Callable[[Fn], Fn]) -> None:
    args, options = arguments(info, sample)
    fn = lambda *args: ADAPTERS[info.name](*args, **options)
    torch._dynamo.reset()
    found = results(compile(fn), fresh(args))
    with InDouble() as mode:
        wide = tree_map_only(Tensor, lambda t: t.detach().double() if t.is_floating_point() else t, options)
        exact_args = [t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in args]
        exact = results(lambda *args: ADAPTERS[info.name](*args, **wide), exact_args)
    try:
        assert_as_accurate(found, results(fn, fresh(args)), exact, mode.narrowed)
    except AssertionError:  # what is left to torch's decompositions is as accurate as torch.compile alone
        counts = dict(counters["lce_inductor"])
        with mock.patch("lce_inductor.passes._Pass.__call__"):
            alone = results(Compiled(fn), fresh(args))
        counters["lce_inductor"].update(counts)
        assert_as_accurate(found, alone, exact, mode.narrowed)


def expected(args: list[Any]) -> bool:
    """Must a sample be rewritten, seen at its logits, its weight and its target?"""
    rows = args[0].numel() // args[0].shape[1] if args[0].dim() > 1 else 1
    return rows > 1 and args[1].dim() == 2 and args[1].shape[0] > 1 and not args[2].is_floating_point()


# Every so many of them; samples come with options that take turns by twos and sevens, which these numbers meet all of.
STEPS = {torch.float64: (1, 5), torch.bfloat16: (4, 5), torch.float32: (8, 11)}


@pytest.mark.parametrize("dtype, step", [(d, steps[not EVERYTHING]) for d, steps in STEPS.items()], ids=str)
@pytest.mark.parametrize("name", INFOS)
def test_samples(name, dtype, step, installed):
    """Eager's numbers for each; a loss of indices is rewritten, one of probabilities may be."""
    seen: Counter[bool] = Counter()
    for sample in list(INFOS[name].sample_inputs("cpu", dtype, requires_grad=True))[::step]:
        compiled: list[Compiled] = []
        check(INFOS[name], sample, lambda fn: compiled.append(Compiled(fn, fullgraph=True)) or compiled[0])
        counts = compiled[0].counts
        assert "internal-error" not in compiled[0].refusals, sample.summary()
        assert counts["rewritten"] == 1 or not expected(arguments(INFOS[name], sample)[0]), sample.summary()
        seen[counts["rewritten"] > 0] += 1
    assert seen[True] > 10 // step


@pytest.mark.parametrize("name", [n for n, o in INFOS.items() if o.error_inputs_func is not None])
def test_wrong_inputs(name, installed):
    """What eager refuses is refused, with the same exception inside Dynamo's."""
    found = 0
    for wrong in INFOS[name].error_inputs("cpu"):
        args, options = arguments(INFOS[name], wrong.sample_input)
        run = Compiled(lambda *args: ADAPTERS[name](*args, **options))
        with pytest.raises(wrong.error_type):
            ADAPTERS[name](*args, **options)
        with pytest.raises((wrong.error_type, torch._dynamo.exc.TorchDynamoException)):
            run(*args)
        found += 1
    assert found
