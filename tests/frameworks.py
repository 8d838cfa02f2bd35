"""Runs frameworks' own training code, tiny, with and without the package: python tests/frameworks.py [NAME ...]

NAME: a part of a case's name. --write FILE: put the rows into its table. The frameworks are no dependencies of the
tests; a case whose framework is not installed is left out, or not cloned below $FRAMEWORKS, if it is no package. Each
case has a process of its own.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import logging
import multiprocessing
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

from frameworks import cases, measure  # the folder beside

SMALL = 1e-6  # norm of a gradient
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
HEADER = [
    "| case | versions | the line | outcome | logits | largest tensor | difference of loss, gradients | graphs | breaks |",
    "|---|---|---|---|---|---|---|---|---|",
]


def measured(name: str, codegen: bool, verbose: bool) -> dict[str, Any]:
    """What a case measured, in a copy of this process: frameworks leave their state everywhere."""
    with tempfile.TemporaryDirectory() as folder:
        path, log = Path(folder) / "row.json", Path(folder) / "log"
        process = multiprocessing.get_context("fork").Process(target=one, args=(name, codegen, path, log))
        process.start()
        process.join()
        if verbose or not path.exists():
            print(log.read_text())
        return json.loads(path.read_text()) if path.exists() else {"name": name, "error": "the process died"}


def one(name: str, codegen: bool, path: Path, log: Path) -> None:
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    logging.getLogger("torch.__trace").propagate = False
    path.write_text(json.dumps(measure.compare(cases()[name], interpret=not codegen)))


# -- the table


def failed(row: dict[str, Any]) -> str:
    """What is wrong with a row, if anything is."""
    if row["error"]:
        return row["error"]
    if row["norm"] < SMALL:
        return "nothing to compare"  # a teacher that is the student, rewards that are all alike
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
    today = datetime.date.today()
    caption = (
        f"{today:%B %Y}, torch {importlib.metadata.version('torch')}, Python {platform.python_version()}, on a CPU."
    )
    lines = [caption, "", *HEADER, *(known[name] for name in cases() if name in known)]
    path.write_text("\n".join([before + BEGIN, *lines, END + after]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--codegen", action="store_true", help="with Inductor's code generation: ten times as slow")
    parser.add_argument("--verbose", action="store_true", help="what the frameworks print, and the package's report")
    options = parser.parse_args()
    print("\n".join(HEADER))
    bad = []
    for name, case in cases().items():
        if options.names and not any(part.lower() in name.lower() for part in options.names):
            continue
        try:
            case.versions()
        except (importlib.metadata.PackageNotFoundError, FileNotFoundError) as missing:
            print(f"{name}: left out, {missing}")
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
