"""Unicorn's C interface, without the Python classes around it.

The classes of the binding cost 3 us for a register and a Python frame for each hook; an exit has about 5 us for
everything. So the engine calls the library itself: `PyDLL` for what returns at once, `CDLL` (which lets the timer
thread in) for emulation. Written against Unicorn 2.1.4; file names in comments are those of its source.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from typing import Any

from unicorn import unicorn_const, x86_const
from unicorn.unicorn_py3.unicorn import uclib

ERR_OK, ERR_INSN_INVALID = unicorn_const.UC_ERR_OK, unicorn_const.UC_ERR_INSN_INVALID
ERR_EXCEPTION = unicorn_const.UC_ERR_EXCEPTION

_WRITE, _ONE_ARGUMENT = 1 << 30, 1 << 26

_P, _U64, _U32, _INT = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_int


class TlbEntry(ctypes.Structure):
    """uc_tlb_entry: the answer of a TLB fill."""

    _fields_ = [("paddr", _U64), ("perms", _U32)]


class Msr(ctypes.Structure):
    """uc_x86_msr."""

    _fields_ = [("index", _U32), ("value", _U64)]


FillHook = ctypes.CFUNCTYPE(ctypes.c_bool, _P, _U64, _INT, ctypes.POINTER(TlbEntry), _P)
OutHook = ctypes.CFUNCTYPE(None, _P, _U32, _INT, _U32, _P)
InHook = ctypes.CFUNCTYPE(_U32, _P, _U32, _INT, _P)
InstructionHook = ctypes.CFUNCTYPE(_U32, _P, _P)
MemoryHook = ctypes.CFUNCTYPE(None, _P, _INT, _U64, _INT, ctypes.c_int64, _P)
MmioReadHook = ctypes.CFUNCTYPE(_U64, _P, _U64, ctypes.c_uint, _P)
MmioWriteHook = ctypes.CFUNCTYPE(None, _P, _U64, ctypes.c_uint, _U64, _P)

_slow = ctypes.CDLL(uclib._name)
_fast = ctypes.PyDLL(uclib._name)


def _prototype(library: ctypes.CDLL, name: str, *arguments: Any) -> Any:
    function = getattr(library, name)
    function.restype, function.argtypes = ctypes.c_int, arguments
    return function


emu_start = _prototype(_slow, "uc_emu_start", _P, _U64, _U64, _U64, ctypes.c_size_t)
emu_stop = _prototype(_fast, "uc_emu_stop", _P)
reg_read = _prototype(_fast, "uc_reg_read", _P, _INT, _P)
reg_write = _prototype(_fast, "uc_reg_write", _P, _INT, _P)
hook_del = _prototype(_fast, "uc_hook_del", _P, ctypes.c_size_t)
mem_map_ptr = _prototype(_fast, "uc_mem_map_ptr", _P, _U64, _U64, _U32, _P)
mem_unmap = _prototype(_fast, "uc_mem_unmap", _P, _U64, _U64)
mmio_map = _prototype(_fast, "uc_mmio_map", _P, _U64, _U64, MmioReadHook, _P, MmioWriteHook, _P)
close = _prototype(_fast, "uc_close", _P)
_context_size = _prototype(_fast, "uc_context_size", _P)
_open = _prototype(_fast, "uc_open", _U32, _U32, ctypes.POINTER(_P))
_hook_add = _prototype(_fast, "uc_hook_add", _P, ctypes.POINTER(ctypes.c_size_t), _INT, _P, _P, _U64, _U64, _INT)
_strerror = _prototype(_fast, "uc_strerror", _INT)
_strerror.restype = ctypes.c_char_p
_ctl = _fast.uc_ctl  # variadic: (handle, control, argument as c_int)
_usable_size = ctypes.CDLL(None).malloc_usable_size
_usable_size.restype, _usable_size.argtypes = ctypes.c_size_t, (_P,)
_CONTEXT_HEADER = 40  # sizeof(struct uc_context) without its data

NOTHING = ctypes.cast(_fast.uc_errno, ctypes.c_void_p)
"""A hook that does nothing and answers 0, in native code: uc_errno() reads a field."""


class UnicornError(RuntimeError):
    """A call failed that must not: the call, and Unicorn's own words."""

    def __init__(self, code: int, call: str) -> None:
        super().__init__(f"{call}: {error_text(code)}")


def error_text(code: int) -> str:
    """Unicorn's own words for an error number."""
    return str(_strerror(code).decode())


def check(code: int, call: str) -> None:
    """Raises: UnicornError."""
    if code:
        raise UnicornError(code, call)


