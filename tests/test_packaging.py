"""What a user installs: a wheel with every module, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lce_inductor

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "lce_inductor", source / "lce_inductor", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(source)]
    subprocess.run(command, check=True, timeout=300)
    (file,) = out.glob("*.whl")
    return zipfile.ZipFile(file)


def test_wheel_holds_every_module(wheel: zipfile.ZipFile) -> None:
    inside = {name for name in wheel.namelist() if not name.startswith(f"lce_inductor-{lce_inductor.__version__}")}
    package = {str(p.relative_to(ROOT)) for p in (ROOT / "lce_inductor").rglob("*.py")}
    package |= {f"lce_inductor/kernels/{p.name}" for p in (ROOT / "lce_inductor/kernels").glob("*.cu*")}
    assert inside == package | {"lce_inductor/py.typed"}


def test_metadata(wheel: zipfile.ZipFile) -> None:
    (name,) = (n for n in wheel.namelist() if n.endswith("METADATA"))
    text = wheel.read(name).decode()
    assert f"Version: {lce_inductor.__version__}" in text
    assert "Requires-Python: >=3.10" in text and "License-Expression: Apache-2.0" in text
    required = [line for line in text.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert required == ["Requires-Dist: torch>=2.11", 'Requires-Dist: triton; platform_system == "Linux"']
