"""The abstract interpretation: one pass over the graph, from products to losses. Pure: nothing is changed."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch.fx import Graph, Node

from ..config import Config
from ..graph.values import device_type, info, numel_hint, size_hint
from ..ops.chunking import ChunkPlan, saves_little
from ..ops.chunking import plan as plan_chunks
from ..ops.types import ARGMAX, NEG_ENTROPY, SUM
from ..reasons import Refusal, refuse
from . import rules_elementwise, rules_loss, rules_reduce, rules_shape  # noqa: F401  (registers the rules)
from .canon import canonical
from .effects import Effects
from .forms import RULES, ClassMap, Form, Head, Parts, Product, Terminal, captured
from .rules_head import head_of, ref_info
from .rules_in_place import in_place


@dataclasses.dataclass
class HeadPlan:
    """What was found about one head: its terminals, or why it stays."""

    head: Head
    terminals: list[Terminal] = dataclasses.field(default_factory=list)
    returned: list[Node] = dataclasses.field(default_factory=list)
    writes: list[Node] = dataclasses.field(default_factory=list)
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
        self.forms: dict[Node, Form] = {}
        self.plans: dict[Node, HeadPlan] = {}
        self.captured: list[tuple[Node, Node, Head]] = []  # what a form read beside logits, where, for which head
        self.logsumexps: dict[Node, ClassMap] = {}  # nodes that are the logsumexp of a form
        self.dead = _dead(graph, self.effects)

    def form(self, node: Any) -> Form | None:
        return self.forms.get(node) if isinstance(node, Node) else None

    def run(self) -> list[HeadPlan]:
        """Interpret every node in order."""
        for node in self.graph.nodes:
            if node.op == "output":
                self._output(node)
            elif node in self.effects.writes:
                self._write(node)
            else:
                self._read(node)
        self._check_captured()
        return list(self.plans.values())

    def _read(self, node: Node) -> None:
        call = canonical(node)
        inputs = [self.forms[a] for a in node.all_input_nodes if a in self.forms]
        if node in self.dead:
            if len({f.head for f in inputs}) == 1:
                self.forms[node] = inputs[0]  # so that it goes with the head
            return
        found = head_of(call) if call is not None else None
        if found is not None:  # also of a form: what looked like logits was the layer before
            head, form, refusal = found
            refs = [ref_info(node, ref) for ref in (head.x, head.weight, head.bias) if ref is not None]
            if refusal is None and any(r and r.dtype != head.dtype for r in refs) and not self.effects.autocast(node):
                refusal = refuse("dtype", node, "the head's inputs differ in dtype")
            self.plans[node] = HeadPlan(head, refusal=refusal)
            if form is not None:
                self._learn(node, form)
        if not inputs:
            return
        outcome = RULES[call.name](self, call, inputs[0]) if call is not None and call.name in RULES else None
        if outcome is None:
            outcome = refuse("two-heads" if len({f.head for f in inputs}) > 1 else "escape", node)
        if isinstance(outcome, Terminal) and _masked_sum(outcome):
            outcome = refuse("escape", node, "a sum over masked classes")
        if isinstance(outcome, Refusal):
            for each in inputs:
                self._refuse(each, outcome)
        elif isinstance(outcome, Terminal):
            self.plans[outcome.form.head.node].terminals.append(outcome)
        else:
            self._learn(node, outcome)

    def _learn(self, node: Node, form: Form) -> None:
        if isinstance(form, ClassMap) and self.effects.grad_off(node) and not self.effects.grad_off(form.head.node):
            form = form.detach()
        if isinstance(form, Product) and self.effects.grad_off(node):
            form = dataclasses.replace(form, probs=form.probs.detach(), values=form.values.detach())
        self.forms[node] = form
        self._capture(node, form)

    def _capture(self, node: Node, form: Form) -> None:
        self.captured += [(ref, node, form.head) for ref in captured(form) if isinstance(ref, Node)]

    def _check_captured(self) -> None:
        """A form stands for values at its own node; what replaces a loss reads them later."""
        order = self.effects.order
        for ref, node, head in self.captured:
            changed = (w for w in self.effects.writes if order[w] > order[node] and self.effects.may_write(w, ref))
            if (write := next(changed, None)) is not None and self.plans[head.node].refusal is None:
                self.plans[head.node].refusal = refuse("mutated", write)

    def _refuse(self, form: Form, refusal: Refusal) -> None:
        for head in {i.head for i in form.items} if isinstance(form, Parts) else {form.head}:
            plan = self.plans[head.node]
            if plan.refusal is None:
                plan.refusal = refusal

    def _write(self, node: Node) -> None:
        """An in-place change of logits: certain for all names of that memory, or the heads in it are off."""
        touched = [other for other in self.forms if self.effects.may_write(node, other)]
        target = self.effects.writes[node][0]
        known = target in self.forms and all(self.effects.same_memory(target, t) for t in touched)
        changed = in_place(self, node, target, touched) if known else None
        if changed is not None:
            self.forms.update(changed)
            self._capture(node, changed[target])
            self.plans[changed[target].head.node].writes.append(node)
            if info(node) is not None:
                self.forms[node] = changed[target]
            return
        for other in touched:
            self._refuse(self.forms[other], refuse("mutated", node))
        for arg in node.all_input_nodes:  # a form is read by, say, `buffer.add_(logits)`
            if arg in self.forms:
                self._refuse(self.forms[arg], refuse("escape", node))

    def _output(self, node: Node) -> None:
        for arg in node.all_input_nodes:
            form = self.forms.get(arg)
            if isinstance(form, ClassMap) and form.plain:
                self.plans[form.head.node].returned.append(arg)
            elif form is not None:
                self._refuse(form, refuse("escape", node))


def _dead(graph: Graph, effects: Effects) -> set[Node]:
    """What nobody reads, of the operations that have a rule: autograd's own copies in graphs of make_fx."""
    found: set[Node] = set()
    for node in reversed(graph.nodes):
        call = None if node in effects.writes or node.op == "output" else canonical(node)
        if call is not None and call.name in RULES and all(user in found for user in node.users):
            found.add(node)
    return found


