"""Compile caches: warm in a fresh process, cold for other settings and other sources."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor

import lce_inductor
from lce_inductor import passes
from lce_inductor.config import Config

PROBE = Path(__file__).with_name("cache_probe.py")
PACKAGE = Path(lce_inductor.__file__).parent

# [hits, misses, bypasses] of two graphs (forward and backward) and of the pair
MISS = {"fx": [0, 2, 0], "aot": [0, 1, 0]}
HIT = {"fx": [2, 0, 0], "aot": [1, 0, 0]}
BYPASS = {"fx": [0, 0, 2], "aot": [0, 0, 1]}
STEPS = {
    "plain": {"install": None},
    "ours": {"install": {"min_logits_bytes": 0}},
    "other settings": {"install": {"min_logits_bytes": 0, "chunk_tokens": 7}},
    "recomputed": {"install": {"min_logits_bytes": 0, "gradients": "recompute"}},
    "user's pass": {"install": {"min_logits_bytes": 0}, "user": "uuid"},
    "user's callable": {"install": {"min_logits_bytes": 0}, "user": "callable"},
}


def probe(cache: Path, root: Path, names: list[str], autograd_cache: bool = True) -> dict[str, dict[str, Any]]:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": str(root)}
    environment["TORCHINDUCTOR_FX_GRAPH_CACHE"] = "1"
    environment["TORCHINDUCTOR_AUTOGRAD_CACHE"] = str(int(autograd_cache))
    command = [sys.executable, str(PROBE), json.dumps([STEPS[n] for n in names])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return dict(zip(names, json.loads(done.stdout.splitlines()[-1])))


def caches(found: dict[str, Any]) -> dict[str, list[int]]:
    return {"fx": found["fx"], "aot": found["aot"]}


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """A cache folder filled by one process, and what that process saw."""
    cache = tmp_path_factory.mktemp("cache")
    return cache, probe(cache, PACKAGE.parent, [name for name in STEPS if name != "recomputed"])


def test_every_setting_has_its_own_entry(cold):
    """One after another in one process: none may take what another left."""
    _, found = cold
    for name in ("plain", "ours", "other settings", "user's pass"):
        assert caches(found[name]) == MISS, name
    assert [found[n]["rewritten"] for n in found] == [0, 1, 1, 1, 1]


def test_a_callable_without_uuid_switches_the_caches_off_as_without_us(cold):
    assert caches(cold[1]["user's callable"]) == BYPASS
    assert cold[1]["user's callable"]["user"] == 1


def test_warm_in_a_fresh_process(cold):
    """Both caches hit, no joint pass runs, and the bits are those of the cold run."""
    cache, before = cold
    names = ["other settings", "ours", "user's pass", "plain"]
    found = probe(cache, PACKAGE.parent, names)
    for name in names:
        assert caches(found[name]) == HIT, name
        assert found[name]["user"] == 0
        assert found[name]["rewritten"] == 0
        assert found[name]["bits"] == before[name]["bits"]


def test_without_the_autograd_cache(cold):
    """Inductor's own cache alone: hits for the same settings, and a miss for settings that nobody had before."""
    cache, before = cold
    found = probe(cache, PACKAGE.parent, ["ours", "plain", "recomputed"], autograd_cache=False)
    for name in ("ours", "plain"):
        assert caches(found[name]) == {"fx": [2, 0, 0], "aot": [0, 0, 0]}, name
        assert found[name]["bits"] == before[name]["bits"]
    assert caches(found["recomputed"]) == {"fx": [0, 2, 0], "aot": [0, 0, 0]}
    assert [found[n]["rewritten"] for n in found] == [1, 0, 1]  # nothing in front of the passes but that cache
    warm = probe(cache, PACKAGE.parent, ["recomputed"], autograd_cache=False)["recomputed"]
    assert caches(warm)["fx"] == [2, 0, 0] and warm["bits"] == found["recomputed"]["bits"]


def test_another_source_misses(cold, tmp_path):
    """The same settings with one comment more in one file of the package."""
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / PACKAGE.name / "ops" / "epilogue.py").open("a") as file:
        file.write("# another version\n")
    found = probe(cold[0], tmp_path, ["ours"])["ours"]
    assert caches(found) == MISS and found["rewritten"] == 1


# -- the keys themselves


def test_uuid_depends_on_the_settings_and_the_stage():
    keys = {
        cls(Config(**settings)).uuid()
        for cls in (passes.DeferPass, passes.HeadsPass)
        for settings in (
            {},
            {"min_logits_bytes": 0},
            {"chunk_tokens": 8},
            {"workspace_bytes": 5},
            {"gradients": "forward"},
            {"gradients": "recompute"},
            {"returned_logits": "keep"},
            {"prefer": "memory"},
        )
    }
    assert len(keys) == 16
    assert passes.DeferPass(Config()).uuid() == passes.DeferPass(Config()).uuid()


def test_every_setting_is_in_the_key():
    import dataclasses

    assert len(dataclasses.fields(Config)) == 6, "a new setting: add a value of it to the test above"


def test_uuid_depends_on_every_source_file_and_on_versions(tmp_path, monkeypatch):
    monkeypatch.setattr(passes, "__file__", str(tmp_path / "passes.py"))
    root = tmp_path / "kernels"
    root.mkdir()
    seen = set()

    def now() -> None:
        passes.source_hash.cache_clear()
        seen.add(passes.source_hash())

    try:
        now()
        for name, text in (
            ("passes.py", "a"),
            ("kernels/rows.py", "a"),
            ("kernels/rows.py", "b"),
            ("kernels/h.json", "{}"),
        ):
            (tmp_path / name).write_text(text)
            now()
        (root / "rows.py").rename(root / "lines.py")
        now()
        assert len(seen) == 6
        (root / "notes.txt").write_text("no source")
        now()
        assert len(seen) == 6
        monkeypatch.setattr(torch, "__version__", "9.9.9")
        now()
        assert len(seen) == 7
    finally:
        monkeypatch.undo()
        passes.source_hash.cache_clear()


def test_passes_can_be_pickled_for_the_cache_key():
    """FxGraphHashDetails asks a pass for its uuid; a pass that cannot be told from itself would always miss."""
    from torch._inductor.codecache import FxGraphHashDetails

    with lce_inductor.installed(min_logits_bytes=0):
        details = object.__new__(FxGraphHashDetails)
        for hook in ("pre_grad_custom_pass", "joint_custom_pre_pass"):
            first = details._get_custom_pass_detail(getattr(inductor, hook))
            assert "lce_inductor" in str(first)
