"""What the host gives to the kernels for sm_90: structs as C lays them out, and assertions for the kernels' text."""

from __future__ import annotations

import ctypes


def _fields(text: str) -> tuple[tuple[str, type], ...]:
    """Fields of a struct in the order of the .cuh file, given as "name name kind, name kind"."""
    kinds = {"int": ctypes.c_int, "i64": ctypes.c_longlong, "ptr": ctypes.c_void_p, "float": ctypes.c_float}
    return tuple((name, kinds[kind]) for names, kind in (part.rsplit(" ", 1) for part in text.split(", "))
                 for name in names.split(" "))  # fmt: skip


class LogitsArguments(ctypes.Structure):
    """`Arguments` of hopper_logits.cuh."""

    _fields_ = _fields(
        "rows columns inner row0 group int, anchor bias target ptr, stride_t i64, sums maxima ptr, part_stride i64, "
        "row_max flag found ptr, x_row0 int, order counted ptr, class0 int, lse g_lse g_target g_sum class_weight ptr"
    )


class DwArguments(ctypes.Structure):
    """`Arguments` of hopper_dw.cuh."""

    _fields_ = _fields("rows columns inner group accumulate row0 int, counted ptr")


class DxArguments(ctypes.Structure):
    """`Arguments` of hopper_dx.cuh."""

    _fields_ = _fields("rows columns inner group splits part before row0 int, counted next arrived ptr")


class RowsArguments(ctypes.Structure):
    """`Arguments` of hopper_rows.cuh."""

    _fields_ = _fields(
        "N H V row0 rows samples tiles marks int, x weight ptr, stride_x stride_w i64, bias target ptr, stride_t i64, "
        "anchor raw target_logit class_sum shift sum_logits sums maxima ptr, part_stride i64, "
        "row_max flag found marked lse g_lse g_slope g_target g_sum ptr, stride_gl stride_gs stride_gt stride_g i64, "
        "u d product e ptr, row_stride i64, tail int, slope float, dx xs dw db key order ends ptr, "
        "needed counts packed counted x_packed ptr, x_apart i64"
    )


def assertions(name: str, struct: type[ctypes.Structure]) -> str:
    """C++ that compiles only if its struct `name` has the fields of `struct`, of the same sizes in the same places."""
    lines = [f'static_assert(sizeof({name}) == {ctypes.sizeof(struct)}, "the host has another size of {name}");']
    # NVRTC 13.0, which comes with torch 2.11, takes no type in __builtin_offsetof; 13.5 does.
    lines.append("#if __CUDACC_VER_MAJOR__ > 13 || (__CUDACC_VER_MAJOR__ == 13 && __CUDACC_VER_MINOR__ >= 5)")
    for field, _ in struct._fields_:  # type: ignore[misc]
        at, wrong = getattr(struct, field), f'"the host has another place or size of {name}::{field}"'
        same = f"__builtin_offsetof({name}, {field}) == {at.offset} && sizeof({name}::{field}) == {at.size}"
        lines.append(f"static_assert({same}, {wrong});")
    lines.append("#endif")
    return "\n".join(lines) + "\n"
