"""The 8254 by rows of its datasheet, and the interrupt that KVM makes of counter 0."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestmem.kvm.irqchip.pit import FLAG_HPET_LEGACY, Pit
from guestmem.kvm.irqchip.pit_counter import FREQUENCY
from tests.kvm.irqchip.rig import Rig

MS = 1_000_000
TICK = 1e9 / FREQUENCY


class PitRig(Rig):
    """A PIT whose interrupts come by pin 0 of the IOAPIC, as vector 0x30."""

    def __init__(self) -> None:
        super().__init__()
        self.chip.create_pit(has_speaker=True)
        self.program_pin(0, 0x30)
        assert self.chip.pic is not None
        self.chip.pic.write(0x21, 1, 0xFF)

    @property
    def pit(self) -> Pit:
        assert self.chip.pit is not None
        return self.chip.pit

    def program(self, counter: int, mode: int, count: int) -> None:
        self.pit.write(0x43, 1, counter << 6 | 0x30 | mode << 1)
        self.pit.write(0x40 + counter, 1, count & 0xFF)
        self.pit.write(0x40 + counter, 1, count >> 8)

    def count(self, counter: int) -> int:
        self.pit.write(0x43, 1, counter << 6)
        return self.pit.read(0x40 + counter, 1) | self.pit.read(0x40 + counter, 1) << 8

    def output(self, counter: int) -> int:
        self.pit.write(0x43, 1, 0xE0 | 2 << counter)  # read-back: status only
        return self.pit.read(0x40 + counter, 1) >> 7

    def interrupts(self, nanoseconds: int, take: bool = True) -> int:
        before = self.clock.time
        taken = 0
        while self.clock.time < before + nanoseconds:
            self.advance(min(100_000, before + nanoseconds - self.clock.time))
            taken += take and self.take() == 0x30
        return taken


@pytest.mark.parametrize(
    ("mode", "outputs"),
    [
        (0, [0, 0, 1, 1]),  # rises at the count and stays
        (1, [1, 1, 0, 0]),
        (2, [0, 0, 1, 0]),  # KVM has the one tick high that is low on the chip
        (3, [1, 0, 1, 0]),  # half of the time each
        (4, [0, 0, 1, 0]),
        (5, [0, 0, 1, 0]),
    ],
)
def test_outputs(mode: int, outputs: list[int]) -> None:
    """At 250, 750, 1000 and 1750 ticks of 1000."""
    rig = PitRig()
    rig.program(2, mode, 1000)
    got = []
    for ticks in (250, 500, 250, 750):
        rig.clock.time += round(ticks * TICK) + 1
        got.append(rig.output(2))
        rig.clock.time -= 1
    assert got == outputs


@pytest.mark.parametrize(("mode", "after"), [(0, 0xFF9C), (1, 0xFF9C), (2, 900), (3, 800), (4, 0xFF9C), (5, 0xFF9C)])
def test_counts_beyond_the_end(mode: int, after: int) -> None:
    """1000, after 1100 ticks."""
    rig = PitRig()
    rig.program(2, mode, 1000)
    rig.clock.time += round(1100 * TICK) + 1
    assert rig.count(2) == after


def test_a_latch_keeps_and_a_second_latch_changes_nothing() -> None:
    rig = PitRig()
    rig.program(2, 0, 1000)
    rig.clock.time += round(100 * TICK) + 1
    rig.pit.write(0x43, 1, 0x80)
    rig.clock.time += round(100 * TICK)
    rig.pit.write(0x43, 1, 0x80)
    assert rig.pit.read(0x42, 1) | rig.pit.read(0x42, 1) << 8 == 900
    assert rig.pit.read(0x42, 1) | rig.pit.read(0x42, 1) << 8 == 800, "not latched"


def test_a_count_of_0_is_65536_and_bytes_alone_are_halves() -> None:
    rig = PitRig()
    rig.program(2, 2, 0)
    assert rig.pit.counters[2].count == 0x10000
    rig.pit.write(0x43, 1, 0x94)  # low byte only
    rig.pit.write(0x42, 1, 0x55)
    assert rig.pit.counters[2].count == 0x55
    rig.pit.write(0x43, 1, 0xA4)  # high byte only
    rig.pit.write(0x42, 1, 0x55)
    assert rig.pit.counters[2].count == 0x5500


def test_the_control_port_reads_0() -> None:
    assert PitRig().pit.read(0x43, 1) == 0


def test_the_gate_of_counter_2_starts_it_over() -> None:
    rig = PitRig()
    rig.program(2, 1, 1000)
    rig.clock.time += round(1500 * TICK)
    assert rig.pit.read(0x61, 1) & 0x21 == 0
    rig.pit.write(0x61, 1, 3)
    assert rig.pit.read(0x61, 1) & 0x23 == 0x23


@pytest.mark.parametrize(("mode", "interrupts"), [(0, 1), (1, 1), (2, 10), (3, 10), (4, 1), (5, 0)])
def test_interrupts_by_mode(mode: int, interrupts: int) -> None:
    """Counter 0 at 1 kHz, for 10 ms and a little. Mode 5 waits for a gate that a PC has not."""
    rig = PitRig()
    rig.program(0, mode, 1193)
    assert rig.interrupts(10 * MS + MS // 2) == interrupts


def test_reinjected_ticks_come_after_the_guest_was_late() -> None:
    rig = PitRig()
    rig.program(0, 2, 1193)
    rig.interrupts(10 * MS + MS // 2, take=False)
    taken = 0
    while rig.take() == 0x30:
        taken += 1
    assert taken == 10


def test_without_reinjection_they_are_lost() -> None:
    rig = PitRig()
    rig.pit.set_reinject(False)
    rig.program(0, 2, 1193)
    rig.interrupts(10 * MS + MS // 2, take=False)
    assert rig.take() == 0x30 and rig.take() == -1
    assert rig.interrupts(3 * MS) == 3


def test_unmasking_the_line_forgets_what_nobody_could_end() -> None:
    rig = PitRig()
    rig.program_pin(0, 1 << 16 | 0x30)
    rig.program(0, 2, 1193)
    rig.interrupts(5 * MS, take=False)
    rig.program_pin(0, 0x30)
    assert rig.take() == -1
    assert rig.interrupts(3 * MS) == 3


def test_it_is_an_nmi_where_lint0_says_so() -> None:
    from guestmem.kvm.irqchip import lapic_registers as reg

    rig = PitRig()
    rig.lapics[0].write(reg.LVT0, 0x400)
    rig.program(0, 2, 1193)
    rig.interrupts(3 * MS + MS // 2)
    assert rig.cpus[0].nmis == 3


def test_the_state_survives_get_and_set() -> None:
    rig, other = PitRig(), PitRig()
    rig.program(0, 2, 1193)
    rig.program(2, 3, 400)
    rig.pit.write(0x61, 1, 3)
    state = rig.pit.pack()
    assert len(state) == 112
    assert struct.unpack_from("<I", state)[0] == 1193
    other.pit.unpack(state)
    assert other.pit.pack() == state
    assert other.interrupts(3 * MS + MS // 2) == 3


def test_an_hpet_in_its_place_silences_it() -> None:
    rig = PitRig()
    rig.program(0, 2, 1193)
    state = bytearray(rig.pit.pack())
    state[72] |= FLAG_HPET_LEGACY
    rig.pit.unpack(bytes(state))
    assert rig.interrupts(3 * MS) == 0


@given(st.binary(min_size=112, max_size=112))
def test_any_state_can_be_set_and_lived_with(state: bytes) -> None:
    rig = PitRig()
    rig.pit.unpack(state)
    rig.advance(MS)
    for port in range(0x40, 0x43):
        rig.pit.write(0x43, 1, (port - 0x40) << 6)
        assert 0 <= rig.pit.read(port, 1) < 256
        assert rig.output(port - 0x40) in (0, 1)
    rig.pit.unpack(rig.pit.pack())


@given(st.lists(st.tuples(st.sampled_from([0x40, 0x41, 0x42, 0x43, 0x61]), st.integers(0, 255)), max_size=80))
def test_rubbish_in_every_register(writes: list[tuple[int, int]]) -> None:
    rig = PitRig()
    for port, value in writes:
        rig.pit.write(port, 1, value)
        assert 0 <= rig.pit.read(port, 1) < 256
        rig.advance(value * 1000)
        rig.take()
