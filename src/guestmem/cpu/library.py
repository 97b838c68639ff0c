"""libguestmem_cpu.so: the CPU in C (`native/cpu.h`), and its functions by ctypes."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

_P, _U64, _U32, _INT, _BOOL = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_int, ctypes.c_bool

MODE_SLICES, MODE_SERIAL, MODE_PARALLEL = 0, 1, 2


class NoLibrary(RuntimeError):
    """Guests cannot be executed: the library was not built."""

    def __init__(self) -> None:
        super().__init__(
            "guests cannot be executed: guestmem was installed without a C compiler, or without unicorn 2.1.4; "
            "see guestmem doctor"
        )


def library_path() -> str:
    """Raises: NoLibrary."""
    path = Path(__file__).with_name("libguestmem_cpu.so")
    if not path.exists():
        raise NoLibrary
    return str(path)


class Library:
    """Its functions. `cpu_run` lets other Python threads run meanwhile; the others return at once."""

    def __init__(self, path: str) -> None:
        long, short = ctypes.CDLL(path), ctypes.PyDLL(path)
        self.run = _prototype(long, "cpu_run", _INT, _P)
        self.settle = _prototype(long, "cpu_settle", None, _P)
        self.block_init = _prototype(short, "cpu_block_init", None, _P)
        self.msr_get = _prototype(short, "cpu_msr_get", _BOOL, _P, _U32, ctypes.POINTER(_U64))
        self.msr_set = _prototype(short, "cpu_msr_set", _BOOL, _P, _U32, _U64)
        self.takes_interrupts = _prototype(short, "cpu_takes_interrupts", _BOOL, _P)
        self.space_create = _prototype(short, "cpu_space_create", _P)
        self.space_destroy = _prototype(short, "cpu_space_destroy", None, _P)
        self.space_map = _prototype(short, "cpu_space_map", _INT, _P, _U64, _U64, _U32, _U64, _BOOL)
        self.space_map_mmio = _prototype(short, "cpu_space_map_mmio", _INT, _P, _U64, _U64)
        self.space_map_rom = _prototype(short, "cpu_space_map_rom", _INT, _P, _U64, _U64, _U32, _U64)
        self.space_drop = _prototype(short, "cpu_space_drop", None, _P, _U64, _U64, _U32, _BOOL)
        self.create = _prototype(short, "cpu_create", _P, _P, _P)
        self.destroy = _prototype(short, "cpu_destroy", None, _P)
        self.last_error = _prototype(short, "cpu_last_error", ctypes.c_char_p)
        self.kick = _prototype(short, "cpu_kick", None, _P)
        self.set_mode = _prototype(short, "cpu_set_mode", None, _INT)
        self.install_handlers = _prototype(short, "cpu_install_handlers", None)


def _prototype(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(library, name)
    function.restype, function.argtypes = result, arguments
    return function


@functools.cache
def load() -> Library:
    """Raises: NoLibrary; OSError."""
    return Library(library_path())
