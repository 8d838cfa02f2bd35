"""Regions: find linear -> loss heads in a joint graph, by how values depend on rows, and compute them chunk by chunk.

tags, facts (what an op does with dimensions) -> spaces (sets of rows) -> labels (the walk over a graph) -> emit (a program
from labelled nodes) -> region (what is computed together) -> kernels_for (do the fused kernels compute it?) -> write.
"""

from __future__ import annotations

import dataclasses
import logging

from torch._inductor.virtualized import V
from torch.fx import Graph, Node

from ..config import Config
from ..graph.values import device_type, numel_hint, size_hint, source
from ..graph.write import finish
from ..ops import regions as _ops  # noqa: F401  (registers the op)
from ..ops.chunking import ChunkPlan, saves_little
from ..ops.chunking import plan as plan_chunks
from ..reasons import Refusal, refuse
from .facts import Crossing
from .fused import NotFused
from .heads import Head as Operands
from .labels import Labels
from .match import match
from .region import Found, Region, find
from .tags import is_one
from .write import write
from .write_fused import write_fused

log = logging.getLogger("lce_inductor")


@dataclasses.dataclass
class Head:
    """What became of a product that makes logits: rewritten, with what stands for it now, or left alone.

    Everything is read off the graph before it is changed. sizes: N, H, V and the bytes of a logit, by hint.
    """

    node: Node
    source: str
    tokens: str
    classes: str
    sizes: tuple[int, int, int, int]
    device: str
    refusal: Refusal | None = None
    losses: list[str] = dataclasses.field(default_factory=list)
    trains: bool = False
    replaced: list[str] = dataclasses.field(default_factory=list)
    inserted: list[str] = dataclasses.field(default_factory=list)
    tier: str = ""

    @staticmethod
    def of(node: Node) -> Head:
        value, x = node.meta["val"], Operands.of(node).x.meta["val"]
        sizes = numel_hint(value.shape[:-1]), size_hint(x.shape[-1]), size_hint(value.shape[-1]), value.dtype.itemsize
        tokens = "*".join(str(s) for s in value.shape[:-1] if not is_one(s))
        return Head(node, source(node), tokens, str(value.shape[-1]), sizes, device_type(node))

    @property
    def logits_bytes(self) -> int:
        """Bytes of the logits, by hint."""
        N, _, V, itemsize = self.sizes
        return N * V * itemsize

    def chunks(self, config: Config) -> ChunkPlan:
        """How the op will cut the rows, by hint."""
        return plan_chunks(*self.sizes, config.chunk_tokens or 0, config.workspace_bytes, device=self.device)


@dataclasses.dataclass
class Decision:
    """The heads of a graph, and the regions that will be written."""

    found: Found
    heads: dict[Node, Head]
    chosen: list[Region]


def decide(graph: Graph, config: Config) -> Decision:
    """Which heads of a joint graph (or one of inference) are rewritten, and why others are not. Pure."""
    found = find(graph, merge=config.gradients != "recompute")
    heads = {node: Head.of(node) for node in found.labels.sources}
    for node, problem in found.problems.items():
        heads[node].refusal = refuse(problem.code, problem.node, problem.why)
    _describe(found, heads)
    return Decision(found, heads, _worthwhile(found, heads, config))


def apply(graph: Graph, decision: Decision, config: Config) -> None:
    """Rewrite what was decided. An exception leaves the graph half-way: the caller has a copy of it."""
    for region in decision.chosen:
        made, tier = _write(graph, decision.found.labels, region, config)
        for node in region.heads:
            decision.heads[node].inserted = [n.format_node() or n.name for n in made]
            decision.heads[node].tier = tier
    finish(graph)


def _write(graph: Graph, labels: Labels, region: Region, config: Config) -> tuple[list[Node], str]:
    """By the fused kernels where they compute the region, else by its own program."""
    try:
        matches = match(labels, region.heads, region.spaces)
    except (NotFused, Crossing) as why:
        log.debug("%s: computed by its own program: %s", region.heads[0], why)
        return write(graph, labels, region, config), "region"
    return write_fused(graph, labels, matches, config), "kernels"


def _describe(found: Found, heads: dict[Node, Head]) -> None:
    """What is told of heads, read off the graph before it is changed."""
    labels = found.labels
    for region in found.regions:
        parts = [*region.forward.values(), *region.backward.values()]
        nodes = [n for part in parts for n, _ in part.nodes if n not in labels.on_tangent]
        for head in region.heads:
            heads[head].losses = list(filter(None, dict.fromkeys(map(source, nodes))))
            heads[head].replaced = [n.format_node() or n.name for n in (head, *nodes)]
    for node in labels.of:
        if labels.wide(node) and reads_as_loss(node):
            for head in labels.heads_of(labels.of[node].space):
                if heads[head].refusal is not None and source(node) not in heads[head].losses:
                    heads[head].losses.append(source(node))
    for sink in labels.sinks:
        if sink.node in labels.on_tangent:
            for head in labels.heads_of(labels.of[sink.wide].space):
                heads[head].trains = True


def reads_as_loss(node: Node) -> bool:
    """A softmax or a logsumexp over the classes."""
    return any(word in str(node.target) for word in ("aten.exp.", "softmax", "logsumexp"))


def _worthwhile(found: Found, heads: dict[Node, Head], config: Config) -> list[Region]:
    """Regions that are large enough to pay; the heads of others get their reason."""
    chosen = []
    for region in found.regions:
        mine = [heads[n] for n in region.heads]
        size = max(h.logits_bytes for h in mine)
        if V.aot_compilation:
            reason = refuse("ahead-of-time", mine[0].node)
        elif size < config.min_logits_bytes:
            reason = refuse("too-small", mine[0].node, f"{size} of {config.min_logits_bytes} bytes")
        else:
            chosen.append(region)
            continue
        for head in mine:
            head.refusal = reason
    # Of several heads, torch.compile alone may hold the logits of all at once.
    if len(chosen) == 1 and len(chosen[0].heads) == 1 and config.min_logits_bytes > 0 and config.chunk_tokens is None:
        head = heads[chosen[0].heads[0]]
        if head.trains and _saves_little(found.labels, head, config):
            head.refusal = refuse("little-saved", head.node)
            return []
    return chosen


def _saves_little(labels: Labels, head: Head, config: Config) -> bool:
    dw = any(s.kind == "dw" for s in labels.sinks)
    return saves_little(head.chunks(config), *head.sizes, dw, head.device)


__all__ = ["Decision", "Head", "apply", "decide"]
