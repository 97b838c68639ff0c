"""IoApic: the 82093AA's 24 pins, from a line to a message.

    a line rises -> `irr` -> redirection entry -> message; level: remote IRR holds it back until the EOI of its vector

`irr` are the pins whose line is up; of them `_delivered` are the edges that have gone out, which a VMM does not see, so
that it does not raise them again. Polarity is read and written and has no meaning, as in KVM: a line of a virtual
machine is up or down. The tracking of the RTC's EOIs, for KVM_IRQ_LINE_STATUS, is not here.

Source: 82093AA datasheet, 3.2 "IOAPIC registers"; arch/x86/kvm/ioapic.c ioapic_set_irq, ioapic_service,
ioapic_write_indirect, __kvm_ioapic_update_eoi, kvm_get_ioapic, kvm_set_ioapic.
"""

from __future__ import annotations

import struct
from typing import Protocol

from guestmem.kvm.irqchip.apic_bus import ApicBus, Message
from guestmem.sched import Timers

PINS = 24
BASE, LENGTH = 0xFEC0_0000, 0x100
_SELECT, _WINDOW = 0x00, 0x10
_ID, _VERSION, _ARBITRATION, _REDIRECTION = 0x00, 0x01, 0x02, 0x10
_VERSION_VALUE = 0x11 | PINS - 1 << 16
_LOGICAL, _DELIVERY_STATUS, _REMOTE_IRR, _LEVEL, _MASKED = 1 << 11, 1 << 12, 1 << 14, 1 << 15, 1 << 16
_READ_ONLY = _DELIVERY_STATUS | _REMOTE_IRR
_DESTINATION_SHIFT = 56
STORM, STORM_DELAY_NS = 10_000, 10_000_000
"""EOIs of one pin at which its next interrupt is delayed. Source: IOAPIC_SUCCESSIVE_IRQ_MAX_COUNT."""
_STATE = struct.Struct("<QIIII24Q")  # base_address, ioregsel, id, irr, pad, redirtbl


class PinListener(Protocol):
    """What the rest of the machine wants to know of a pin."""

    def acked(self, pin: int) -> None:
        """The guest has ended the interrupt of a pin."""
        ...

    def masked(self, pin: int, is_masked: bool) -> None: ...

    def hears_acks_of(self, pin: int) -> bool: ...


