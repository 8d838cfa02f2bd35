"""Regions: find linear -> loss heads in a joint graph, by how values depend on rows, and compute them chunk by chunk.

tags, facts (what an op does with dimensions) -> spaces (sets of rows) -> labels (the walk over a graph) -> emit (a
program from labelled nodes) -> region (what is computed together) -> match (do the fused kernels compute it?) -> write.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch._inductor.virtualized import V
from torch.fx import Graph, Node

from ..config import Config
from ..graph.backup import Backup
from ..graph.values import device_type, equal_values, has_hint, numel_hint, roots, same, size_hint, source
from ..graph.write import sort
from ..lower.chunk_plan import ChunkPlan, peak_bytes, saves_little
from ..lower.plan import (
    Plan,
    Request,
    capabilities,
    chunks,
    planned,
    policy_of,
    training,
    why_not_on,
)
from ..lower.region_arguments import Cut
from ..ops.row_region import cut_by_hints
from ..reasons import NOWHERE, Refusal, refuse
from ..schedule import Scheduled
from ..schedule.request import request_of
from ..spec.program import parse
from ..spec.statistics import LSE, TARGET
from .aten_ops import Crossing, at, bound, rank
from .fused import NotFused
from .heads import factors, is_product
from .labels import PRODUCTS, Labels, Problem
from .losses import Loss, is_product_by_shape, like, looks_like_logits, products_of_gradient, read_by_products
from .losses import losses as find_losses
from .match import fused_calls
from .region import Found, Region, find
from .spelling import can_respell, respell
from .tags import is_one, size
from .write import write
from .write_fused import write_fused

aten = torch.ops.aten
ops = torch.ops.lce_inductor
log = logging.getLogger("lce_inductor")


_SAME = (
    aten.view.default, aten.reshape.default, aten.alias.default, aten.detach.default, aten.clone.default,
    aten._unsafe_view.default,
)  # fmt: skip


class Alternative(NamedTuple):
    """What prefer='memory' would make of a head of which nothing is saved without: bytes that a step adds at its peak,
    gradients included, and its products; both also of torch.compile alone."""

    bytes: int
    bytes_alone: int
    products: int
    products_alone: int


@dataclasses.dataclass
class Head:
    """What became of a product that makes logits: rewritten, with what stands for it now, or left alone.

    Everything is read off the graph before it is changed. sizes: N, H, V and the bytes of a logit, by hint; guessed: is
    one of them only a guess? losses: the lines of what reads the logits as a loss does. backward: products of the
    logits' gradient. returned: are they returned as logits are, so that a loss outside could read them? tier: "kernels"
    or "region"; steps: of its program (0: the kernels have none); products: of a training step. ops: what computes it
    now. request, plan: of the kernels' call, of that for the gradients where there are two. cut: of its program's, of
    that of the forward where there are two. for_memory: where that is no empty word, see Alternative.
    """

    node: Node
    source: str
    tokens: str
    classes: str
    sizes: tuple[int, int, int, int]
    device: str
    guessed: bool = False
    refusal: Refusal | None = None
    losses: list[str] = dataclasses.field(default_factory=list)
    backward: list[Node] = dataclasses.field(default_factory=list)
    replaced: list[str] = dataclasses.field(default_factory=list)
    inserted: list[str] = dataclasses.field(default_factory=list)
    tier: str = ""
    returned: bool = False
    steps: int = 0
    products: int = 0
    together: int = 1
    gradients: str = ""
    ops: list[Node] = dataclasses.field(default_factory=list)
    request: Request | None = None
    plan: Plan | None = None
    cut: Cut | None = None
    for_memory: Alternative | None = None

    @staticmethod
    def of(node: Node) -> Head:
        value, x = node.meta["val"], factors(node)[0].meta["val"]
        sizes = numel_hint(value.shape[:-1]), size_hint(x.shape[-1]), size_hint(value.shape[-1]), value.dtype.itemsize
        tokens = "*".join(str(s) for s in value.shape[:-1] if not is_one(s))
        guessed = not all(map(has_hint, value.shape))
        return Head(node, source(node), tokens, str(value.shape[-1]), sizes, device_type(node), guessed)

    @property
    def trains(self) -> bool:
        """Do the logits get a gradient?"""
        return bool(self.backward)

    @property
    def logits_bytes(self) -> int:
        """Bytes of the logits, by hint."""
        N, _, V, itemsize = self.sizes
        return N * V * itemsize

    def chunks(self, config: Config) -> ChunkPlan:
        """How the op will cut the rows, by hint."""
        if self.plan is not None:
            return self.plan.chunks
        if self.cut is not None:
            return self.cut.chunks
        policy = policy_of(self.device).chunks
        return chunks(*self.sizes, config.chunk_tokens or 0, config.workspace_bytes, policy)

    def plan_text(self, config: Config) -> str:
        """The same in words; of the kernels, with what computes it and why not what is faster."""
        if self.plan is not None:
            return str(self.plan)
        cut = self.chunks(config)
        return f"{cut.count} chunks of {cut.rows} tokens"


@dataclasses.dataclass
class Stray:
    """A loss that no head of this graph computes. sizes as a Head's, without H; stop: what made its logits, if anything
    did; product: the line of the product of torch's that other products read, too, if one did."""

    losses: list[str]
    tokens: str
    classes: str
    logits_bytes: int
    guessed: bool
    refusal: Refusal
    trains: bool
    product: str = ""


