"""The block of a CPU: struct cpu_block of `native/cpu.h`, in which its state lies whenever it does not run.

`BlockState` is that state as KVM reads and writes it. It needs nothing but the block, so it serves a CPU of this process
and one of another's alike.
"""

from __future__ import annotations

import ctypes
import dataclasses
import struct
from collections.abc import Iterable
from typing import Any

from guestmem.cpu import cpuid
from guestmem.cpu.engine import (
    CpuidTable,
    Debug,
    Failed,
    Halt,
    HostFault,
    Hypercall,
    InterruptWindow,
    MmioRead,
    MmioWrite,
    PageBit,
    PortIn,
    PortOut,
    Pvalidate,
    ReadMsr,
    Rmpadjust,
    Shutdown,
    SignalPending,
    SliceOver,
    Stage2Miss,
    Stop,
    Tdcall,
    Vmgexit,
    WriteMsr,
)
from guestmem.cpu.library import load
from guestmem.cpu.registers import DebugRegisters, DescriptorTable, Events, Regs, Segment, Sregs

ABI = 1
_U8, _U16, _U32, _U64, _I64 = ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int64

REGS, SREGS, FPU, DEBUG, EVENTS, MSRS, CPUID, CONTROL = (1 << bit for bit in range(8))
"""Groups of state, for `dirty`."""

(
    STOP_NONE, STOP_SLICE, STOP_KICKED, STOP_SIGNAL, STOP_MISS, STOP_HOST_FAULT, STOP_PORT_OUT, STOP_PORT_IN,
    STOP_MMIO_READ, STOP_MMIO_WRITE, STOP_HALT, STOP_WINDOW, STOP_RDMSR, STOP_WRMSR, STOP_HYPERCALL, STOP_PVALIDATE,
    STOP_RMPADJUST, STOP_VMGEXIT, STOP_TDCALL, STOP_DEBUG, STOP_SHUTDOWN, STOP_FAILED,
) = range(22)  # fmt: skip
ANSWER_NONE, ANSWER_VALUE, ANSWER_RAISE = range(3)
ACCESS_SHARED, ACCESS_PRIVATE, ACCESS_ANY = range(3)
_GUEST_PLAIN, _GUEST_SNP, _GUEST_TD = range(3)
_DATA = 4096
_CPUID_MAX, _STOP_MSRS_MAX = 256, 32
_SIGNIFICANT_INDEX = 1


class _Stop(ctypes.Structure):
    _fields_ = [
        ("kind", _U32), ("size", _U32), ("count", _U32), ("port", _U16),
        ("write", _U8), ("fetch", _U8), ("access", _U8), ("large", _U8), ("validate", _U8), ("cpl", _U8),
        ("host_signal", _U8), ("reserved", _U8 * 3),
        ("gpa", _U64), ("hva", _U64), ("nr", _U64), ("value", _U64 * 4), ("why", ctypes.c_char * 64),
        ("data", _U8 * _DATA),
    ]  # fmt: skip


class _Answer(ctypes.Structure):
    _fields_ = [
        ("kind", _U32), ("vector", _U32), ("error_code", _U32), ("reserved", _U32), ("value", _U64),
        ("data", _U8 * _DATA),
    ]  # fmt: skip


class _MsrRange(ctypes.Structure):
    _fields_ = [("first", _U32), ("count", _U32), ("reads", _U32), ("writes", _U32)]


class _Msr(ctypes.Structure):
    _fields_ = [("index", _U32), ("present", _U32), ("value", _U64)]


class _CpuidEntry(ctypes.Structure):
    _fields_ = [(name, _U32) for name in ("function", "index", "flags", "eax", "ebx", "ecx", "edx")] + [
        ("padding", _U32 * 3)
    ]


class _GuestDebug(ctypes.Structure):
    _fields_ = [("control", _U32), ("pad", _U32), ("debugreg", _U64 * 8)]