class IoApic:
    """`lines` holds, by pin, the sources that drive it: a bit for each; a pin is up while any does."""

    def __init__(self, bus: ApicBus, timers: Timers, listener: PinListener) -> None:
        self._bus = bus
        self._timers = timers
        self._listener = listener
        self._late = timers.new(self._serve_levels)
        self.lines = [0] * PINS
        self.reset()

    def reset(self) -> None:
        """Source: kvm_ioapic_reset."""
        self._late.cancel()
        self.base, self.select, self.id, self.irr = BASE, 0, 0, 0
        self._delivered = 0
        self.entries = [_MASKED] * PINS
        self._successive = [0] * PINS
        self.update_handled()

    def close(self) -> None:
        """The VM is no more."""
        self._late.cancel()

    def update_handled(self) -> None:
        """Which vectors' EOIs are looked at: those of level entries, and of pins that somebody hears acks of. Source:
        kvm_ioapic_scan_entry."""
        self.handled = 0
        for pin, entry in enumerate(self.entries):
            if entry & _LEVEL or self._listener.hears_acks_of(pin):
                self.handled |= 1 << (entry & 0xFF)

    # Lines

    def set_line(self, pin: int, source: int, is_up: bool) -> int:
        """Drive a pin. How many APICs took the interrupt; 0: coalesced with one that they have; -1: masked, or held
        back until an EOI."""
        self.lines[pin] = self.lines[pin] | 1 << source if is_up else self.lines[pin] & ~(1 << source)
        return self._set(pin, bool(self.lines[pin]))

    def _set(self, pin: int, is_up: bool) -> int:
        bit, before = 1 << pin, self.irr
        if not is_up:
            self.irr &= ~bit
            return 1
        self.irr |= bit
        if not self.entries[pin] & _LEVEL:
            self._delivered &= ~bit
            if before & bit:
                return 0
        return self._serve(pin)

    def _serve(self, pin: int) -> int:
        """Source: ioapic_service."""
        entry = self.entries[pin]
        if entry & _MASKED or (entry & _LEVEL and entry & _REMOTE_IRR):
            return -1
        is_level = bool(entry & _LEVEL)
        self._delivered |= 0 if is_level else 1 << pin
        taken = self._bus.deliver(
            Message(
                vector=entry & 0xFF,
                mode=entry >> 8 & 7,
                destination=entry >> _DESTINATION_SHIFT,
                is_logical=bool(entry & _LOGICAL),
                is_level=is_level,
            )
        )
        if taken and is_level:
            self.entries[pin] |= _REMOTE_IRR
        return taken

    def _serve_levels(self) -> None:
        """Source: kvm_ioapic_eoi_inject_work."""
        for pin, entry in enumerate(self.entries):
            if entry & _LEVEL and self.irr >> pin & 1 and not entry & _REMOTE_IRR:
                self._serve(pin)

    # EOI

    def eoi(self, vector: int, is_level: bool) -> None:
        """The guest has ended an interrupt. Its APIC cannot keep that to itself: this IOAPIC has no EOI register, so no
        guest is offered to. Source: __kvm_ioapic_update_eoi."""
        for pin in range(PINS):
            if self.entries[pin] & 0xFF == vector:
                self._listener.acked(pin)
                if is_level:
                    self._end_level(pin)

    def _end_level(self, pin: int) -> None:
        entry = self.entries[pin] = self.entries[pin] & ~_REMOTE_IRR
        if entry & _MASKED or not self.irr >> pin & 1:
            self._successive[pin] = 0
            return
        self._successive[pin] += 1
        if self._successive[pin] == STORM:
            self._successive[pin] = 0
            self._late.start(self._timers.now() + STORM_DELAY_NS)
        else:
            self._serve(pin)

    # Registers

    def mmio_read(self, offset: int, size: int) -> int:
        value = self.select if offset == _SELECT else self._read_window() if offset == _WINDOW else 0
        return value & (1 << 8 * size) - 1

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        """Narrower writes are taken as the low bytes of a register. Source: ioapic_mmio_write."""
        if offset == _SELECT:
            self.select = value & 0xFF
        elif offset == _WINDOW:
            self._write_window(value & 0xFFFF_FFFF)

    def _read_window(self) -> int:
        if self.select in (_ID, _ARBITRATION):
            return self.id << 24
        if self.select == _VERSION:
            return _VERSION_VALUE
        pin, is_high = divmod(self.select - _REDIRECTION, 2)
        entry = self.entries[pin] if 0 <= pin < PINS else (1 << 64) - 1
        return entry >> 32 * is_high & 0xFFFF_FFFF

    def _write_window(self, value: int) -> None:
        pin, is_high = divmod(self.select - _REDIRECTION, 2)
        if self.select == _ID:
            self.id = value >> 24 & 0xF
        elif 0 <= pin < PINS:
            self._write_entry(pin, bool(is_high), value)

    def _write_entry(self, pin: int, is_high: bool, value: int) -> None:
        """An entry that is made edge-triggered loses its remote IRR: so Linux clears it where there is no EOI register.
        A level that is up is served at once; an edge that came while the entry was masked is lost."""
        old = self.entries[pin]
        new = value << 32 | old & 0xFFFF_FFFF if is_high else old & ~0xFFFF_FFFF | value
        new = new & ~_READ_ONLY | old & _READ_ONLY
        self.entries[pin] = new if new & _LEVEL else new & ~_REMOTE_IRR
        self.update_handled()
        if (old ^ new) & _MASKED:
            self._listener.masked(pin, bool(new & _MASKED))
        if new & _LEVEL and self.irr >> pin & 1:
            self._serve(pin)

    # State

    def pack(self) -> bytes:
        """struct kvm_ioapic_state."""
        return _STATE.pack(self.base, self.select, self.id, self.irr & ~self._delivered, 0, *self.entries)

    def unpack(self, data: bytes) -> None:
        """Lines that are up in it are raised anew. Source: kvm_set_ioapic, kvm_ioapic_inject_all."""
        self.base, self.select, self.id, irr, _, *entries = _STATE.unpack_from(data)
        self.id &= 0xF
        self.select &= 0xFF
        self.entries = list(entries)
        self.irr = self._delivered = 0
        self.update_handled()
        for pin in range(PINS):
            if irr >> pin & 1:
                self._set(pin, True)
