"""What the launches of one call of the anchored softmax share, as tensors and numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec.epilogue import Steps
from ..spec.statistics import RowGrads


class Call:
    """A head and where its results go; rows means rows of a chunk. None is what a call does not need.

    Attributes:
        N, H, V: sizes. rows, chunks: of the plan; the last chunk may have fewer rows. tiles: of the first product's
            columns.
        x, weight, bias, target, stride_t: [N, H], [V, H], [V] in fp32, [N] with that stride.
        steps, slope: the epilogue, and its derivative where sums of logits have a gradient (it is affine then).
        samples: classes that a row without a target looks at for its anchor.
        store: is there room for a chunk's exponentials? known: is lse known beforehand?
        packs: are only rows that count multiplied? needed: bool [N] or None, those that do whatever comes in.
            x_packed: [rows, H], x of a chunk's.
        lse, d: [N], d as the kernels say. target_logit: [N, 1]. sum_logits: [N].
        class_sum, shift: [H] and [2], for the rows' sums of logits.
        grads: of the statistics, in fp32.
        e: [rows, row stride], E of a chunk. product: [rows, H], E @ weight. xs: [rows, H], u x.
        dx, dw, db: [N, H], [V, H] and [V].
    """

    N: int
    H: int
    V: int
    rows: int
    chunks: int
    tiles: int
    samples: int
    stride_t: int
    store: bool
    known: bool
    packs: bool
    steps: Steps
    slope: float
    grads: RowGrads
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor | None
    needed: Tensor | None
    x_packed: Tensor | None
    lse: Tensor | None
    target_logit: Tensor | None
    sum_logits: Tensor | None
    class_sum: Tensor | None
    shift: Tensor | None
    d: Tensor | None
    e: Tensor | None
    product: Tensor | None
    xs: Tensor | None
    dx: Tensor | None
    dw: Tensor | None
    db: Tensor | None

    def f32(self, *shape: int) -> Tensor:
        """Memory on the device of x."""
        return self.x.new_empty(shape, dtype=torch.float32)
