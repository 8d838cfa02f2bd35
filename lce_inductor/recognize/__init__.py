"""Recognise: find linear -> row statistic heads in a torch-level or aten graph and rewrite them.

values (what is known of a node) -> canon (one name per operation) -> forms + rules_* (the abstract
interpretation) -> walk (graph -> plan) -> place (where may the plan's nodes stand?) -> rewrite (plan -> graph).
"""

from __future__ import annotations

from torch._inductor.virtualized import V
from torch.fx import Graph, Node

from ..config import Config
from ..graph.backup import Backup
from ..ops import schema  # noqa: F401  (registers the ops)
from ..reasons import Refusal, refuse
from . import rewrite
from .effects import Effects
from .place import place
from .walk import HeadPlan, decide


def recognize(graph: Graph, config: Config) -> list[HeadPlan]:
    """Rewrite every head of a graph that can be; returns what was found, rewritten (refusal None) or not.

    Either the whole graph is rewritten as planned, or an exception leaves it exactly as it was.
    """
    walk, plans = decide(graph, config)
    if V.aot_compilation:
        for plan in plans:
            plan.refusal = plan.refusal or refuse("ahead-of-time", plan.head.node)
    if all(plan.refusal is not None for plan in plans):
        return plans
    backup = Backup(graph)
    replaced: dict[Node, Node] = {}
    try:
        for plan in plans:
            if plan.refusal is not None:
                continue
            placed = place(walk, plan, replaced)
            if isinstance(placed, Refusal):
                plan.refusal = placed
                continue
            plan.describe()
            plan.new_nodes = rewrite.apply(walk, plan, placed, config, replaced)
            walk.effects = Effects(graph)
        graph.lint()
    except Exception:
        backup.restore()
        raise
    return plans
