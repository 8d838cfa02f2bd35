"""The known softmax: where the forward has left lse, dZ needs no more of a row than is known before the product.

    dZ = g_lse exp(Y - lse) + g_sum class_weight, and g_target more at the target

So the product's own epilogue writes it, in 16 bits, and no logits are there: of bf16 heads on sm_90, in chunks of rows
(head_cuda.py) or blocks of classes (head_classes.py). The logits are not rounded, as lse's were not: it is for what the
anchored softmax has computed the forward of.
"""

from __future__ import annotations

from typing import overload

from torch import Tensor

from ..kernels import hopper, nvrtc
from ..spec.statistics import HeadArgs, RowGrads
from .products import on_sectors


class Known:
    """What all pieces share. a: the head as their products take it, whose targets the kernel finds itself."""

    def __init__(self, a: HeadArgs, rows: hopper.RowGradients, kernel: nvrtc.Kernel) -> None:
        self.a, self._rows, self._kernel = a, rows, kernel

    @classmethod
    def of(cls, a: HeadArgs, lse: Tensor, grads: RowGrads) -> Known | None:
        """None where NVRTC does not make that product after all."""
        target, g_target = (None if t is None or not t.shape[1] else t[:, 0] for t in (a.target, grads.target))
        here = a.bias is not None, target is not None and g_target is not None, grads.sum is not None
        kernel = hopper.gradients(a.x.device, a.x.dtype, *here, a.epilogue)
        if kernel is None:
            return None
        assert grads.lse is not None
        rows = hopper.RowGradients(_f32(lse), _f32(grads.lse), target, _f32(g_target), _f32(grads.sum))
        bias, class_weight = _f32(a.bias), _f32(a.class_weight)
        return cls(a._replace(x=on_sectors(a.x), bias=bias, class_weight=class_weight, target=None), rows, kernel)

    def gradient(self, z: Tensor, row0: int = 0, block: HeadArgs | None = None, class0: int = 0) -> None:
        """dZ of rows row0 ... row0 + len(z) into z; block: the classes of `a` from class0 on, None for all."""
        b = block or self.a
        hopper.launch_gradients(
            self._kernel, z, self.a.x, b.weight, self._rows, row0, class0, b.bias, b.class_weight
        )  # fmt: skip


@overload
def _f32(t: Tensor) -> Tensor: ...
@overload
def _f32(t: None) -> None: ...
def _f32(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()
