"""Lapic: the local APIC of one vCPU, as a machine of registers. xAPIC by its MMIO page, x2APIC by MSRs.

    accept(message) -> IRR -> pending_vector -> acknowledge -> ISR -> EOI -> the IOAPIC, if the vector is one of its

IRR, ISR and TMR are integers of 256 bits: the highest vector is a bit_length. Nothing waits here, so a call is atomic
to every task; no lock guards a field. ESR stays as it was set: like KVM's this APIC finds no errors.

Source: Intel SDM vol. 3, chapter 11; arch/x86/kvm/lapic.c, whose functions are named where something follows them.
"""

from __future__ import annotations

from typing import Protocol

from guestmem.kvm.irqchip import lapic_registers as reg
from guestmem.kvm.irqchip.apic_bus import DFR_FLAT, ApicBus, DeliveryMode, Message
from guestmem.kvm.irqchip.lapic_timer import LapicTimer, TimerMode, TimeStampCounter
from guestmem.sched import Timers

_MASK_32 = 0xFFFF_FFFF


class LapicCpu(TimeStampCounter, Protocol):
    """The vCPU that an APIC belongs to."""

    def kick(self) -> None:
        """Something may have become pending: if it sleeps, it is to look; if it runs, too."""
        ...

    def inject_nmi(self) -> None: ...


class EoiListener(Protocol):
    """What hears of the end of an interrupt: the controllers that the APIC is wired to."""

    def eoi(self, lapic: Lapic, vector: int) -> None: ...


