"""Says of any program whether torch.compile with lce_inductor computes what eager computes.

Only the public door is used: install(), then torch.compile. So the judgement does not depend on how heads are
recognised. Where ours and eager's results differ, torch.compile alone decides: its own deviations are not ours.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch._dynamo.guards as guards
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from corpus.harness import GraphRecord, InDouble, no_codegen_backend
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves, tree_map_only

import lce_inductor

Fn = Callable[..., Any]
Results = list[Tensor | None]


class Verdict(NamedTuple):
    """`kind`: "right"; "wrong"; "inaccurate" (the right formula, more rounding than allowed); "crash" (torch.compile
    alone works); "as torch" (torch.compile alone deviates in the same way); "invalid" (eager raises too)."""

    kind: str
    detail: str = ""
    rewritten: int = 0
    refused: tuple[str, ...] = ()
    largest: int = 0

    @property
    def failed(self) -> bool:
        return self.kind in ("wrong", "inaccurate", "crash", "internal")


@contextlib.contextmanager
def cheap() -> Iterator[None]:
    """Without keys of caches and measuring of guards, which touch no graph; random numbers are eager's."""
    with (
        functorch_config.patch(enable_autograd_cache=False),
        inductor_config.patch(fx_graph_cache=False, fallback_random=True),
        mock.patch.object(guards, "profile_guard_manager", lambda *args: 0.0),
    ):
        yield


