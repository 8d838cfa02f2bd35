"""The README and docs/ do what they say: their Python runs, commands and links exist, numbers add up."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lce_inductor
from lce_inductor.bench.__main__ import _parser
from lce_inductor.bench.models import _parser as models_parser
from lce_inductor.bench.ranks import _parser as ranks_parser
from lce_inductor.config import Config
from lce_inductor.lower.chunk_plan import peak_bytes
from lce_inductor.lower.device_policy import POLICIES
from lce_inductor.lower.plan import chunks
from lce_inductor.reasons import REASONS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCS = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
PAGES = "\n".join([README, *DOCS.values()])


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES, re.DOTALL)


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def prose(text: str) -> str:
    """Without code: what looks like a link there is none."""
    return re.sub(r"`[^`\n]*`", "", without_blocks(text))


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.*)$", without_blocks(text), re.MULTILINE):
        found.append(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-"))
    return {f"{slug}-{n}" if (n := found[:i].count(slug)) else slug for i, slug in enumerate(found)}


def links(text: str) -> list[str]:
    """Links and pictures, to other sites apart."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(text))
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def broken_links(page: Path) -> list[str]:
    broken = []
    for link in links(page.read_text()):
        name, _, anchor = link.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            broken.append(link)
    return broken


COMMANDS = [
    line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines() if line.split("#")[0].strip()
]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 37)

    def forward(self, h: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(h), labels)


def test_python_blocks() -> None:
    """In the order in which they stand: install, compile, explain."""
    args = (torch.randn(24, 8), torch.randint(0, 37, (24,)))
    names: dict[str, object] = {"model": Model(), "args": args}
    found = blocks("python")
    assert [line for block in found for line in block.splitlines() if line and not line.startswith("import")] == [
        "lce_inductor.install()",
        "model = torch.compile(model)  # your model, your loss, your training loop",
        "print(lce_inductor.explain(model)(*args))  # what you compile, and what you call it with",
    ]
    names["torch"] = torch
    for block in found:
        exec(block, names)
    assert lce_inductor.is_installed()


def test_every_command_is_known() -> None:
    kinds = ("pip install .", "python3 -m venv", "python -m lce_inductor.bench", 'TORCH_LOGS="+lce_inductor" python')
    kinds += ("python tests/frameworks.py", "torchrun --nproc-per-node 2 -m lce_inductor.bench.ranks")
    assert COMMANDS and all(c.startswith(kinds) for c in COMMANDS), COMMANDS


def test_files_and_extras_of_the_commands_exist() -> None:
    named = re.findall(r"\b((?:examples|tests|lce_inductor)/[\w/]+\.py|tests/corpus)\b", PAGES)
    assert named and all((ROOT / name).exists() for name in named)
    listed = set(re.findall(r"^\| `(\w+\.py)` \|", DOCS["measured.md"], re.MULTILINE))
    helpers = {"compare.py", "data.py", "gpt.py", "options.py", "step_memory.py", "summary.py"}
    assert listed == {p.name for p in (ROOT / "examples").glob("*.py")} - helpers
    extras = set(re.findall(r'"\.\[([\w,]+)\]"', PAGES))
    project = (ROOT / "pyproject.toml").read_text()
    assert all(f"\n{extra} = [" in project for names in extras for extra in names.split(","))


@pytest.mark.parametrize("command", [c for c in COMMANDS if "lce_inductor.bench" in c])
def test_benchmark_takes_these_flags(command: str) -> None:
    """test_bench.py and test_bench_models.py run them; this is about what the pages say."""
    words = shlex.split(command)
    module, *flags = words[words.index("-m") + 1 :]
    parsers = {"lce_inductor.bench": _parser, "lce_inductor.bench.models": models_parser}
    parser = {**parsers, "lce_inductor.bench.ranks": ranks_parser}[module]()
    assert parser.parse_args(flags) is not None
    benchmarks = "\n".join([README, *(page for name, page in DOCS.items() if name != "frameworks.md")])
    for flag in set(re.findall(r"`(--[a-z-]+)", benchmarks)):
        assert flag in _parser().format_help(), flag


