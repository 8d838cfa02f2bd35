"""The order in which the product for dX takes its work (hopper_dx.cuh), in Python, with as few clusters as one likes.

A step of the simulation lets one cluster do one thing. Every cluster that runs claims the lowest item that is left, and one
ahead; it ends an item when the part before it has been added. A cluster that is not resident does nothing.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

from lce_inductor.kernels import hopper
from lce_inductor.spec.sizes import ceil_div


@dataclasses.dataclass
class Launch:
    """What launch_dx gives to the kernel: tiles, parts of each, clusters."""

    tiles: int
    parts: int
    clusters: int

    @classmethod
    def of(cls, n: int, H: int, V: int, clusters: int) -> Launch:
        tiles, parts = (
            ceil_div(n, hopper.PAIR) * ceil_div(H, hopper.COLUMNS),
            hopper.parts_of_dx(n, H, V, clusters).count,
        )
        return cls(tiles, parts, min(tiles * parts, clusters))

    @property
    def count(self) -> int:
        return self.tiles * self.parts


class Claims:
    """The kernel's: an atomic counter, left as it was by whoever claims last."""

    def __init__(self, launch: Launch, next_item: list[int]) -> None:
        self.launch, self.next = launch, next_item
        self.begin: dict[int, int] = {}

    def first(self, cluster: int) -> int:
        self.begin[cluster] = -1
        item = self._claim()
        return item

    def after(self, cluster: int, item: int) -> int:
        return self.begin[cluster]

    def starts(self, cluster: int) -> None:
        """As it begins an item, it claims the one after it."""
        self.begin[cluster] = self._claim()

    def _claim(self) -> int:
        item = self.next[0]
        self.next[0] += 1
        if item == self.launch.count + self.launch.clusters - 1:
            self.next[0] = 0
        return item


class Rounds:
    """Items go round, whether or not a cluster is there to take them: as it was, and does not end."""

    def __init__(self, launch: Launch, next_item: list[int]) -> None:
        self.launch = launch

    def first(self, cluster: int) -> int:
        return cluster

    def after(self, cluster: int, item: int) -> int:
        return item + self.launch.clusters

    def starts(self, cluster: int) -> None:
        pass


def run(
    launch: Launch, resident: int, order: Callable[..., Claims | Rounds], next_item: list[int], seed: int = 0
) -> list[list[int]] | None:
    """The order in which each tile's parts were added; None where nothing moves any more.

    resident: how many clusters the GPU has room for at a time; the next comes when one has ended.
    """
    g = random.Random(seed)
    items, waiting = order(launch, next_item), list(range(launch.clusters))
    g.shuffle(waiting)
    now: dict[int, int] = {}  # the item of each cluster that runs
    added: list[list[int]] = [[] for _ in range(launch.tiles)]
    while now or waiting:
        while waiting and len(now) < resident:
            cluster = waiting.pop()
            now[cluster] = items.first(cluster)
            if now[cluster] < launch.count:
                items.starts(cluster)
        able = [c for c, i in now.items() if i >= launch.count or len(added[i % launch.tiles]) == i // launch.tiles]
        if not able:
            return None
        cluster = g.choice(able)
        item = now[cluster]
        if item >= launch.count:
            del now[cluster]
            continue
        added[item % launch.tiles].append(item // launch.tiles)
        now[cluster] = items.after(cluster, item)
        if now[cluster] < launch.count:
            items.starts(cluster)
    return added
