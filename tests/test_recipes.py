"""The pages of docs/recipes/ do what they say: each page's Python runs, and a head of it is rewritten."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus.harness import no_codegen_backend
from frameworks import cases
from torch._dynamo.utils import counters

import lce_inductor

FOLDER = Path(__file__).parent.parent / "docs" / "recipes"
BY_COMMAND = {"litgpt"}  # does not install beside the tests' transformers
PAGES = sorted(p for p in FOLDER.glob("*.md") if p.stem not in {"README", *BY_COMMAND})


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs go through all of Inductor's passes and are interpreted, which takes seconds; nothing of a page stays."""
    real = torch.compile

    def compile(model: Any = None, **options: Any) -> Any:
        options["backend"] = no_codegen_backend([])
        return real(model, **options)

    monkeypatch.setattr(torch, "compile", compile)
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    yield
    lce_inductor.uninstall()
    torch._dynamo.reset()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_recipe(
    page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.S | re.M)
    assert len(blocks) == 1
    path = tmp_path / f"recipe_{page.stem.replace('-', '_')}.py"
    path.write_text(blocks[0])
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)  # Dynamo looks globals up there
    spec.loader.exec_module(module)
    assert counters["lce_inductor"]["rewritten"] >= 1, dict(counters["lce_inductor"])
    assert "rewritten" in capsys.readouterr().out


def test_every_recipe_is_linked() -> None:
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", (FOLDER / "README.md").read_text()))
    assert linked == {p.name for p in FOLDER.glob("*.md")} - {"README.md"}


def test_what_is_not_run_here_is_run_by_command() -> None:
    assert {f"recipe: {page}" for page in BY_COMMAND} == {name for name in cases() if name.startswith("recipe: ")}
