"""GSI routing: what the table takes, and where a GSI goes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestmem.kvm.irqchip import MsiRoute
from guestmem.kvm.irqchip import lapic_registers as reg
from guestmem.kvm.irqchip.chip import X2APIC_NO_SUPPRESS_EOI, X2APIC_SUPPRESS_EOI
from guestmem.kvm.irqchip.routing import ENTRY, parse_routes
from guestmem.trace import Refusal
from tests.kvm.irqchip.rig import Cpu, Rig, x2apic

CHIP, MSI = 1, 2


def entry(gsi: int, kind: int, *union: int, flags: int = 0) -> bytes:
    return ENTRY.pack(gsi, kind, flags, 0, *union, *(0,) * (8 - len(union)))


@pytest.mark.parametrize(
    ("entries", "is_split", "rule"),
    [
        ([entry(0, CHIP, 0, 8)], False, "routing.pin"),
        ([entry(0, CHIP, 1, 8)], False, "routing.pin"),
        ([entry(0, CHIP, 2, 24)], False, "routing.pin"),
        ([entry(0, CHIP, 3, 0)], False, "routing.pin"),
        ([entry(0, CHIP, 2, 0)], True, "routing.type"),
        ([entry(0, 3)], False, "routing.type"),
        ([entry(0, 77)], False, "routing.type"),
        ([entry(4096, MSI)], False, "routing.gsi"),
        ([entry(0, CHIP, 2, 0, flags=1)], False, "routing.flags"),
        ([entry(0, MSI, flags=2)], False, "routing.flags"),
        ([entry(0, MSI), entry(0, MSI)], False, "routing.duplicate"),
        ([entry(0, CHIP, 2, 0), entry(0, MSI)], False, "routing.duplicate"),
        ([entry(0, CHIP, 2, 0), entry(0, CHIP, 2, 1)], False, "routing.duplicate"),
        ([entry(0, CHIP, 2, 0), entry(0, CHIP, 0, 0), entry(0, CHIP, 1, 0)], False, None),
        ([entry(4095, MSI, 0xFEE0_0000, 0, 0x40, flags=1)], True, None),
    ],
)
def test_what_the_table_takes(entries: list[bytes], is_split: bool, rule: str | None) -> None:
    if rule is None:
        assert sum(map(len, parse_routes(b"".join(entries), is_split, False).values())) == len(entries)
        return
    with pytest.raises(Refusal) as refusal:
        parse_routes(b"".join(entries), is_split, False)
    assert refusal.value.rule == rule


def test_the_upper_address_with_32_bit_ids() -> None:
    with pytest.raises(Refusal, match=r"EINVAL \[msi.address\]"):
        parse_routes(entry(0, MSI, 0, 0x101, 0), True, True)
    rig = Rig(1, is_split=True)
    x2apic(rig.lapics[0])
    rig.chip.has_32_bit_ids = True
    assert rig.chip.send_msi(MsiRoute(0xFEE0_0000, 0x100, 0x40)) == 0
    assert rig.chip.send_msi(MsiRoute(0xFEE0_0000, 0, 0x40)) == 1


def test_a_gsi_that_goes_nowhere_and_an_msi_to_no_apic() -> None:
    """As on a real kernel: -1 only where there is no vCPU."""
    rig = Rig()
    assert rig.chip.set_irq(1000, 0, True) == -1
    assert rig.chip.send_msi(MsiRoute(0xFEE0_7000, 0, 0x40)) == 0
    assert Rig(0).chip.send_msi(MsiRoute(0xFEE0_0000, 0, 0x40)) == -1


@pytest.mark.parametrize(
    ("low", "data", "vector"),
    [(0xFEE0_1000, 0x41, [-1, 0x41]), (0xFEE0_200C, 0x4142, [-1, 0x42]), (0xFEEF_F000, 0x43, [0x43] * 2)],
)
def test_msis(low: int, data: int, vector: list[int]) -> None:
    rig = Rig(2)
    for number, lapic in enumerate(rig.lapics):
        lapic.write(reg.LDR, 1 << number << 24)
    rig.chip.send_msi(MsiRoute(low, 0, data))
    assert [rig.take(0), rig.take(1)] == vector


def test_an_ack_follows_the_routes() -> None:
    """GSI 40 is at pin 7 now: who hears of 40's acks hears pin 7's, whose default GSI was 7."""
    rig = Rig()
    acked: list[int] = []
    for gsi in (7, 40):
        rig.chip.add_ack_listener(gsi, lambda gsi=gsi: acked.append(gsi))  # type: ignore[misc]
    rig.chip.set_routes(parse_routes(entry(40, CHIP, 2, 7), False, False))
    rig.program_pin(7, 0x77)
    rig.chip.pulse(40, 0)
    rig.take()
    assert acked == [40]


def test_the_vmm_s_ioapic_hears_of_level_msis_alone() -> None:
    rig = Rig(1, is_split=True, pins=2)
    level, edge = (0xFEE0_0000, 0, 0x8050), (0xFEE0_0000, 0, 0x51)
    table = entry(0, MSI, *level) + entry(1, MSI, *edge) + entry(2, MSI, 0xFEE0_0000, 0, 0x8052)
    rig.chip.set_routes(parse_routes(table, True, False))
    for gsi in range(3):
        assert rig.chip.pulse(gsi, 0) == 1
    while rig.take() >= 0:
        pass
    assert rig.cpus[0].eoi_exits == [0x50], "and GSI 2 is no pin of its"
    rig.lapics[0].write(reg.SVR, 0x11FF)
    for flags, exits in ((0, 2), (X2APIC_SUPPRESS_EOI, 2)):
        rig.chip.set_x2apic_api(flags)
        rig.chip.pulse(0, 0)
        rig.take()
        assert len(rig.cpus[0].eoi_exits) == exits, "a guest that suppresses broadcasts is listened to if asked for"


def test_suppressing_eoi_broadcasts_is_offered_where_the_vmm_has_the_ioapic() -> None:
    offered = reg.VERSION_NO_EOI_BROADCAST
    assert not (Rig().lapics[0].read(reg.VERSION) or 0) & offered
    rig = Rig(0, is_split=True)
    for flags, expected in ((0, offered), (X2APIC_NO_SUPPRESS_EOI, 0), (X2APIC_SUPPRESS_EOI, offered)):
        rig.chip.set_x2apic_api(flags)
        lapic = rig.chip.new_lapic(0, Cpu(rig.clock), is_bsp=True)
        assert (lapic.read(reg.VERSION) or 0) & offered == expected


entries = st.builds(
    lambda gsi, kind, flags, union: entry(gsi, kind, *union, flags=flags),
    st.integers(0, 4096),
    st.sampled_from([CHIP, MSI, MSI, 3]),
    st.sampled_from([0, 0, 0, 1, 2]),
    st.lists(st.one_of(st.integers(0, 3), st.integers(0, 2**32 - 1)), max_size=8),
)


@given(st.lists(entries, max_size=8))
def test_any_entries_are_a_table_or_refused(table: list[bytes]) -> None:
    for is_split in (False, True):
        try:
            routes = parse_routes(b"".join(table), is_split, False)
        except Refusal:
            continue
        rig = Rig(1, is_split=is_split)
        rig.chip.set_routes(routes)
        for gsi in routes:
            rig.chip.pulse(gsi, 0)
