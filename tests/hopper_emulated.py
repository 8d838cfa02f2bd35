"""hopper.py without a GPU: its launches decoded and computed by torch, so that what the host does is tested in CI.

The kernels themselves are compiled by test_hopper.py, and run on a GPU by test_anchored.py.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lce_inductor.kernels import anchored_kernels, hopper, nvrtc, tuning
from lce_inductor.spec.epilogue import Steps, apply_with_slope, flatten


def emulate(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """From here on head_anchored.py takes the kernels of sm_90; the list grows by the name of each launch that did something."""
    launched: list[str] = []

    def kernels(variants: tuple[hopper.Variant, ...], steps: Steps, device: int) -> hopper._Kernels:
        small = {name: RowsKernel(name, steps, launched) for name in hopper._Kernels._fields[1:]}
        return hopper._Kernels(tuple(Product(v, launched) for v in variants), **small)

    monkeypatch.setattr(hopper, "supported", lambda device: True)
    monkeypatch.setattr(
        hopper, "products",
        lambda device, dtype: hopper.Products(*(Product(v, launched) for v in hopper._PRODUCTS[dtype])),
    )  # fmt: skip
    monkeypatch.setattr(tuning, "multiprocessors", lambda device: 6)
    monkeypatch.setattr(hopper, "_kernels", kernels)
    monkeypatch.setattr(hopper, "_prepared", functools.lru_cache(hopper._prepared.__wrapped__))
    monkeypatch.setattr(nvrtc, "tensor_map", tensor_map)
    monkeypatch.setattr(nvrtc, "need_context", lambda: None)
    monkeypatch.setattr(nvrtc, "current_stream", lambda device: 0)
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


class Product:
    """The product of `variant`, in the words of hopper_logits.cuh and hopper_dw.cuh."""

    def __init__(self, variant: hopper.Variant, launched: list[str]) -> None:
        self.variant, self.launched = variant, launched

    def launch(self, blocks: int, threads: int, arguments: Sequence[Any], stream: int) -> None:
        assert blocks % 2 == 0 and blocks > 0 and threads == 384 and stream == 0
        *maps, a = arguments
        product = self.variant.product
        kinds = {"logits": hopper.LogitsArguments, "dx": hopper.DxArguments, "dw": hopper.DwArguments}
        assert type(a) is kinds[product]
        getattr(self, "_" + product)(a, *(m.tensor for m in maps))

    def _dx(self, a: hopper.DxArguments, e: Tensor, weight: Tensor, out: Tensor) -> None:
        self.launched.append("dx")
        assert (a.rows, a.columns) == out.shape and a.inner == len(weight) == e.shape[1] and a.rows == len(e)
        steps = -(-a.inner // hopper.DEPTH)
        assert 0 < a.group <= -(-a.rows // hopper.PAIR) and (a.splits - 1) * a.part < steps <= a.splits * a.part
        tiles = 2 * -(-a.rows // hopper.PAIR) * -(-a.columns // hopper.COLUMNS)
        arrived = _at(a.arrived, tiles, ctypes.c_int, torch.int32)
        assert a.next == a.arrived - 4 and not _at(a.next, 1, ctypes.c_int, torch.int32)
        assert (arrived == a.before).all()
        arrived += a.splits
        out.copy_(e.float() @ weight.float())

    def _dw(self, a: hopper.DwArguments, e: Tensor, xs: Tensor, dw: Tensor) -> None:
        self.launched.append("dw")
        assert (a.rows, a.columns) == dw.shape and a.inner == len(e) == len(xs) and e.shape[1] == len(dw)
        product = e.float().t() @ xs.float()
        dw.copy_(dw + product if a.accumulate else product)

    def _logits(self, a: hopper.LogitsArguments, x: Tensor, weight: Tensor, e_out: Tensor) -> None:
        flags, n, V = self.variant.flags, a.rows, a.columns
        pairs = -(-n // hopper.PAIR)
        assert a.inner == x.shape[1] == weight.shape[1] and len(weight) == V and 0 < a.group <= pairs
        if "REDO" in flags:
            found = _at(a.found, 1 + pairs, ctypes.c_int, torch.int32)
            if not found[0]:
                return
        self.launched.append(" ".join(sorted(flags)))
        rows, tiles = slice(a.row0, a.row0 + n), -(-V // hopper.COLUMNS)
        z = x[rows].float() @ weight.float().t()
        if "PLAIN" in flags:
            e_out[:, :V], e_out[:, V:] = z, 3.0  # beyond the classes: anything
            z = torch.nn.functional.pad(e_out[:, :V].float(), (0, tiles * hopper.COLUMNS - V), value=-torch.inf)
            z = z.view(n, tiles, hopper.COLUMNS)
            high = z.nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(2)
            base = torch.where(high.isinf(), 0.0, high)
            for address, values in ((a.sums, (z - base[..., None]).exp().sum(2)), (a.maxima, high)):
                _at(address, tiles * a.part_stride, ctypes.c_float, torch.float32).view(tiles, -1)[:, :n] = values.t()
            return
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
            for address, padding, reduce in ((a.sums, 0.0, torch.sum), (a.maxima, -torch.inf, torch.amax)):
                values = e if address == a.sums else torch.where(aside | z.isnan(), -torch.inf, z)
                values = torch.nn.functional.pad(values, (0, tiles * hopper.COLUMNS - V), value=padding)
                out = _at(address, tiles * a.part_stride, ctypes.c_float, torch.float32).view(tiles, a.part_stride)
                out[:, :n][:, wanted] = reduce(values.view(n, tiles, hopper.COLUMNS), 2).t()[:, wanted]
        if "STORE" in flags:
            stored = e if slope is None else e * slope
            assert e_out.shape[0] == n
            e_out[:, :V][wanted] = stored.to(e_out.dtype)[wanted]
            e_out[:, V:][wanted] = 0


class RowsKernel:
    """A kernel of hopper_rows.cuh, by the one of the same purpose in anchored_kernels.py."""

    def __init__(self, name: str, steps: Steps, launched: list[str]) -> None:
        self.name, self.steps, self.launched = name, flatten(steps), launched

    def launch(self, blocks: int, threads: int, arguments: Sequence[Any], stream: int) -> None:
        a, *flags = arguments
        assert type(a) is hopper.RowsArguments and stream == 0
        launch = getattr(self, "_" + self.name)
        assert launch(a, *(bool(f.value) for f in flags)) == blocks
        self.launched.append(self.name)

    def _anchors(self, a: Any) -> int:
        _at(a.marked, a.marks, ctypes.c_int, torch.int32).zero_()
        anchored_kernels.anchor_kernel[(a.N,)](
            _rows(a.x, a.N, a.stride_x, a.H), a.stride_x, _rows(a.weight, a.V, a.stride_w, a.H), a.stride_w,
            _f32(a.bias, a.V), _target(a), a.stride_t, a.V, a.H, _f32(a.anchor, a.N), _f32(a.target_logit, a.N),
            _f32(a.raw, a.N), _f32(a.class_sum, a.H), _f32(a.sum_logits, a.N), _f32(a.shift, 2),
            SAMPLES=a.samples, STEPS=self.steps, BLOCK_H=64,
        )  # fmt: skip
        return -(-a.N // 8)

    def _normalise(self, a: Any, known: bool, redo: bool) -> int:
        count = a.tiles * a.part_stride
        found = None if known else _at(a.found, 1 + -(-a.rows // hopper.PAIR), ctypes.c_int, torch.int32)
        anchored_kernels.normalise_kernel[(-(-a.rows // 8),)](
            _f32(a.sums, count), _f32(a.maxima, count), a.part_stride, a.tiles, _f32(a.row_max, a.rows),
            _at(a.flag, a.rows, ctypes.c_int, torch.int32), found, _f32(a.anchor, a.N), _f32(a.raw, a.N),
            _target(a), a.stride_t, _f32(a.lse, a.N),
            *_strided(a.g_lse, a.N, a.stride_gl), *_strided(a.g_slope, a.N, a.stride_gs),
            *_strided(a.g_target, a.N, a.stride_gt), _f32(a.u, a.rows), _f32(a.d, a.N), a.rows, a.row0, a.V,
            STEPS=self.steps, KNOWN=known, GRAD=a.d is not None, REDO=redo, PAIR=hopper.PAIR, BLOCK_N=8, BLOCK_T=128,
        )  # fmt: skip
        return -(-a.rows // 32)

    def _spread(self, a: Any) -> int:
        anchored_kernels.spread_kernel[(a.rows, -(-a.H // 64))](
            _f32(a.product, a.rows * a.H), _rows(a.e, a.rows, a.row_stride, a.V), a.row_stride,
            _rows(a.x, a.N, a.stride_x, a.H), a.stride_x, _rows(a.weight, a.V, a.stride_w, a.H), a.stride_w,
            _target(a), a.stride_t, _f32(a.u, a.rows), _f32(a.d, a.N), *_strided(a.g_sum, a.N, a.stride_g),
            _f32(a.class_sum, a.H), _rows(a.dx, a.N, a.H, a.H), _rows(a.xs, a.rows, a.H, a.H), a.row0, a.V, a.H,
            TAIL=a.tail, SLOPE=a.slope, BLOCK_H=64,
        )  # fmt: skip
        return -(-a.rows // 8)

    def _collect(self, a: Any) -> int:
        anchored_kernels.collect_kernel[(a.N, -(-a.H // 64))](
            _at(a.key, a.N, ctypes.c_int, torch.int32), _at(a.order, a.N, ctypes.c_longlong, torch.int64),
            _at(a.ends, a.N, ctypes.c_longlong, torch.int64), _rows(a.x, a.N, a.stride_x, a.H), a.stride_x,
            _f32(a.d, a.N), _f32(a.dw, a.V * a.H), _f32(a.db, a.V), a.V, a.H, BLOCK_R=8, BLOCK_H=64,
        )  # fmt: skip
        return -(-a.N // 8) * -(-a.H // 256)


def _f32(address: int | None, count: int) -> Tensor | None:
    return None if address is None else _at(address, count, ctypes.c_float, torch.float32)


def _strided(address: int | None, count: int, stride: int) -> tuple[Tensor | None, int]:
    return _f32(address, 1 + (count - 1) * stride), stride


def _rows(address: int | None, rows: int, stride: int, columns: int) -> Tensor | None:
    if address is None:
        return None
    return _at(address, (rows - 1) * stride + columns, ctypes.c_short, torch.bfloat16)


def _target(a: Any) -> Tensor | None:
    count = 1 + (a.N - 1) * a.stride_t
    return None if a.target is None else _at(a.target, count, ctypes.c_longlong, torch.int64)
