"""IrqChip: the interrupt controllers of one VM and how they are wired.

    set_irq(gsi) -> routes -> IOAPIC pin -> message -> APIC      full (KVM_CREATE_IRQCHIP)
                           -> PIC line -> LINT0 of an APIC
                           -> MSI -> message -> APIC             also split (KVM_CAP_SPLIT_IRQCHIP): no other here

and back: EOI of a vector -> pins that have it -> GSI -> who hears of its acks (the PIT, a resampling irqfd).

It is changed between two awaits and never across one, so no lock guards it; KVM's irq_lock, ioapic->lock and pic_lock
order what cannot meet here.

Source: virt/kvm/irqchip.c kvm_set_irq, virt/kvm/eventfd.c kvm_notify_acked_irq; arch/x86/kvm/irq.c kvm_set_ioapic_irq,
kvm_set_pic_irq, kvm_set_msi, kvm_scan_ioapic_routes; x86.c kvm_vm_ioctl_get_irqchip.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Protocol

from guestmem.kvm.irqchip import pit
from guestmem.kvm.irqchip.apic_bus import ApicBus
from guestmem.kvm.irqchip.ioapic import IoApic
from guestmem.kvm.irqchip.lapic import Lapic, LapicCpu
from guestmem.kvm.irqchip.lapic_registers import LVT0
from guestmem.kvm.irqchip.pic import Pic
from guestmem.kvm.irqchip.pit import Pit
from guestmem.kvm.irqchip.routing import IOAPIC, MsiRoute, PinRoute, Routes, default_routes
from guestmem.sched import Timers

USERSPACE_SOURCE, RESAMPLE_SOURCE, PIT_SOURCE = 0, 1, 2
"""Who drives a line: KVM_IRQ_LINE and irqfd, an irqfd with resampling, the PIT."""
X2APIC_32_BIT_IDS, X2APIC_NO_BROADCAST_QUIRK, X2APIC_SUPPRESS_EOI, X2APIC_NO_SUPPRESS_EOI = 1, 2, 4, 8
X2APIC_API = X2APIC_32_BIT_IDS | X2APIC_NO_BROADCAST_QUIRK | X2APIC_SUPPRESS_EOI | X2APIC_NO_SUPPRESS_EOI
"""Flags of KVM_CAP_X2APIC_API."""
STATE_SIZE = 512
"""Of the union in struct kvm_irqchip."""


class Ports(Protocol):
    """A device at IO ports."""

    def read(self, port: int, size: int) -> int: ...

    def write(self, port: int, size: int, value: int) -> None: ...


class EoiExit(LapicCpu, Protocol):
    """A vCPU whose VMM has the IOAPIC."""

    def request_eoi_exit(self, vector: int) -> None:
        """KVM_EXIT_IOAPIC_EOI before the guest goes on."""
        ...


class IrqChip:
    """`ioapic` and `pic` are None where they are the VMM's (`is_split`), whose IOAPIC has the first `reserved_pins`
    GSIs. `ports` are the IO ports of what is here. `has_32_bit_ids` is KVM_X2APIC_API_USE_32BIT_IDS; what a guest does
    that has its APIC broadcast no EOI counts only with `respects_suppressed_eoi`."""

    def __init__(self, timers: Timers, is_split: bool = False, reserved_pins: int = 0) -> None:
        self._timers = timers
        self.is_split = is_split
        self.reserved_pins = reserved_pins
        self.has_32_bit_ids = self.respects_suppressed_eoi = False
        self._offers_suppressed_eoi = is_split
        self.bus = ApicBus()
        self.routes: Routes = {} if is_split else default_routes()
        self._gsi_of = _gsis(self.routes)
        self._ack_listeners: defaultdict[int, list[Callable[[], None]]] = defaultdict(list)
        self._level_vectors = 0  # of the VMM's IOAPIC
        self._cpus: dict[Lapic, EoiExit] = {}
        self.ports: dict[int, Ports] = {}
        self.ioapic = None if is_split else IoApic(self.bus, timers, _Pins(self, lambda pin: IOAPIC))
        self.pic = None if is_split else Pic(_Pins(self, lambda line: line >> 3), self._pic_output)
        self.pit: Pit | None = None
        if self.pic is not None:
            self.ports |= dict.fromkeys((0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1), self.pic)

    def new_lapic(self, number: int, cpu: EoiExit, is_bsp: bool) -> Lapic:
        """The local APIC of a new vCPU, after reset."""
        lapic = Lapic(number, self.bus, self._timers, cpu, self, self._offers_suppressed_eoi)
        lapic.is_bsp = is_bsp
        lapic.reset()
        self._cpus[lapic] = cpu
        self.bus.add(lapic)
        return lapic

    def set_x2apic_api(self, flags: int) -> None:
        """KVM_CAP_X2APIC_API. As it is without the last two, a guest that leaves an EOI to the VMM's IOAPIC is offered
        to, and not listened to. Source: kvm_lapic_advertise_suppress_eoi_broadcast."""
        self.has_32_bit_ids = bool(flags & X2APIC_32_BIT_IDS)
        self.bus.broadcast_quirk = not flags & X2APIC_NO_BROADCAST_QUIRK
        self.respects_suppressed_eoi = bool(flags & X2APIC_SUPPRESS_EOI)
        self._offers_suppressed_eoi = self.is_split and not flags & X2APIC_NO_SUPPRESS_EOI

    def create_pit(self, has_speaker: bool) -> None:
        """KVM_CREATE_PIT2."""
        self.pit = Pit(self._timers, self._pit_tick, has_speaker)
        self.ports |= dict.fromkeys(pit.PORTS, self.pit)
        if has_speaker:
            self.ports |= dict.fromkeys(range(pit.SPEAKER_PORT, pit.SPEAKER_PORT + 1), self.pit)
        self.add_ack_listener(pit.IRQ, self.pit.acked)

    def close(self) -> None:
        """The VM is no more: no timer of its controllers fires."""
        for lapic in self.bus.lapics:
            lapic.timer.stop()
        if self.ioapic is not None:
            self.ioapic.close()
        if self.pit is not None:
            self.pit.close()

    # Raising

    def set_irq(self, gsi: int, source: int, is_up: bool) -> int:
        """Drive a GSI. How many interrupts came of it; 0: coalesced, or nobody took it; -1: nowhere, or masked."""
        result = -1
        for route in self.routes.get(gsi, ()):
            one = self._set_route(route, source, is_up)
            if one >= 0:
                result = one + max(result, 0)
        return result

    def _set_route(self, route: PinRoute | MsiRoute, source: int, is_up: bool) -> int:
        if isinstance(route, MsiRoute):
            return self.send_msi(route) if is_up else -1
        if route.chip == IOAPIC:
            return self.ioapic.set_line(route.pin, source, is_up) if self.ioapic is not None else -1
        return self.pic.set_line(route.pin, source, is_up) if self.pic is not None else -1

    def pulse(self, gsi: int, source: int) -> int:
        """An edge. What `set_irq` said of its rise."""
        result = self.set_irq(gsi, source, True)
        self.set_irq(gsi, source, False)
        return result

    def send_msi(self, msi: MsiRoute) -> int:
        """How many APICs took it; -1 if there are none."""
        return self.bus.deliver(msi.message(self.has_32_bit_ids))

    def set_routes(self, routes: Routes) -> None:
        """KVM_SET_GSI_ROUTING."""
        self.routes = routes
        self._gsi_of = _gsis(routes)
        self._update_handled()

    def _pic_output(self) -> None:
        """The first APIC whose LINT0 lets it through gets it. Source: pic_unlock."""
        lapic = next((lapic for lapic in self.bus.lapics if lapic.accepts_pic), None)
        if lapic is not None:
            self._cpus[lapic].kick()

    def _pit_tick(self) -> None:
        """And an NMI to every APIC whose LINT0 says so: the watchdog of Linux. Source: pit_do_work."""
        self.pulse(pit.IRQ, PIT_SOURCE)
        for lapic in self.bus.lapics:
            if lapic.lint0_is_nmi:
                lapic.deliver_local(LVT0)

    # Ends of interrupts

    def add_ack_listener(self, gsi: int, listener: Callable[[], None]) -> None:
        """Call `listener` whenever the guest has ended an interrupt of a GSI. Source: kvm_register_irq_ack_notifier."""
        self._ack_listeners[gsi].append(listener)
        self._update_handled()

    def remove_ack_listener(self, gsi: int, listener: Callable[[], None]) -> None:
        self._ack_listeners[gsi].remove(listener)
        self._update_handled()

    def eoi(self, lapic: Lapic, vector: int) -> None:
        """An APIC has ended an interrupt. Source: kvm_ioapic_send_eoi."""
        is_level = bool(lapic.tmr >> vector & 1)
        if self.ioapic is not None:
            if is_level or self.ioapic.handled >> vector & 1:
                self.ioapic.eoi(vector, is_level)
        elif self._level_vectors >> vector & 1 and is_level:
            if lapic.suppresses_eoi and self.respects_suppressed_eoi:
                return
            self._cpus[lapic].request_eoi_exit(vector)

    def acked(self, chip: int, pin: int) -> None:
        """A pin's interrupt was ended. Source: kvm_notify_acked_irq."""
        gsi = self._gsi_of.get((chip, pin))
        if gsi is not None:
            for listener in tuple(self._ack_listeners.get(gsi, ())):
                listener()

    def masked(self, chip: int, pin: int, is_masked: bool) -> None:
        """Source: kvm_fire_mask_notifiers."""
        if self.pit is not None and self._gsi_of.get((chip, pin)) == pit.IRQ:
            self.pit.masked(is_masked)

    def hears_acks(self, chip: int, pin: int) -> bool:
        gsi = self._gsi_of.get((chip, pin))
        return gsi is not None and bool(self._ack_listeners.get(gsi))

    def _update_handled(self) -> None:
        """Which EOIs somebody waits for. A VMM's IOAPIC waits for those of the level-triggered MSIs that its pins are
        routed to. Source: kvm_scan_ioapic_routes."""
        if self.ioapic is not None:
            self.ioapic.update_handled()
        self._level_vectors = 0
        for gsi in range(self.reserved_pins):
            for route in self.routes.get(gsi, ()):
                if isinstance(route, MsiRoute) and route.data >> 15 & 1:
                    self._level_vectors |= 1 << (route.data & 0xFF)

    # State

    def get_state(self, chip: int) -> bytes:
        """The union of struct kvm_irqchip, of a controller that is here."""
        assert self.pic is not None and self.ioapic is not None
        state = self.ioapic.pack() if chip == IOAPIC else self.pic.pack(chip)
        return state.ljust(STATE_SIZE, b"\0")

    def set_state(self, chip: int, data: bytes) -> None:
        """KVM_SET_IRQCHIP."""
        assert self.pic is not None and self.ioapic is not None
        if chip == IOAPIC:
            self.ioapic.unpack(data)
        else:
            self.pic.unpack(chip, data)


class _Pins:
    """What one controller tells of its pins. See ioapic.PinListener."""

    def __init__(self, irqchip: IrqChip, chip_of: Callable[[int], int]) -> None:
        self._irqchip = irqchip
        self._chip_of = chip_of

    def acked(self, pin: int) -> None:
        self._irqchip.acked(self._chip_of(pin), pin)

    def masked(self, pin: int, is_masked: bool) -> None:
        self._irqchip.masked(self._chip_of(pin), pin, is_masked)

    def hears_acks_of(self, pin: int) -> bool:
        return self._irqchip.hears_acks(self._chip_of(pin), pin)


def _gsis(routes: Mapping[int, tuple[PinRoute | MsiRoute, ...]]) -> dict[tuple[int, int], int]:
    """Which GSI drives a pin."""
    pins = ((gsi, route) for gsi, both in routes.items() for route in both if isinstance(route, PinRoute))
    return {(route.chip, route.pin): gsi for gsi, route in pins}