@dataclasses.dataclass
class Decision:
    """The heads of a graph, and the regions that will be written."""

    found: Found
    heads: dict[Node, Head]
    chosen: list[Region]
    strays: list[Stray] = dataclasses.field(default_factory=list)

    def leave(self, code: str) -> None:
        """What was to be rewritten stays as it is, for a reason that showed only then."""
        for node in [n for region in self.chosen for n in region.heads]:
            head = self.heads[node]
            kept: dict[str, Any] = {"losses": head.losses, "backward": head.backward, "returned": head.returned}
            self.heads[node] = dataclasses.replace(Head.of(node), refusal=refuse(code, node), **kept)
        self.chosen = []


def decide(graph: Graph, config: Config) -> Decision:
    """Which heads of a joint graph (or one of inference) are rewritten, and why others are not. Pure."""
    found = find(graph, merge=config.gradients != "recompute")
    heads = {node: Head.of(node) for node in found.labels.sources}
    for node, problem in found.problems.items():
        heads[node].refusal = _refused(problem, heads[node], config)
    strays = _describe(found, heads)
    return Decision(found, heads, _worthwhile(found, heads, config), strays)


def _refused(problem: Problem, head: Head, config: Config) -> Refusal:
    """Why a head is left alone. Small logits that are returned were not deferred, because they are small."""
    if problem.code == "returned" and config.returned_logits == "defer" and head.logits_bytes < config.min_logits_bytes:
        return _too_small(head.logits_bytes, head.node, config)
    return refuse(problem.code, problem.node, problem.why)


def _too_small(size: int, node: Node, config: Config) -> Refusal:
    return refuse("too-small", node, f"{size} of {config.min_logits_bytes} bytes")


def ask_for_rows(decision: Decision, config: Config) -> bool:
    """Where nothing but a guard is missing, that labels have as many rows as the logits, ask for it, as cross_entropy
    does: gather() takes labels of fewer rows, and so Dynamo gives them a length of their own. Was any asked for?"""
    asked = False
    for node, problem in decision.found.problems.items():
        if problem.code != "rows-differ" or decision.heads[node].logits_bytes < config.min_logits_bytes:
            continue
        a = bound(problem.node)
        pairs = zip(a["self"].meta["val"].shape, a["index"].meta["val"].shape)
        different = [
            roots(p, q) for d, (p, q) in enumerate(pairs) if d != at(a["dim"], rank(a["self"])) and not same(p, q)
        ]
        if different and all(has_hint(p) and has_hint(q) and size_hint(p) == size_hint(q) for p, q in different):
            asked = all(bool(p == q) for p, q in different) or asked  # this is what adds the guard
    return asked


def repeated(decision: Decision) -> list[tuple[Node, Node]]:
    """Heads that are written twice and of which one is left alone, each with its first: torch.compile computes them
    once, so that the logits of the other are there as well."""
    chosen = {n for region in decision.chosen for n in region.heads}
    found: list[tuple[Node, Node]] = []
    for node in decision.heads if chosen else ():
        first = next(n for n in decision.heads if n.target is node.target and equal_values(n.args, node.args))
        if (first in chosen) != (node in chosen) and first.meta.get("recompute") == node.meta.get("recompute"):
            found.append((node, first))
    return found


