"""Runs frameworks' own training code, tiny, with and without the package: python tests/frameworks.py [NAME ...]

NAME: a part of a case's name. --write FILE: put the table into it, between its marks. --json FILE: all that was measured.
The frameworks are no dependencies of the tests; those that are not installed are left out.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE)]


def cases() -> dict[str, Any]:
    import frameworks
    from frameworks import measure

    for module in pkgutil.iter_modules(frameworks.__path__):
        importlib.import_module(f"frameworks.{module.name}")
    return measure.CASES


def in_a_process(name: str, codegen: bool) -> dict[str, Any] | None:
    """What a case measured; its own process, as frameworks leave their state everywhere."""
    with tempfile.TemporaryDirectory() as folder:
        path, log = Path(folder) / "row.json", Path(folder) / "log"
        with log.open("w") as file:
            command = [sys.executable, __file__, "--one", name, "--json", str(path), *["--codegen"] * codegen]
            subprocess.run(command, stdout=file, stderr=subprocess.STDOUT)
        if os.environ.get("VERBOSE"):
            print(log.read_text())
        return json.loads(path.read_text()) if path.exists() else {"name": name, "error": log.read_text()[-300:]}


def one(name: str, codegen: bool) -> dict[str, Any]:
    import logging

    from frameworks import measure

    logging.getLogger("torch.__trace").propagate = False
    return measure.compare(cases()[name], interpret=not codegen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--one")
    parser.add_argument("--json")
    parser.add_argument("--codegen", action="store_true", help="with Inductor's code generation: ten times as slow")
    options = parser.parse_args()
    if options.one:
        Path(options.json).write_text(json.dumps(one(options.one, options.codegen)))
        return
    for name in cases():
        if not options.names or any(part.lower() in name.lower() for part in options.names):
            print(json.dumps(in_a_process(name, options.codegen), indent=1), flush=True)


if __name__ == "__main__":
    main()
