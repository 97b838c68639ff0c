"""The IOAPIC by rows of its datasheet, and what KVM makes of a line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestmem.kvm.irqchip import ioapic as model
from guestmem.kvm.irqchip import lapic_registers as reg
from guestmem.kvm.irqchip.ioapic import IoApic
from tests.kvm.irqchip.rig import Rig

LEVEL, MASKED, REMOTE_IRR = 1 << 15, 1 << 16, 1 << 14


def chip(rig: Rig) -> IoApic:
    assert rig.chip.ioapic is not None
    return rig.chip.ioapic


def read(ioapic: IoApic, select: int) -> int:
    ioapic.mmio_write(0, 4, select)
    return ioapic.mmio_read(0x10, 4)


def test_registers() -> None:
    ioapic = chip(Rig())
    assert read(ioapic, 1) == 0x17_0011, "24 pins"
    ioapic.mmio_write(0, 4, 0)
    ioapic.mmio_write(0x10, 4, 0xFF00_0000)
    assert read(ioapic, 0) == read(ioapic, 2) == 0x0F00_0000
    assert read(ioapic, 0x10) == MASKED
    assert read(ioapic, 0x10 + 48) == read(ioapic, 5) == 0xFFFF_FFFF, "no such entry"
    assert ioapic.mmio_read(0x20, 4) == 0


def test_delivery_status_and_remote_irr_cannot_be_written() -> None:
    rig = Rig()
    rig.program_pin(3, 1 << 12 | REMOTE_IRR | LEVEL | 0x33)
    assert chip(rig).entries[3] == LEVEL | 0x33


def test_an_edge_is_delivered_once_until_the_line_was_down() -> None:
    rig = Rig()
    rig.program_pin(3, 0x33)
    ioapic = chip(rig)
    assert ioapic.set_line(3, 0, True) == 1
    assert ioapic.set_line(3, 0, True) == 0, "coalesced"
    assert rig.take() == 0x33 and rig.take() == -1
    ioapic.set_line(3, 0, False)
    assert ioapic.set_line(3, 0, True) == 1


def test_an_edge_while_masked_is_lost_and_a_level_is_not() -> None:
    rig = Rig()
    ioapic = chip(rig)
    for pin, mode in ((3, 0), (4, LEVEL)):
        rig.program_pin(pin, MASKED | mode | 0x30 + pin)
        assert ioapic.set_line(pin, 0, True) == -1
        rig.program_pin(pin, mode | 0x30 + pin)
    assert rig.take() == 0x34
    ioapic.set_line(4, 0, False)


def test_a_level_waits_for_eoi_and_comes_again() -> None:
    rig = Rig()
    rig.program_pin(4, LEVEL | 0x44)
    ioapic, lapic = chip(rig), rig.lapics[0]
    assert ioapic.set_line(4, 0, True) == 1
    assert ioapic.set_line(4, 0, True) == -1, "remote IRR"
    assert lapic.acknowledge() == 0x44
    assert lapic.pending_vector == -1
    lapic.write(reg.EOI, 0)
    assert lapic.pending_vector == 0x44
    ioapic.set_line(4, 0, False)
    assert rig.take() == 0x44
    assert not ioapic.entries[4] & REMOTE_IRR and rig.take() == -1


def test_a_line_is_up_while_any_source_drives_it() -> None:
    rig = Rig()
    rig.program_pin(4, LEVEL | 0x44)
    ioapic = chip(rig)
    ioapic.set_line(4, 0, True)
    ioapic.set_line(4, 1, True)
    ioapic.set_line(4, 0, False)
    assert rig.take() == 0x44 and rig.take() == 0x44
    ioapic.set_line(4, 1, False)
    assert rig.take() == 0x44 and rig.take() == -1


def test_making_an_entry_edge_triggered_clears_remote_irr() -> None:
    """How Linux makes an EOI where there is no EOI register."""
    rig = Rig()
    rig.program_pin(4, LEVEL | 0x44)
    chip(rig).set_line(4, 0, True)
    rig.program_pin(4, MASKED | 0x44)
    assert not chip(rig).entries[4] & REMOTE_IRR


def test_a_storm_of_levels_is_delayed() -> None:
    rig = Rig()
    rig.program_pin(4, LEVEL | 0x44)
    chip(rig).set_line(4, 0, True)
    served = 0
    while rig.take() >= 0:
        served += 1
    assert served == model.STORM
    rig.advance(model.STORM_DELAY_NS)
    assert rig.take() == 0x44


@pytest.mark.parametrize(
    ("entry", "taken"),
    [(0x0100_0000_0000_0055, [0, 1]), (0xFF00_0000_0000_0055, [1, 1]), (0x0300_0000_0000_0855, [1, 1])],
)
def test_destinations(entry: int, taken: list[int]) -> None:
    rig = Rig(2)
    for number, lapic in enumerate(rig.lapics):
        lapic.write(reg.LDR, 1 << number << 24)
    rig.program_pin(5, entry)
    chip(rig).set_line(5, 0, True)
    assert [lapic.irr >> 0x55 & 1 for lapic in rig.lapics] == taken


def test_an_nmi_and_an_init_pin() -> None:
    rig = Rig(2)
    rig.program_pin(5, 1 << 56 | 0x400)
    rig.program_pin(6, 1 << 56 | 0x500)
    chip(rig).set_line(5, 0, True)
    chip(rig).set_line(6, 0, True)
    assert rig.cpus[1].nmis == 1 and rig.lapics[1].init_pending


def test_the_state_survives_get_and_set() -> None:
    rig, other = Rig(), Rig()
    rig.program_pin(3, 0x33)
    rig.program_pin(4, LEVEL | 0x44)
    for pin in (3, 4):
        chip(rig).set_line(pin, 0, True)
    state = rig.chip.get_state(2)
    assert len(state) == 512
    other.chip.set_state(2, state)
    assert other.chip.get_state(2) == state
    assert other.take() == -1, "the edge has gone out, and the level waits for its EOI, which is the APIC's state"


@given(st.binary(min_size=512, max_size=512), st.lists(st.integers(0, 23), max_size=8))
def test_any_state_can_be_set_and_lived_with(state: bytes, pins: list[int]) -> None:
    rig = Rig(2)
    rig.chip.set_state(2, state)
    for pin in pins:
        rig.chip.pulse(pin, 0)
    for _ in range(50):
        rig.take()
    rig.chip.set_state(2, rig.chip.get_state(2))


@given(st.lists(st.tuples(st.sampled_from([0, 0x10, 0x20, 0x40]), st.integers(0, 2**32 - 1)), max_size=80))
def test_rubbish_in_every_register(writes: list[tuple[int, int]]) -> None:
    rig = Rig()
    ioapic = chip(rig)
    for offset, value in writes:
        ioapic.mmio_write(offset, 4, value)
        ioapic.mmio_read(offset, 8)
        rig.chip.pulse(value % 24, 0)
        rig.take()