def open_handle() -> int:
    """A new x86 CPU whose TLB asks a hook, and which no address stops. 2 to 14 ms."""
    handle = _P()
    check(_open(unicorn_const.UC_ARCH_X86, unicorn_const.UC_MODE_64, ctypes.byref(handle)), "uc_open")
    assert handle.value is not None
    # The richest model that Unicorn lets one choose; CPUID is answered by the engine, this decides what executes.
    _ctl_int(handle.value, unicorn_const.UC_CTL_CPU_MODEL, x86_const.UC_CPU_X86_EPYC)
    set_tlb_mode(handle.value, unicorn_const.UC_TLB_VIRTUAL)
    # Emulation ends at the address `until`, and 0 is an address like another: an empty set of exits has none.
    _ctl_int(handle.value, unicorn_const.UC_CTL_UC_USE_EXITS, 1)
    return handle.value


def set_tlb_mode(handle: int, mode: int) -> None:
    """UC_TLB_VIRTUAL: fills ask a hook. UC_TLB_CPU: the MMU of QEMU, for comparison."""
    _ctl_int(handle, unicorn_const.UC_CTL_TLB_TYPE, mode)


def flush_tlb(handle: int) -> None:
    """Empty the TLB. 1 us; also right inside of a hook."""
    _ctl(_P(handle), _INT(_WRITE | unicorn_const.UC_CTL_TLB_FLUSH))


def flush_code(handle: int) -> None:
    """Drop all translated code. 14 us and what it takes to translate again; not inside of a hook."""
    _ctl(_P(handle), _INT(_WRITE | unicorn_const.UC_CTL_TB_FLUSH))


def _ctl_int(handle: int, control: int, value: int) -> None:
    check(_ctl(_P(handle), _INT(_WRITE | _ONE_ARGUMENT | control), _INT(value)), f"uc_ctl({control})")


def context_size(handle: int) -> int:
    """Bytes of CPU state that a saved context has."""
    return int(_context_size(handle)) - _CONTEXT_HEADER


def handle_image(handle: int) -> bytes:
    """The bytes of the structure behind a handle (uc_struct)."""
    return ctypes.string_at(handle, _usable_size(handle))


def hook_add(handle: int, kind: int, callback: Any, begin: int = 1, end: int = 0, instruction: int = 0) -> int:
    """Add a hook, which the caller keeps alive, for `begin` to `end` inclusive; the default is every address."""
    hook = ctypes.c_size_t()
    pointer = ctypes.cast(callback, _P)
    check(_hook_add(handle, ctypes.byref(hook), kind, pointer, None, begin, end, instruction), "uc_hook_add")
    return hook.value


def msr_read(handle: int, index: int) -> int:
    """What RDMSR gives; 0 for an MSR that Unicorn does not have."""
    msr = Msr(index, 0)
    check(reg_read(handle, x86_const.UC_X86_REG_MSR, ctypes.byref(msr)), "rdmsr")
    return int(msr.value)


def msr_write(handle: int, index: int, value: int) -> None:
    """What WRMSR does; nothing for an MSR that Unicorn does not have."""
    check(reg_write(handle, x86_const.UC_X86_REG_MSR, ctypes.byref(Msr(index, value))), "wrmsr")


class Page:
    """Memory of this process that a CPU may be given as its own, with `content` at its start."""

    SIZE = mmap.PAGESIZE

    def __init__(self, content: bytes) -> None:
        self.size = -(-len(content) // self.SIZE) * self.SIZE
        self._memory = mmap.mmap(-1, self.size)
        self._memory.write(content)
        self._view = ctypes.c_char.from_buffer(self._memory)
        self.address = ctypes.addressof(self._view)

    def answer(self, entry: Any) -> bool:
        """The answer to a TLB fill, whatever was asked for."""
        entry[0].paddr, entry[0].perms = self.address, 7
        return True


@functools.cache
def fault_address_offset() -> int:
    """Where a handle keeps the address whose TLB fill was refused (uc_struct.invalid_addr), in bytes.

    A fill hook is told the page only, and nothing in the API gives the rest; CR2 and the gpa of a stage-2 fault need
    it. Two faults at known addresses find the place. Raises: UnicornError for a build in which it is not unique.
    """
    handle = open_handle()
    try:
        hook_add(handle, unicorn_const.UC_HOOK_TLB_FILL, NOTHING)
        places: set[int] = set(range(0, _usable_size(handle) - 7, 8))
        for address in (0x1234_5678_9ABC, 0x7EDC_BA98_7654):
            emu_start(handle, address, 0, 0, 0)
            places = {place for place in places if _U64.from_address(handle + place).value == address}
    finally:
        close(handle)
    if len(places) != 1:
        raise UnicornError(unicorn_const.UC_ERR_VERSION, f"fault address of {uclib._name}: {len(places)} places")
    return places.pop()