class Lapic:
    """`number` is that of the vCPU, and its APIC ID after reset. `is_bsp`: the bootstrap processor's.

    `init_pending` and `sipi_pending` are latched until the vCPU takes them. `has_x2apic` and `has_tsc_deadline` are as
    the guest's CPUID has them; `can_suppress_eoi`: software may keep EOIs from the IOAPIC, offered where that is not
    the kernel's.
    """

    def __init__(
        self, number: int, bus: ApicBus, timers: Timers, cpu: LapicCpu, listener: EoiListener, can_suppress_eoi: bool
    ) -> None:
        self.number = number
        self._bus = bus
        self._cpu = cpu
        self._listener = listener
        self._version = reg.VERSION_VALUE | (reg.VERSION_NO_EOI_BROADCAST if can_suppress_eoi else 0)
        self.timer = LapicTimer(timers, cpu, self._timer_expired)
        self.has_x2apic = self.has_tsc_deadline = False
        self.is_bsp = False
        self.base = 0
        self.id = self.ldr = 0
        self.dfr = DFR_FLAT
        self.svr = 0xFF
        self.tpr = 0
        self.esr = 0
        self.icr = 0
        self.irr = self.isr = self.tmr = 0
        self.lvt = dict.fromkeys(reg.LVT_WRITABLE, reg.LVT_MASKED)
        self.divide = 0
        self.init_pending = self.sipi_pending = False
        self.sipi_vector = 0

    # Life

    def reset(self, is_init: bool = False) -> None:
        """Power-up, or INIT, after which the ID, the base and the mode are as before.

        LINT0 of the bootstrap processor lets the 8259A through, for guests that know no APIC
        (KVM_X86_QUIRK_LINT0_REENABLED). Source: kvm_lapic_reset.
        """
        if not is_init:
            self.base = reg.BASE_DEFAULT | reg.BASE_ENABLED | (reg.BASE_BSP if self.is_bsp else 0)
            self.id = self.number & 0xFF  # the register has eight bits
        self.timer.stop()
        self.timer.set_mode(TimerMode.ONE_SHOT)
        self.lvt = dict.fromkeys(reg.LVT_WRITABLE, reg.LVT_MASKED)
        if self.is_bsp:
            self.lvt[reg.LVT0] = DeliveryMode.EXTINT << reg.LVT_MODE_SHIFT
        self.dfr = DFR_FLAT
        self.ldr = self.ldr if self.is_x2apic else 0
        self.svr = 0xFF
        self.tpr = self.esr = self.icr = 0
        self.irr = self.isr = self.tmr = 0
        self.set_divide(0)
        self._bus.ids_changed()

    def restored(self) -> None:
        """The VMM has set the registers: whoever keeps something that follows from them looks again."""
        self._bus.ids_changed()
        self._cpu.kick()

    @property
    def is_enabled(self) -> bool:
        """By the base MSR. Source: kvm_apic_hw_enabled."""
        return bool(self.base & reg.BASE_ENABLED)

    @property
    def is_software_enabled(self) -> bool:
        return bool(self.svr & reg.SVR_ENABLED)

    @property
    def is_x2apic(self) -> bool:
        return self.base & reg.BASE_X2APIC != 0

    @property
    def physical_id(self) -> int:
        """What a physical destination names. The ID of a vCPU beyond 254 does not fit into an xAPIC; KVM lets it be
        named before it is in x2APIC mode. Source: kvm_apic_match_physical_addr."""
        return self.number if self.is_x2apic or self.number > 0xFF else self.id

    def set_base(self, value: int, from_guest: bool) -> bool:
        """MSR 0x1b. False if it does not take the value: reserved bits, x2APIC without xAPIC, or for a guest a change
        of mode that the SDM (figure 11-27) does not have. Source: kvm_apic_set_base."""
        reserved = 0x2FF | (0 if self.has_x2apic else reg.BASE_X2APIC) | ~((1 << 52) - 1)
        mode, old_mode = (base & (reg.BASE_ENABLED | reg.BASE_X2APIC) for base in (value, self.base))
        both = reg.BASE_ENABLED | reg.BASE_X2APIC
        if value & reserved or mode == reg.BASE_X2APIC:
            return False
        if from_guest and (old_mode, mode) in ((both, reg.BASE_ENABLED), (0, both)):
            return False
        self.base = value
        if (mode ^ old_mode) & reg.BASE_ENABLED and mode:
            self.id = self.number & 0xFF  # the register has eight bits
        if mode == both and old_mode != both:
            self.ldr = self.number >> 4 << 16 | 1 << (self.number & 0xF)
        self._bus.ids_changed()
        self._cpu.kick()
        return True

    # What the vCPU asks before it enters the guest

    @property
    def ppr(self) -> int:
        """Source: __apic_update_ppr."""
        in_service = self.isr.bit_length() - 1 & 0xF0 if self.isr else 0
        return self.tpr if self.tpr & 0xF0 >= in_service else in_service

    @property
    def pending_vector(self) -> int:
        """The vector that the processor would take now; -1 for none. Source: kvm_apic_has_interrupt."""
        vector = self.irr.bit_length() - 1
        if vector < 0 or vector & 0xF0 <= self.ppr or not self.is_enabled:
            return -1
        return vector

    @property
    def accepts_pic(self) -> bool:
        """Whether LINT0 lets the interrupts of an 8259A through. Source: kvm_apic_accept_pic_intr."""
        lvt = self.lvt[reg.LVT0]
        is_virtual_wire = not lvt & reg.LVT_MASKED and lvt >> reg.LVT_MODE_SHIFT & 7 == DeliveryMode.EXTINT
        return not self.is_enabled or is_virtual_wire

    def acknowledge(self) -> int:
        """The processor takes the pending vector, which is in service now; -1 for none. Source:
        kvm_apic_ack_interrupt."""
        vector = self.pending_vector
        if vector >= 0:
            self.irr &= ~(1 << vector)
            self.isr |= 1 << vector
        return vector

    # What arrives

    def accept(self, message: Message) -> int:
        """1 if it took the message, else 0. Source: __apic_accept_irq."""
        if message.mode <= DeliveryMode.LOWEST:
            return self._accept_vector(message)
        match message.mode:
            case DeliveryMode.NMI:
                self._cpu.inject_nmi()
            case DeliveryMode.INIT:
                if message.is_level and not message.is_asserted:  # "INIT level de-assert", of the first Pentiums
                    return 0
                self.init_pending, self.sipi_pending = True, False
            case DeliveryMode.STARTUP:
                self.sipi_vector, self.sipi_pending = message.vector, True
            case _:
                return 0
        self._cpu.kick()
        return 1

    def _accept_vector(self, message: Message) -> int:
        if (message.is_level and not message.is_asserted) or not self.is_enabled or not self.is_software_enabled:
            return 0
        bit = 1 << message.vector
        self.tmr = self.tmr | bit if message.is_level else self.tmr & ~bit
        self.irr |= bit
        self._cpu.kick()
        return 1

    def deliver_local(self, entry: int) -> bool:
        """An interrupt of the APIC's own, by its LVT entry. Source: kvm_apic_local_deliver."""
        lvt = self.lvt[entry]
        if lvt & reg.LVT_MASKED or not self.is_enabled:
            return False
        mode = lvt >> reg.LVT_MODE_SHIFT & 7
        return bool(self.accept(Message(lvt & 0xFF, mode, 0, is_level=bool(lvt & reg.LVT_LEVEL))))

    @property
    def lint0_is_nmi(self) -> bool:
        """The watchdog: each tick of the PIT is to be an NMI. Source: apic_lvt_nmi_mode."""
        return self.lvt[reg.LVT0] & (reg.LVT_MASKED | 7 << reg.LVT_MODE_SHIFT) == DeliveryMode.NMI << reg.LVT_MODE_SHIFT

    def _timer_expired(self) -> None:
        self.deliver_local(reg.LVT_TIMER)

    # The registers, as the page and the MSRs have them

    def read(self, register: int) -> int | None:
        """32 bits; None if there is no such register to read."""
        if register not in reg.READABLE or (self.is_x2apic and register in reg.NOT_IN_X2APIC):
            return None
        if reg.ISR <= register < reg.ESR:
            bank, word = divmod(register - reg.ISR, 8)
            return (self.isr, self.tmr, self.irr)[bank] >> 32 * word & _MASK_32
        if register in self.lvt:
            return self.lvt[register]
        return self._read_single(register)

    def _read_single(self, register: int) -> int:
        match register:
            case reg.ID:
                return self.number if self.is_x2apic else self.id << 24
            case reg.TPR:
                return self.tpr
            case reg.PPR:
                return self.ppr
            case reg.ICR:
                return self.icr & _MASK_32
            case reg.ICR2:
                return self.icr >> 32
            case reg.CURRENT_COUNT:
                return self.timer.current_count
            case reg.INITIAL_COUNT:
                return self.timer.initial_count
            case reg.VERSION:
                return self._version
            case reg.SVR:
                return self.svr
            case reg.LDR:
                return self.ldr
            case reg.DFR:
                return self.dfr
            case reg.DIVIDE:
                return self.divide
            case reg.ESR:
                return self.esr
            case _:
                return 0  # the arbitration priority is no priority of ours

    def write(self, register: int, value: int) -> bool:
        """32 bits; False if there is no such register to write. Source: kvm_lapic_reg_write."""
        match register:
            case reg.EOI:
                self.end_of_interrupt()
            case reg.ICR:
                self._send_ipi(value | self.icr & _MASK_32 << 32)
            case reg.TPR:
                self.tpr = value & 0xFF
                self._cpu.kick()
            case reg.INITIAL_COUNT:
                self.timer.set_initial_count(value)
            case reg.DIVIDE:
                self.set_divide(value)
            case reg.SVR:
                self._set_svr(value)
            case reg.ESR:
                return not (self.is_x2apic and value)
            case _ if register in self.lvt:
                self._set_lvt(register, value)
            case _:
                return self._write_x2apic(register, value) if self.is_x2apic else self._write_xapic(register, value)
        return True

    def _write_xapic(self, register: int, value: int) -> bool:
        match register:
            case reg.ICR2:
                self.icr = self.icr & _MASK_32 | (value & 0xFF00_0000) << 32
                return True
            case reg.ID:
                self.id = value >> 24
            case reg.LDR:
                self.ldr = value & 0xFF00_0000
            case reg.DFR:
                self.dfr = value | 0x0FFF_FFFF
            case _:
                return False
        self._bus.ids_changed()
        return True

    def _write_x2apic(self, register: int, value: int) -> bool:
        if register != reg.SELF_IPI or value & ~0xFF:
            return False
        self.accept(Message(value, DeliveryMode.FIXED, self.number))
        return True

    def _set_svr(self, value: int) -> None:
        """Source: apic_set_spiv. Disabled by software, all LVT entries are masked."""
        can_suppress = self._version & reg.VERSION_NO_EOI_BROADCAST
        self.svr = value & (0x3FF | (reg.SVR_NO_EOI_BROADCAST if can_suppress else 0))
        if not self.is_software_enabled:
            for entry in self.lvt:
                self.lvt[entry] |= reg.LVT_MASKED

    def _set_lvt(self, entry: int, value: int) -> None:
        writable = reg.LVT_WRITABLE[entry]
        if entry == reg.LVT_TIMER:
            writable |= (3 if self.has_tsc_deadline else 1) << reg.TIMER_MODE_SHIFT
        masked = 0 if self.is_software_enabled else reg.LVT_MASKED
        self.lvt[entry] = (value | masked) & writable
        if entry == reg.LVT_TIMER:
            self.timer.set_mode(TimerMode(value >> reg.TIMER_MODE_SHIFT & writable >> reg.TIMER_MODE_SHIFT & 3))
        elif entry == reg.LVT0:
            self._cpu.kick()

    def set_divide(self, value: int) -> None:
        """The divide configuration register: bits 0, 1 and 3."""
        self.divide = value & 0xB
        self.timer.set_divide(self.divide)

    def end_of_interrupt(self) -> None:
        """The highest in service is done; the IOAPIC hears of it unless software has it broadcast no EOI. Source:
        apic_set_eoi."""
        vector = self.isr.bit_length() - 1
        if vector >= 0:
            self.isr &= ~(1 << vector)
            self._listener.eoi(self, vector)

    @property
    def suppresses_eoi(self) -> bool:
        return bool(self.svr & reg.SVR_NO_EOI_BROADCAST)

    def _send_ipi(self, icr: int) -> None:
        """Delivered by the time that the write is over, so the status bit is never seen. Source: kvm_apic_send_ipi."""
        self.icr = icr & ~reg.ICR_BUSY
        message = Message(
            vector=icr & 0xFF,
            mode=icr >> 8 & 7,
            destination=icr >> 32 if self.is_x2apic else icr >> 56,
            is_logical=bool(icr & reg.ICR_LOGICAL),
            is_asserted=bool(icr & reg.ICR_ASSERTED),
            is_level=bool(icr & reg.ICR_LEVEL),
            shorthand=icr >> reg.ICR_SHORTHAND_SHIFT & 3,
        )
        self._bus.deliver(message, self)

    # MMIO and MSRs

    def mmio_read(self, offset: int, size: int) -> int:
        """A read of the page. Reserved registers are 0, a disabled page is all ones. Source: apic_mmio_read."""
        if self.is_x2apic or not self.is_enabled:
            return (1 << 8 * size) - 1
        inside = offset & 0xF
        value = self.read(offset >> 4) if inside + size <= 4 else None
        return (value or 0) >> 8 * inside & (1 << 8 * size) - 1

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        """Only aligned words are written. Source: apic_mmio_write."""
        if size == 4 and not offset & 0xF and self.is_enabled and not self.is_x2apic:
            self.write(offset >> 4, value)

    def msr_read(self, register: int) -> int | None:
        """MSR 0x800 + `register`; None is #GP. Source: kvm_x2apic_msr_read."""
        if not self.is_x2apic:
            return None
        return self.icr if register == reg.ICR else self.read(register)

    def msr_write(self, register: int, value: int) -> bool:
        """False is #GP. Source: kvm_x2apic_msr_write."""
        if not self.is_x2apic or (register in (reg.ID, reg.LDR)):
            return False
        if register == reg.ICR:
            if value & reg.X2APIC_ICR_RESERVED:
                return False
            self._send_ipi(value)
            return True
        return not value >> 32 and self.write(register, value)
