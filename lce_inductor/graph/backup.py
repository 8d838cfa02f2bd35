"""Going back: a pass that fails half-way must leave the graph as it found it."""

from __future__ import annotations

import torch
from torch.fx import Graph


class Backup:
    """A copy of a graph to go back to when a rewrite fails half-way."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.copy = Graph()
        self.out = self.copy.graph_copy(graph, {})
        self.out_meta = next(n for n in reversed(graph.nodes) if n.op == "output").meta

    def restore(self) -> None:
        # Placeholders stay: Dynamo knows them by more than their meta.
        inputs = self.graph.find_nodes(op="placeholder")
        env = dict(zip(self.copy.find_nodes(op="placeholder"), inputs))
        nodes = [n for n in self.graph.nodes if n.op != "placeholder"]
        for node in nodes:  # a graph left half-way need not be in order
            node.args, node.kwargs = (), {}
        for node in reversed(nodes):
            self.graph.erase_node(node)
        self.graph.graph_copy(self.copy, env)
        end = self.graph.output(torch.fx.map_arg(self.out, env.__getitem__))
        end.meta = dict(self.out_meta)
