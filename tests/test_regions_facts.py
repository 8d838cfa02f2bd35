"""What is known of operations: the tags of a result, checked by changing one row of the operands."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves, tree_map

from lce_inductor.regions.aten_ops import (
    RULES,
    Crossing,
    bound,
    fact,
    moved_dims,
    operand_tags,
    result_tags,
)
from lce_inductor.regions.index_ops import counts_rows
from lce_inductor.regions.spaces import forward_move
from lce_inductor.regions.tags import LOCAL, ONE, ROW

aten = torch.ops.aten
prims = torch.ops.prims
g = torch.Generator().manual_seed(0)
X, Y = (torch.randn(3, 3, 3, generator=g, dtype=torch.float64) for _ in range(2))
FLAT = torch.randn(3, 3, generator=g, dtype=torch.float64)
I = torch.randint(0, 3, (3, 3, 3), generator=g)
LINE = torch.tensor([2, 0, 0])

# Three times three times three: no size tells dimensions apart, so that only the rules can.
CALLS: dict[str, tuple[Any, ...]] = {
    "add": (aten.add.Tensor, X, Y),
    "add of fewer dimensions": (aten.add.Tensor, X, FLAT),
    "add of one": (aten.add.Tensor, X, Y[:1]),
    "where": (aten.where.self, X > 0, X, Y),
    "sum": (aten.sum.dim_IntList, X, [1]),
    "sum of two": (aten.sum.dim_IntList, X, [0, -1], True),
    "mean": (aten.mean.dim, X, [2]),
    "amax": (aten.amax.default, X, [-1], True),
    "argmax": (aten.argmax.default, X, 1),
    "max": (aten.max.dim, X, 0),
    "topk": (aten.topk.default, X, 2, 1),
    "sort": (aten.sort.default, X, 2),
    "cumsum": (aten.cumsum.default, X, 0),
    "softmax": (aten._softmax.default, X, 2, False),
    "log_softmax": (aten._log_softmax.default, X, 1, False),
    "softmax backward": (aten._softmax_backward_data.default, X, Y, 2, torch.float64),
    "gather": (aten.gather.default, X, 2, I[:, :, :2]),
    "gather along the first": (aten.gather.default, X, 0, I[:1]),
    "scatter": (aten.scatter.src, X, 1, I, Y),
    "scatter of a number": (aten.scatter.value, X, 2, I[:, :, :1], 0.5),
    "scatter_add": (aten.scatter_add.default, X, 0, I, Y),
    "slice": (aten.slice.Tensor, X, 1, 0, 2),
    "select": (aten.select.int, X, 1, 2),
    "index_select": (aten.index_select.default, X, 2, LINE),
    "index": (aten.index.Tensor, X, [None, LINE]),
    "index by a matrix": (aten.index.Tensor, FLAT, [I[0]]),
    "pick": (aten.index.Tensor, FLAT, [torch.arange(3), LINE]),
    "index_put": (aten.index_put.default, X, [LINE], Y, True),
    "index_put by a mask": (aten.index_put.default, X, [X > 0], torch.tensor(2.0, dtype=X.dtype)),
    "slice_scatter": (aten.slice_scatter.default, X, Y[:, :2], 1, 0, 2),
    "select_scatter": (aten.select_scatter.default, X, FLAT, 0, 1),
    "cat": (aten.cat.default, [X, Y], 1),
    "flip": (aten.flip.default, X, [0, 2]),
    "pad": (aten.constant_pad_nd.default, X, [0, 1, 2, 0]),
    "permute": (aten.permute.default, X, [2, 0, 1]),
    "transpose": (aten.transpose.int, X, 0, 2),
    "t": (aten.t.default, FLAT),
    "expand": (aten.expand.default, FLAT, [3, 3, 3]),
    "unsqueeze": (aten.unsqueeze.default, FLAT, 1),
    "squeeze": (aten.squeeze.dim, X[:, :1], 1),
    "new_empty": (aten.new_zeros.default, X, [3, 3, 3]),
}


def traced(op: Any, *args: Any) -> tuple[Node, list[Node]]:
    """The call as a node; the tensors that it reads are placeholders."""
    graph, holes = Graph(), []

    def hole(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.dtype == torch.int64 and value.dim() == 1 and torch.equal(value, torch.arange(len(value))):
            node = graph.call_function(prims.iota.default, (len(value),), {"start": 0, "step": 1})
        else:
            node = graph.placeholder(f"p{len(holes)}")
            holes.append(node)
        node.meta["val"] = value
        return node

    node = graph.call_function(op, tree_map(hole, args))
    node.meta["val"] = op(*args)
    return node, holes


def rows(tags: str, shape: Any) -> Tensor:
    sizes = [s if t == ROW else 1 for s, t in zip(shape, tags)]
    return torch.arange(torch.Size(sizes).numel()).reshape(sizes).expand(shape)


def changed(t: Tensor, at: Tensor) -> Tensor:
    """Other values where the mask says so."""
    other = ~t if t.dtype == torch.bool else (t + 1) % 3 if t.dtype == torch.int64 else t * 1.5 + 7.0
    return torch.where(at, other, t)


@pytest.mark.parametrize("name", CALLS)
def test_rows_depend_on_their_own_row_alone(name):
    """For every choice of row dimensions in every operand: refused, or no other row of the result changes."""
    op, *args = CALLS[name]
    node, holes = traced(op, *args)
    found = fact(node)
    tensors = [h.meta["val"] for h in holes]
    allowed = 0
    for kinds in itertools.product(*(list(itertools.product(ROW + LOCAL, repeat=t.dim())) for t in tensors[:2])):
        tags = {
            h: "".join(ONE if s == 1 else k for k, s in zip(ks, h.meta["val"].shape)) for h, ks in zip(holes, kinds)
        }
        known = {h: t for h, t in tags.items() if ROW in t}
        count = {rows(t, h.meta["val"].shape).max().item() for h, t in known.items()}
        if not known or len(count) > 1:  # rows of different numbers are no one set
            continue
        if holes[0] in known and forward_move(node, known[holes[0]]):  # other rows: test_regions_spaces.py
            continue
        try:
            out = result_tags(node, found, known)
            operand_tags(node, found, out)
        except Crossing:
            continue
        values = tree_leaves(node.meta["val"])
        if ROW not in out or rows(out, values[0].shape).max().item() not in count:
            continue
        allowed += 1
        for row in range(count.pop() + 1):
            new = {h: changed(h.meta["val"], rows(t, h.meta["val"].shape) == row) for h, t in known.items()}
            env = iter([new.get(h, h.meta["val"]) for h in holes])
            again = op(*tree_map(lambda a: next(env) if isinstance(a, Tensor) and not _counts(a) else a, args))
            for before, after in zip(values, tree_leaves(again)):
                others = rows(out, before.shape) != row
                assert torch.equal(before[others], after[others]), (known, out)
    assert allowed


def _counts(a: Tensor) -> bool:
    return a.dtype == torch.int64 and a.dim() == 1 and torch.equal(a, torch.arange(len(a)))


def test_every_rule_of_an_operation_has_a_call_or_a_neighbour():
    """A new rule belongs into CALLS; these are spellings of what is there, or make tensors of nothing."""
    assert len(RULES) > 80 and {call[0] for call in CALLS.values()} - set(RULES) <= {aten.add.Tensor}


@pytest.mark.parametrize(
    "op, args, code",
    [
        (aten.gather.default, (X, 2, I[:2]), "rows-differ"),
        (aten.scatter.src, (X, 2, I[:2], Y), "rows-differ"),
        (aten.scatter.src, (X, 2, I, torch.cat([Y, Y])), "crossing"),
        (aten.sum.default, (X,), "crossing"),
        (aten.sum.dim_IntList, (X, []), "crossing"),
        (aten.rand_like.default, (X,), "random"),
        (aten.native_dropout.default, (X, 0.5, True), "random"),
        (aten.index.Tensor, (X, [LINE, LINE]), "crossing"),
        (aten.index.Tensor, (X, [None, torch.tensor([True, False, True])]), "crossing"),
        (aten.mm.default, (FLAT, FLAT), "escape"),
        (aten.diagonal.default, (FLAT,), "escape"),
    ],
)
def test_no_fact(op, args, code):
    with pytest.raises(Crossing) as found:
        fact(traced(op, *args)[0])
    assert found.value.code == code


def test_arguments_by_position_and_by_keyword_are_the_same():
    node, (x,) = traced(aten.slice.Tensor, X, 1, 0, 2)
    graph = node.graph
    other = graph.call_function(aten.slice.Tensor, (x,), {"dim": 1, "start": 0, "end": 2})
    assert bound(node) == bound(other) and bound(node)["step"] == 1


def test_dimensions_in_a_program():
    """Rows are the first dimension there; an argument that names a row can't be moved."""
    node, (x, _) = traced(aten.gather.default, X, 2, I)
    found = fact(node)
    assert moved_dims(found, node, operand_tags(node, found, "rrl")) == {1: 1}
    assert moved_dims(found, node, operand_tags(node, found, "lrl")) == {1: 2}
    with pytest.raises(Crossing):
        moved_dims(found, node, [(x, "lrr"), (x, "lrr")])


def test_what_counts_rows():
    node, _ = traced(aten.index.Tensor, FLAT, [torch.arange(3), LINE])
    assert counts_rows(node.args[1][0], node.args[0])
    for start, step in ((1, 1), (0, 2)):
        node.args[1][0].kwargs = {"start": start, "step": step}
        assert not counts_rows(node.args[1][0], node.args[0])
