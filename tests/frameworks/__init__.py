"""Other people's training code, as they ship it, with and without the package: `python tests/frameworks.py`."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .measure import Case


def cases() -> dict[str, Case]:
    """All of them; the frameworks themselves are imported when a case runs."""
    from . import measure

    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return measure.CASES
