"""hopper.py without a GPU: its launches decoded and computed by torch, so that what the host does is tested in CI.

The kernels themselves are compiled by test_hopper.py, and run on a GPU by test_anchored.py.
"""

from __future__ import annotations

import ctypes
import types
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lce_inductor.kernels import hopper, nvrtc
from lce_inductor.ops.epilogue import apply_with_slope


def emulate(monkeypatch: pytest.MonkeyPatch, own_dw: bool = False) -> list[str]:
    """From here on anchored.py takes the kernels of sm_90; the list grows by the name of each launch that did something."""
    from lce_inductor.kernels import anchored

    launched: list[str] = []
    monkeypatch.setattr(hopper, "supported", lambda device: True)
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: 6)
    monkeypatch.setattr(hopper, "_kernels", lambda variants, device: tuple(Kernel(v, launched) for v in variants))
    monkeypatch.setattr(hopper, "_kernel", lambda variant, device: Kernel(variant, launched))
    monkeypatch.setattr(nvrtc, "tensor_map", tensor_map)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=0))
    if own_dw:
        monkeypatch.setattr(anchored, "OWN_DW", frozenset({None}))  # the interpreter has no capability
    return launched


def tensor_map(t: Tensor, rows: int, box_rows: int) -> nvrtc.TensorMap:
    """What the driver would refuse is refused; the tensor goes with it."""
    assert t.stride(1) == 1 and t.stride(0) * t.itemsize % 16 == 0 and t.data_ptr() % 16 == 0
    assert 0 < rows <= len(t) and 0 < box_rows <= 256
    found = nvrtc.TensorMap()
    found.tensor = t[:rows]
    return found


def _at(address: int | None, count: int, kind: Any, dtype: torch.dtype) -> Tensor:
    """What a kernel sees behind a pointer."""
    assert address
    return torch.frombuffer((kind * count).from_address(address), dtype=dtype)


class Kernel:
    """The product of `variant`, in the words of hopper_logits.cuh and hopper_dw.cuh."""

    def __init__(self, variant: hopper.Variant, launched: list[str]) -> None:
        self.variant, self.launched = variant, launched

    def launch(self, blocks: int, threads: int, arguments: Sequence[Any], stream: int) -> None:
        assert blocks % 2 == 0 and blocks > 0 and threads == 384 and stream == 0
        *maps, a = arguments
        assert type(a) is (hopper.DwArguments if self.variant.is_dw else hopper.LogitsArguments)
        (self._dw if self.variant.is_dw else self._logits)(a, *(m.tensor for m in maps))

    def _dw(self, a: hopper.DwArguments, e: Tensor, xs: Tensor, dw: Tensor) -> None:
        self.launched.append("dw")
        assert (a.rows, a.columns) == dw.shape and a.inner == len(e) == len(xs) and e.shape[1] == len(dw)
        product = e.float().t() @ xs.float()
        dw.copy_(dw + product if a.accumulate else product)

    def _logits(self, a: hopper.LogitsArguments, x: Tensor, weight: Tensor, e_out: Tensor) -> None:
        flags, n, V = self.variant.flags, a.rows, a.columns
        pairs = -(-n // hopper.PAIR)
        assert a.inner == x.shape[1] == weight.shape[1] and len(weight) == V and 0 < a.group <= pairs
        found = _at(a.found, 1 + pairs, ctypes.c_int, torch.int32)
        if "REDO" in flags and not found[0]:
            return
        self.launched.append(" ".join(sorted(flags)))
        rows = slice(a.row0, a.row0 + n)
        z = x[rows].float() @ weight.float().t()
        if "HAS_BIAS" in flags:
            z = z + _at(a.bias, V, ctypes.c_float, torch.float32)
        z, slope = apply_with_slope(self.variant.steps, z)
        anchor = _at(a.anchor, len(x), ctypes.c_float, torch.float32)[rows].clone()
        wanted = torch.ones(n, dtype=torch.bool)
        if "REDO" in flags:
            flag = _at(a.flag, n, ctypes.c_int, torch.int32) > 0
            high = anchor.maximum(_at(a.row_max, n, ctypes.c_float, torch.float32))
            anchor = torch.where(flag, torch.where(high.abs() < torch.inf, high, 0.0), anchor)
            wanted = found[1:].repeat_interleave(hopper.PAIR)[:n] > 0
        aside = torch.zeros(n, V, dtype=torch.bool)
        if "HAS_TARGET" in flags:
            t = _at(a.target, 1 + (len(x) - 1) * a.stride_t, ctypes.c_longlong, torch.int64)[:: a.stride_t][rows]
            some = (t >= 0) & (t < V)
            aside[some, t[some]] = True
        e = torch.where(aside, 0.0, (z - anchor[:, None]).exp())
        if "SUM" in flags:
            tiles = -(-V // hopper.COLUMNS)
            for address, padding, reduce in ((a.sums, 0.0, torch.sum), (a.maxima, -torch.inf, torch.amax)):
                values = e if address == a.sums else torch.where(aside | z.isnan(), -torch.inf, z)
                values = torch.nn.functional.pad(values, (0, tiles * hopper.COLUMNS - V), value=padding)
                out = _at(address, tiles * a.part_stride, ctypes.c_float, torch.float32).view(tiles, a.part_stride)
                out[:, :n][:, wanted] = reduce(values.view(n, tiles, hopper.COLUMNS), 2).t()[:, wanted]
        if "STORE" in flags:
            stored = torch.where(e == 0, 0.0, e * slope) if slope is not None else e
            assert e_out.shape[0] == n
            e_out[:, :V][wanted] = stored.to(e_out.dtype)[wanted]
            e_out[:, V:][wanted] = 0
