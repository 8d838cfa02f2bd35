"""CUDA C++ without a toolkit: NVRTC, which comes with torch's CUDA builds, and the driver, through ctypes.

Triton 3.6 has no clusters, no multicast and no two warpgroups that take turns on sm_90; where a kernel needs them
it is written in CUDA C++ (hopper.cu). What NVRTC makes of it is kept in Inductor's cache folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import pathlib
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import Union

import torch
from torch import Tensor

_SWIZZLE_128 = 3
_PROMOTE_256 = 3
_TYPES = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}
_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

_thread = threading.local()


Argument = Union[ctypes.Structure, ctypes.c_int]


class TensorMap(ctypes.Structure):
    """CUtensorMap: how the copy engine walks through a matrix."""

    _fields_ = (("bytes", ctypes.c_ubyte * 128),)


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """The library that torch has loaded, or one that the loader finds.

    Raises:
        OSError: there is none.
    """
    major = (torch.version.cuda or "13").split(".")[0]
    for name in (f"libnvrtc.so.{major}", "libnvrtc.so"):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    with contextlib.suppress(ImportError):
        import nvidia

        for folder in nvidia.__path__:
            for path in sorted(pathlib.Path(folder).glob("*/lib/libnvrtc.so.*")):
                for needed in path.parent.glob("libnvrtc-builtins.so.*"):  # it asks for this by name later
                    ctypes.CDLL(str(needed))
                return ctypes.CDLL(str(path))
    raise OSError("libnvrtc is not installed: it comes with torch's CUDA builds, or as nvidia-cuda-nvrtc")


@functools.cache
def _driver() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    pointer, number = ctypes.c_void_p, ctypes.c_uint
    library.cuLaunchKernel.argtypes = (pointer, *(number,) * 7, pointer, pointer, pointer)
    return library


def available() -> bool:
    """True where NVRTC can be loaded; a GPU need not be there."""
    try:
        _nvrtc()
    except OSError:
        return False
    return True


def version() -> tuple[int, int]:
    """Of NVRTC: major, minor."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def compile(source: str, architecture: str = "sm_90a", folder: pathlib.Path | None = None) -> bytes:
    """CUDA C++ to a cubin.

    Args:
        folder: where cubins are kept, by default in Inductor's cache folder.

    Raises:
        RuntimeError: the compiler's errors.
        OSError: no NVRTC.
    """
    if folder is None:
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        folder = pathlib.Path(cache_dir()) / "lce_inductor"
    key = hashlib.sha256(f"{architecture} {list(version())} {source}".encode()).hexdigest()
    path = folder / f"{key}.cubin"
    with contextlib.suppress(OSError):
        return path.read_bytes()
    cubin = _compile(_nvrtc(), source, architecture)
    with contextlib.suppress(OSError):  # a cache that cannot be written is none
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder)
        with os.fdopen(handle, "wb") as file:
            file.write(cubin)
        os.replace(name, path)
    return cubin