def respelled(graph: Graph, decision: Decision, config: Config) -> Decision:
    """Write products of heads that are left alone in another way, where that lets them be rewritten; nothing else
    changes the graph."""
    heads = decision.heads
    for node, problem in decision.found.problems.items():
        if can_respell(node, problem) and heads[node].logits_bytes >= config.min_logits_bytes:
            before = Backup(graph)
            product = respell(graph, node, problem.code)
            found = decide(graph, config)
            if any(product in region.heads for region in found.chosen):
                decision = found
            else:
                before.restore()
    return decision


def apply(graph: Graph, decision: Decision, config: Config) -> None:
    """Rewrite what was decided. An exception leaves the graph half-way: the caller can go back.

    What nobody reads any more is still there.
    """
    for region in decision.chosen:
        made, tier = _write(graph, decision.found.labels, region, config)
        for node in region.heads:
            decision.heads[node].inserted = [n.format_node() or n.name for n in made]
            decision.heads[node].tier, decision.heads[node].ops = tier, made
            decision.heads[node].request = _request(made) if tier == "kernels" else None
            decision.heads[node].steps = steps_of(made)
            if region.backward or region.merged:
                decision.heads[node].gradients = "forward" if region.merged else "recompute"
    sort(graph)


def _write(graph: Graph, labels: Labels, region: Region, config: Config) -> tuple[list[Node], str]:
    """By the fused kernels where they compute the region, else by its own program."""
    try:
        matches = fused_calls(labels, region.heads, region.spaces)
    except (NotFused, Crossing) as why:
        if region.fused_only:
            raise
        log.debug("%s: computed by its own program: %s", region.heads[0], why)
        return write(graph, labels, region, config), "region"
    return write_fused(graph, labels, matches, config), "kernels"


def _describe(found: Found, heads: dict[Node, Head]) -> list[Stray]:
    """What is told of heads and of losses without one, read off the graph before it is changed."""
    labels = found.labels
    strays: dict[tuple[Node, ...], Stray] = {}
    for loss in find_losses(labels.graph, labels.on_tangent):
        mine: list[Head | Stray] = [heads[n] for n in loss.origins if n in heads]
        for reader in mine or [strays.setdefault(loss.origins, _stray(loss, labels))]:
            line = source(loss.node) or ("" if reader.losses else NOWHERE)
            if line and line not in reader.losses:
                reader.losses.append(line)
    for region in found.regions:
        parts = [*region.forward.values(), *region.backward.values()]
        nodes = [n for part in parts for n, _ in part.nodes if n not in labels.on_tangent]
        for head in (heads[n] for n in region.heads):
            head.replaced = [n.format_node() or n.name for n in (head.node, *nodes)]
            # A loss without a softmax is all that is computed.
            head.losses = head.losses or list(filter(None, dict.fromkeys(map(source, nodes))))
    for node in heads:
        heads[node].backward = products_of_gradient(node, labels.on_tangent)
        heads[node].returned = looks_like_logits(node, labels.on_tangent)
    # A softmax of a single vector, made of no product, weighs something; one of an input without a gradient, beside a
    # head, is its target: a teacher's stored logits.
    no_heads = {s for s in strays if strays[s].refusal.reason.code == "no-head"}
    targets = {s for s in no_heads if strays[s].tokens == "1" or (found.regions and not strays[s].trains)}
    return [stray for s, stray in strays.items() if s not in targets]