def quiet() -> None:
    """For scripts: programs that fail on purpose would fill the screen."""
    for name in ("lce_inductor", "torch._dynamo", "torch._inductor", "torch._functorch", "torch.fx"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def fresh(args: Sequence[Any]) -> list[Any]:
    """Copies that share no memory with the arguments; a tensor that comes twice stays one."""
    known: dict[int, Tensor] = {}

    def copy(t: Tensor) -> Tensor:
        return known.setdefault(id(t), t.detach().clone().requires_grad_(t.requires_grad))

    return [tree_map_only(Tensor, copy, a) for a in args]


def _double(t: Tensor) -> Tensor:
    return t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t


def run(fn: Fn, args: Sequence[Any], grad: bool = True, between: Fn | None = None, first: bool = False) -> Results:
    """Outputs, gradients of the arguments for fixed cotangents, and what is left in the arguments.

    `between` gets the arguments after the call and before the backward. `first`: only the first output is
    differentiated, as logits that are deferred refuse to be.
    """
    torch.manual_seed(0)
    leaves = [t for t in tree_leaves(list(args)) if isinstance(t, Tensor)]
    with torch.set_grad_enabled(grad):
        outputs = [t for t in tree_leaves(fn(*args)) if isinstance(t, Tensor)]
    values: Results = [t.detach().clone() for t in outputs]
    if between is not None:
        with torch.no_grad():
            between(*args)
    roots = [(i, t) for i, t in enumerate(outputs[:1] if first else outputs) if t.requires_grad]
    wanted = [t for t in leaves if t.is_leaf and t.requires_grad]
    if roots and wanted:
        cotangents = [_cotangent(i, t) for i, t in roots]
        roots = [t for _, t in roots]
        values += torch.autograd.grad(roots, wanted, cotangents, allow_unused=True)
    else:
        values += [None] * len(wanted)
    return [*values, *(t.detach().clone() for t in leaves)]


def _cotangent(i: int, t: Tensor) -> Tensor:
    return torch.randn(t.shape, generator=torch.Generator().manual_seed(i + 1), dtype=torch.float64).to(t.dtype)


def compiled(
    fn: Fn, calls: Sequence[Sequence[Any]], package: bool, **options: Any
) -> tuple[Results, list[GraphRecord]]:
    """Results of one compiled function for each arguments, without code generation, and its graphs."""
    torch._dynamo.reset()
    counters.clear()
    records: list[GraphRecord] = []
    package_on = lce_inductor.installed(min_logits_bytes=0, **options["settings"])
    results: Results = []
    with package_on if package else contextlib.nullcontext(), cheap():
        compiled_fn = torch.compile(fn, backend=no_codegen_backend(records), dynamic=options["dynamic"])
        for args in map(fresh, calls):
            for i in options["marked"]:
                torch._dynamo.mark_dynamic(args[i], 0)
            results += run(compiled_fn, args, options["grad"], options["between"], options["first"])
    return results, records


def judge(
    fn: Fn, args: Sequence[Any], *, dynamic: bool | None = None, grad: bool = True, between: Fn | None = None,
    first: bool = False, narrow: Sequence[torch.dtype] = (), settings: dict[str, Any] | None = None,
    marked: Sequence[int] = (), more: Sequence[Sequence[Any]] = (),
) -> Verdict:  # fmt: skip
    """Compare a program with eager. `narrow`: dtypes that it computes in, besides those of its arguments; `marked`:
    arguments with a dynamic first dimension; `more`: arguments of further calls of the same compiled function."""
    options = {"dynamic": dynamic, "grad": grad, "between": between, "first": first, "settings": settings or {}}
    options |= {"marked": marked}
    saved_grad = torch.is_grad_enabled()
    try:
        return _judge(fn, [args, *more], options, narrow)
    finally:
        torch.set_grad_enabled(saved_grad)  # an edited program that raised may leave it off


def _judge(fn: Fn, calls: Sequence[Sequence[Any]], options: dict[str, Any], narrow: Sequence[torch.dtype]) -> Verdict:
    grad, between, first = options["grad"], options["between"], options["first"]
    leaves = sum(isinstance(t, Tensor) for t in tree_leaves(list(calls[-1])))
    try:
        eager, valid = [t for args in calls for t in run(fn, fresh(args), grad, between, first)], True
    except Exception as error:
        torch.set_grad_enabled(True)
        invalid = Verdict("invalid", _first_line(error))
        # Autograd forbids a change in place. Ours must too, or give the outputs, and where the change comes after the
        # call the gradients, of what stood there when it was read.
        try:
            later = between is not None
            eager, valid = [t for args in calls for t in run(fn, fresh(args), grad and later, None, first)], False
        except Exception:
            torch.set_grad_enabled(True)
            return invalid
        if len(calls) > 1 or not grad:
            return invalid
        if not later:
            leaves += sum(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves(list(calls[0])))
    try:
        ours, records = compiled(fn, calls, True, **options)
    except Exception as error:
        torch.set_grad_enabled(True)
        mine = Verdict("crash", _first_line(error), *_counts())
        if not valid:
            return invalid
        try:
            compiled(fn, calls, False, **options)
        except Exception as other:
            torch.set_grad_enabled(True)
            return mine._replace(kind="as torch", detail=_first_line(other))
        return mine
    rewritten, refused = _counts()
    seen = Verdict("right", "", rewritten, refused, max((g.largest for g in records), default=0))
    if "internal-error" in refused:
        return seen._replace(kind="internal", detail="internal-error")
    if not valid:
        ours, eager = ours[:-leaves], eager[:-leaves]
    exact, narrowed = _exact(fn, calls, grad, eager, first, between if valid else None)
    inner = [d for args in calls for d in _floats(args)]
    unit = max(torch.finfo(d).eps for d in (torch.float64, *inner, *_floats(eager), *narrow, *narrowed))
    problem, bad = _compare(ours, eager, exact, unit)
    if problem and valid:
        problem, bad = _compare(ours, eager, exact, unit, _spread(fn, calls, eager, options))
    if not problem:
        return seen
    try:
        alone, _ = compiled(fn, calls, False, **options)
        alone = alone[: len(eager)]
        its_problem, its_bad = _compare(alone, eager, exact, unit)
        # It is as far from eager, or as inaccurate and ours is within the room that it leaves.
        if its_bad or not _compare(ours, alone, alone, unit)[0] or not (bad or _compare(ours, alone, exact, unit)[0]):
            return seen._replace(kind="as torch", detail=f"{problem}; torch.compile alone: {its_problem or 'the same'}")
    except Exception:  # where torch.compile alone raises, ours must not give other numbers
        torch.set_grad_enabled(True)
    return seen._replace(kind="wrong" if bad else "inaccurate", detail=problem)


def _counts() -> tuple[int, tuple[str, ...]]:
    found = counters["lce_inductor"]
    return found["rewritten"], tuple(sorted(k.removeprefix("refused:") for k in found if k.startswith("refused:")))


def _first_line(error: BaseException) -> str:
    lines = [x for x in str(error).splitlines() if x.strip() and not x.startswith("backend=")]
    return f"{type(error).__name__}: {' / '.join(lines[:2])[:300]}"


def _floats(values: Any) -> list[torch.dtype]:
    return [t.dtype for t in tree_leaves(list(values)) if isinstance(t, Tensor) and t.is_floating_point()]


def _exact(
    fn: Fn, calls: Sequence[Sequence[Any]], grad: bool, eager: Results, first: bool, between: Fn | None
) -> tuple[Results, set[torch.dtype]]:
    """The program in fp64 throughout, casts included, and the narrower dtypes that it asks for."""
    with InDouble() as mode:
        try:
            exact: Results = []
            for args in map(fresh, calls):
                if set(_floats(args)) != {torch.float64}:
                    args = [tree_map_only(Tensor, _double, a) for a in args]
                exact += run(fn, args, grad, between, first)
        except Exception:  # a cast that the program needs, say for an integer's sake
            torch.set_grad_enabled(True)
            return eager, mode.narrowed
    return exact[: len(eager)], mode.narrowed


def _spread(fn: Fn, calls: Sequence[Sequence[Any]], eager: Results, options: dict[str, Any]) -> list[float]:
    """How far each result of eager moves where the inputs move by a rounding: far, where they are nearly divided by zero."""
    generator = torch.Generator().manual_seed(0)

    def moved(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        sign = torch.randint(-1, 2, t.shape, generator=generator).to(t.dtype)
        return (t.detach() * (1 + sign * torch.finfo(t.dtype).eps)).requires_grad_(t.requires_grad)

    found = [0.0] * len(eager)
    for _ in range(2):
        args = [tree_map_only(Tensor, moved, fresh(a)) for a in calls]
        results = [t for a in args for t in run(fn, a, options["grad"], options["between"], options["first"])]
        for i, (a, b) in enumerate(zip(results, eager)):
            if a is not None and b is not None and a.shape == b.shape and b.is_floating_point():
                found[i] = max(found[i], _error(a, b))
    return [f if math.isfinite(f) else 0.0 for f in found]


def _compare(
    ours: Results, eager: Results, exact: Results, unit: float, spread: Sequence[float] = ()
) -> tuple[str, bool]:
    """The first difference, and whether it is more than rounding.

    Allowed is 1.25 times eager's error, and what two evaluations in other orders differ by: logits come to 15 and
    more, each rounding of them counts fully in a probability, and random programs take small differences of large
    numbers. spread: of each result, see `_spread`; where a rounding moves half of all digits and more, as a tie or a step
    would, it excuses nothing further. Ten times that, or a tenth of the whole, is no rounding any more.
    """
    if len(ours) != len(eager):
        return f"{len(ours)} results, eager {len(eager)}", True
    first = ""
    for i, (mine, theirs, ref) in enumerate(zip(ours, eager, exact)):
        if mine is None or theirs is None:
            other = theirs if mine is None else mine
            # A number that cancels out may get zeros where eager cuts it off, and the other way round.
            if other is not None and bool((other != 0).any()):
                return f"result {i}: {'None' if mine is None else 'a tensor'} where eager has the opposite", True
            continue
        if (mine.dtype, mine.shape) != (theirs.dtype, theirs.shape):
            found, wanted = f"{mine.dtype} {tuple(mine.shape)}", f"{theirs.dtype} {tuple(theirs.shape)}"
            return f"result {i}: {found}, eager {wanted}", True
        if not mine.is_floating_point():
            if not torch.equal(mine, theirs):
                return f"result {i}: {mine.flatten()[:6].tolist()}, eager {theirs.flatten()[:6].tolist()}", True
            continue
        ref = theirs if ref is None or ref.shape != theirs.shape else ref
        error, norm = _error(mine, ref), _norm(ref)
        # Of bf16's roundings, each is large; in fp64 nothing is lost by allowing for sums that cancel to zero.
        roundings, least = (4, 0.02) if unit > 1e-4 else (16, 1) if unit > 1e-10 else (16, 10)
        slack = roundings * unit * (norm + least * math.sqrt(max(mine.numel(), 1)))
        room = 1.25 * _error(theirs, ref) + slack + (min(16 * spread[i], math.sqrt(unit) * norm) if spread else 0.0)
        if not error <= room:
            detail = f"result {i}: error {error:.3g} of {norm:.3g}, allowed {room:.3g}"
            if not error <= max(2 * room, min(10 * room, 0.1 * norm)):
                return detail, True
            first = first or detail
    return first, False


def _error(value: Tensor, exact: Tensor) -> float:
    a, b = value.double(), exact.double()
    special = ~torch.isfinite(b)
    if not torch.equal(torch.nan_to_num(a[special], nan=1.0), torch.nan_to_num(b[special], nan=1.0)):
        return math.inf
    return float((a - b)[~special].norm())


def _norm(t: Tensor) -> float:
    return float(t.double()[torch.isfinite(t)].norm())