def _compile(library: ctypes.CDLL, source: str, architecture: str) -> bytes:
    program = ctypes.c_void_p()
    _check_nvrtc(library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"lce_inductor.cu", 0, None, None))
    try:
        options = [f"--gpu-architecture={architecture}".encode(), b"-std=c++17"]
        failed = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        if failed:
            size = ctypes.c_size_t()
            library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            text = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(program, text)
            raise RuntimeError(f"NVRTC: {text.value.decode(errors='replace')}")
        size = ctypes.c_size_t()
        _check_nvrtc(library.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        cubin = ctypes.create_string_buffer(size.value)
        _check_nvrtc(library.nvrtcGetCUBIN(program, cubin))
        return cubin.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _check_nvrtc(result: int) -> None:
    if result:
        text = _nvrtc().nvrtcGetErrorString
        text.restype = ctypes.c_char_p
        raise RuntimeError(f"NVRTC: {text(result).decode()}")


def _check(result: int, what: str) -> None:
    if result:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(result, ctypes.byref(text))
        raise RuntimeError(f"{what}: {(text.value or b'unknown error').decode()} ({result})")


def load(cubin: bytes, shared_bytes: Mapping[str, int]) -> dict[str, Kernel]:
    """The named functions of a cubin, with the bytes of dynamic shared memory of each, on the current device."""
    need_context()
    module = ctypes.c_void_p()
    _check(_driver().cuModuleLoadData(ctypes.byref(module), cubin), f"loading {', '.join(shared_bytes)}")
    return {name: Kernel(module, name, size) for name, size in shared_bytes.items()}


class Kernel:
    """A function of a loaded module."""

    def __init__(self, module: ctypes.c_void_p, name: str, shared_bytes: int) -> None:
        self._function = ctypes.c_void_p()
        _check(_driver().cuModuleGetFunction(ctypes.byref(self._function), module, name.encode()), f"finding {name}")
        attribute = _driver().cuFuncSetAttribute(self._function, _DYNAMIC_SHARED, shared_bytes)
        _check(attribute, f"{shared_bytes} bytes of shared memory for {name}")
        self._name, self._shared = name, shared_bytes

    def launch(self, blocks: int, threads: int, arguments: Sequence[Argument], stream: int) -> None:
        """On the current context (see need_context); `arguments` are passed by value."""
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        found = _driver().cuLaunchKernel(
            self._function, blocks, 1, 1, threads, 1, 1, self._shared, stream, pointers, None
        )  # fmt: skip
        _check(found, f"launching {self._name}")


def tensor_map(t: Tensor, rows: int, box_rows: int) -> TensorMap:
    """The first `rows` rows of t, [R, C] with 16-byte aligned rows, in boxes of box_rows rows of 128 bytes, swizzled.

    t: bf16, fp16 or fp32. What is outside reads as zeros and is not written.
    """
    return _tensor_map(t.data_ptr(), t.dtype, rows, t.shape[1], t.stride(0), box_rows)


# From step to step tensors are mostly where they were; encoding costs the host more than a launch.
@functools.lru_cache(maxsize=512)
def _tensor_map(address: int, dtype: torch.dtype, rows: int, columns: int, stride: int, box_rows: int) -> TensorMap:
    need_context()
    found, size = TensorMap(), dtype.itemsize
    u64, u32 = ctypes.c_uint64, ctypes.c_uint32
    # A map may be anywhere, the driver's encoder wants its result on 64 bytes.
    space = (ctypes.c_ubyte * 192)()
    aligned = (ctypes.addressof(space) + 63) & ~63
    _check(
        _driver().cuTensorMapEncodeTiled(
            ctypes.c_void_p(aligned), _TYPES[dtype], 2, ctypes.c_void_p(address),
            (u64 * 2)(columns, rows), (u64 * 1)(stride * size),
            (u32 * 2)(128 // size, box_rows), (u32 * 2)(1, 1), 0, _SWIZZLE_128, _PROMOTE_256, 0,
        ),
        f"a tensor map of {rows} x {columns}, {stride} apart",
    )  # fmt: skip
    ctypes.memmove(ctypes.byref(found), aligned, 128)
    return found


def need_context() -> None:
    """Threads of autograd may have a device and no context yet. Looked for once in each."""
    if getattr(_thread, "has_context", False):
        return
    context = ctypes.c_void_p()
    _check(_driver().cuCtxGetCurrent(ctypes.byref(context)), "the current context")
    if not context.value:
        device = torch.cuda.current_device()
        _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "the device's context")
        _check(_driver().cuCtxSetCurrent(context), "setting the context")
    _thread.has_context = True


def current_stream(device: torch.device) -> int:
    """The handle of the device's current stream, without the object that torch.cuda.current_stream makes of it."""
    return torch._C._cuda_getCurrentRawStream(device.index)
