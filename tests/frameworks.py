"""Runs frameworks' own training code, tiny, with and without the package: python tests/frameworks.py [NAME ...]

NAME: a part of a case's name. --write FILE: put the rows into its table. The frameworks are no dependencies of the
tests; a case whose framework is not installed is left out. Each case has a process of its own.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import logging
import pkgutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[:0] = [str(Path(__file__).parent)]

if TYPE_CHECKING:
    from frameworks.measure import Case

BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
HEADER = [
    "| case | versions | the line | outcome | logits | largest tensor | difference of loss, gradients | graphs | breaks |",
    "|---|---|---|---|---|---|---|---|---|",
]


def cases() -> dict[str, Case]:
    import frameworks
    from frameworks import measure

    for module in pkgutil.iter_modules(frameworks.__path__):
        importlib.import_module(f"frameworks.{module.name}")
    return measure.CASES


def is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def measured(name: str, codegen: bool, verbose: bool) -> dict[str, Any]:
    """What a case measured, in another process: frameworks leave their state everywhere."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"
        command = [sys.executable, __file__, "--one", name, "--json", str(path), *["--codegen"] * codegen]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if verbose or not path.exists():
            print(done.stdout)
        return json.loads(path.read_text()) if path.exists() else {"name": name, "error": "the process died"}


def one(name: str, codegen: bool) -> dict[str, Any]:
    from frameworks import measure

    logging.getLogger("torch.__trace").propagate = False
    return measure.compare(cases()[name], interpret=not codegen)


# -- the table


def failed(row: dict[str, Any]) -> str:
    """What is wrong with a row, if anything is."""
    if row["error"]:
        return row["error"]
    off = [f"{what} differ by {row[what]:.1e}" for what in ("loss", "gradient") if row[what] > row["tolerance"]]
    return "; ".join(off)


def outcome(row: dict[str, Any]) -> str:
    if wrong := failed(row):
        return f"**{wrong}**"
    parts = []
    if row["rewritten"]:
        parts.append(f"rewritten: {', '.join({'region': 'program'}.get(t, t) for t in row['tiers'])}")
    elif not row["reads"]:
        parts.append("as it was")
    parts += [f"`{code}`" for code in row["codes"]]
    parts += [f"read {n} times, `{site}`" for site, n in row["sites"].items()]
    parts += [row["note"]] if row["note"] else []
    return "; ".join(parts)


def cells(row: dict[str, Any]) -> str:
    if "loss" not in row:
        return f"| {row['name']} | | | **{row['error']}** | | | | | |"
    versions = ", ".join(f"{k} {v}" for k, v in row["versions"].items() if k != "torch")
    largest = " → ".join(size(n) for n in row["largest"])
    held = " (held)" if row["largest"][1] >= 0.9 * row["logits"] and not row["note"] else ""
    differences = ", ".join("-" if row[k] != row[k] else f"{row[k]:.0e}" for k in ("loss", "gradient"))
    values = [
        row["name"], versions, f"`{row['line']}`" if row["line"] else "", outcome(row).replace("|", "\\|"), size(row["logits"]),
        largest + held, differences, "{} → {}".format(*row["graphs"]), "{} → {}".format(*row["breaks"]),
    ]  # fmt: skip
    return f"| {' | '.join(values)} |"


def size(count: int) -> str:
    return f"{count / 1024:.0f} KiB"


def write(path: Path, rows: list[str]) -> None:
    """Replaces rows of the same case, and keeps the others, in the order of the cases."""
    text = path.read_text()
    before, _, rest = text.partition(BEGIN)
    old, _, after = rest.partition(END)
    known = {line.split("|")[1].strip(): line for line in old.splitlines() if line.startswith("| ")}
    known |= {line.split("|")[1].strip(): line for line in rows}
    lines = [*HEADER, *(known[name] for name in cases() if name in known)]
    path.write_text("\n".join([before + BEGIN, *lines, END + after]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--codegen", action="store_true", help="with Inductor's code generation: ten times as slow")
    parser.add_argument("--verbose", action="store_true", help="what the frameworks print, and the package's report")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        options.json.write_text(json.dumps(one(options.one, options.codegen)))
        return
    print("\n".join(HEADER))
    bad = []
    for name, case in cases().items():
        if options.names and not any(part.lower() in name.lower() for part in options.names):
            continue
        if missing := [p for p in case.packages if not is_installed(p)]:
            print(f"{name}: without {', '.join(missing)}, left out")
            continue
        row = measured(name, options.codegen, options.verbose)
        if options.verbose:
            print(row.get("report"))
        line = cells(row)
        print(line, flush=True)
        bad += [name] if failed(row) else []
        if options.write:
            write(options.write, [line])
    if bad:
        sys.exit(f"not as without the package: {', '.join(bad)}")


if __name__ == "__main__":
    main()