class Block(ctypes.Structure):
    """struct cpu_block."""

    _fields_ = [
        ("abi", _U32), ("size", _U32), ("dirty", _U32),
        ("request_interrupt_window", _U8), ("guest_kind", _U8), ("page_bit", _U8), ("msr_mode", _U8),
        ("stop_msrs_count", _U32), ("stop_msrs", _MsrRange * _STOP_MSRS_MAX),
        ("guest_debug", _GuestDebug), ("tsc_offset", _I64),
        ("regs", _U64 * 18), ("sregs", _U8 * 312), ("debug", _U8 * 128), ("events", _U8 * 64), ("xcr0", _U64),
        ("xsave", _U8 * 4096), ("msrs", _Msr * 256),
        ("cpuid_count", _U32), ("cpuid", _CpuidEntry * _CPUID_MAX),
        ("stop", _Stop), ("answer", _Answer),
        *((name, _U64) for name in ("runs", "fills", "misses", "deliveries", "host_faults", "slices", "code_flushes",
                                    "exclusive")),
    ]  # fmt: skip


BLOCK_SIZE = ctypes.sizeof(Block)

_REGS = struct.Struct("<18Q")
_SEGMENT = struct.Struct("<QIH9Bx")
_TABLE = struct.Struct("<QH6x")
_CONTROL = struct.Struct("<7Q32x")
_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
_DEBUG = struct.Struct("<4QQQ")
_EVENTS = struct.Struct("<4BI4B4BII4BB26xBQ")
_RFLAGS_IF = 1 << 9
_SHADOW_STI = 2
_XCR0_X87, XCR0_SUPPORTED = 1, 3
_LEGACY, _AREA = 512, 576
_XSAVE_HEADER = struct.Struct("<QQ")  # XSTATE_BV XCOMP_BV
_MXCSR_AT, _MXCSR_MASK = 24, 0xFFFF
_ST, _XMM = 32, 160
_INITIAL_FPU = struct.pack("<HHBxHQQII", 0x37F, 0, 0, 0, 0, 0, 0x1F80, _MXCSR_MASK).ljust(_LEGACY, b"\0")
_MASK_64 = (1 << 64) - 1


def new_block(buffer: Any, offset: int, page_bit: PageBit | None) -> Block:
    """A block at `offset` of a writable buffer: the state after reset, and the CPUID of a guest with this page bit.

    Raises: NoLibrary; RuntimeError if the library has another idea of a block.
    """
    block = Block.from_buffer(buffer, offset)
    load().block_init(ctypes.addressof(block))
    if (block.abi, block.size) != (ABI, BLOCK_SIZE):
        raise RuntimeError(f"libguestmem_cpu.so has blocks of {block.size} bytes, not {BLOCK_SIZE}: build it again")
    if page_bit is not None:
        block.page_bit = page_bit.position
        block.guest_kind = _GUEST_SNP if page_bit.set_is_private else _GUEST_TD
    return block


# Stops and answers


def read_stop(block: Block) -> Stop:
    """Why the CPU came back."""
    stop = block.stop
    reader = _STOPS.get(stop.kind)
    if reader is None:
        raise RuntimeError(f"a stop of kind {stop.kind}")
    result: Stop = reader(stop)
    return result


def _private(stop: _Stop) -> bool | None:
    return None if stop.access == ACCESS_ANY else stop.access == ACCESS_PRIVATE


def _data(stop: _Stop) -> int:
    return int.from_bytes(bytes(stop.data[: stop.size * max(stop.count, 1)]), "little")


_STOPS: dict[int, Any] = {
    STOP_SLICE: lambda stop: SliceOver(),
    STOP_KICKED: lambda stop: SliceOver(),
    STOP_SIGNAL: lambda stop: SignalPending(),
    STOP_MISS: lambda stop: Stage2Miss(stop.gpa, bool(stop.write), bool(stop.fetch), _private(stop)),
    STOP_HOST_FAULT: lambda stop: HostFault(stop.gpa, stop.hva, bool(stop.write), _private(stop)),
    STOP_PORT_OUT: lambda stop: PortOut(stop.port, stop.size, _data(stop)),
    STOP_PORT_IN: lambda stop: PortIn(stop.port, stop.size, stop.count),
    STOP_MMIO_READ: lambda stop: MmioRead(stop.gpa, stop.size),
    STOP_MMIO_WRITE: lambda stop: MmioWrite(stop.gpa, stop.size, _data(stop)),
    STOP_HALT: lambda stop: Halt(),
    STOP_WINDOW: lambda stop: InterruptWindow(),
    STOP_RDMSR: lambda stop: ReadMsr(stop.nr),
    STOP_WRMSR: lambda stop: WriteMsr(stop.nr, stop.value[0]),
    STOP_HYPERCALL: lambda stop: Hypercall(stop.nr, tuple(stop.value), stop.cpl),
    STOP_PVALIDATE: lambda stop: Pvalidate(stop.gpa, bool(stop.large), bool(stop.validate)),
    STOP_RMPADJUST: lambda stop: Rmpadjust(
        stop.gpa,
        bool(stop.large),
        target=stop.value[0] & 0xFF,
        permissions=stop.value[0] >> 8 & 0xFF,
        vmsa=bool(stop.value[0] >> 16 & 1),
    ),
    STOP_VMGEXIT: lambda stop: Vmgexit(stop.value[0]),
    STOP_TDCALL: lambda stop: Tdcall(stop.nr),
    STOP_DEBUG: lambda stop: Debug(stop.nr, stop.value[0], stop.value[1], stop.value[2]),
    STOP_SHUTDOWN: lambda stop: Shutdown(),
    STOP_FAILED: lambda stop: Failed(stop.value[0], stop.why.decode()),
}