def test_log_command(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import torch, torch.nn.functional as F, lce_inductor\n"
        "lce_inductor.install(min_logits_bytes=0)\n"
        "step = torch.compile(lambda h, w, y: F.cross_entropy(F.linear(h, w), y), backend='inductor')\n"
        "step(torch.randn(24, 8), torch.randn(37, 8), torch.randint(0, 37, (24,)))\n"
    )
    env = {**os.environ, "TORCH_LOGS": "+lce_inductor", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert "rewrote" in ran.stderr and "train.py:3" in ran.stderr


def test_settings_table_has_every_field() -> None:
    defaults = {name: field.default for name, field in Config.__dataclass_fields__.items()}
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", README.split("## Settings")[1], re.MULTILINE))
    assert set(rows) == set(defaults)
    written = {"64 MiB": 64 << 20, "1.5 GiB": 3 << 29, "None": None}
    assert {k: written.get(v.strip(), v.strip('" ')) for k, v in rows.items()} == defaults


def test_memory_worked_out() -> None:
    memory = DOCS["memory.md"]
    N, H, V = 81920, 4096, 128256
    p = chunks(N, H, V, 2, 0, Config().workspace_bytes, POLICIES["cuda"].chunks)
    assert f"{N:,} × {V:,} × 2 bytes = {N * V * 2 / 2**30:.2f} GiB" in memory
    assert f"{p.rows:,} rows of {V:,} logits, {p.rows * p.row_stride * 2 / 2**30:.2f} GiB" in memory.replace("\n", " ")
    assert f"({V:,} × {H:,} × 4 = {V * H * 4 / 2**30:.2f} GiB)" in memory
    assert f"dX ({N * H * 2 / 2**30:.2f} GiB)" in memory.replace("\n", " ")
    assert peak_bytes(p, N, H, V, 2, dx=True, dw=True) / 2**30 < 3.7


def test_what_is_little_saved() -> None:
    """The same limit in the chunk plan, in the reason that users see, and in the pages."""
    text = f"save less than {POLICIES['cuda'].chunks.least_saving >> 20} MiB"
    assert text in REASONS["little-saved"].explanation
    assert DOCS["reasons.md"].count(text) == DOCS["limits.md"].count(text) == 1
    assert set(re.findall(r"save less than \d+ MiB", PAGES)) == {text}


def test_readme_is_read_in_five_minutes() -> None:
    assert len(README.splitlines()) <= 200


def test_results_in_readme_are_those_measured() -> None:
    """Figures that are told twice are the same figures."""
    results = README.split("## Results")[1].split("\n## ")[0]
    figures = re.findall(r"\d+(?:[.,]\d+)*", prose(results))
    measured = set(re.findall(r"\d+(?:[.,]\d+)*", DOCS["measured.md"]))
    assert len(figures) > 40 and set(figures) <= measured, set(figures) - measured


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{name}" for name in DOCS)])
def test_links(page: str) -> None:
    assert broken_links(ROOT / page) == []


def test_every_page_and_picture_is_linked() -> None:
    assert {f"docs/{name}" for name in DOCS} <= set(links(README))
    shown = {link.rpartition("/")[2] for link in links(PAGES)}
    assert {path.name for path in (ROOT / "docs").glob("*.png")} <= shown


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# One: `code`, two\n\n## Twice\n\n## Twice\n\n```bash\n# no heading\n```\n")
    good = ["there.md", "there.md#one-code-two", "there.md#twice", "there.md#twice-1", "#here"]
    bad = ["gone.md", "gone.png", "there.md#twice-2", "there.md#no-heading", "#nowhere"]
    page = tmp_path / "page.md"
    page.write_text("# Here\n\n`[code](gone.md)` [site](https://example.org/gone.md)\n\n```\n[block](gone.md)\n```\n\n")
    with page.open("a") as file:
        file.writelines(f"![text]({link})\n" for link in [*good, *bad])
    assert broken_links(page) == bad
