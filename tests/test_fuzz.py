"""A few programs of each fuzzer; `python tests/many_fuzz.py` runs thousands (see there).

Failures that were found are kept as programs of test_never_wrong.py.
"""

from __future__ import annotations

import itertools

import argument_cases
import broadcast_cases
import mutation_cases
import opinfo_cases
import pytest
import row_programs
from oracle import quiet
from text_programs import Text

SEED = 11
QUICK = {argument_cases: 25, broadcast_cases: 15, mutation_cases: 25, opinfo_cases: 20, row_programs: 25}
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


def test_the_judge_sees_a_wrong_program():
    """A difference that only compiled code has is called wrong where torch.compile alone is right, else not."""
    import torch
    from oracle import judge

    def fn(x, w):
        return (torch.nn.functional.linear(x, w) * (2.0 if torch.compiler.is_compiling() else 1.0)).sum()

    args = [torch.randn(5, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True)]
    assert judge(fn, args).kind == "as torch"
