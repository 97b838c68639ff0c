"""ApicBus: from an interrupt message to the local APICs that it names.

Everything that interrupts a vCPU through its APIC is a message here: an IPI, a pin of the IOAPIC, an MSI.

Source: arch/x86/kvm/irq_comm.c kvm_irq_delivery_to_apic; lapic.c kvm_apic_match_dest, kvm_apic_broadcast; Intel SDM
vol. 3, 11.6.2 "Determining IPI destination", 11.12.10 for x2APIC.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from guestmem.kvm.irqchip.lapic import Lapic

XAPIC_BROADCAST, X2APIC_BROADCAST = 0xFF, 0xFFFF_FFFF
DFR_FLAT, DFR_CLUSTER = 0xFFFF_FFFF, 0x0FFF_FFFF


class DeliveryMode(enum.IntEnum):
    """Bits 10:8 of ICR, of an LVT entry, of a redirection entry and of the data of an MSI."""

    FIXED = 0
    LOWEST = 1
    SMI = 2
    REMOTE_READ = 3
    NMI = 4
    INIT = 5
    STARTUP = 6
    EXTINT = 7


class Shorthand(enum.IntEnum):
    """Bits 19:18 of ICR."""

    NONE = 0
    SELF = 1
    ALL = 2
    ALL_BUT_SELF = 3


class Message(NamedTuple):
    """struct kvm_lapic_irq. `is_asserted` is the level, which only counts for a level-triggered message and INIT.
    `redirection_hint` is that of an MSI: to the lowest priority whatever the mode says."""

    vector: int
    mode: int
    destination: int
    is_logical: bool = False
    is_asserted: bool = True
    is_level: bool = False
    shorthand: int = Shorthand.NONE
    redirection_hint: bool = False

    @property
    def to_lowest_priority(self) -> bool:
        return self.mode == DeliveryMode.LOWEST or self.redirection_hint


class ApicBus:
    """The APICs of one VM, by the number of their vCPU. `broadcast_quirk`: to a message that is no IPI, 0xff is a
    broadcast in x2APIC mode too, until KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK."""

    def __init__(self) -> None:
        self.lapics: list[Lapic] = []
        self.broadcast_quirk = True
        self._by_id: dict[int, list[Lapic]] | None = None

    def add(self, lapic: Lapic) -> None:
        self.lapics.append(lapic)
        self.lapics.sort(key=lambda other: other.number)
        self.ids_changed()

    def ids_changed(self) -> None:
        """An APIC has another ID or another mode. Source: kvm_recalculate_apic_map."""
        self._by_id = None

    def deliver(self, message: Message, source: Lapic | None = None) -> int:
        """How many APICs took it; -1 if there is none at all. `source` sends an IPI."""
        if not self.lapics:
            return -1
        found = self.destinations(message, source)
        if message.to_lowest_priority and len(found) > 1 and not self._is_fixed_broadcast(message):
            found = self._hashed(message.vector, found)
        return sum(lapic.accept(message) for lapic in found)

    def destinations(self, message: Message, source: Lapic | None = None) -> list[Lapic]:
        """The APICs that a message names."""
        if message.shorthand:
            return self._by_shorthand(message.shorthand, source)
        destination, is_ipi = message.destination, source is not None
        if message.is_logical:
            return [lapic for lapic in self.lapics if self._is_named(lapic, destination, is_ipi, matches_logical)]
        if destination in (XAPIC_BROADCAST, X2APIC_BROADCAST):
            return [lapic for lapic in self.lapics if self._is_named(lapic, destination, is_ipi, matches_physical)]
        if self._by_id is None:
            self._by_id = {}
            for lapic in self.lapics:
                self._by_id.setdefault(lapic.physical_id, []).append(lapic)
        return self._by_id.get(destination, [])

    def _by_shorthand(self, shorthand: int, source: Lapic | None) -> list[Lapic]:
        if shorthand == Shorthand.SELF:
            return [source] if source is not None else []
        return [lapic for lapic in self.lapics if shorthand == Shorthand.ALL or lapic is not source]

    def _is_named(self, lapic: Lapic, destination: int, is_ipi: bool, matches: Matches) -> bool:
        """Source: kvm_apic_mda."""
        if self.broadcast_quirk and not is_ipi and destination == XAPIC_BROADCAST and lapic.is_x2apic:
            destination = X2APIC_BROADCAST
        return destination == broadcast_id(lapic) or matches(lapic, destination)

    @staticmethod
    def _is_fixed_broadcast(message: Message) -> bool:
        """There is no lowest priority among all: the hardware has none, and KVM makes it fixed."""
        return not message.is_logical and message.destination == XAPIC_BROADCAST

    @staticmethod
    def _hashed(vector: int, found: list[Lapic]) -> list[Lapic]:
        """The one of lowest priority is chosen by the vector, so that a device's interrupts stay with one vCPU. Source:
        kvm_vector_to_index."""
        enabled = [lapic for lapic in found if lapic.is_software_enabled]
        return [enabled[vector % len(enabled)]] if enabled else []


def broadcast_id(lapic: Lapic) -> int:
    return X2APIC_BROADCAST if lapic.is_x2apic else XAPIC_BROADCAST


def matches_physical(lapic: Lapic, destination: int) -> bool:
    """Source: kvm_apic_match_physical_addr."""
    return destination == lapic.physical_id


def matches_logical(lapic: Lapic, destination: int) -> bool:
    """Flat: a bit for each APIC. Cluster: the upper part must agree. Any other DFR names nobody. Source:
    kvm_apic_match_logical_addr."""
    if lapic.is_x2apic:
        ldr = lapic.ldr
        return ldr >> 16 == destination >> 16 and bool(ldr & destination & 0xFFFF)
    ldr = lapic.ldr >> 24
    if lapic.dfr == DFR_FLAT:
        return bool(ldr & destination)
    if lapic.dfr == DFR_CLUSTER:
        return ldr >> 4 == destination >> 4 and bool(ldr & destination & 0xF)
    return False


if TYPE_CHECKING:
    from collections.abc import Callable

    Matches = Callable[[Lapic, int], bool]
