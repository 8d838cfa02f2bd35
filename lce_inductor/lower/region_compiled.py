"""A program as code that Inductor made, once for all numbers of rows.

The program becomes an FX graph that ends by writing each factor of dX and dW into its memory, mostly the logits' own.
Inductor gets it directly: no Dynamo, no guards of that, none of the passes in Inductor's hooks, ours included, and no
CUDA graphs of its own. Its caches on disk know it as they know any graph.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..spec.program import Program, Ref, Step, parse, resolve
from .region_values import Meta, fill, places, propagate, takes_device, used, wide

log = logging.getLogger(__name__)
aten = torch.ops.aten

# Kinds of devices whose programs are compiled; on a CPU the compiler is slow and the blocks are fast.
DEVICES = {"cuda"}
# One code for every number of rows. False: one for each, that of each last, shorter chunk as well.
ANY_ROWS = True
# Elements that a kernel of 32-bit indices can tell apart.
_INDEXABLE = 2**31 - 1
_MOST = 64
_HOOKS = (
    "pre_grad_custom_pass", "joint_custom_pre_pass", "joint_custom_post_pass", "post_grad_custom_pre_pass",
    "post_grad_custom_post_pass", "_pre_fusion_custom_pass", "_post_fusion_custom_pass", "custom_partitioner_fn",
)  # fmt: skip
_OFF = ("triton.cudagraphs", "cpp_wrapper", "fx_wrapper", "freezing")


class Key(NamedTuple):
    """A program and what it is called with, for any number of rows.

    homes: the memory of each factor, in order, that none of the logits' own is for.
    """

    text: str
    inputs: tuple[Meta, ...]
    homes: tuple[Meta, ...]
    sizes: tuple[int, ...]
    device: torch.device

    @property
    def program(self) -> Program:
        return parse(self.text)

    def open_sizes(self) -> list[int]:
        """The sizes, by place, that code leaves open: numbers of some batch, not those that inputs have as well."""
        known = {d for m in (*self.inputs, *self.homes) for d in m.shape}
        return [i for i, size in enumerate(self.sizes) if size > 1 and size not in known]

    def of_code(self) -> Key:
        """The same for all calls that code may be shared by."""
        free = self.open_sizes()
        return self._replace(sizes=tuple(-1 if i in free else size for i, size in enumerate(self.sizes)))


class _Code(NamedTuple):
    """fits: does it do for so many rows and these open sizes? any_rows: is it given the number of rows?"""

    call: Callable[..., Sequence[Tensor]]
    fits: Callable[[int, tuple[int, ...]], bool]
    any_rows: bool


_lock = threading.RLock()
# By key (of_code) and number of rows, None for any.
_codes: OrderedDict[tuple[Key, int | None], _Code | None] = OrderedDict()


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()  # another thread may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def rows_at_a_time(key: Key) -> int:
    """So many rows that no operand has more elements than 32-bit indices tell apart."""
    kinds = parse(key.text).inputs
    metas = [m for kind, m in zip(kinds, key.inputs) if kind != "whole"] + list(key.homes)
    apart = max((max(m.stride[0], *m.shape, 1) for m in metas), default=1)
    return max(_INDEXABLE // apart, 1)


def run(key: Key, n: int, inputs: Sequence[Tensor], homes: Sequence[Tensor]) -> list[Tensor] | None:
    """The values of the results of kind row, and sums over rows of those of kind sum, in order; factors end up in their
    memory. None, and nothing is done, where there is no code and none can be made now.
    """
    code = _find(key, n)
    if code is None:
        return None
    numbers = ([n] if code.any_rows else []) + [key.sizes[i] for i in key.open_sizes()]
    return list(code.call(*[inputs[i].detach() for i in _read(key.text)], *homes, *numbers))


def clear() -> None:
    """Forget all code."""
    with _lock:
        _codes.clear()


def _find(key: Key, n: int) -> _Code | None:
    if n == 1:  # Inductor would make code of its own for it
        return None
    shared, free = key.of_code(), tuple(key.sizes[i] for i in key.open_sizes())
    found, known = _known(shared, n, free)
    if known or _is_capturing(key.device):
        return found
    with _lock:
        found, known = _known(shared, n, free)  # another thread may have made it
        if known:
            return found
        rows = None if ANY_ROWS and (shared, None) not in _codes else n
        try:
            code: _Code | None = _compile(key, n, rows is None)
        except Exception as error:
            log.warning("a region's program cannot be compiled and runs step by step: %s", error, exc_info=True)
            code = None
        _codes[shared, rows] = code
        while len(_codes) > _MOST:
            _codes.popitem(last=False)
        return code


def _known(key: Key, n: int, free: tuple[int, ...]) -> tuple[_Code | None, bool]:
    with _lock:
        for rows in (None, n):
            if (key, rows) in _codes:
                code = _codes[key, rows]
                if code is None or code.fits(n, free):
                    _codes.move_to_end((key, rows))
                    return code, True
    return None, False


@functools.lru_cache(maxsize=256)
def _read(text: str) -> list[int]:
    """The inputs that a program's graph has, in order."""
    return [i for i, kind in enumerate(parse(text).inputs) if kind == "logits" or i in used(text)]


