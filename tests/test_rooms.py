"""The rooms of the house: imports go one way, and each line knows its room."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lce_inductor

ROOT = Path(lce_inductor.__file__).parent
# From the ground up: what stands in a room may import from its own and from those before it. design.md describes them.
ROOMS = (
    "config reasons spec kernels lower ops graph schedule regions reporting deferred_logits returned_logits hook_chain passes install deferred_heads "
    "explaining __init__ bench"
).split()
LONGEST = 500


def room(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> list[str]:
    """Rooms that a file imports from, at any depth and for types, too."""
    package = list(path.relative_to(ROOT).parts[:-1])
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[list[str]] = []
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module or "").split(".")
            base = [part for part in base if part]
            names = [base] if base else [[alias.name] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lce_inductor":
            names = [(node.module or "").split(".")[1:] or [alias.name for alias in node.names]]
        elif isinstance(node, ast.Import):
            names = [a.name.split(".")[1:] for a in node.names if a.name.split(".")[0] == "lce_inductor"]
        found += [name[0] if name and name[0] in ROOMS else "__init__" for name in names]
    return found


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_arrow_runs_back(path: Path) -> None:
    here = ROOMS.index(room(path))
    back = {name for name in imports(path) if ROOMS.index(name) > here}
    assert not back, f"{path.relative_to(ROOT)} imports from {sorted(back)}, which stand above it"


def test_every_room_is_known() -> None:
    assert {room(path) for path in FILES} == set(ROOMS)


def test_the_test_sees_an_arrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "kernels").mkdir()
    file = tmp_path / "kernels" / "rows.py"
    for line in ("from ..lower import plan", "from ..lower.plan import Plan", "import lce_inductor.lower.plan"):
        file.write_text(f"def f():\n    {line}\n")
        assert imports(file) == ["lower"]
    file.write_text("from . import tuning\nfrom .call import Call\nimport torch\n")
    assert imports(file) == ["kernels", "kernels"]


def test_no_file_is_too_long() -> None:
    long = {str(p.relative_to(ROOT)): n for p in FILES if (n := len(p.read_text().splitlines())) > LONGEST}
    assert not long