def _stray(loss: Loss, labels: Labels) -> Stray:
    value = loss.logits.meta["val"]
    count = numel_hint(value.shape)
    tokens = count // max(size_hint(loss.classes), 1)
    shape = [size(s) for s in value.shape]  # compared as expressions, so that no guard comes of it
    shape.remove(size(loss.classes))
    text = "*".join(str(s) for s in shape if not is_one(s)) or str(tokens)
    made = next((n for n in loss.origins if is_product(n) or is_product_by_shape(n)), None)
    product = ""
    if made is not None and tokens == 1 and made.target in PRODUCTS:
        refusal = refuse("one-row", made)
    elif made is not None and made.target in PRODUCTS and read_by_products(made, labels.on_tangent):
        refusal, product = refuse("product", read_by_products(made, labels.on_tangent)), source(made)
    elif made is not None:
        refusal = refuse("foreign-product", made)
    else:
        refusal = refuse("no-head", next((n for n in loss.origins if n.op == "call_function"), None))
    trains = any(like(n, loss.logits) for n in labels.on_tangent)
    if made is None:  # logits from elsewhere: there goes their gradient, too, in whatever shape they came
        returned = next(iter(labels.graph.find_nodes(op="output"))).all_input_nodes
        values = (n.meta.get("val") for n in returned if n in labels.on_tangent)
        trains = any(isinstance(v, torch.Tensor) and numel_hint(v.shape) == count for v in values)
    guessed = not all(map(has_hint, value.shape))
    return Stray([], text, str(loss.classes), count * value.dtype.itemsize, guessed, refusal, trains, product)


def _worthwhile(found: Found, heads: dict[Node, Head], config: Config) -> list[Region]:
    """Regions that are large enough to pay; the heads of others get their reason."""
    chosen = []
    groups = _by_weight([heads[n] for region in found.regions for n in region.heads])
    together = {h.node: sum(other.logits_bytes for other in group) for group in groups for h in group}
    for region in found.regions:
        mine = [heads[n] for n in region.heads]
        size = max(together[n] for n in region.heads)
        unknown = next(filter(None, map(_why_not_there, mine)), "")
        if V.aot_compilation:
            reason = refuse("ahead-of-time", mine[0].node)
        elif unknown:
            reason = refuse("device", mine[0].node, unknown)
        elif size < config.min_logits_bytes:
            reason = _too_small(size, mine[0].node, config)
        else:
            chosen.append(region)
            continue
        for head in mine:
            head.refusal = reason
    mine = [heads[n] for region in chosen for n in region.heads]
    simple = all(len(r.heads) == 1 for r in chosen) and all(h.trains and not _deferred(h.node) for h in mine)
    if mine and simple and _save_little(found.labels, chosen, mine, config):
        for head in mine:
            head.refusal = refuse("little-saved", head.node)
        return []
    return chosen


def _why_not_there(head: Head) -> str:
    return why_not_on(torch.device(head.device), head.node.meta["val"].dtype, head.trains)


def _by_weight(heads: list[Head]) -> list[list[Head]]:
    """Heads of one weight whose logits torch.compile alone holds all at once, until the backward; others by one."""
    groups: list[list[Head]] = []
    for head in heads:
        weight = factors(head.node)[1]
        mine = (g for g in groups if g[0].trains and head.trains and equal_values(factors(g[0].node)[1], weight))
        group = next(mine, None)
        if group is None:
            groups.append([head])
        else:
            group.append(head)
    return groups


def _deferred(node: Node) -> bool:
    """Are these logits returned without being computed? Then what they are computed from is returned."""
    (end,) = node.graph.find_nodes(op="output")
    return _origin(factors(node)[0]) in {_origin(n) for n in end.all_input_nodes}


def _origin(node: Node) -> Node:
    while node.target in _SAME and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _save_little(labels: Labels, regions: list[Region], heads: list[Head], config: Config) -> bool:
    """Are the heads to be left alone for that? Those of one weight count as one of all their rows, since they add into
    one dW. Says of a single one, too, what prefer='memory' would save."""
    dw = any(s.kind == "dw" for s in labels.sinks)
    policy = policy_of(heads[0].device)
    rows = ((group[0], sum(h.sizes[0] for h in group)) for group in _by_weight(heads))
    whole = [dataclasses.replace(head, sizes=(N, *head.sizes[1:])) for head, N in rows]
    cuts = [head.chunks(config) for head in whole]
    little = saves_little([(cut, *head.sizes) for cut, head in zip(cuts, whole)], dw, policy.chunks)
    if len(heads) > 1:
        little = little and config.prefer != "memory"
    elif little or cuts[0].count == 1:
        other = _for_memory(labels, regions[0], heads[0], config, dw)
        if config.prefer == "memory":
            little = little and other is None
        else:
            heads[0].for_memory = other
    return little and config.min_logits_bytes > 0 and config.chunk_tokens is None


