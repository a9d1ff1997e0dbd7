"""crc32c of memory as it lies, at the speed of the memory.

A checksum of every extent costs nothing only if it runs at 10 GB/s and more, on mapped memory without a copy, and
without the interpreter's lock. ISA-L does (through ctypes; a library of the system, or the one inside pyeclib's
wheel). google-crc32c, which zarr needs anyway, is next: its library through ctypes, and where that is not to be found
its Python face, which copies.
"""

import ctypes
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Memory: TypeAlias = bytes | bytearray | memoryview | NDArray[np.uint8]
"""contiguous memory"""

_Engine: TypeAlias = Callable[[NDArray[np.uint8], int], int]
_PROBE, _PROBE_CRC = b"123456789", 0xE3069283  # the check value of the algorithm
_ONES = 0xFFFFFFFF
_AT_ONCE = 1 << 30  # ISA-L counts bytes in an int


def crc32c(data: Memory, value: int = 0) -> int:
    """Checksum of ``data``; ``value`` is that of what comes before it."""
    return engine()[1](np.frombuffer(data, np.uint8), value) if len(data) else value


@cache
def engine() -> tuple[str, _Engine]:
    """Name and function of the fastest engine of this machine that computes the right thing."""
    for name, function in _engines():
        if function(np.frombuffer(_PROBE, np.uint8), 0) == _PROBE_CRC:
            return name, function
    raise AssertionError("google-crc32c gives a wrong checksum")


def _engines() -> Iterator[tuple[str, _Engine]]:
    for path in ("libisal.so.2", *_libraries("pyeclib", "libisal")):
        if function := _symbol(path, "crc32_iscsi"):
            yield "isal", _isal(function)
    for path in _libraries("google-crc32c", "libcrc32c"):
        if function := _symbol(path, "crc32c_extend"):
            yield "google-crc32c", _google(function)
    yield "google-crc32c, copying", _copying


def _libraries(distribution: str, stem: str) -> Iterator[str]:
    """Shared libraries inside an installed wheel, whose names are the wheel's private affair."""
    try:
        listed = files(distribution) or []
    except PackageNotFoundError:
        return
    yield from (str(path.locate()) for path in listed if path.name.startswith(stem) and ".so" in path.name)


def _symbol(path: str, name: str) -> Any:
    try:
        return getattr(ctypes.CDLL(path), name)
    except (OSError, AttributeError):  # another architecture, another version
        return None


def _isal(function: Any) -> _Engine:
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_int, ctypes.c_uint), ctypes.c_uint

    def run(data: NDArray[np.uint8], value: int) -> int:
        value ^= _ONES  # ISA-L leaves both inversions to its callers
        for start in range(0, data.size, _AT_ONCE):
            value = function(data.ctypes.data + start, min(_AT_ONCE, data.size - start), value)
        return value ^ _ONES

    return run


def _google(function: Any) -> _Engine:
    function.argtypes, function.restype = (ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_uint32

    def run(data: NDArray[np.uint8], value: int) -> int:
        return int(function(value, data.ctypes.data, data.size))

    return run


def _copying(data: NDArray[np.uint8], value: int) -> int:
    import google_crc32c

    for start in range(0, data.size, 1 << 20):
        value = google_crc32c.extend(value, data[start : start + (1 << 20)].tobytes())
    return value
