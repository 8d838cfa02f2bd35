"""A few programs of each fuzzer; `python tests/many_fuzz.py` runs thousands (see there).

Failures that were found are kept as programs of test_never_wrong.py.
"""

from __future__ import annotations

import contextlib
import itertools

import argument_cases
import broadcast_cases
import mutation_cases
import opinfo_cases
import pytest
import row_programs
import torch
import torch.nn.functional as F
from oracle import judge, quiet
from text_programs import Text, make_inputs

import lce_inductor

SEED = 11
QUICK = {argument_cases: 18, broadcast_cases: 10, mutation_cases: 18, opinfo_cases: 14, row_programs: 18}
PROGRAMS = [
    pytest.param(program, id=f"{module.__name__}-{i}")
    for module, count in QUICK.items()
    for i, program in enumerate(itertools.islice(module.programs(SEED), count))
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_as_eager(program):
    quiet()
    assert not (verdict := program.check()).failed, f"{verdict}\n{program}"


def test_a_program_is_a_script_of_its_own(capsys):
    """What is printed for a bug report runs, and shows no difference where there is none."""
    text = Text("z = F.linear(x, w)\nreturn F.cross_entropy(z, y) + scale", dtype="float32", batches=(6,), marked=True)
    script = str(text).replace("torch.compile(program", 'torch.compile(program, backend="eager"')
    exec(compile(script, "program", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert all(line.startswith("0.0 of") for line in lines)


FACTOR = [1.0]


def _scaled(x, w):
    return (F.linear(x, w) * FACTOR[0]).logsumexp(-1).sum()


@pytest.mark.parametrize("factor, kind", [(1.0, "right"), (1 + 3e-14, "inaccurate"), (1.001, "wrong"), (None, "crash")])
def test_the_judge_tells_what_the_package_changes(factor, kind, monkeypatch):
    @contextlib.contextmanager
    def other(**settings):
        FACTOR[0] = factor
        try:
            yield
        finally:
            FACTOR[0] = 1.0

    monkeypatch.setattr(lce_inductor, "installed", other)
    assert judge(_scaled, make_inputs(("x", "w"), torch.float64)).kind == kind


def test_the_judge_lets_torch_deviate_alone():
    def fn(x, w):
        return (F.linear(x, w) * (2.0 if torch.compiler.is_compiling() else 1.0)).sum()

    assert judge(fn, make_inputs(("x", "w"), torch.float64)).kind == "as torch"