def _for_memory(labels: Labels, region: Region, head: Head, config: Config, dw: bool) -> Alternative | None:
    """None where it saves as little, or where the kernels, which alone have such a mode, don't compute the head."""
    dtype, asked = head.node.meta["val"].dtype, LSE | TARGET
    r = Request(
        *head.sizes[:3], dtype, config.chunk_tokens or 0, config.workspace_bytes, asked, 1, grads=asked,
        mask=(True, dw, False), prefer="memory",
    )  # fmt: skip
    policy, device = policy_of(head.device), capabilities(torch.device(head.device))
    recompute = True if not region.merged else False if config.gradients == "forward" else None
    step = training(r, device, policy, recompute)
    alone = peak_bytes(ChunkPlan(r.N, 1, r.V), *head.sizes, dx=True, dw=dw)
    if alone - step.peak_bytes < max(policy.chunks.least_saving, 1):
        return None
    try:
        fused_calls(labels, region.heads, region.spaces)
    except (NotFused, Crossing):
        return None
    return Alternative(step.peak_bytes, alone, 2 + dw + step.recompute, 2 + dw)


def scheduled(decision: Decision, found: dict[Node, Scheduled]) -> None:
    """What became of the heads' gradients: see schedule()."""
    rewritten = {node: head for node, head in decision.heads.items() if head.tier}
    for head in rewritten.values():
        places = {found[op].gradients for op in head.ops if op in found}
        if places or head.tier == "kernels":
            head.gradients = "recompute" if "recompute" in places else "".join(places)
        head.ops = list(dict.fromkeys(now for op in head.ops for now in (found[op].ops if op in found else (op,))))
        if head.request is not None:
            given = dict(zip((a.name for a in head.ops[0].target._schema.arguments), head.ops[0].args))  # type: ignore[union-attr]
            rows = size_hint(given["x"].meta["val"].shape[0])  # type: ignore[union-attr]
            chunk_tokens: Any = given["chunk_tokens"]
            asked = head.request._replace(N=rows, chunk_tokens=chunk_tokens)
            if head.gradients == "recompute" and any(op.target is ops.row_stats_backward.default for op in head.ops):
                asked = asked.backward()
            head.plan = planned(asked, torch.device(head.device))
        region = next((op for op in head.ops if op.target is ops.row_region.default), None)
        if region is not None:
            head.cut = cut_by_hints(*torch.fx.map_arg(region.args, lambda n: n.meta["val"]))
    for node, head in rewritten.items():
        together = _together(node, rewritten)
        head.products = products_of(dict.fromkeys(op for other in together for op in rewritten[other].ops))
        head.together = len(together)


def _together(node: Node, heads: dict[Node, Head]) -> list[Node]:
    """The heads that are computed by the same calls."""
    found, ops = [node], set(heads[node].ops)
    while more := [n for n in heads if n not in found and not ops.isdisjoint(heads[n].ops)]:
        found += more
        ops.update(op for n in more for op in heads[n].ops)
    return found


def _request(made: list[Node]) -> Request:
    """What the kernels are asked for; of several calls, the first."""
    forward, backward = (
        next((n for n in made if n.target is op), None)
        for op in (ops.row_stats.default, ops.row_stats_backward.default)
    )
    assert forward is not None
    return request_of(forward, backward)


def steps_of(made: list[Node]) -> int:
    """How many steps the programs of these ops have."""
    return sum(len(parse(text).steps) for text in _programs(made))


def products_of(made: Iterable[Node]) -> int:
    """How many products of a head's size these ops compute."""
    count = 0
    for node in made:
        if node.target is ops.row_region.default:
            for p in map(parse, _programs([node])):
                count += p.inputs.count("logits") + sum(r.kind in ("dx", "dw") for r in p.results)
        elif node.target in (ops.row_stats.default, ops.row_stats_with_grad.default, ops.row_stats_backward.default):
            masks = [a for a in node.args if isinstance(a, (list, tuple))]
            count += 1 + sum(sum(map(bool, mask[:2])) for mask in masks)
    return count


def _programs(made: list[Node]) -> list[str]:
    return [a for n in made if n.target is ops.row_region.default for a in n.args if isinstance(a, str)]


__all__ = ["Decision", "Head", "Stray", "apply", "ask_for_rows", "decide", "repeated", "respelled", "scheduled"]
