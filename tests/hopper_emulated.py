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
    monkeypatch.setattr(hopper, "_try", lambda variants, device: kernels(variants, (), 0))
    monkeypatch.setattr(hopper, "gradients", functools.lru_cache(hopper.gradients.__wrapped__))
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
        n = _live(a.rows, a)
        if n:  # a chunk that is not full is the last one with rows that count
            assert (arrived == a.before).all()
            arrived += a.splits
        out[:n] = e[:n].float() @ weight.float()

    def _dw(self, a: hopper.DwArguments, e: Tensor, xs: Tensor, dw: Tensor) -> None:
        self.launched.append("dw")
        assert (a.rows, a.columns) == dw.shape and a.inner == len(e) == len(xs) and e.shape[1] == len(dw)
        n = max(_live(a.inner, a), a.row0 == 0)
        if n == 0:
            return
        n = min(-(-n // hopper.DEPTH) * hopper.DEPTH, a.inner)
        product = e[:n].float().t() @ xs[:n].float()
        dw.copy_(dw + product if a.accumulate else product)

    def _logits(self, a: hopper.LogitsArguments, x: Tensor, weight: Tensor, e_out: Tensor) -> None:
        flags, n, V = self.variant.flags, a.rows, a.columns
        live = _live(n, a)
        if max(live, a.row0 == 0) == 0:
            return
        pairs = -(-n // hopper.PAIR)
        assert a.inner == x.shape[1] == weight.shape[1] and len(weight) == V and 0 < a.group <= pairs
        if "REDO" in flags:
            found = _at(a.found, 1 + pairs, ctypes.c_int, torch.int32)
            if not found[0]:
                return
        self.launched.append(" ".join(sorted(flags)))
        if "GRADIENT" in flags:
            return self._gradients(a, x, weight, e_out)
        tiles = -(-V // hopper.COLUMNS)
        rows = torch.arange(a.row0, a.row0 + n)
        if a.order:
            rows[:live] = _at(a.order + 4 * a.row0, live, ctypes.c_int, torch.int32).long() if live else rows[:0]
            rows[live:] = rows[:1] if live else 0
        N = int(rows.max()) + 1
        z = x[a.x_row0 : a.x_row0 + n].float() @ weight.float().t()
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
        anchor = _at(a.anchor, N, ctypes.c_float, torch.float32)[rows].clone()
        wanted = torch.ones(n, dtype=torch.bool)
        if "REDO" in flags:
            flag = _at(a.flag, n, ctypes.c_int, torch.int32) > 0
            high = anchor.maximum(_at(a.row_max, n, ctypes.c_float, torch.float32))
            anchor = torch.where(flag, torch.where(high.abs() < torch.inf, high, 0.0), anchor)
            wanted = found[1:].repeat_interleave(hopper.PAIR)[:n] > 0
        anchor[live:] = torch.inf
        aside = torch.zeros(n, V, dtype=torch.bool)
        if "HAS_TARGET" in flags:
            t = _at(a.target, 1 + (N - 1) * a.stride_t, ctypes.c_longlong, torch.int64)[:: a.stride_t][rows]
            some = (t >= 0) & (t < V)
            aside[some, t[some]] = True
        aside[live:] = False
        e = torch.where(aside, 0.0, (z - anchor[:, None]).exp())
        written = torch.arange(n) < max(-(-live // hopper.PAIR), 1) * hopper.PAIR
        here = torch.arange(n) < live
        if "SUM" in flags:
            for address, padding, reduce in ((a.sums, 0.0, torch.sum), (a.maxima, -torch.inf, torch.amax)):
                values = e if address == a.sums else torch.where(aside | z.isnan(), -torch.inf, z)
                values = torch.nn.functional.pad(values, (0, tiles * hopper.COLUMNS - V), value=padding)
                out = _at(address, tiles * a.part_stride, ctypes.c_float, torch.float32).view(tiles, a.part_stride)
                out[:, :n][:, wanted & here] = reduce(values.view(n, tiles, hopper.COLUMNS), 2).t()[:, wanted & here]
        if "STORE" in flags:
            stored = e if slope is None else e * slope
            assert e_out.shape[0] == n
            assert not stored[live:][written[live:]].any()
            wanted &= written
            e_out[:, :V][wanted] = stored.to(e_out.dtype)[wanted]
            e_out[:, V:][wanted] = 0

    def _gradients(self, a: hopper.LogitsArguments, x: Tensor, weight: Tensor, out: Tensor) -> None:
        flags, n, V = self.variant.flags, a.rows, a.columns
        assert n == len(out) and V <= out.shape[1] < V + 64 and x.dtype == weight.dtype == out.dtype
        assert a.x_row0 == a.row0
        assert ("HALF" in flags) == (x.dtype == torch.float16) and not a.counted

        def of(address: int | None, flag: str, count: int = 0) -> Tensor:
            assert flag in flags
            found = _at(address, count or len(x), ctypes.c_float, torch.float32)
            return found if count else found[a.row0 : a.row0 + n]

        z = x[a.row0 : a.row0 + n].float() @ weight.float().t()
        if "HAS_BIAS" in flags:
            z = z + of(a.bias, "HAS_BIAS", V)
        z, slope = apply_with_slope(self.variant.steps, z)
        lse = of(a.lse, "GRADIENT")[:, None]
        g = of(a.g_lse, "GRADIENT")[:, None] * (z - lse).exp()
        if "HAS_BIAS" in flags:
            g = torch.where((z == -torch.inf) & lse.isfinite(), 0.0, g)
        if "HAS_SUM" in flags:
            g_sum = of(a.g_sum, "HAS_SUM")[:, None]
            g = g + g_sum * (of(a.class_weight, "HAS_SUM", V) if a.class_weight else 1)
        if "HAS_TARGET" in flags:
            target = _at(a.target, 1 + (len(x) - 1) * a.stride_t, ctypes.c_longlong, torch.int64)[:: a.stride_t or 1]
            columns = target.expand(len(x))[a.row0 : a.row0 + n, None] - a.class0
            g = g + torch.where(columns == torch.arange(V), of(a.g_target, "HAS_TARGET")[:, None], 0.0)
        out[:, :V], out[:, V:] = g if slope is None else g * slope, 3.0  # beyond the classes: anything


class RowsKernel:
    """A kernel of hopper_rows.cuh, by the one of the same purpose in anchored_kernels.py."""

    def __init__(self, name: str, steps: Steps, launched: list[str]) -> None:
        self.name, self.steps, self.launched = name, flatten(steps), launched

    def launch(self, blocks: int, threads: int, arguments: Sequence[Any], stream: int) -> None:
        a, *flags = arguments
        assert type(a) is hopper.RowsArguments and stream == 0
        over = {
            "anchors": (a.N, 8),
            "count": (a.N, 8),
            "gather": (a.rows, 8),
            "spread": (a.rows, 8),
            "normalise": (a.rows, 32),
        }
        n, each = over.get(self.name, (1, 1))
        assert blocks == (-(-a.N // 8) * -(-a.H // 256) if self.name == "collect" else -(-n // each))
        self.launched.append(self.name)
        launch = getattr(self, "_" + self.name)
        if not a.packed or self.name in ("count", "pack", "gather", "collect"):
            launch(a, *(bool(f.value) for f in flags))
        elif self.name == "anchors" and not _at(a.counted, 1, ctypes.c_int, torch.int32):
            _at(a.marked, a.marks, ctypes.c_int, torch.int32).zero_()
        elif self.name == "anchors" or _live(a.rows, a):
            of_rows = Packed(a, self.name == "anchors")
            launch(of_rows, *(bool(f.value) for f in flags))
            of_rows.put_back()
        elif self.name == "spread":
            _zero_behind(a, 0)

    def _count(self, a: Any) -> None:
        counts = torch.zeros(a.N, dtype=torch.bool)
        if a.needed:
            counts |= _at(a.needed, a.N, ctypes.c_ubyte, torch.uint8).bool()
        for g in ("lse", "slope", "target", "sum"):
            stride = getattr(a, "stride_" + {"lse": "gl", "slope": "gs", "target": "gt", "sum": "g"}[g])
            if address := getattr(a, "g_" + g):
                counts |= _f32(address, 1 + (a.N - 1) * stride)[:: stride or 1].expand(a.N) != 0
        x = _rows(a.x, a.N, a.stride_x, a.H).as_strided((a.N, a.H), (a.stride_x, 1)).float().abs()
        counts |= ~(x <= 2.0**40).all(1)
        _at(a.counts, a.N, ctypes.c_int, torch.int32).copy_(counts)
        for address in (a.lse, a.target_logit, a.sum_logits):
            if address:
                _f32(address, a.N)[~counts] = 0

    def _pack(self, a: Any) -> None:
        rows = _at(a.counts, a.N, ctypes.c_int, torch.int32).nonzero()[:, 0]
        packed = _at(a.packed, a.N, ctypes.c_int, torch.int32)
        packed.fill_(1 << 30)
        packed[: len(rows)] = rows
        _at(a.counted, 1, ctypes.c_int, torch.int32).fill_(len(rows))

    def _gather(self, a: Any) -> None:
        n = _live(a.rows, a)
        end = min(max(-(-n // hopper.PAIR), a.row0 == 0) * hopper.PAIR, a.rows)
        to = _rows(a.x_packed, a.rows, a.x_apart, a.H).as_strided((a.rows, a.H), (a.x_apart, 1))
        to[:end] = 0
        if n:
            rows = _at(a.packed + 4 * a.row0, n, ctypes.c_int, torch.int32)
            to[:n] = _rows(a.x, a.N, a.stride_x, a.H).as_strided((a.N, a.H), (a.stride_x, 1))[rows]

    def _anchors(self, a: Any) -> None:
        _at(a.marked, a.marks, ctypes.c_int, torch.int32).zero_()
        anchored_kernels.anchor_kernel[(a.N,)](
            _rows(a.x, a.N, a.stride_x, a.H), a.stride_x, _rows(a.weight, a.V, a.stride_w, a.H), a.stride_w,
            _f32(a.bias, a.V), _target(a), a.stride_t, a.V, a.H, _f32(a.anchor, a.N), _f32(a.target_logit, a.N),
            _f32(a.raw, a.N), _f32(a.class_sum, a.H), _f32(a.sum_logits, a.N), _f32(a.shift, 2),
            SAMPLES=a.samples, STEPS=self.steps, BLOCK_H=64,
        )  # fmt: skip

    def _normalise(self, a: Any, known: bool, redo: bool) -> None:
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

    def _spread(self, a: Any) -> None:
        anchored_kernels.spread_kernel[(a.rows, -(-a.H // 64))](
            _f32(a.product, a.rows * a.H), _rows(a.e, a.rows, a.row_stride, a.V), a.row_stride,
            _rows(a.x, a.N, a.stride_x, a.H), a.stride_x, _rows(a.weight, a.V, a.stride_w, a.H), a.stride_w,
            _target(a), a.stride_t, _f32(a.u, a.rows), _f32(a.d, a.N), *_strided(a.g_sum, a.N, a.stride_g),
            _f32(a.class_sum, a.H), _rows(a.dx, a.N, a.H, a.H), _rows(a.xs, a.rows, a.H, a.H), a.row0, a.V, a.H,
            TAIL=a.tail, SLOPE=a.slope, BLOCK_H=64,
        )  # fmt: skip
        if isinstance(a, Packed):
            _zero_behind(a.of, a.rows)

    def _collect(self, a: Any) -> None:
        anchored_kernels.collect_kernel[(a.N, -(-a.H // 64))](
            _at(a.key, a.N, ctypes.c_int, torch.int32), _at(a.order, a.N, ctypes.c_longlong, torch.int64),
            _at(a.ends, a.N, ctypes.c_longlong, torch.int64), _rows(a.x, a.N, a.stride_x, a.H), a.stride_x,
            _f32(a.d, a.N), _f32(a.dw, a.V * a.H), _f32(a.db, a.V), a.V, a.H, BLOCK_R=8, BLOCK_H=64,
        )  # fmt: skip


def _live(rows: int, a: Any) -> int:
    """Rows of a launch that count."""
    if not a.counted:
        return rows
    return max(min(rows, int(_at(a.counted, 1, ctypes.c_int, torch.int32)) - a.row0), 0)


def _zero_behind(a: Any, n: int) -> None:
    end = min(max(-(-n // hopper.DEPTH), a.row0 == 0) * hopper.DEPTH, a.rows)
    if a.xs:
        _rows(a.xs, a.rows, a.H, a.H).view(a.rows, a.H)[n:end] = 0


class Packed:
    """Arguments with the rows that count one after another, in copies that go back where they came from."""

    _STRIDES = {"x": "x", "target": "t", "g_lse": "gl", "g_slope": "gs", "g_target": "gt", "g_sum": "g"}
    _KINDS = {
        "x": (ctypes.c_short, torch.bfloat16),
        "dx": (ctypes.c_short, torch.bfloat16),
        "target": (ctypes.c_longlong, torch.int64),
    }

    def __init__(self, a: Any, whole: bool) -> None:
        for name, _ in a._fields_:
            setattr(self, name, getattr(a, name))
        row0, rows = (0, a.N) if whole else (a.row0, a.rows)
        n = max(min(rows, int(_at(a.counted, 1, ctypes.c_int, torch.int32)) - row0), 0)
        self.of, self.N, self.rows, self.row0, self._kept = a, n, n, 0, []
        index = (
            _at(a.packed + 4 * row0, n, ctypes.c_int, torch.int32).long() if n else torch.zeros(0, dtype=torch.int64)
        )
        for name in (
            "x",
            "target",
            "anchor",
            "raw",
            "target_logit",
            "sum_logits",
            "lse",
            "d",
            "dx",
            *list(self._STRIDES)[2:],
        ):
            if not getattr(a, name):
                continue
            stride = (
                a.H if name == "dx" else getattr(a, "stride_" + self._STRIDES[name]) if name in self._STRIDES else 1
            )
            columns = a.H if name in ("x", "dx") else 1
            kind, dtype = self._KINDS.get(name, (ctypes.c_float, torch.float32))
            flat = _at(getattr(a, name), (a.N - 1) * stride + columns, kind, dtype)
            whole_of = flat.as_strided((a.N, columns), (stride, 1))
            copy = whole_of[index]
            self._kept.append((name, whole_of, copy, index))
            setattr(self, name, copy.data_ptr())
            if name in self._STRIDES:
                setattr(self, "stride_" + self._STRIDES[name], columns)

    def put_back(self) -> None:
        for name, whole_of, copy, index in self._kept:
            if name in ("anchor", "raw", "target_logit", "sum_logits", "lse", "d", "dx"):
                whole_of[index] = copy


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
