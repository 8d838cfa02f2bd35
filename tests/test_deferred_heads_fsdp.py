"""FSDP2 and heads under defer(): hooks that gather, free and reduce run around logits that are not computed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import lce_inductor
from lce_inductor.deferred_heads.logits import PendingLogits

H, V = 16, 211


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, H)
        self.layers = nn.ModuleList(nn.Linear(H, H) for _ in range(2))
        self.norm = nn.LayerNorm(H)
        self.head = nn.Linear(H, V, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        for layer in self.layers:
            h = h + layer(h).tanh()
        return self.head(self.norm(h))


def loss(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1).float(), y.flatten())


# How the head's weight is held: by the root, with the norm or by itself, freed after the forward or not.
HELD = {
    "root": lambda m: [],
    "kept": lambda m: [([m.norm, m.head], False)],
    "freed": lambda m: [([m.norm, m.head], True)],
    "alone": lambda m: [(m.head, True)],
}


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("held", HELD)
def test_steps_are_those_of_eager(held, one_process, installed):
    mesh = init_device_mesh("cpu", (1,))
    ids, y = torch.randint(0, V, (2, 2, 9))
    losses = []
    for deferred in (True, False):
        torch.manual_seed(0)
        model = Model()
        for part, free in [*((layer, True) for layer in model.layers), *HELD[held](model)]:
            fully_shard(part, mesh=mesh, reshard_after_forward=free)
        fully_shard(model, mesh=mesh)
        if deferred:
            lce_inductor.defer(model.head)
        optimizer = torch.optim.SGD(model.parameters(), lr=1)
        for _ in range(3):
            z = model(ids)
            assert isinstance(z, PendingLogits) == deferred
            step = (torch.compile(loss) if deferred else loss)(z, y)
            step.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(step.item())
    assert losses[:3] == pytest.approx(losses[3:], abs=1e-5)
    assert losses[2] < losses[1] < losses[0]
