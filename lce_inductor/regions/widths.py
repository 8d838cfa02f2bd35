"""Which labelled nodes have about as many values in each row as there are classes, and so must not exist as a whole."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from ..graph.values import size_hint
from .spaces import Space
from .tags import LOCAL

if TYPE_CHECKING:
    from .labels import Label

# A wide node has at least this share of the classes.
_WIDE = 8


class Widths:
    """The classes of heads, and what is as wide as they are: a head's logits, and of labelled nodes with (nearly) that
    many local elements those that are made of wide ones, or have a dimension of theirs. A number of each row times its
    hidden state is none, however many hidden dimensions there are: the user's own tensors have that size."""

    def __init__(self, of: dict[Node, Label]) -> None:
        self.of = of
        self._classes: dict[Space, int] = {}
        self._wide: dict[Node, bool] = {}
        self._sizes: set[int] = set()  # by hint: two inputs of as many classes have two symbols

    def add(self, head: Node, space: Space) -> None:
        self._classes[space] = size_hint(head.meta["val"].shape[-1])
        self._wide[head] = self._classes[space] > 1
        self._sizes.add(self._classes[space])

    def classes(self, space: Space) -> int:
        """The number of classes of the narrowest head of these rows and of those that they follow from."""
        root = space.find()
        found = [c for s, c in self._classes.items() if s.find() is root]
        if not found:
            found = [self.classes(m.before) for m in root.found_from]
        return min(found, default=1)

    def wide(self, node: Node) -> bool:
        if node not in self._wide:
            self._wide[node] = self._is_wide(node)
        return self._wide[node]

    def _is_wide(self, node: Node) -> bool:
        label, value = self.of[node], node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return value is not None  # several results: what is read of them decides
        sizes = {size_hint(s) for s, t in zip(value.shape, label.tags) if t == LOCAL} - {1}
        count = math.prod(size_hint(s) for s, t in zip(value.shape, label.tags) if t == LOCAL)
        if count == 1 or count * _WIDE <= self.classes(label.space):
            return False
        if sizes.isdisjoint(self._sizes) and not any(a in self.of and self.wide(a) for a in node.all_input_nodes):
            return False
        self._sizes |= sizes
        return True
