"""Where Unicorn's CPU state lies inside a saved context.

uc_context_save() copies QEMU's CPUX86State (qemu/target/i386/cpu.h) as it is and uc_context_restore() puts it back, so
patching the copy reaches what the register API cannot: the hidden part of segment registers, the mode, the exception in
flight. Where the fields lie is found by marked values that are written through the public API, once per process; a
build in which they do not lie as expected is refused.
"""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

from unicorn import unicorn_const, x86_const

from guestmem.cpu import uc_native

GENERAL = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15")
SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs")
"""In the order of CPUX86State.regs and .segs."""


class SegmentCache(ctypes.Structure):
    """A segment register with its hidden part; `flags` is the second word of a descriptor."""

    _fields_ = [
        ("selector", ctypes.c_uint32),
        ("base", ctypes.c_uint64),
        ("limit", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
    ]


class Env(ctypes.Structure):
    """The first fields of CPUX86State."""

    _fields_ = [
        ("regs", ctypes.c_uint64 * 16),
        ("eip", ctypes.c_uint64),
        ("eflags", ctypes.c_uint64),
        ("cc_dst", ctypes.c_uint64),
        ("cc_src", ctypes.c_uint64),
        ("cc_src2", ctypes.c_uint64),
        ("cc_op", ctypes.c_uint32),
        ("df", ctypes.c_int32),
        ("hflags", ctypes.c_uint32),
        ("hflags2", ctypes.c_uint32),
        ("segs", SegmentCache * 6),
        ("ldt", SegmentCache),
        ("tr", SegmentCache),
        ("gdt", SegmentCache),
        ("idt", SegmentCache),
        ("cr", ctypes.c_uint64 * 9),
        ("a20_mask", ctypes.c_int32),
        ("bnd_regs", ctypes.c_uint64 * 8),
        ("bndcs_regs", ctypes.c_uint64 * 2),
        ("msr_bndcfgs", ctypes.c_uint64),
        ("efer", ctypes.c_uint64),
    ]


class EnvTail(ctypes.Structure):
    """The fields of CPUX86State from the last exception on."""

    _fields_ = [
        ("error_code", ctypes.c_int32),
        ("exception_is_int", ctypes.c_int32),
        ("exception_next_eip", ctypes.c_uint64),
        ("dr", ctypes.c_uint64 * 8),
        ("breakpoints", ctypes.c_uint64 * 4),
        ("old_exception", ctypes.c_int32),
        ("vm_vmcb", ctypes.c_uint64),
        ("tsc_offset", ctypes.c_uint64),
        ("intercept", ctypes.c_uint64),
        ("intercept_cr_dr", ctypes.c_uint16 * 4),
        ("intercept_exceptions", ctypes.c_uint32),
        ("nested_cr3", ctypes.c_uint64),
        ("nested_pg_mode", ctypes.c_uint32),
        ("v_tpr", ctypes.c_uint8),
    ]


class EnvLayout(NamedTuple):
    """Offsets of Env and EnvTail in a saved context. Bytes."""

    env: int
    tail: int


@functools.cache
def env_layout() -> EnvLayout:
    """Write marked values through the register API and find them again. Raises: UnicornError."""
    handle = uc_native.open_handle()
    context = uc_native.new_context(handle)
    marks = {f"UC_X86_REG_{name.upper()}": 0x5EED_0000_0000_0000 + i * 0x0101_0101 for i, name in enumerate(GENERAL)}
    marks |= {f"UC_X86_REG_DR{i}": 0x5EED_1111_0000_0000 + i * 0x0101_0101 for i in range(4)}
    marks |= {"UC_X86_REG_CR2": 0x5EED_2222_0000_0000, "UC_X86_REG_RIP": 0x5EED_3333_0000_0000}
    try:
        for name, value in marks.items():
            uc_native.check(
                uc_native.reg_write(handle, getattr(x86_const, name), ctypes.byref(ctypes.c_uint64(value))), name
            )
        uc_native.context_save(handle, context)
        image = uc_native.context_image(handle, context)
        efer = uc_native.msr_read(handle, 0xC000_0080)
    finally:
        uc_native.context_free(context)
        uc_native.close(handle)
    words = [value.to_bytes(8, "little") for value in marks.values()]
    layout = EnvLayout(image.find(b"".join(words[:16])), image.find(b"".join(words[16:20])) - EnvTail.dr.offset)
    if min(layout) > 0 and layout.tail + ctypes.sizeof(EnvTail) <= len(image):
        env = Env.from_buffer_copy(image, layout.env)
        if (env.cr[2], env.eip, env.efer) == (marks["UC_X86_REG_CR2"], marks["UC_X86_REG_RIP"], efer):
            return layout
    raise uc_native.UnicornError(unicorn_const.UC_ERR_VERSION, "layout of uc_context")
