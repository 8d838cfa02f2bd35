"""Programs as text: what a generator writes is what a bug report shows.

A `Text` is the body of a function of the inputs below. `str()` of it is a script that needs torch and lce_inductor only.
"""

from __future__ import annotations

import itertools
import re
import sys
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from oracle import Fn, Verdict, judge
from torch import Tensor

N, B, T, H, V = 24, 4, 6, 8, 37  # N = B * T; no size occurs twice

# Every input that a body may name, drawn in this order: expression, and whether it takes a gradient.
INPUTS: dict[str, tuple[str, bool]] = {
    "x": ("rand(N, H)", True),
    "x3": ("rand(B, T, H)", True),
    "w": ("rand(V, H) * 0.5", True),
    "w2": ("rand(V, H) * 0.5", True),
    "b": ("rand(V)", True),
    "down": ("rand(3, H)", True),
    "up": ("rand(V, 3)", True),
    "row": ("rand(N)", True),
    "row3": ("rand(B, T)", True),
    "scale": ("rand() * 0.2 + 1.3", True),
    "gain": ("rand(V) * 0.2 + 1", True),
    "const": ("rand(N, V)", False),
    "soft": ("rand(N, V).softmax(-1)", False),
    "classes": ("rand(V).exp()", False),
    "weights": ("rand(N).exp()", False),
    "weights3": ("rand(B, T).exp()", False),
    "temp": ("rand(N).abs() + 0.5", False),
    "temp3": ("rand(B, T).abs() + 0.5", False),
    "y": ("ints(V, N)", False),
    "y3": ("ints(V, B, T)", False),
    "ignored": ("torch.where(rand(N) > 1, -100, ints(V, N))", False),
    "ids": ("ints(N, N, 9)", False),
    "many": ("ints(V, N, 3)", False),
    "mask": ("rand(N, V) > 1", False),
    "mask_rows": ("rand(N) > 0.3", False),
    "mask_rows3": ("rand(B, T) > 0.3", False),
    "picks": ("ints(N, 12)", False),
    "mask_classes": ("torch.arange(V) % 7 == 3", False),
}

# Those whose first dimension is a number of tokens or sequences.
ROWS = {n for n, (text, _) in INPUTS.items() if "(N" in text or "(B" in text or ", N" in text or ", B" in text}

_numbers = itertools.count()
PREAMBLE = """\
def rand(*shape):
    return torch.randn(shape, generator=g, dtype=torch.float64)

def ints(high, *shape):
    return torch.randint(0, high, shape, generator=g)
"""


def make_inputs(names: tuple[str, ...], dtype: torch.dtype, batch: int = B) -> list[Tensor]:
    """Each input by its own seed, so that a shorter program sees the same values."""
    made = []
    for name in names:
        generator = torch.Generator().manual_seed(list(INPUTS).index(name))
        scope: dict[str, Any] = {"torch": torch, "g": generator, "B": batch, "T": T, "N": batch * T, "H": H, "V": V}
        exec(PREAMBLE, scope)
        text, grad = INPUTS[name]
        value = eval(text, scope)
        made.append(value.to(dtype).requires_grad_(grad) if value.is_floating_point() else value)
    return made


def _made(name: str, dtype: str) -> str:
    text, grad = INPUTS[name]
    if text.startswith(("ints", "torch.where", "torch.arange")) or ">" in text:
        return text
    return f"({text}).to(torch.{dtype}).requires_grad_({grad})"


class Text(NamedTuple):
    """`body` ends with a return. `setup` is module-level text (custom ops, functions); `between` is a statement on the
    inputs between the call and the backward. `marked`: what has a row per token has a dynamic first dimension.
    `batches`: sizes of further calls of the same compiled function."""

    body: str
    dtype: str = "float64"
    dynamic: bool | None = None
    grad: bool = True
    autocast: bool = False
    setup: str = ""
    between: str = ""
    marked: bool = False
    first: bool = False
    batches: tuple[int, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        words = set(re.findall(r"(?<![\w.])[a-z_]\w*", f"{self.body}\n{self.between}"))
        return tuple(n for n in INPUTS if n in words)

    def inputs(self, batch: int = B) -> list[Tensor]:
        return make_inputs(self.names, getattr(torch, self.dtype), batch)

    def _define(self) -> str:
        lines = [f"    {line}" for line in self.body.strip().splitlines()]
        if self.autocast:
            lines = ['    with torch.autocast("cpu", torch.bfloat16):', *(f"    {line}" for line in lines)]
        return "\n".join([f"def program({', '.join(self.names)}):", *lines])

    def functions(self) -> tuple[Fn, Fn | None]:
        # A module that can be imported: Dynamo looks up globals there, and keeps what it found under the module's name.
        number = next(_numbers)
        sys.modules.pop(f"user_code{number - 100}", None)
        sys.modules[f"user_code{number}"] = module = ModuleType(f"user_code{number}")
        scope = module.__dict__
        scope.update(torch=torch, F=F, aten=torch.ops.aten)
        exec(f"{self.setup}\n{self._define()}", scope)
        if not self.between:
            return scope["program"], None
        exec(f"def between({', '.join(self.names)}):\n    {self.between}", scope)
        return scope["program"], scope["between"]

    def __str__(self) -> str:
        values = "\n".join(
            f"    g.manual_seed({list(INPUTS).index(n)})\n    {n} = {_made(n, self.dtype)}" for n in self.names
        )
        names = ", ".join(self.names)
        marks = "\n".join(f"    torch._dynamo.mark_dynamic({n}, 0)" for n in self.names if self.marked and n in ROWS)
        return f"""\
import torch
import torch.nn.functional as F

import lce_inductor

aten = torch.ops.aten
B, T, H, V = {B}, {T}, {H}, {V}
g = torch.Generator()

{PREAMBLE}
{self.setup}

{self._define()}

def step(fn, B=B):
    N = B * T
{values}
{marks or "    # no dimension is marked dynamic"}
    with torch.set_grad_enabled({self.grad}):
        loss = fn({names})
    with torch.no_grad():
        {self.between or "pass  # nothing changes before the backward"}
    loss = loss if torch.is_tensor(loss) else loss[0]
    if loss.requires_grad:
        loss.sum().backward()
    return [loss.detach(), *(t.grad for t in ({names},) if t.requires_grad)]

lce_inductor.install(min_logits_bytes=0)
compiled = torch.compile(program, dynamic={self.dynamic})
for batch in {(B, *self.batches)}:
    for a, b in zip(step(program, batch), step(compiled, batch)):
        print("none" if a is None or b is None else (a - b).norm().item(), "of", None if a is None else a.norm().item())
"""

    def check(self) -> Verdict:
        fn, between = self.functions()
        narrow = [d for d in (torch.float32, torch.bfloat16, torch.float16) if str(d) in self.body + self.setup]
        return judge(
            fn, self.inputs(), dynamic=self.dynamic, grad=self.grad, between=between, first=self.first,
            narrow=[*narrow, *([torch.bfloat16] if self.autocast else [])],
            marked=[i for i, n in enumerate(self.names) if self.marked and n in ROWS],
            more=[self.inputs(b) for b in self.batches],
        )  # fmt: skip
