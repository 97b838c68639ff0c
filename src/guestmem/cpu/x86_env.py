"""Unicorn's CPU as it lies in memory, and how it is found.

Everything that the engine moves in or out of the CPU goes straight to QEMU's structures (qemu/target/i386/cpu.h and
qemu/include/hw/core/cpu.h): the register API costs a call for each register and does not reach the hidden part of
segments, the mode, the exception in flight, nor why a pass has ended. Where they lie is found once per process, by
marked values that are written through the public API and by what a few instructions do; a build in which they do not
lie as expected is refused.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterator
from typing import NamedTuple

from unicorn import unicorn_const, x86_const

from guestmem.cpu import uc_native

GENERAL = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15")
SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs")
"""In the order of CPUX86State.regs and .segs."""

_U8, _U16, _U32, _U64 = ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64
_I32 = ctypes.c_int32


class SegmentCache(ctypes.Structure):
    """A segment register with its hidden part; `flags` is the second word of a descriptor."""

    _fields_ = [("selector", _U32), ("base", _U64), ("limit", _U32), ("flags", _U32)]


class Env(ctypes.Structure):
    """The first fields of CPUX86State. Between two passes `eflags` is all of RFLAGS."""

    _fields_ = [
        ("regs", _U64 * 16),
        ("eip", _U64),
        ("eflags", _U64),
        ("cc_dst", _U64),
        ("cc_src", _U64),
        ("cc_src2", _U64),
        ("cc_op", _U32),
        ("df", _I32),
        ("hflags", _U32),
        ("hflags2", _U32),
        ("segs", SegmentCache * 6),
        ("ldt", SegmentCache),
        ("tr", SegmentCache),
        ("gdt", SegmentCache),
        ("idt", SegmentCache),
        ("cr", _U64 * 9),
        ("a20_mask", _I32),
        ("bnd_regs", _U64 * 8),
        ("bndcs_regs", _U64 * 2),
        ("msr_bndcfgs", _U64),
        ("efer", _U64),
    ]


class EnvMsrs(ctypes.Structure):
    """The fields of CPUX86State from SYSENTER_CS to XCR0."""

    _fields_ = [
        ("sysenter_cs", _U32),
        ("sysenter_esp", _U64),
        ("sysenter_eip", _U64),
        ("star", _U64),
        ("vm_hsave", _U64),
        ("lstar", _U64),
        ("cstar", _U64),
        ("fmask", _U64),
        ("kernel_gs_base", _U64),
        ("tsc", _U64),
        ("tsc_adjust", _U64),
        ("tsc_deadline", _U64),
        ("tsc_aux", _U64),
        ("xcr0", _U64),
    ]


class EnvTail(ctypes.Structure):
    """The fields of CPUX86State from the last exception on."""

    _fields_ = [
        ("error_code", _I32),
        ("exception_is_int", _I32),
        ("exception_next_eip", _U64),
        ("dr", _U64 * 8),
        ("breakpoints", _U64 * 4),
        ("old_exception", _I32),
        ("vm_vmcb", _U64),
        ("tsc_offset", _U64),
        ("intercept", _U64),
        ("intercept_cr_read", _U16),
        ("intercept_cr_write", _U16),
        ("intercept_dr_read", _U16),
        ("intercept_dr_write", _U16),
        ("intercept_exceptions", _U32),
        ("nested_cr3", _U64),
        ("nested_pg_mode", _U32),
        ("v_tpr", _U8),
    ]


class PassEnd(ctypes.Structure):
    """The fields of CPUState from `halted` on: how the last pass has ended."""

    _fields_ = [("halted", _U32), ("can_do_io", _U32), ("exception_index", _I32)]


class Layout(NamedTuple):
    """Offsets in bytes: in the handle (uc_struct), in what its `cpu` points to (X86CPU), and in CPUX86State."""

    cpu: int
    no_exit_request: int
    interrupt_request: int
    leave_blocks: int
    pass_end: int
    env: int
    msrs: int
    tail: int
    env_size: int


class CpuMemory:
    """The live structures of the CPU behind `handle`. Not to be touched once the handle is closed.

    `interrupt_request` is looked at between two blocks, if the first does not jump to the second by itself; 0xFFFF in
    `leave_blocks` (icount_decr.u16.high) makes each block return.
    """

    def __init__(self, handle: int, found: Layout) -> None:
        cpu = _U64.from_address(handle + found.cpu).value
        self.address = cpu + found.env
        self.size = found.env_size
        self.env = Env.from_address(self.address)
        self.msrs = EnvMsrs.from_address(self.address + found.msrs)
        self.tail = EnvTail.from_address(self.address + found.tail)
        self.pass_end = PassEnd.from_address(cpu + found.pass_end)
        self.interrupt_request = _U32.from_address(cpu + found.interrupt_request)
        self.leave_blocks = _U16.from_address(_U64.from_address(cpu + found.leave_blocks).value + 2)
        self.no_exit_request = _U8.from_address(handle + found.no_exit_request)


@functools.cache
def layout() -> Layout:
    """Find the structures in a CPU of its own. 20 ms. Raises: UnicornError."""
    handle = uc_native.open_handle()
    try:
        found = _find(handle, _mark(handle))
        _check(handle, CpuMemory(handle, found))
        return found
    finally:
        uc_native.close(handle)


class _Marks(NamedTuple):
    general: bytes
    debug: bytes
    syscall: bytes


_CR2, _RIP = 0x5EED_2222_0000_0000, 0x5EED_3333_0000_0000


def _mark(handle: int) -> _Marks:
    """Put values into registers that nothing else holds."""
    general = [0x5EED_0000_0000_0000 + i * 0x0101_0101 for i in range(len(GENERAL))]
    debug = [0x5EED_1111_0000_0000 + i * 0x0101_0101 for i in range(4)]
    syscall = [0x5EED_4444_0000_0000 + i * 0x0101_0101 for i in range(3)]
    values = {f"UC_X86_REG_{name.upper()}": value for name, value in zip(GENERAL, general, strict=True)}
    values |= {f"UC_X86_REG_DR{i}": value for i, value in enumerate(debug)}
    values |= {"UC_X86_REG_CR2": _CR2, "UC_X86_REG_RIP": _RIP}
    for name, value in values.items():
        uc_native.check(uc_native.reg_write(handle, getattr(x86_const, name), ctypes.byref(_U64(value))), name)
    for index, value in zip((0xC000_0082, 0xC000_0083, 0xC000_0084), syscall, strict=True):
        uc_native.msr_write(handle, index, value)
    return _Marks(_words(general), _words(debug), _words(syscall))


def _words(values: list[int]) -> bytes:
    return b"".join(value.to_bytes(8, "little") for value in values)


def _find(handle: int, marks: _Marks) -> Layout:
    image = uc_native.handle_image(handle)
    size = uc_native.context_size(handle)
    flag = _no_exit_request(image, uc_native.fault_address_offset(), size)
    found = []
    for place in range(0, len(image) - 7, 8):
        memory = _peek(int.from_bytes(image[place : place + 8], "little"), 1 << 17)
        env = memory.find(marks.general)
        # CPUState, in front of CPUX86State, ends with a pointer to its handle; in front of that is how a pass ended.
        owner = memory.rfind(handle.to_bytes(8, "little"), 0, max(env, 0))
        msrs = memory.find(marks.syscall, env) - env - EnvMsrs.lstar.offset
        tail = memory.find(marks.debug, env) - env - EnvTail.dr.offset
        if env > 0 and min(owner, msrs, tail, flag) > 0:
            start = int.from_bytes(image[place : place + 8], "little")
            # `env_ptr` is followed by `icount_decr_ptr`.
            pointers = memory.find((start + env).to_bytes(8, "little"), 0, env)
            # `interrupt_request` follows two counts, a pointer, seven flags and the flags of the next block.
            found.append(Layout(place, flag, 28, pointers + 8, owner - 16, env, msrs, tail, size))
    if not found:
        raise _refused("the CPU behind a handle")
    # A pointer to something else that lies in front of the CPU has the CPU behind it too.
    return min(found, key=lambda layout: layout.env)


def _no_exit_request(image: bytes, fault_address: int, context_size: int) -> int:
    """Where uc_struct has `no_exit_request`: between `hook_insert`, `first_tb` and `init_done`, which is set.

    In front of them stand the size of a saved context and an instruction pointer. -1 if they are not found.
    """
    for place in range(fault_address, min(fault_address + 1024, len(image) - 24), 4):
        flags = (place + 4 + 7 & -8) + 8
        if int.from_bytes(image[place : place + 4], "little") == context_size and image[flags + 3] == 1:
            return flags + 2
    return -1


def _peek(address: int, size: int) -> bytes:
    """Memory of this process, as much of it as can be read."""
    if not 0x1_0000 <= address < 1 << 47 or address % 8:
        return b""
    memory = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(memory, size, address)
    except OSError:
        return b""
    finally:
        os.close(memory)


def _check(handle: int, cpu: CpuMemory) -> None:
    """Raises: UnicornError, unless values that were marked by name, and what a few instructions do, agree."""
    agreed = [("CR2", cpu.env.cr[2] == _CR2), ("EIP", cpu.env.eip == _RIP), ("XCR0", cpu.msrs.xcr0 == 3)]
    # Setting RIP has asked for it.
    before = cpu.address - ctypes.addressof(cpu.leave_blocks)
    agreed.append(("icount_decr_ptr", 0 < before < 1 << 12 and cpu.leave_blocks.value == 0xFFFF))
    agreed.append(("EFER", cpu.env.efer == uc_native.msr_read(handle, 0xC000_0080)))
    agreed.extend(_behaviour(handle, cpu))
    for what, agrees in agreed:
        if not agrees:
            raise _refused(what)


def _behaviour(handle: int, cpu: CpuMemory) -> Iterator[tuple[str, bool]]:
    """Execute HLT, INT 5, and a store that asks for a stop with an instruction after it that would show."""
    page = uc_native.Page(b"\xf4\xcd\x05" + b"\x88\x07\xff\xc0\xeb\xfa")
    fill = uc_native.FillHook(lambda _uc, _linear, _kind, entry, _data: page.answer(entry))
    stop = uc_native.MemoryHook(lambda *_: bool(uc_native.emu_stop(handle)) and None)
    uc_native.hook_add(handle, unicorn_const.UC_HOOK_TLB_FILL, fill)
    uc_native.hook_add(handle, unicorn_const.UC_HOOK_MEM_WRITE, stop)
    uc_native.check(uc_native.mem_map_ptr(handle, page.address, page.SIZE, 7, page.address), "uc_mem_map_ptr")

    code = uc_native.emu_start(handle, page.address, 0, 0, 0)
    yield "CPUState.halted", (code, cpu.pass_end.halted) == (uc_native.ERR_OK, 1)
    code = uc_native.emu_start(handle, page.address + 1, 0, 0, 0)
    yield "CPUState.exception_index", (code, cpu.pass_end.exception_index) == (uc_native.ERR_EXCEPTION, 5)
    cpu.no_exit_request.value = 1
    cpu.env.regs[0], cpu.env.regs[7] = 0, page.address + 2048
    uc_native.emu_start(handle, page.address + 3, 0, 0, 0)
    yield "uc_struct.no_exit_request", (cpu.env.regs[0], cpu.env.eip) == (1, page.address + 3)
    requests = cpu.interrupt_request.value, cpu.leave_blocks.value
    yield "CPUState", (cpu.pass_end.halted, *requests) == (0, 0, 0)


def _refused(what: str) -> uc_native.UnicornError:
    return uc_native.UnicornError(unicorn_const.UC_ERR_VERSION, f"layout of {what}")
