"""The GSI routing table: from a number that irqfd, a device or a VMM raises to pins of controllers, or to an MSI.

Source: virt/kvm/irqchip.c kvm_set_irq_routing, setup_routing_entry; arch/x86/kvm/irq.c kvm_set_routing_entry,
kvm_setup_default_irq_routing; include/uapi/linux/kvm.h struct kvm_irq_routing_entry.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

from guestmem.kvm.irqchip import ioapic, pic
from guestmem.kvm.irqchip.apic_bus import Message
from guestmem.trace import Refusal

MAX_ROUTES = 4096
"""KVM_MAX_IRQ_ROUTES; GSIs are below it as well."""
PIC_FIRST, PIC_SECOND, IOAPIC = 0, 1, 2
"""KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC."""
ENTRY = struct.Struct("<IIII8I")  # gsi, type, flags, pad, u
_TYPE_IRQCHIP, _TYPE_MSI = 1, 2
_MSI_VALID_DEVID = 1


class PinRoute(NamedTuple):
    """To a pin of a controller. Those of the second 8259A count on from the first's: 8 to 15."""

    chip: int
    pin: int


class MsiRoute(NamedTuple):
    """To APICs, as a write of `data` to the address would go. Intel SDM vol. 3, 11.11."""

    address_low: int
    address_high: int
    data: int

    def message(self, has_32_bit_ids: bool) -> Message:
        """Source: kvm_msi_to_lapic_irq."""
        high = self.address_high & 0xFFFF_FF00 if has_32_bit_ids else 0
        return Message(
            vector=self.data & 0xFF,
            mode=self.data >> 8 & 7,
            destination=self.address_low >> 12 & 0xFF | high,
            is_logical=bool(self.address_low & 1 << 2),
            is_level=bool(self.data & 1 << 15),
            redirection_hint=bool(self.address_low & 1 << 3),
        )

    def check(self, has_32_bit_ids: bool) -> None:
        """Raises: Refusal EINVAL `msi.address`: with 32-bit IDs the low byte of the upper address is reserved. Source:
        kvm_msi_route_invalid."""
        if has_32_bit_ids and self.address_high & 0xFF:
            raise Refusal(errno.EINVAL, "msi.address", address_high=self.address_high)


Route: TypeAlias = PinRoute | MsiRoute
Routes: TypeAlias = dict[int, tuple[Route, ...]]
"""By GSI."""


def default_routes() -> Routes:
    """As a PC is wired before anybody says otherwise: the IOAPIC's pins, and the PICs' lines for the first sixteen."""
    routes: Routes = {}
    for gsi in range(ioapic.PINS):
        both = (PinRoute(IOAPIC, gsi), PinRoute(gsi // 8, gsi))
        routes[gsi] = both if gsi < pic.LINES else both[:1]
    return routes


def parse_routes(entries: bytes, is_split: bool, has_32_bit_ids: bool) -> Routes:
    """The table from an array of struct kvm_irq_routing_entry.

    Raises: Refusal EINVAL `routing.gsi`, `routing.flags`, `routing.type`, `routing.pin`, `routing.duplicate`,
    `msi.address`.
    """
    routes: Routes = {}
    parsed = list(ENTRY.iter_unpack(entries))
    for gsi, *_ in parsed:
        if gsi >= MAX_ROUTES:
            raise Refusal(errno.EINVAL, "routing.gsi", gsi=gsi, limit=MAX_ROUTES)
    for gsi, kind, flags, _, *union in parsed:
        if flags & ~(_MSI_VALID_DEVID if kind == _TYPE_MSI else 0):
            raise Refusal(errno.EINVAL, "routing.flags", gsi=gsi, flags=flags)
        route = _parse(gsi, kind, union, is_split)
        if isinstance(route, MsiRoute):
            route.check(has_32_bit_ids)
        _check_alone(gsi, route, routes.get(gsi, ()))
        routes[gsi] = (*routes.get(gsi, ()), route)
    return routes


def _parse(gsi: int, kind: int, union: list[int], is_split: bool) -> Route:
    if kind == _TYPE_MSI:
        return MsiRoute(*union[:3])
    if kind != _TYPE_IRQCHIP or is_split:
        raise Refusal(errno.EINVAL, "routing.type", gsi=gsi, type=kind)
    chip, pin = union[:2]
    pins = {PIC_FIRST: 8, PIC_SECOND: 8, IOAPIC: ioapic.PINS}.get(chip, 0)
    if pin >= pins:
        raise Refusal(errno.EINVAL, "routing.pin", gsi=gsi, chip=chip, pin=pin, pins=pins)
    return PinRoute(chip, pin + 8 if chip == PIC_SECOND else pin)


def _check_alone(gsi: int, route: Route, others: Iterable[Route]) -> None:
    """A GSI may go to one pin of each controller, or to one MSI."""
    for other in others:
        if not isinstance(other, PinRoute) or not isinstance(route, PinRoute) or other.chip == route.chip:
            raise Refusal(errno.EINVAL, "routing.duplicate", gsi=gsi)
