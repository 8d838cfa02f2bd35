"""The two passes as Inductor sees them. A failure in either leaves a working, unrewritten compile."""

from __future__ import annotations

import hashlib
import logging
import pathlib
from functools import lru_cache
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from . import regions, report, watch
from .config import Config
from .graph.backup import Backup
from .ops import schema  # noqa: F401  (registers the ops)
from .schedule import schedule

log = logging.getLogger("lce_inductor")


@lru_cache(None)
def source_hash() -> str:
    """Hash of every source file of the package and of the versions of torch and triton."""
    digest = hashlib.sha256()
    root = pathlib.Path(__file__).parent
    for path in sorted(root.rglob("*")):
        if path.suffix in (".py", ".json", ".cu", ".cuh") and path.is_file():
            digest.update(str(path.relative_to(root)).encode())
            digest.update(path.read_bytes())
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    digest.update(f"{torch.__version__} {triton_version}".encode())
    return digest.hexdigest()


class _Pass(CustomGraphPass):
    stage = ""

    def __init__(self, config: Config) -> None:
        self.config = config

    def uuid(self) -> Any:
        return f"lce_inductor {self.stage} {source_hash()} {self.config.key()}"

    def __call__(self, graph: Graph) -> None:
        try:
            self.run(graph)
        except Exception as error:
            report.count("refused:internal-error")
            log.warning(
                "internal-error in the %s stage: the graph stays as it is (%s: %s)",
                self.stage, type(error).__name__, error, exc_info=log.isEnabledFor(logging.DEBUG),
            )  # fmt: skip

    def run(self, graph: Graph) -> None:
        raise NotImplementedError


class RecognizePass(_Pass):
    """Pre-grad: linear -> loss becomes head_stats and arithmetic on its rows.

    z = linear(h, w)               stats = head_stats(h, w, None, [y], ...)
    loss = cross_entropy(z, y)     loss = lce_inductor.cross_entropy(stats[0], ...)
    """

    stage = "recognize"

    def uuid(self) -> Any:
        watch.begin(self.config)  # a cache asks for its key: from torch 2.12 on, the pass may not run after that
        return super().uuid()

    def run(self, graph: Graph) -> None:
        pass


class SchedulePass(_Pass):
    """Joint graph: where it is legal, gradients move into the forward.

    lse, ... = row_stats(x, w, ...)             lse, ..., dx1, dw1 = row_stats_with_grad(x, w, ..., g1)
    dx, dw = row_stats_backward(x, w, ..., g)   dx, dw = dx1 * tangent, dw1 * tangent
    """

    stage = "schedule"

    def run(self, graph: Graph) -> None:
        decision = regions.decide(graph, self.config)
        if decision.chosen:
            backup = Backup(graph)
            try:
                regions.apply(graph, decision, self.config)
                schedule(graph, self.config)
            except Exception:
                backup.restore()
                raise
        watch.saw(report.records_of(list(decision.heads.values()), self.config), self.config)
