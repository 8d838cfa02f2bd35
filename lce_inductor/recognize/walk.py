"""The abstract interpretation: one pass over the graph, from products to losses. Pure: nothing is changed."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch.fx import Graph, Node

from ..config import Config
from ..reasons import Refusal, refuse
from . import rules_loss, rules_shape  # noqa: F401  (registers the rules)
from .canon import Call, canonical
from .effects import Effects
from .forms import RULES, ClassMap, Head, Terminal
from .rules_head import head_of
from .values import info, numel_hint


@dataclasses.dataclass
class HeadPlan:
    """What was found about one head: its terminals, or why it stays."""

    head: Head
    terminals: list[Terminal] = dataclasses.field(default_factory=list)
    returned: list[Node] = dataclasses.field(default_factory=list)
    refusal: Refusal | None = None
    new_nodes: list[Node] = dataclasses.field(default_factory=list)
    replaced_nodes: list[str] = dataclasses.field(default_factory=list)

    @property
    def logits_bytes(self) -> int:
        """Bytes of the logits, by hint."""
        known = info(self.head.node)
        return 0 if known is None else numel_hint(known.shape) * known.dtype.itemsize

    def describe(self) -> None:
        """Keep the text of the nodes that a rewrite is about to replace."""
        nodes = [self.head.node, *(t.node for t in self.terminals)]
        self.replaced_nodes = [n.format_node() or n.name for n in nodes]


class Walk:
    """State of the interpretation of one graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.effects = Effects(graph)
        self.forms: dict[Node, ClassMap] = {}
        self.plans: dict[Node, HeadPlan] = {}
        self._aliases: dict[int, set[Node]] = {}

    def form(self, node: Any) -> ClassMap | None:
        return self.forms.get(node) if isinstance(node, Node) else None

    def run(self) -> list[HeadPlan]:
        """Interpret every node in order."""
        for node in self.graph.nodes:
            if node.op == "output":
                self._output(node)
                continue
            changed = self.effects.writes.get(node)
            if changed is not None:
                self._mutation(node)
                continue
            call = canonical(node)
            inputs = [a for a in node.all_input_nodes if a in self.forms]
            if inputs:
                self._apply(node, call, inputs)
            elif call is not None:
                form = head_of(call)
                if form is not None:
                    self.plans[node] = HeadPlan(form.head)
                    self._learn(node, form)
        return list(self.plans.values())

    def _learn(self, node: Node, form: ClassMap) -> None:
        if self.effects.grad_off(node) and not self.effects.grad_off(form.head.node):
            form = form.with_(detached=True)
        self.forms[node] = form
        known = info(node)
        if known is not None and known.storage is not None:
            self._aliases.setdefault(known.storage, set()).add(node)

    def _apply(self, node: Node, call: Call | None, inputs: list[Node]) -> None:
        heads = {self.forms[i].head for i in inputs}
        if call is None or call.name not in RULES or len(heads) > 1:
            for head in heads:
                self._refuse(head, refuse("two-heads" if len(heads) > 1 else "escape", node))
            return
        form = self.forms[inputs[0]]
        outcome = RULES[call.name](self, call, form)
        if isinstance(outcome, ClassMap):
            self._learn(node, outcome)
        elif isinstance(outcome, Terminal):
            self.plans[form.head.node].terminals.append(outcome)
        else:
            self._refuse(form.head, outcome if isinstance(outcome, Refusal) else refuse("escape", node))

    def _refuse(self, head: Head, refusal: Refusal) -> None:
        plan = self.plans[head.node]
        if plan.refusal is None:
            plan.refusal = refusal

    def _mutation(self, node: Node) -> None:
        """An in-place change: every head with a form in that memory, or in unknown memory, is off."""
        for other, form in self.forms.items():
            if self.effects.may_write(node, other):
                self._refuse(form.head, refuse("mutated", node))
        for arg in node.all_input_nodes:  # a form is read by, say, `buffer.add_(logits)`
            if arg in self.forms:
                self._refuse(self.forms[arg].head, refuse("escape", node))

    def _output(self, node: Node) -> None:
        for arg in node.all_input_nodes:
            form = self.forms.get(arg)
            if form is not None:
                self.plans[form.head.node].returned.append(arg)


def decide(graph: Graph, config: Config) -> tuple[Walk, list[HeadPlan]]:
    """Plans for every product of the graph that may be a head: legality from the rules, then profitability."""
    walk = Walk(graph)
    plans = walk.run()
    for plan in plans:
        if plan.refusal is None and not plan.terminals:
            plan.refusal = refuse("returned-loss-free" if plan.returned else "no-loss", plan.head.node)
        if plan.refusal is None and plan.logits_bytes < config.min_logits_bytes:
            detail = f"{plan.logits_bytes} of {config.min_logits_bytes} bytes"
            plan.refusal = refuse("too-small", plan.head.node, detail)
    return walk, plans
