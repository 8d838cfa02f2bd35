"""The list of cases: what a case is, and the decorator that adds one."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch

from .inputs import Dims, leaf


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """The head must be rewritten."""


@dataclasses.dataclass(frozen=True)
class Refuse:
    """The head must be left alone, and `code` counted; codes.UNSEEN where it is not even taken for a head."""

    code: str


REWRITE = Rewrite()
# Arguments of install() under which logits count and what is as wide as hidden states does not.
TINY = {"min_logits_bytes": 24 * 101 * 4}


Expectation = Rewrite | Refuse


@dataclasses.dataclass(frozen=True)
class Case:
    """One spelling.

    Attributes:
        name: "family/spelling".
        body: a function of named inputs (see inputs.py), or an nn.Module class taking `Dims`.
        expect: what must become of its head under grad.
        no_grad: the same where the case runs under torch.no_grad(), None where it makes no sense there.
        heads: linears that must be rewritten.
        dims: sizes of the inputs.
        rows: rows of the smallest head; a tensor of `rows * V` elements counts as held logits;
            0 where such a tensor is not told apart from the weight.
        low: dtypes to run besides fp64 and fp32, for spellings that are about casts.
        backward: "all" differentiable outputs get a random cotangent, or only the "first" or
            "second", or "none".
        config: arguments of install() that differ from the default.
        frozen: inputs that need no gradient here.
        plain: weights are plain tensors, so that V and H are symbolic under dynamic shapes too.
        fullgraph: False for a spelling that Dynamo cuts into several graphs.
        dynamic: False for a spelling that makes no sense there; `recompiles` where a new size needs a new graph with
            torch.compile alone too.
        unbacked: compile with data-dependent output shapes captured.
        deferred: the logits are returned, and computed when they are read; a joint graph by itself has to hold them.
        note: why the case is there, where the code does not say it.
    """

    name: str
    body: Callable[..., Any]
    expect: Expectation
    no_grad: Expectation | None
    heads: int
    dims: Dims
    rows: int
    low: tuple[torch.dtype, ...]
    backward: str
    config: dict[str, Any]
    frozen: tuple[str, ...]
    plain: bool
    fullgraph: bool
    dynamic: bool
    recompiles: bool
    unbacked: bool
    deferred: bool
    note: str

    @property
    def limit(self) -> int:
        """Elements from which a tensor counts as held logits."""
        return self.rows * self.dims.V

    def build(
        self, dtype: torch.dtype, stored: torch.dtype | None = None, grow: int = 0
    ) -> tuple[Callable[..., Any], list[Any], dict[str, torch.Tensor]]:
        """Make the callable, its arguments and its leaves by name.

        Values are drawn in fp64 and rounded to `dtype`; `stored` then widens them, so that a reference run
        sees the very values that the run in `dtype` saw. `grow` tokens are added to every sequence.
        """
        dims = dataclasses.replace(self.dims, T=self.dims.T + grow)
        leaves: dict[str, torch.Tensor] = {}
        fn: Callable[..., Any] = self.body
        signature = inspect.signature(self.body)
        if inspect.isclass(self.body):
            module = _seeded_module(self.body, dims).to(dtype)
            module = module.to(stored or dtype)
            leaves.update({k: p for k, p in module.named_parameters() if p.requires_grad})
            fn, signature = module, inspect.signature(module.forward)
        args = []
        for name in signature.parameters:
            value = leaf(name, dims, dtype, stored or dtype, frozen=name in self.frozen, plain=self.plain)
            if isinstance(value, torch.Tensor) and value.requires_grad:
                leaves[name] = value
            args.append(value)
        return fn, args, leaves


CASES: dict[str, Case] = {}
_SAME = Rewrite()  # a marker by identity: "under no_grad as under grad"


def case(
    name: str,
    expect: Expectation = REWRITE,
    *,
    no_grad: Expectation | None = _SAME,
    heads: int = 1,
    dims: Dims | None = None,
    rows: int | None = None,
    low: tuple[torch.dtype, ...] = (),
    backward: str = "all",
    config: dict[str, Any] | None = None,
    frozen: tuple[str, ...] = (),
    plain: bool = False,
    fullgraph: bool = True,
    dynamic: bool = True,
    recompiles: bool = False,
    unbacked: bool = False,
    deferred: bool = False,
    note: str = "",
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function or an nn.Module class as a case; the arguments are the attributes of `Case`."""
    dims = dims or Dims()

    def add(body: Callable[..., Any]) -> Callable[..., Any]:
        if name in CASES:
            raise ValueError(f"two cases are called {name!r}")
        CASES[name] = Case(
            name=name,
            body=body,
            expect=expect,
            no_grad=expect if no_grad is _SAME else no_grad,
            heads=heads,
            dims=dims,
            rows=dims.B * dims.T if rows is None else rows,
            low=low,
            backward=backward,
            config=config or {},
            frozen=frozen,
            plain=plain,
            fullgraph=fullgraph,
            dynamic=dynamic,
            recompiles=recompiles,
            unbacked=unbacked,
            deferred=deferred,
            note=note,
        )
        return body

    return add


def _seeded_module(cls: Callable[..., Any], dims: Dims) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        module: torch.nn.Module = cls(dims)
        # nn.Linear's own initialisation gives nearly uniform predictions; wider weights test more.
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(torch.randn(p.shape, dtype=torch.float64) * (1.5 / dims.H**0.5))
    return module.double()