class BlockState:
    """The state of the CPU behind `block`: CpuState, and the part of Engine that is state."""

    def __init__(self, block: Block, page_bit: PageBit | None) -> None:
        self._block: Block | None = block
        self._library = load()
        self.set_cpuid(cpuid.default(page_bit))

    @property
    def block(self) -> Block:
        """Raises: ValueError, once it is closed."""
        if self._block is None:
            raise ValueError("the engine is closed")
        return self._block

    @property
    def _address(self) -> int:
        return ctypes.addressof(self.block)

    def close_block(self) -> None:
        """Nobody has the state any more."""
        self._block = None

    # The answer to the last stop

    def complete(self, value: int) -> None:
        """See Engine. Dropped if nothing asks for it."""
        block = self.block
        stop, answer = block.stop, block.answer
        length = min(stop.size * max(stop.count, 1), _DATA)
        if stop.kind in (STOP_PORT_IN, STOP_MMIO_READ):
            data = (value & (1 << length * 8) - 1).to_bytes(length, "little").ljust(8, b"\0")
            ctypes.memmove(answer.data, data, len(data))
        answer.value = value & _MASK_64
        answer.kind = ANSWER_VALUE

    def raise_exception(self, vector: int, error_code: int) -> None:
        """See Engine."""
        answer = self.block.answer
        answer.vector, answer.error_code, answer.kind = vector, error_code, ANSWER_RAISE

    # What it is

    def set_cpuid(self, table: CpuidTable) -> None:
        """Of `table` the first 256 entries."""
        block = self.block
        entries = list(table.items())[:_CPUID_MAX]
        for entry, ((leaf, subleaf), (eax, ebx, ecx, edx)) in zip(block.cpuid, entries, strict=False):
            flags = _SIGNIFICANT_INDEX if cpuid.is_indexed(leaf) else 0
            entry.function, entry.index, entry.flags = leaf, subleaf, flags
            entry.eax, entry.ebx, entry.ecx, entry.edx = eax, ebx, ecx, edx
        block.cpuid_count = len(entries)
        block.dirty |= CPUID

    def set_stop_msrs(self, ranges: Iterable[tuple[int, int, bool, bool]]) -> None:
        """The MSRs whose accesses are stops: first, how many, reads, writes. Raises: ValueError, beyond 32 ranges."""
        wanted = list(ranges)
        if len(wanted) > _STOP_MSRS_MAX:
            raise ValueError(f"{len(wanted)} ranges of MSRs: at most {_STOP_MSRS_MAX}")
        for place, (first, count, reads, writes) in zip(self.block.stop_msrs, wanted, strict=False):
            place.first, place.count, place.reads, place.writes = first, count, reads, writes
        self.block.stop_msrs_count = len(wanted)

    def set_stop_unknown_msrs(self, stop: bool) -> None:
        """Whether an access to an MSR that there is not is a stop, rather than #GP."""
        self.block.msr_mode = stop

    def set_guest_debug(self, control: int, debugreg: tuple[int, ...] = (0,) * 8) -> None:
        """struct kvm_guest_debug."""
        debug = self.block.guest_debug
        debug.control = control
        debug.debugreg[:] = debugreg

    # Registers

    def get_regs(self) -> Regs:
        return Regs(*self.block.regs)

    def set_regs(self, regs: Regs) -> None:
        """All general registers, cut to 64 bits."""
        words = [word & _MASK_64 for word in dataclasses.astuple(regs)]
        words[17] |= 2
        self.block.regs[:] = words
        self.block.dirty |= REGS

    def get_sregs(self) -> Sregs:
        data = bytes(self.block.sregs)
        segments = {}
        for place, name in enumerate(_SEGMENTS):
            base, limit, selector, *bits = _SEGMENT.unpack_from(data, place * _SEGMENT.size)
            segments[name] = Segment(base, limit, selector, *bits)
        at = len(_SEGMENTS) * _SEGMENT.size
        gdt = DescriptorTable(*_TABLE.unpack_from(data, at))
        idt = DescriptorTable(*_TABLE.unpack_from(data, at + _TABLE.size))
        cr0, cr2, cr3, cr4, cr8, efer, apic_base = _CONTROL.unpack_from(data, at + 2 * _TABLE.size)
        return Sregs(**segments, gdt=gdt, idt=idt, cr0=cr0, cr2=cr2, cr3=cr3, cr4=cr4, cr8=cr8, efer=efer,
                     apic_base=apic_base)  # fmt: skip

    def set_sregs(self, sregs: Sregs) -> None:
        data = b"".join(_pack_segment(getattr(sregs, name)) for name in _SEGMENTS)
        data += b"".join(_TABLE.pack(table.base, table.limit & 0xFFFF) for table in (sregs.gdt, sregs.idt))
        s = sregs
        data += _CONTROL.pack(s.cr0, s.cr2, s.cr3, s.cr4, s.cr8, s.efer, s.apic_base)
        ctypes.memmove(self.block.sregs, data, len(data))
        self.block.dirty |= SREGS

    # FPU

    def get_fpu(self) -> bytes:
        """The FXSAVE64 image, 512 bytes."""
        return bytes(self.block.xsave[:_LEGACY])

    def set_fpu(self, image: bytes) -> None:
        """Raises: ValueError, for a wrong size or reserved bits of MXCSR."""
        if len(image) < _LEGACY:
            raise ValueError(f"FXSAVE image of {len(image)} bytes: need {_LEGACY}")
        mxcsr = int.from_bytes(image[_MXCSR_AT : _MXCSR_AT + 4], "little")
        if mxcsr & ~_MXCSR_MASK:
            raise ValueError(f"MXCSR {mxcsr:#x}: reserved bits")
        data = bytearray(image[:_LEGACY])
        data[_MXCSR_AT + 4 : _MXCSR_AT + 8] = _MXCSR_MASK.to_bytes(4, "little")
        ctypes.memmove(self.block.xsave, bytes(data), _LEGACY)
        self.block.dirty |= FPU

    def get_xsave(self) -> bytes:
        """The XSAVE area in standard form, 576 bytes, with x87 and SSE marked as in use."""
        return self.get_fpu() + _XSAVE_HEADER.pack(XCR0_SUPPORTED, 0).ljust(_AREA - _LEGACY, b"\0")

    def set_xsave(self, area: bytes) -> None:
        """Raises: ValueError, for state that there is not, the compact form, or as `set_fpu`."""
        if len(area) < _AREA:
            raise ValueError(f"XSAVE area of {len(area)} bytes: need {_AREA}")
        present, compact = _XSAVE_HEADER.unpack_from(area, _LEGACY)
        if present & ~XCR0_SUPPORTED or compact or any(area[_LEGACY + _XSAVE_HEADER.size : _AREA]):
            raise ValueError(f"XSTATE_BV {present:#x}, XCOMP_BV {compact:#x}: need at most {XCR0_SUPPORTED:#x} and 0")
        image = bytearray(area[:_LEGACY])
        if not present & _XCR0_X87:
            image[:24], image[_ST:_XMM] = _INITIAL_FPU[:24], _INITIAL_FPU[_ST:_XMM]
        if not present >> 1 & 1:
            image[_XMM : _XMM + 256] = bytes(256)
        self.set_fpu(bytes(image))

    def get_xcr0(self) -> int:
        return int(self.block.xcr0)

    def set_xcr0(self, value: int) -> None:
        """Raises: ValueError, without x87 or for state that there is not."""
        if not value & _XCR0_X87 or value & ~XCR0_SUPPORTED:
            raise ValueError(f"XCR0 {value:#x}: need bit 0, and at most {XCR0_SUPPORTED:#x}")
        self.block.xcr0 = value
        self.block.dirty |= FPU

    # Debug registers, MSRs

    def get_debug_registers(self) -> DebugRegisters:
        d0, d1, d2, d3, dr6, dr7 = _DEBUG.unpack_from(bytes(self.block.debug))
        return DebugRegisters((d0, d1, d2, d3), dr6, dr7)

    def set_debug_registers(self, registers: DebugRegisters) -> None:
        """Raises: ValueError. Source: kvm_vcpu_ioctl_x86_set_debugregs."""
        if registers.dr6 >> 32 or registers.dr7 >> 32:
            raise ValueError(f"DR6 {registers.dr6:#x}, DR7 {registers.dr7:#x}: need 32 bits")
        data = _DEBUG.pack(*registers.db, registers.dr6, registers.dr7)
        ctypes.memmove(self.block.debug, data, len(data))
        self.block.dirty |= DEBUG

    def get_msr(self, index: int) -> int | None:
        """None if there is no such register."""
        value = _U64()
        return value.value if self._library.msr_get(self._address, index, ctypes.byref(value)) else None

    def set_msr(self, index: int, value: int) -> bool:
        """False if there is no such register or it does not take the value."""
        return bool(self._library.msr_set(self._address, index, value & _MASK_64))

    # Events

    def get_events(self) -> Events:
        (injected, nr, has_error, pending, error_code, interrupt, interrupt_nr, soft, shadow,
         nmi, nmi_pending, nmi_masked, _, _, _, *_, has_payload, payload) = _EVENTS.unpack_from(
            bytes(self.block.events)
        )  # fmt: skip
        return Events(
            exception_injected=bool(injected),
            exception_pending=bool(pending),
            exception_nr=nr,
            exception_error_code=error_code if has_error else None,
            exception_payload=payload if has_payload else None,
            interrupt_injected=bool(interrupt),
            interrupt_nr=interrupt_nr,
            interrupt_soft=bool(soft),
            interrupt_shadow=shadow,
            nmi_injected=bool(nmi),
            nmi_pending=bool(nmi_pending),
            nmi_masked=bool(nmi_masked),
        )

    def set_events(self, events: Events) -> None:
        """An INT instruction that is being delivered is taken to have two bytes, which RIP is past."""
        e = events
        data = _EVENTS.pack(
            e.exception_injected, e.exception_nr, e.exception_error_code is not None, e.exception_pending,
            e.exception_error_code or 0, e.interrupt_injected, e.interrupt_nr, e.interrupt_soft,
            _SHADOW_STI if e.interrupt_shadow else 0, e.nmi_injected, e.nmi_pending, e.nmi_masked, 0, 0, 0,
            0, 0, 0, 0, 0, e.exception_payload is not None, e.exception_payload or 0,
        )  # fmt: skip
        ctypes.memmove(self.block.events, data, len(data))
        self.block.dirty |= EVENTS

    def queue_interrupt(self, vector: int) -> None:
        """The guest takes it as soon as RFLAGS.IF is set and no shadow is. Raises: ValueError, beyond 255."""
        if not 0 <= vector < 256:
            raise ValueError(f"interrupt vector {vector}")
        self.set_events(dataclasses.replace(self.get_events(), interrupt_injected=True, interrupt_nr=vector))

    def queue_nmi(self) -> None:
        """One NMI is remembered while another is served."""
        self.set_events(dataclasses.replace(self.get_events(), nmi_pending=True))

    @property
    def request_interrupt_window(self) -> bool:
        """Whether `run` returns InterruptWindow."""
        return bool(self.block.request_interrupt_window)

    @request_interrupt_window.setter
    def request_interrupt_window(self, wanted: bool) -> None:
        self.block.request_interrupt_window = wanted

    @property
    def interrupt_flag(self) -> bool:
        """RFLAGS.IF."""
        return bool(self.block.regs[17] & _RFLAGS_IF)

    @property
    def ready_for_interrupt_injection(self) -> bool:
        """Whether the guest would take an interrupt now, and none waits."""
        return bool(self._library.takes_interrupts(self._address))


def _pack_segment(s: Segment) -> bytes:
    return _SEGMENT.pack(s.base & _MASK_64, s.limit & 0xFFFF_FFFF, s.selector & 0xFFFF, s.type, s.present, s.dpl, s.db,
                         s.s, s.l, s.g, s.avl, s.unusable)  # fmt: skip
