"""The two passes as Inductor sees them. A failure in either leaves a working, unrewritten compile."""

from __future__ import annotations

import hashlib
import logging
import pathlib
from functools import lru_cache
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, Node

from . import regions
from .config import Config
from .graph.backup import Backup
from .graph.simplify import simplify, writes_to_slices
from .graph.values import collectives
from .ops import schema  # noqa: F401  (registers the ops)
from .reporting import records, watch
from .returned_logits import defer_returned
from .schedule import Scheduled, schedule
from .schedule.held_inputs import keeps_to_marks

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
        watch.begin(self.config)  # a cache asks for its key: where it knows the graph, no pass may run after that
        # A setting that decides (plan.widens), and that torch's own keys leave out.
        narrow = torch.backends.cuda.matmul.allow_fp16_accumulation
        engine = keeps_to_marks()  # compiled autograd gets what is saved in another way
        return f"lce_inductor {self.stage} {source_hash()} {self.config.key()} {narrow} {engine}"

    def __call__(self, graph: Graph) -> None:
        try:
            self.run(graph)
        except Exception as error:
            records.count("refused:internal-error")
            log.warning(
                "internal-error in the %s stage: the graph stays as it is (%s: %s)",
                self.stage, type(error).__name__, error, exc_info=log.isEnabledFor(logging.DEBUG),
            )  # fmt: skip

    def run(self, graph: Graph) -> None:
        raise NotImplementedError


class DeferPass(_Pass):
    """Pre-grad: logits that are returned beside a loss are not computed before somebody reads them.

    z = linear(h, w)               z = linear(h, w)
    loss = cross_entropy(z, y)     loss = cross_entropy(z, y)
    return loss, z                 return loss, defer_logits(h, w, None, ...)
    """

    stage = "defer"

    def run(self, graph: Graph) -> None:
        watch.begin(self.config)
        defer_returned(graph, self.config)


class HeadsPass(_Pass):
    """Joint graph: heads are found as regions and computed chunk by chunk; where it is legal, gradients with them.

    z = mm(x, w); ...; loss = ...      lse, target_logit, ..., dx1, dw1 = row_stats_with_grad(x, w, y, ...); loss = ...
    dz = ...; dx = mm(dz, w.t())       dx = dx1 * tangent
    dw = mm(dz.t(), x)                 dw = dw1 * tangent
    """

    stage = "heads"

    def run(self, graph: Graph) -> None:
        backup = Backup(graph) if writes_to_slices(graph) else None
        try:
            simplified = backup is not None and simplify(graph)
            decision = regions.decide(graph, self.config)
            if twice := regions.repeated(decision):
                simplified, backup = True, backup or Backup(graph)
                for node, first in twice:
                    node.replace_all_uses_with(first)
                decision = regions.decide(graph, self.config)
            if regions.ask_for_rows(decision, self.config):
                decision = regions.decide(graph, self.config)
            backup = backup or Backup(graph)
            decision = regions.respelled(graph, decision, self.config)
            if decision.chosen:
                self._rewrite(graph, decision, backup)
            elif simplified:
                backup.restore()
        except Exception:
            if backup is not None:
                backup.restore()
            raise
        if decision.chosen:
            graph.eliminate_dead_code()  # there is no way back from it: the last step
        watch.saw(records.records_of(decision, self.config, set(graph.nodes)), self.config)

    def _rewrite(self, graph: Graph, decision: regions.Decision, backup: Backup) -> None:
        order = collectives(graph)
        regions.apply(graph, decision, self.config)
        found = schedule(graph, self.config)
        regions.scheduled(decision, found)
        graph.lint()
        if collectives(graph) != order:
            backup.restore()
            decision.leave("collective-order")
            return
        _count_gradients(decision, found)


def _count_gradients(decision: regions.Decision, found: dict[Node, Scheduled]) -> None:
    """Of each fused op, and of each head that its own program computes."""
    fused = (now.gradients for op, now in found.items() if op.target is torch.ops.lce_inductor.row_stats.default)
    programs = (head.gradients for head in decision.heads.values() if head.tier == "region")
    for place in (*fused, *filter(None, programs)):
        records.count(f"gradients:{place}")
