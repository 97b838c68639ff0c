"""The state of a vCPU besides its general and segment registers, for the VMM that saves and restores it."""

from __future__ import annotations

import dataclasses

from guestmem.cpu import fpu
from guestmem.cpu.cpu_state import HF2_NMI, HF_INHIBIT_IRQ
from guestmem.cpu.exceptions import NMI, PF, RFLAGS_IF, Event, has_error_code
from guestmem.cpu.registers import DebugRegisters, Events
from guestmem.cpu.uc_vcpu import Vcpu

_SHADOW_STI = 2


class UnicornState:
    """Implements `guestmem.cpu.engine.CpuState`. All methods raise ValueError once the engine is closed."""

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu, self._core = vcpu, vcpu.core
        self._closed = False
        self._core.cpu.msrs.xcr0 = fpu.XCR0_X87

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the engine is closed")

    def get_fpu(self) -> bytes:
        """The FXSAVE64 image, 512 bytes."""
        self._check_open()
        return fpu.get_fpu(self._core.handle)

    def set_fpu(self, image: bytes) -> None:
        """Raises: ValueError, for a wrong size or reserved bits of MXCSR."""
        self._check_open()
        fpu.set_fpu(self._core.handle, image)

    def get_xsave(self) -> bytes:
        """The XSAVE area in standard form, 576 bytes."""
        self._check_open()
        return fpu.get_xsave(self._core.handle)

    def set_xsave(self, area: bytes) -> None:
        """Raises: ValueError, for state that there is not, the compact form, or as `set_fpu`."""
        self._check_open()
        fpu.set_xsave(self._core.handle, area)

    def get_xcr0(self) -> int:
        self._check_open()
        return int(self._core.cpu.msrs.xcr0)

    def set_xcr0(self, value: int) -> None:
        """Raises: ValueError, without x87 or for state that there is not."""
        self._check_open()
        if not value & fpu.XCR0_X87 or value & ~fpu.SUPPORTED:
            raise ValueError(f"XCR0 {value:#x}: need bit 0, and at most {fpu.SUPPORTED:#x}")
        self._core.cpu.msrs.xcr0 = value

    def get_debug_registers(self) -> DebugRegisters:
        self._check_open()
        dr = self._core.cpu.tail.dr
        return DebugRegisters((dr[0], dr[1], dr[2], dr[3]), dr[6], dr[7])

    def set_debug_registers(self, registers: DebugRegisters) -> None:
        """Raises: ValueError. Source: kvm_vcpu_ioctl_x86_set_debugregs."""
        self._check_open()
        if registers.dr6 >> 32 or registers.dr7 >> 32:
            raise ValueError(f"DR6 {registers.dr6:#x}, DR7 {registers.dr7:#x}: need 32 bits")
        dr = self._core.cpu.tail.dr
        dr[0], dr[1], dr[2], dr[3] = registers.db
        dr[6], dr[7] = registers.dr6, registers.dr7

    def get_msr(self, index: int) -> int | None:
        """None if there is no such register."""
        self._check_open()
        return self._vcpu.instructions.msrs.get(index)

    def set_msr(self, index: int, value: int) -> bool:
        """False if there is no such register or it does not take the value."""
        self._check_open()
        return self._vcpu.instructions.msrs.set(index, value)

    def get_events(self) -> Events:
        self._check_open()
        interrupts, cpu, pending = self._vcpu.interrupts, self._core.cpu, self._vcpu.pending
        events = Events(
            interrupt_injected=interrupts.vector is not None,
            interrupt_nr=interrupts.vector or 0,
            interrupt_shadow=_SHADOW_STI if interrupts.shadow else 0,
            nmi_pending=interrupts.nmi,
            nmi_masked=bool(cpu.env.hflags2 & HF2_NMI),
        )
        if pending is None:
            return events
        if pending.exception:
            error_code = pending.error_code if has_error_code(pending.vector) else None
            return dataclasses.replace(
                events,
                exception_injected=True,
                exception_nr=pending.vector,
                exception_error_code=error_code,
                exception_payload=pending.address if pending.vector == PF else None,
            )
        if pending.external and pending.vector == NMI:
            return dataclasses.replace(events, nmi_injected=True)
        return dataclasses.replace(
            events, interrupt_injected=True, interrupt_nr=pending.vector, interrupt_soft=pending.software
        )

    def set_events(self, events: Events) -> None:
        """An INT instruction that is being delivered (`interrupt_soft`) is taken to have two bytes, which RIP is at."""
        self._check_open()
        vcpu, cpu = self._vcpu, self._core.cpu
        vcpu.pending, vcpu.interrupts.vector = None, None
        if events.exception_injected or events.exception_pending:
            address = cpu.env.cr[2] if events.exception_payload is None else events.exception_payload
            vcpu.pending = Event(events.exception_nr, events.exception_error_code or 0, address=address)
        elif events.nmi_injected:
            vcpu.pending = Event(NMI, external=True)
        elif events.interrupt_injected and events.interrupt_soft:
            vcpu.pending = Event(events.interrupt_nr, length=2)
        elif events.interrupt_injected:
            vcpu.interrupts.vector = events.interrupt_nr
        vcpu.interrupts.nmi = events.nmi_pending
        cpu.env.hflags2 = cpu.env.hflags2 & ~HF2_NMI | (HF2_NMI if events.nmi_masked else 0)
        shadow = HF_INHIBIT_IRQ if events.interrupt_shadow else 0
        cpu.env.hflags = cpu.env.hflags & ~HF_INHIBIT_IRQ | shadow

    @property
    def cr8(self) -> int:
        return int(self._core.cpu.tail.v_tpr & 15)

    @cr8.setter
    def cr8(self, value: int) -> None:
        self._core.cpu.tail.v_tpr = value & 15

    def queue_interrupt(self, vector: int) -> None:
        """The guest takes it as soon as RFLAGS.IF is set and no shadow is. Raises: ValueError, beyond 255."""
        self._check_open()
        if not 0 <= vector < 256:
            raise ValueError(f"interrupt vector {vector}")
        self._vcpu.interrupts.vector = vector

    def queue_nmi(self) -> None:
        """One NMI is remembered while another is served."""
        self._check_open()
        self._vcpu.interrupts.nmi = True

    @property
    def request_interrupt_window(self) -> bool:
        """Whether `run` returns InterruptWindow."""
        return self._vcpu.interrupts.window

    @request_interrupt_window.setter
    def request_interrupt_window(self, wanted: bool) -> None:
        self._vcpu.interrupts.window = wanted

    @property
    def interrupt_flag(self) -> bool:
        """RFLAGS.IF."""
        return bool(self._core.cpu.env.eflags & RFLAGS_IF)

    @property
    def ready_for_interrupt_injection(self) -> bool:
        """Whether the guest would take an interrupt now, and none waits."""
        self._check_open()
        vcpu = self._vcpu
        return vcpu.pending is None and vcpu.interrupts.vector is None and vcpu.interrupts.open
