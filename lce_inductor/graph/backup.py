"""Going back: a pass that fails half-way must leave the graph as it found it."""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node


class Backup:
    """What a graph was, to go back to it when a rewrite fails half-way.

    Cheap, since it copies no node: a rewrite adds nodes, changes arguments and moves nodes, but erases none of those
    that were there. Dead code is eliminated last, when nothing can fail any more.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: list[tuple[Node, tuple[Any, ...], dict[str, Any]]] = [(n, n.args, n.kwargs) for n in graph.nodes]

    def restore(self) -> None:
        there = {n for n, _, _ in self.nodes}
        new = [n for n in self.graph.nodes if n not in there]
        for node in new:  # a graph left half-way need not be in order
            node.args, node.kwargs = (), {}
        for node, args, kwargs in self.nodes:
            node.args, node.kwargs = args, kwargs
        for node in reversed(new):
            self.graph.erase_node(node)
        cursor = self.nodes[0][0]
        for node, _, _ in self.nodes[1:]:
            cursor.append(node)
            cursor = node