def decide(graph: Graph, config: Config) -> tuple[Walk, list[HeadPlan]]:
    """Plans for every product of the graph that may be a head: legality from the rules, then profitability."""
    walk = Walk(graph)
    plans = walk.run()
    for plan in plans:
        if plan.refusal is None and not plan.terminals:
            plan.refusal = refuse("returned-loss-free" if plan.returned else "no-loss", plan.head.node)
        if plan.refusal is None and plan.returned and not _trains(walk, plan):
            plan.refusal = refuse("returned-loss-free", plan.head.node, "the loss in this graph has no gradient")
        if plan.refusal is None and plan.logits_bytes < config.min_logits_bytes:
            detail = f"{plan.logits_bytes} of {config.min_logits_bytes} bytes"
            plan.refusal = refuse("too-small", plan.head.node, detail)
    left = [plan for plan in plans if plan.refusal is None]
    # Of several heads, torch.compile alone may hold the logits of all at once.
    if (
        len(left) == 1
        and config.min_logits_bytes > 0
        and config.chunk_tokens is None
        and _saves_little(left[0], config)
    ):
        left[0].refusal = refuse("little-saved", left[0].head.node)
    return walk, plans


def chunks_of(head: Head, config: Config) -> ChunkPlan:
    """How the op will cut the rows of a head's logits, by hint."""
    return plan_chunks(*_sizes(head), config.chunk_tokens or 0, config.workspace_bytes, device=device_type(head.node))


def _sizes(head: Head) -> tuple[int, int, int, int]:
    """N, H, V and the bytes of a logit, by hint."""
    known, x = info(head.node), info(head.x)
    assert known is not None
    H = 0 if x is None else size_hint(x.shape[-1])
    return numel_hint(known.shape[:-1]), H, size_hint(head.num_classes), known.dtype.itemsize


def _saves_little(plan: HeadPlan, config: Config) -> bool:
    """Is this a head that trains, and whose logits are not returned, that chunks bring nearly nothing?"""
    known, weight = info(plan.head.node), info(plan.head.weight)
    if known is None or plan.returned or not known.requires_grad:
        return False
    device, dw = device_type(plan.head.node), weight is None or weight.requires_grad
    return saves_little(chunks_of(plan.head, config), *_sizes(plan.head), dw, device)


def _masked_sum(terminal: Terminal) -> bool:
    """A sum over classes meets what the masked ones were set to: of -inf the gradient is the mask's alone, or NaN."""
    return any(w.bit in (SUM, NEG_ENTROPY) for w in terminal.wants) and any(
        e.name in ("mask", "fill") for e in terminal.form.edits
    )


def _trains(walk: Walk, plan: HeadPlan) -> bool:
    """Does a gradient flow from the graph's own losses? If logits that need one are returned beside losses that
    are only logged, the caller differentiates the logits."""
    known = info(plan.head.node)
    if known is None or not known.requires_grad:
        return True
    return any(
        not t.form.detached and not walk.effects.grad_off(t.node) and any(w.bit != ARGMAX for w in t.wants)
        for t in plan.terminals
    )
