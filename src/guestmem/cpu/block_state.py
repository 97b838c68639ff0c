"""The state of a vCPU that lies in a block: for whoever has the block, while the CPU is not inside of cpu_run()."""

from __future__ import annotations

import ctypes
from typing import Any

from guestmem.cpu import block as b
from guestmem.cpu import cpuid
from guestmem.cpu.block import CpuBlock
from guestmem.cpu.engine import CpuidTable, PageBit
from guestmem.cpu.registers import DebugRegisters, DescriptorTable, Events, Regs, Segment, Sregs

LEGACY, AREA = 512, 576
XCR0_X87, XCR0_SSE = 1, 2
SUPPORTED_STATE = XCR0_X87 | XCR0_SSE
"""The bits of XCR0 that there is state for."""
_MXCSR, _MXCSR_MASK = 24, 0xFFFF
_ST, _XMM, _XMM_END = 32, 160, 416
_INITIAL_X87 = (0x37F).to_bytes(_MXCSR, "little")
_RFLAGS_IF = 1 << 9
_MASK_64 = (1 << 64) - 1


class BlockState:
    """Implements `guestmem.cpu.engine.CpuState`, and the registers of `Engine`, over `block`.

    `_check_open` may be overridden to refuse; what gets, sets or queues asks it.
    """

    def __init__(self, block: CpuBlock) -> None:
        self.block = block

    def _check_open(self) -> None:
        """Raises: ValueError, where the state is no longer to be had."""

    def set_page_bit(self, bit: PageBit | None) -> None:
        """The guest's, before it runs."""
        self.block.page_bit = bit.position if bit else 0
        self.block.guest_kind = b.PLAIN if bit is None else b.SNP if bit.set_is_private else b.TD
        self.block.dirty |= b.CONTROL

    def set_cpuid(self, table: CpuidTable) -> None:
        """What CPUID answers. MAXPHYADDR follows from it; the page bit does not, which is the hardware's."""
        self._check_open()
        if len(table) > b.CPUID_MAX:
            raise ValueError(f"{len(table)} leaves of CPUID: at most {b.CPUID_MAX}")
        # Subleaf 0 comes last: it answers for those that are not there.
        leaves = sorted(table.items(), reverse=True)
        for entry, ((leaf, index), (eax, ebx, ecx, edx)) in zip(self.block.cpuid, leaves, strict=False):
            entry.function, entry.index = leaf, index
            entry.flags = b.SIGNIFICANT_INDEX if leaf in cpuid.INDEXED or index else 0
            entry.eax, entry.ebx, entry.ecx, entry.edx = eax, ebx, ecx, edx
        self.block.cpuid_count = len(table)
        self.block.dirty |= b.CPUID

    def set_stop_msrs(self, ranges: tuple[range, ...], unknown: bool = False) -> None:
        """MSRs whose RDMSR and WRMSR are stops, and whether those of which the CPU knows nothing are too.

        Raises: ValueError, beyond 32 ranges.
        """
        self._check_open()
        if len(ranges) > b.STOP_MSRS_MAX:
            raise ValueError(f"{len(ranges)} ranges of MSRs: at most {b.STOP_MSRS_MAX}")
        for place, wanted in zip(self.block.stop_msrs, ranges, strict=False):
            place.first, place.count, place.reads, place.writes = wanted.start, len(wanted), 1, 1
        self.block.stop_msrs_count = len(ranges)
        self.block.msr_mode = unknown
        self.block.dirty |= b.CONTROL

    def set_guest_debug(self, control: int, registers: tuple[int, ...]) -> None:
        """struct kvm_guest_debug: KVM_GUESTDBG_* bits, and DR0 to DR7."""
        self._check_open()
        self.block.guest_debug.control = control
        self.block.guest_debug.debugreg[:] = registers
        self.block.dirty |= b.CONTROL

    @property
    def cr8(self) -> int:
        """0 to 15, as MOV to CR8 left it."""
        return int(self.block.sregs.cr8) & 15

    @cr8.setter
    def cr8(self, value: int) -> None:
        if self.cr8 != value & 15:  # what is dirty is loaded again
            self.block.sregs.cr8 = value & 15
            self.block.dirty |= b.SREGS

    def get_regs(self) -> Regs:
        """The general registers. At a stop that repeats its instruction, those before the instruction."""
        self._check_open()
        regs = self.block.regs
        return Regs(**{name: getattr(regs, name) for name in b.REG_NAMES})

    def set_regs(self, regs: Regs) -> None:
        """Set the general registers. If RIP moves, what the instruction there waited for is void."""
        self._check_open()
        target = self.block.regs
        if target.rip != regs.rip & _MASK_64:
            self._forget_exception()
        for name in b.REG_NAMES:
            setattr(target, name, getattr(regs, name) & _MASK_64)
        target.rflags |= 2
        self.block.dirty |= b.REGS

    def _forget_exception(self) -> None:
        events = self.block.events
        if events.exception_injected or events.exception_pending or events.interrupt_soft:
            events.exception_injected = events.exception_pending = 0
            if events.interrupt_soft:
                events.interrupt_injected = events.interrupt_soft = 0
            self.block.dirty |= b.EVENTS

    def get_sregs(self) -> Sregs:
        """Segments with their hidden parts, and control registers."""
        self._check_open()
        sregs = self.block.sregs
        segments: dict[str, Any] = {name: _segment(getattr(sregs, name)) for name in b.SEGMENTS}
        controls = {name: getattr(sregs, name) for name in b.CONTROLS}
        gdt, idt = (DescriptorTable(table.base, table.limit) for table in (sregs.gdt, sregs.idt))
        return Sregs(**segments, gdt=gdt, idt=idt, **controls)

    def set_sregs(self, sregs: Sregs) -> None:
        """Set segments, hidden parts included, and control registers. Nothing is read from guest memory."""
        self._check_open()
        target = self.block.sregs
        for name in b.SEGMENTS:
            _set_segment(getattr(target, name), getattr(sregs, name))
        for name in ("gdt", "idt"):
            table = getattr(sregs, name)
            getattr(target, name).base, getattr(target, name).limit = table.base, table.limit
        for name in b.CONTROLS:
            setattr(target, name, getattr(sregs, name))
        self.block.dirty |= b.SREGS

    def get_fpu(self) -> bytes:
        """The FXSAVE64 image, 512 bytes."""
        self._check_open()
        return ctypes.string_at(self.block.xsave, LEGACY)

    def set_fpu(self, image: bytes) -> None:
        """Raises: ValueError, for a wrong size or reserved bits of MXCSR."""
        self._check_open()
        if len(image) < LEGACY:
            raise ValueError(f"FXSAVE image of {len(image)} bytes: need {LEGACY}")
        self._put_xsave(image[:LEGACY] + SUPPORTED_STATE.to_bytes(8, "little").ljust(AREA - LEGACY, b"\0"))

    def get_xsave(self) -> bytes:
        """The XSAVE area in standard form, 576 bytes."""
        self._check_open()
        return ctypes.string_at(self.block.xsave, AREA)

    def set_xsave(self, area: bytes) -> None:
        """Raises: ValueError, for state that there is not, the compact form, or as `set_fpu`."""
        self._check_open()
        if len(area) < AREA:
            raise ValueError(f"XSAVE area of {len(area)} bytes: need {AREA}")
        present, compact = (int.from_bytes(area[at : at + 8], "little") for at in (LEGACY, LEGACY + 8))
        if present & ~SUPPORTED_STATE or compact or any(area[LEGACY + 16 : AREA]):
            raise ValueError(f"XSTATE_BV {present:#x}, XCOMP_BV {compact:#x}: need at most {SUPPORTED_STATE:#x} and 0")
        whole = bytearray(area[:AREA])
        if not present & XCR0_X87:
            whole[:_MXCSR], whole[_ST:_XMM] = _INITIAL_X87, bytes(_XMM - _ST)
        if not present & XCR0_SSE:
            whole[_XMM:_XMM_END] = bytes(_XMM_END - _XMM)
        whole[LEGACY] = SUPPORTED_STATE
        self._put_xsave(bytes(whole))

    def _put_xsave(self, area: bytes) -> None:
        mxcsr = int.from_bytes(area[_MXCSR : _MXCSR + 4], "little")
        if mxcsr & ~_MXCSR_MASK:
            raise ValueError(f"MXCSR {mxcsr:#x}: reserved bits")
        ctypes.memmove(self.block.xsave, area, AREA)
        self.block.dirty |= b.FPU

    def get_xcr0(self) -> int:
        self._check_open()
        return int(self.block.xcr0)

    def set_xcr0(self, value: int) -> None:
        """Raises: ValueError, without x87 or for state that there is not."""
        self._check_open()
        if not value & XCR0_X87 or value & ~SUPPORTED_STATE:
            raise ValueError(f"XCR0 {value:#x}: need bit 0, and at most {SUPPORTED_STATE:#x}")
        self.block.xcr0 = value
        self.block.dirty |= b.FPU

    def get_debug_registers(self) -> DebugRegisters:
        self._check_open()
        debug = self.block.debug
        return DebugRegisters((debug.db[0], debug.db[1], debug.db[2], debug.db[3]), debug.dr6, debug.dr7)

    def set_debug_registers(self, registers: DebugRegisters) -> None:
        """Raises: ValueError. Source: kvm_vcpu_ioctl_x86_set_debugregs."""
        self._check_open()
        if registers.dr6 >> 32 or registers.dr7 >> 32:
            raise ValueError(f"DR6 {registers.dr6:#x}, DR7 {registers.dr7:#x}: need 32 bits")
        debug = self.block.debug
        debug.db[:] = registers.db
        debug.dr6, debug.dr7 = registers.dr6, registers.dr7
        self.block.dirty |= b.DEBUG

    def get_msr(self, index: int) -> int | None:
        """None if there is no such register."""
        self._check_open()
        value = ctypes.c_uint64()
        known = b.library().cpu_msr_get(ctypes.byref(self.block), index, ctypes.byref(value))
        return value.value if known else None

    def set_msr(self, index: int, value: int) -> bool:
        """False if there is no such register or it does not take the value."""
        self._check_open()
        return bool(b.library().cpu_msr_set(ctypes.byref(self.block), index, value))

    def get_events(self) -> Events:
        self._check_open()
        e = self.block.events
        return Events(
            exception_injected=bool(e.exception_injected),
            exception_pending=bool(e.exception_pending),
            exception_nr=e.exception_nr,
            exception_error_code=e.exception_error_code if e.exception_has_error_code else None,
            exception_payload=e.exception_payload if e.exception_has_payload else None,
            interrupt_injected=bool(e.interrupt_injected),
            interrupt_nr=e.interrupt_nr,
            interrupt_soft=bool(e.interrupt_soft),
            interrupt_shadow=e.interrupt_shadow,
            nmi_injected=bool(e.nmi_injected),
            nmi_pending=bool(e.nmi_pending),
            nmi_masked=bool(e.nmi_masked),
        )

    def set_events(self, events: Events) -> None:
        """An INT instruction that is being delivered (`interrupt_soft`) is taken to have two bytes, which RIP is at."""
        self._check_open()
        e = self.block.events
        e.exception_injected, e.exception_pending = events.exception_injected, events.exception_pending
        e.exception_nr = events.exception_nr
        e.exception_has_error_code = events.exception_error_code is not None
        e.exception_error_code = events.exception_error_code or 0
        e.exception_has_payload = events.exception_payload is not None
        e.exception_payload = events.exception_payload or 0
        e.interrupt_injected, e.interrupt_nr = events.interrupt_injected, events.interrupt_nr
        e.interrupt_soft, e.interrupt_shadow = events.interrupt_soft, events.interrupt_shadow
        e.nmi_injected, e.nmi_pending, e.nmi_masked = events.nmi_injected, events.nmi_pending, events.nmi_masked
        self.block.dirty |= b.EVENTS

    def queue_interrupt(self, vector: int) -> None:
        """The guest takes it as soon as RFLAGS.IF is set and no shadow is. Raises: ValueError, beyond 255."""
        self._check_open()
        if not 0 <= vector < 256:
            raise ValueError(f"interrupt vector {vector}")
        events = self.block.events
        events.interrupt_injected, events.interrupt_nr, events.interrupt_soft = 1, vector, 0
        self.block.dirty |= b.EVENTS

    def queue_nmi(self) -> None:
        """One NMI is remembered while another is served."""
        self._check_open()
        self.block.events.nmi_pending = 1
        self.block.dirty |= b.EVENTS

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
        return bool(self.block.regs.rflags & _RFLAGS_IF)

    @property
    def ready_for_interrupt_injection(self) -> bool:
        """Whether the guest would take an interrupt now, and none waits."""
        self._check_open()
        return bool(b.library().cpu_takes_interrupts(ctypes.byref(self.block)))


def _segment(raw: b.KvmSegment) -> Segment:
    return Segment(**{name: getattr(raw, name) for name in b.SEGMENT_FIELDS})


def _set_segment(raw: b.KvmSegment, segment: Segment) -> None:
    for name in b.SEGMENT_FIELDS:
        setattr(raw, name, getattr(segment, name))
