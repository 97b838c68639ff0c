"""The block of a CPU as native/cpu.h has it, and the library itself.

The block holds all state of the CPU while it does not run. It may lie in memory that two processes share: the one whose
CPU it is, and the one that steers.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

LIBRARY = Path(__file__).parent / "native" / "libguestmem_cpu.so"
ABI = 1
STOP_DATA, CPUID_MAX, MSRS_MAX, STOP_MSRS_MAX = 4096, 256, 256, 32

REGS, SREGS, FPU, DEBUG, EVENTS, MSRS, CPUID, CONTROL = (1 << i for i in range(8))
"""Groups of state, for `CpuBlock.dirty`."""

PLAIN, SNP, TD = range(3)
"""CpuBlock.guest_kind."""
SHARED, PRIVATE, ANY = range(3)
"""CpuStop.access."""
ANSWER_NONE, ANSWER_VALUE, ANSWER_RAISE, ANSWER_MMIO = range(4)
SIGNIFICANT_INDEX = 1
"""KVM_CPUID_FLAG_SIGNIFCANT_INDEX."""

_U8, _U16, _U32, _U64 = ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64


class CpuStop(ctypes.Structure):
    """struct cpu_stop."""

    _fields_ = [
        ("kind", _U32),
        ("size", _U32),
        ("count", _U32),
        ("port", _U16),
        ("write", _U8),
        ("fetch", _U8),
        ("access", _U8),
        ("large", _U8),
        ("validate", _U8),
        ("cpl", _U8),
        ("host_signal", _U8),
        ("reserved", _U8 * 3),
        ("gpa", _U64),
        ("hva", _U64),
        ("nr", _U64),
        ("value", _U64 * 4),
        ("why", ctypes.c_char * 64),
        ("data", _U8 * STOP_DATA),
    ]


class CpuAnswer(ctypes.Structure):
    """struct cpu_answer."""

    _fields_ = [
        ("kind", _U32),
        ("vector", _U32),
        ("error_code", _U32),
        ("reserved", _U32),
        ("value", _U64),
        ("data", _U8 * STOP_DATA),
    ]


class CpuMsr(ctypes.Structure):
    """struct cpu_msr."""

    _fields_ = [("index", _U32), ("present", _U32), ("value", _U64)]


class CpuMsrRange(ctypes.Structure):
    """struct cpu_msr_range."""

    _fields_ = [("first", _U32), ("count", _U32), ("reads", _U32), ("writes", _U32)]


class GuestDebug(ctypes.Structure):
    """struct kvm_guest_debug."""

    _fields_ = [("control", _U32), ("pad", _U32), ("debugreg", _U64 * 8)]


REG_NAMES = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip",
    "rflags",
)  # fmt: skip
"""The order of struct kvm_regs."""


class KvmRegs(ctypes.Structure):
    """struct kvm_regs."""

    _fields_ = [(name, _U64) for name in REG_NAMES]


SEGMENT_FIELDS = ("base", "limit", "selector", "type", "present", "dpl", "db", "s", "l", "g", "avl", "unusable")


class KvmSegment(ctypes.Structure):
    """struct kvm_segment."""

    _fields_ = [
        ("base", _U64),
        ("limit", _U32),
        ("selector", _U16),
        *((name, _U8) for name in SEGMENT_FIELDS[3:]),
        ("padding", _U8),
    ]


class KvmDtable(ctypes.Structure):
    """struct kvm_dtable."""

    _fields_ = [("base", _U64), ("limit", _U16), ("padding", _U16 * 3)]


SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
CONTROLS = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")


class KvmSregs(ctypes.Structure):
    """struct kvm_sregs."""

    _fields_ = [
        *((name, KvmSegment) for name in SEGMENTS),
        ("gdt", KvmDtable),
        ("idt", KvmDtable),
        *((name, _U64) for name in CONTROLS),
        ("interrupt_bitmap", _U64 * 4),
    ]


class KvmDebugregs(ctypes.Structure):
    """struct kvm_debugregs."""

    _fields_ = [("db", _U64 * 4), ("dr6", _U64), ("dr7", _U64), ("flags", _U64), ("reserved", _U64 * 9)]


class KvmVcpuEvents(ctypes.Structure):
    """struct kvm_vcpu_events; the fields of its inner structures have their names in front."""

    _fields_ = [
        ("exception_injected", _U8),
        ("exception_nr", _U8),
        ("exception_has_error_code", _U8),
        ("exception_pending", _U8),
        ("exception_error_code", _U32),
        ("interrupt_injected", _U8),
        ("interrupt_nr", _U8),
        ("interrupt_soft", _U8),
        ("interrupt_shadow", _U8),
        ("nmi_injected", _U8),
        ("nmi_pending", _U8),
        ("nmi_masked", _U8),
        ("nmi_pad", _U8),
        ("sipi_vector", _U32),
        ("flags", _U32),
        ("smi", _U8 * 4),
        ("triple_fault_pending", _U8),
        ("reserved", _U8 * 26),
        ("exception_has_payload", _U8),
        ("exception_payload", _U64),
    ]


class KvmCpuidEntry2(ctypes.Structure):
    """struct kvm_cpuid_entry2."""

    _fields_ = [
        ("function", _U32),
        ("index", _U32),
        ("flags", _U32),
        ("eax", _U32),
        ("ebx", _U32),
        ("ecx", _U32),
        ("edx", _U32),
        ("padding", _U32 * 3),
    ]


class CpuBlock(ctypes.Structure):
    """struct cpu_block."""

    _fields_ = [
        ("abi", _U32),
        ("size", _U32),
        ("dirty", _U32),
        ("request_interrupt_window", _U8),
        ("guest_kind", _U8),
        ("page_bit", _U8),
        ("msr_mode", _U8),
        ("stop_msrs_count", _U32),
        ("stop_msrs", CpuMsrRange * STOP_MSRS_MAX),
        ("guest_debug", GuestDebug),
        ("tsc_offset", ctypes.c_int64),
        ("regs", KvmRegs),
        ("sregs", KvmSregs),
        ("debug", KvmDebugregs),
        ("events", KvmVcpuEvents),
        ("xcr0", _U64),
        ("xsave", _U8 * 4096),
        ("msrs", CpuMsr * MSRS_MAX),
        ("cpuid_count", _U32),
        ("cpuid", KvmCpuidEntry2 * CPUID_MAX),
        ("stop", CpuStop),
        ("answer", CpuAnswer),
        ("runs", _U64),
        ("fills", _U64),
        ("misses", _U64),
        ("deliveries", _U64),
        ("host_faults", _U64),
        ("slices", _U64),
        ("code_flushes", _U64),
        ("exclusive", _U64),
    ]


class CpuUnavailableError(RuntimeError):
    """There is no CPU to execute guests with; the message says what is missing."""


@functools.cache
def library() -> Any:
    """libguestmem_cpu.so, with its functions declared. Raises: CpuUnavailableError."""
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        raise CpuUnavailableError(
            f"{LIBRARY.name} cannot be loaded ({error}): it is built at installation, by gcc, from the libunicorn.a of "
            "the package unicorn"
        ) from error
    pointer, block = ctypes.c_void_p, ctypes.POINTER(CpuBlock)
    for name, result, arguments in (
        ("cpu_block_init", None, (block,)),
        ("cpu_msr_get", ctypes.c_bool, (block, _U32, ctypes.POINTER(_U64))),
        ("cpu_msr_set", ctypes.c_bool, (block, _U32, _U64)),
        ("cpu_takes_interrupts", ctypes.c_bool, (block,)),
        ("cpu_space_create", pointer, ()),
        ("cpu_space_destroy", None, (pointer,)),
        ("cpu_space_map", ctypes.c_int, (pointer, _U64, _U64, ctypes.c_uint, _U64, ctypes.c_bool)),
        ("cpu_space_map_mmio", ctypes.c_int, (pointer, _U64, _U64)),
        ("cpu_space_drop", None, (pointer, _U64, _U64, ctypes.c_uint, ctypes.c_bool)),
        ("cpu_create", pointer, (pointer, block)),
        ("cpu_destroy", None, (pointer,)),
        ("cpu_last_error", ctypes.c_char_p, ()),
        ("cpu_run", ctypes.c_int, (pointer,)),
        ("cpu_settle", None, (pointer,)),
        ("cpu_kick", None, (pointer,)),
        ("cpu_set_mode", None, (ctypes.c_int,)),
        ("cpu_watch_signals", None, (pointer, _U64)),
        ("cpu_install_handlers", None, ()),
    ):
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    _check(loaded)
    return loaded


def _check(loaded: Any) -> None:
    """Raises: CpuUnavailableError, for a library that was built from another cpu.h."""
    block = CpuBlock()
    loaded.cpu_block_init(ctypes.byref(block))
    if (block.abi, block.size) != (ABI, ctypes.sizeof(CpuBlock)):
        raise CpuUnavailableError(
            f"{LIBRARY.name} has ABI {block.abi} and a block of {block.size} bytes, this needs {ABI} and "
            f"{ctypes.sizeof(CpuBlock)}: install again"
        )


def missing() -> str | None:
    """Why no guest code can be executed; None if it can."""
    try:
        library()
    except CpuUnavailableError as error:
        return str(error)
    return None


def last_error() -> str:
    """What the library says of the call that just failed."""
    return os.fsdecode(library().cpu_last_error())