def _is_capturing(device: torch.device) -> bool:
    """Is a CUDA graph captured right now? Compiling launches and waits, which would end it."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


# -- from a program to code


@torch._disable_dynamo  # type: ignore[attr-defined]
def _compile(key: Key, n: int, any_rows: bool) -> _Code:
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    shape_env = ShapeEnv()
    fake_mode = FakeTensorMode(shape_env=shape_env)
    numbers = [_symbol(shape_env, n, "rows")] if any_rows else []
    numbers += [_symbol(shape_env, key.sizes[i], f"size{i}") for i in key.open_sizes()]
    symbols = [number.node.expr for number in numbers]
    rows = numbers[0] if any_rows else n
    graph, metas = build(key, n, any_rows)
    with _alone(key.device), _inductor_patches(), tracing(TracingContext(fake_mode)):
        with fake_mode:
            examples = [
                torch.empty_strided(m.shape if whole else (rows, *m.shape), m.stride, dtype=m.dtype, device=key.device)
                for m, whole in metas
            ]
        call: Any = compile_fx(graph, [*examples, *numbers])
    guards = [guard.expr for guard in shape_env.guards]

    @functools.lru_cache(maxsize=64)  # sympy takes half a millisecond, more than a chunk's first product
    def fits(count: int, sizes: tuple[int, ...]) -> bool:
        """Does what Inductor took for granted hold?"""
        if count != n and not (any_rows and count > 1):
            return False
        given = dict(zip(symbols, [count, *sizes] if any_rows else sizes))
        return all(bool(guard.xreplace(given) == True) for guard in guards)  # noqa: E712  (sympy's true)

    return _Code(call, fits, any_rows)


def _symbol(shape_env: Any, n: int, name: str) -> Any:
    """A number that is not known, with n as an example."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    source = ConstantSource(name)
    symbol = shape_env.create_symbol(n, source, dynamic_dim=DimDynamic.DYNAMIC)
    return shape_env.create_symintnode(symbol, hint=n, source=source)


@contextlib.contextmanager
def _alone(device: torch.device) -> Iterator[None]:
    """Nothing of what the caller is doing: its modes, its autocast, its place in autograd, its device."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.utils._python_dispatch._disable_current_modes())
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch._C._DisableAutocast())
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        yield


def _inductor_patches() -> Any:
    from torch._inductor import config

    known = config.get_config_copy()
    patches: dict[str, Any] = {name: None for name in _HOOKS if name in known}
    return config.patch(patches | {name: False for name in _OFF if name in known})


def _of_one_place(step: Step, fakes: Sequence[Any]) -> int | None:
    """The number of classes if a step adds one number to one class of each row, as the gradient of a gather does."""
    if resolve(step.op) is not aten.scatter_add.default or step.kwargs:
        return None
    base, dim, index, source = (fakes[a.index] if isinstance(a, Ref) else a for a in step.args)
    found = base.dim() == 2 and dim in (1, -1) and index.shape == source.shape == (len(base), 1)
    return base.shape[1] if found else None


def _selected(graph: torch.fx.Graph, args: Sequence[Any], classes: int, device: torch.device) -> torch.fx.Node:
    """The same as a selection, which takes no memory; a scatter takes as much as fp32 logits in Inductor's code."""
    base, _, index, source = args
    iota = graph.call_function(
        torch.ops.prims.iota.default, (classes,),
        {"start": 0, "step": 1, "dtype": torch.int64, "device": device, "requires_grad": False},
    )  # fmt: skip
    there = graph.call_function(aten.eq.Tensor, (index, iota))
    return graph.call_function(aten.where.self, (there, graph.call_function(aten.add.Tensor, (base, source)), base))


def build(key: Key, n: int, any_rows: bool) -> tuple[torch.fx.GraphModule, list[tuple[Meta, bool]]]:
    """The graph, and for each tensor that it takes what it is and whether it is the same for all rows.

    Behind the tensors it takes the number of rows, if that is open, and the open sizes.
    """
    program, graph = parse(key.text), torch.fx.Graph()
    place = places(key.text, key.inputs, key.sizes, key.device)
    metas: list[tuple[Meta, bool]] = []
    values: list[Any] = [None] * len(program.inputs)
    rows: Any = n
    for i in _read(key.text):
        values[i] = graph.placeholder(f"{program.inputs[i]}_{i}")
        metas.append((key.inputs[i], program.inputs[i] == "whole"))
    homes = {}
    for index, m in zip((i for i, at in place.items() if at is None), key.homes):
        homes[index] = graph.placeholder(f"home_{index}")
        metas.append((m, False))
    if any_rows:  # not read off a tensor: caches check what was taken for granted of numbers that are inputs
        rows = graph.placeholder("rows")
    sizes: list[Any] = list(key.sizes)
    for i in key.open_sizes():
        sizes[i] = graph.placeholder(f"size_{i}")
    fakes = propagate(key.text, 2, key.inputs, key.sizes, key.device)
    for step in program.steps:
        op, args = resolve(step.op), tuple(fill(step.args, values, rows, sizes))
        kwargs = {k: fill(v, values, rows, sizes) for k, v in step.kwargs.items()}
        if takes_device(op):
            kwargs["device"] = key.device
        classes = _of_one_place(step, fakes)
        written = (
            graph.call_function(op, args, kwargs) if classes is None else _selected(graph, args, classes, key.device)
        )
        values.append(written)
    out = []
    for result in program.results:
        value = values[result.value.index]
        if result.kind == "row":  # it may share memory with logits that are written over below
            out.append(graph.call_function(aten.clone.default, (value,)))
        elif result.kind == "sum":
            out.append(graph.call_function(aten.sum.dim_IntList, (value, [0]), {"dtype": wide(result.dtype)}))
    for index, at in place.items():
        home = homes[index] if at is None else values[at]
        if home is not values[index]:
            graph.call_function(aten.copy_.default, (home, values[index]))
    graph.output(tuple(out))
    return torch.fx.GraphModule(torch.nn.Module(), graph), metas
