"""The local APIC by rows of the SDM, and by a model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestmem.kvm.irqchip import lapic_page
from guestmem.kvm.irqchip import lapic_registers as reg
from guestmem.kvm.irqchip.apic_bus import DeliveryMode, Message
from guestmem.kvm.irqchip.lapic import Lapic
from tests.kvm.irqchip.rig import ENABLED, Rig, x2apic

REGISTERS = range(0x40)
WORDS = st.integers(0, 0xFFFF_FFFF)


def fixed(vector: int, destination: int = 0, **more: object) -> Message:
    return Message(vector, DeliveryMode.FIXED, destination, **more)  # type: ignore[arg-type]


def test_after_reset() -> None:
    """SDM 11.4.7.1; LINT0 of the bootstrap processor is KVM's quirk."""
    rig = Rig(2)
    for lapic in rig.lapics:
        lapic.reset()
    first, second = rig.lapics
    assert first.read(reg.SVR) == 0xFF
    assert first.read(reg.DFR) == 0xFFFF_FFFF
    assert [first.read(entry) for entry in reg.LVT_WRITABLE if entry != reg.LVT0] == [0x10000] * 5
    assert (first.read(reg.LVT0), second.read(reg.LVT0)) == (0x700, 0x10000)
    assert (first.base, second.base) == (0xFEE0_0900, 0xFEE0_0800)
    assert second.read(reg.ID) == 1 << 24
    assert first.read(reg.VERSION) == 0x5_0014


def test_init_keeps_id_and_base_and_forgets_the_rest() -> None:
    lapic = Rig(2).lapics[1]
    lapic.write(reg.ID, 0x2A00_0000)
    lapic.accept(fixed(0x50))
    lapic.reset(is_init=True)
    assert (lapic.read(reg.ID), lapic.base, lapic.irr, lapic.read(reg.SVR)) == (0x2A00_0000, 0xFEE0_0800, 0, 0xFF)


def test_priority_by_class() -> None:
    """SDM 11.8.3: a vector is taken if its class is above the processor's; EOI ends the highest in service."""
    lapic = Rig().lapics[0]
    lapic.accept(fixed(0x41))
    assert lapic.acknowledge() == 0x41
    assert lapic.ppr == 0x40
    lapic.accept(fixed(0x4F))
    assert lapic.acknowledge() == -1, "the same class"
    lapic.accept(fixed(0x51))
    assert lapic.acknowledge() == 0x51
    lapic.write(reg.EOI, 0)
    assert lapic.ppr == 0x40
    lapic.write(reg.EOI, 0)
    assert lapic.acknowledge() == 0x4F


@pytest.mark.parametrize(("tpr", "in_service", "ppr"), [(0x35, 0x31, 0x35), (0x2F, 0x31, 0x30), (0x40, 0x31, 0x40)])
def test_ppr(tpr: int, in_service: int, ppr: int) -> None:
    lapic = Rig().lapics[0]
    lapic.isr = 1 << in_service
    lapic.write(reg.TPR, tpr)
    assert lapic.read(reg.PPR) == ppr


@given(st.lists(st.one_of(st.integers(0, 255), st.sampled_from(["take", "eoi"])), max_size=60), st.integers(0, 255))
def test_it_delivers_as_sets_of_vectors_do(steps: list[int | str], tpr: int) -> None:
    lapic = Rig().lapics[0]
    lapic.write(reg.TPR, tpr)
    requested: set[int] = set()
    serving: list[int] = []
    for step in steps:
        if isinstance(step, int):
            lapic.accept(fixed(step))
            requested.add(step)
        elif step == "eoi":
            lapic.write(reg.EOI, 0)
            if serving:
                serving.remove(max(serving))
        else:
            best = max(requested, default=-1)
            floor = max([tpr >> 4, *(vector >> 4 for vector in serving)])
            expected = best if best >> 4 > floor else -1
            assert lapic.acknowledge() == expected
            if expected >= 0:
                requested.discard(expected)
                serving.append(expected)
    assert lapic.irr == sum(1 << vector for vector in requested)
    assert lapic.isr == sum(1 << vector for vector in set(serving))


def test_disabled_by_software_it_masks_its_lvt_and_takes_no_vector() -> None:
    lapic = Rig().lapics[0]
    lapic.write(reg.LVT1, 0x400)
    lapic.write(reg.SVR, 0xFF)
    assert lapic.read(reg.LVT1) == 0x10400
    lapic.write(reg.LVT1, 0x400)
    assert lapic.read(reg.LVT1) == 0x10400, "SDM 11.4.7.2: the mask cannot be cleared"
    assert lapic.accept(fixed(0x40)) == 0
    assert lapic.accept(Message(0, DeliveryMode.NMI, 0)) == 1, "but an NMI"


@pytest.mark.parametrize(
    ("low", "taken"),
    [
        (0x40000 | 0x44, [1, 0, 0, 0]),  # self
        (0x80000 | 0x44, [1, 1, 1, 1]),  # all
        (0xC0000 | 0x44, [0, 1, 1, 1]),  # all but self
        (0x44, [0, 0, 1, 0]),  # physical 2
    ],
)
def test_shorthands_of_an_ipi(low: int, taken: list[int]) -> None:
    rig = Rig(4)
    rig.lapics[0].write(reg.ICR2, 2 << 24)
    rig.lapics[0].write(reg.ICR, low)
    assert [lapic.irr >> 0x44 & 1 for lapic in rig.lapics] == taken


@pytest.mark.parametrize(
    ("dfr", "destination", "taken"),
    [
        (0xFFFF_FFFF, 0b0101, [1, 0, 1, 0]),
        (0xFFFF_FFFF, 0xFF, [1, 1, 1, 1]),
        (0x0FFF_FFFF, 0x03, [1, 1, 0, 0]),  # cluster 0: its members 0 and 1
        (0x0FFF_FFFF, 0x14, [0, 0, 0, 0]),  # cluster 1 has nobody
        (0x7FFF_FFFF, 0b0101, [0, 0, 0, 0]),  # neither model
    ],
)
def test_logical_destinations(dfr: int, destination: int, taken: list[int]) -> None:
    rig = Rig(4)
    for number, lapic in enumerate(rig.lapics):
        lapic.write(reg.DFR, dfr)
        lapic.write(reg.LDR, 1 << number << 24)
    rig.chip.bus.deliver(fixed(0x44, destination, is_logical=True))
    assert [lapic.irr >> 0x44 & 1 for lapic in rig.lapics] == taken


def test_logical_destinations_in_x2apic_mode_follow_from_the_id() -> None:
    rig = Rig(20)
    for lapic in rig.lapics:
        x2apic(lapic)
    assert rig.lapics[17].read(reg.LDR) == 1 << 16 | 1 << 1
    rig.chip.bus.deliver(fixed(0x44, 1 << 16 | 0b1010, is_logical=True))
    assert [lapic.number for lapic in rig.lapics if lapic.irr] == [17, 19]
    rig.lapics[3].msr_write(reg.ICR, 0xFFFF_FFFF << 32 | 0x45)
    assert all(lapic.irr >> 0x45 & 1 for lapic in rig.lapics), "broadcast"


def test_lowest_priority_goes_to_one_that_is_enabled() -> None:
    rig = Rig(4)
    rig.lapics[1].write(reg.SVR, 0xFF)
    message = Message(0x42, DeliveryMode.LOWEST, 0b1110, is_logical=True)
    for number, lapic in enumerate(rig.lapics):
        lapic.write(reg.LDR, 1 << number << 24)
    assert rig.chip.bus.deliver(message) == 1
    assert sum(bool(lapic.irr) for lapic in rig.lapics[2:]) == 1


def test_init_deassert_is_nothing_and_init_forgets_sipi() -> None:
    lapic = Rig(2).lapics[1]
    lapic.accept(Message(0, DeliveryMode.INIT, 1, is_asserted=False, is_level=True))
    assert not lapic.init_pending
    lapic.accept(Message(9, DeliveryMode.STARTUP, 1))
    lapic.accept(Message(0, DeliveryMode.INIT, 1))
    assert (lapic.init_pending, lapic.sipi_pending, lapic.sipi_vector) == (True, False, 9)


@pytest.mark.parametrize(
    ("register", "shift"), [(0b0000, 1), (0b0001, 2), (0b0010, 3), (0b0011, 4), (0b1000, 5), (0b1010, 7), (0b1011, 0)]
)
def test_the_timer_divides(register: int, shift: int) -> None:
    """SDM figure 11-10."""
    rig = Rig()
    lapic = rig.lapics[0]
    lapic.write(reg.DIVIDE, register)
    lapic.write(reg.LVT_TIMER, 0x40)
    lapic.write(reg.INITIAL_COUNT, 1000)
    rig.advance(500 << shift)
    assert lapic.read(reg.CURRENT_COUNT) == 500
    rig.advance((500 << shift) - 1)
    assert not lapic.irr
    rig.advance(1)
    assert lapic.irr == 1 << 0x40


def start_periodic(lapic: Lapic, nanoseconds: int) -> None:
    """Vector 0x40, undivided: a count is 1 ns."""
    lapic.write(reg.DIVIDE, 0xB)
    lapic.write(reg.LVT_TIMER, 0x2_0040)
    lapic.write(reg.INITIAL_COUNT, nanoseconds)


def test_a_periodic_timer_is_not_faster_than_kvm_lets_it() -> None:
    rig = Rig()
    start_periodic(rig.lapics[0], 1)
    count = 0
    for _ in range(1000):
        rig.advance(1000)
        count += rig.take() >= 0
    assert count == 5


def test_a_periodic_timer_that_nobody_looked_at_goes_on_in_step() -> None:
    rig = Rig()
    start_periodic(rig.lapics[0], 1_000_000)
    rig.clock.time += 7_300_000
    rig.timers.fire_due()
    assert rig.take() == 0x40
    assert rig.timers.next_deadline == 1_008_000_000


def test_tsc_deadline_mode() -> None:
    rig = Rig()
    lapic = rig.lapics[0]
    lapic.timer.set_tsc_deadline(5)
    assert lapic.timer.tsc_deadline == 0, "not in another mode"
    lapic.write(reg.LVT_TIMER, 0x4_0040)
    lapic.write(reg.INITIAL_COUNT, 1000)
    assert lapic.read(reg.INITIAL_COUNT) == 0
    lapic.timer.set_tsc_deadline(rig.cpus[0].tsc() + 2_000)
    rig.advance(999)
    assert not lapic.irr
    rig.advance(1)
    assert (lapic.irr, lapic.timer.tsc_deadline) == (1 << 0x40, 0)
    lapic.timer.set_tsc_deadline(1)
    rig.advance(0)
    assert rig.take() == 0x40, "a time that is over fires at once"
    lapic.timer.set_tsc_deadline(rig.cpus[0].tsc() + 2_000)
    lapic.write(reg.LVT_TIMER, 0x40)
    rig.advance(5_000)
    assert lapic.timer.tsc_deadline == 0 and not lapic.irr, "leaving the mode disarms"


def test_without_tsc_deadline_in_cpuid_its_mode_is_not_there() -> None:
    lapic = Rig().lapics[0]
    lapic.has_tsc_deadline = False
    lapic.write(reg.LVT_TIMER, 0x6_0040)
    assert lapic.read(reg.LVT_TIMER) == 0x2_0040


@pytest.mark.parametrize(
    ("start", "value", "from_guest", "good"),
    [
        ("xapic", 0xFEE0_0C00, True, True),
        ("x2apic", 0xFEE0_0800, True, False),  # x2APIC to xAPIC
        ("x2apic", 0xFEE0_0800, False, True),  # the VMM may
        ("x2apic", 0xFEE0_0000, True, True),
        ("off", 0xFEE0_0C00, True, False),  # off to x2APIC
        ("off", 0xFEE0_0800, True, True),
        ("xapic", 0xFEE0_0400, True, False),  # x2APIC without xAPIC
        ("xapic", 0xFEE0_0801, True, False),
        ("xapic", 1 << 60 | 0xFEE0_0800, False, False),
        ("xapic", 0xFED0_0800, True, True),
    ],
)
def test_modes(start: str, value: int, from_guest: bool, good: bool) -> None:
    """SDM figure 11-27."""
    lapic = Rig(2).lapics[1]
    lapic.base = {"xapic": 0xFEE0_0800, "x2apic": 0xFEE0_0C00, "off": 0xFEE0_0000}[start]
    before = lapic.base
    assert lapic.set_base(value, from_guest) is good
    assert lapic.base == (value if good else before)


def test_registers_that_are_not_x2apic_msrs() -> None:
    lapic = Rig().lapics[0]
    assert lapic.msr_read(reg.SVR) is None, "in xAPIC mode none is"
    x2apic(lapic)
    assert lapic.msr_read(reg.SVR) == ENABLED
    assert [lapic.msr_read(register) for register in (reg.DFR, reg.ICR2, reg.EOI, 0, 0x3F)] == [None] * 5
    assert not lapic.msr_write(reg.SVR, 1 << 32)
    assert not lapic.msr_write(reg.ID, 0)
    assert not lapic.msr_write(reg.ICR, 1 << 20)
    assert lapic.msr_write(reg.SELF_IPI, 0x77)
    assert lapic.pending_vector == 0x77


def test_mmio_of_odd_sizes() -> None:
    lapic = Rig().lapics[0]
    lapic.write(reg.LVT1, 0x1_0433)
    assert [lapic.mmio_read(0x360 + at, 1) for at in range(4)] == [0x33, 0x04, 0x01, 0]
    assert lapic.mmio_read(0x362, 4) == 0, "across the register's end"
    lapic.mmio_write(0x360, 1, 0xFF)
    lapic.mmio_write(0x364, 4, 0xFF)
    assert lapic.read(reg.LVT1) == 0x1_0433
    lapic.set_base(0xFEE0_0000, from_guest=True)
    assert lapic.mmio_read(0x360, 4) == 0xFFFF_FFFF


def busy(lapic: Lapic) -> None:
    start_periodic(lapic, 1_000_000)
    lapic.accept(fixed(0x91, is_level=True))
    lapic.accept(fixed(0xF3))
    lapic.acknowledge()
    lapic.write(reg.TPR, 0x20)


@pytest.mark.parametrize("is_x2apic", [False, True])
def test_the_state_survives_get_and_set(is_x2apic: bool) -> None:
    source, destination = Rig(), Rig()
    lapic, other = source.lapics[0], destination.lapics[0]
    if is_x2apic:
        x2apic(lapic)
        x2apic(other)
    busy(lapic)
    source.advance(300_000)
    page = lapic_page.pack(lapic, False)
    assert lapic_page.unpack(other, page, False)
    assert lapic_page.pack(other, False) == page
    assert (other.irr, other.isr, other.tmr) == (lapic.irr, lapic.isr, lapic.tmr)
    other.write(reg.EOI, 0)
    assert destination.take() == 0x91
    destination.advance(699_999)
    assert not other.irr
    destination.advance(1)
    assert other.irr == 1 << 0x40, "the timer went on where it was"
    destination.advance(1_000_000)
    assert destination.take() == 0x40


@given(st.binary(min_size=1024, max_size=1024))
def test_any_state_can_be_set_and_lived_with(page: bytes) -> None:
    rig = Rig()
    lapic = rig.lapics[0]
    assert lapic_page.unpack(lapic, page, False)
    again = lapic_page.pack(lapic, False)
    rig.advance(10_000_000)
    while rig.take() >= 0:
        pass
    assert lapic_page.unpack(lapic, again, False)


@given(st.booleans(), st.lists(st.tuples(st.sampled_from(REGISTERS), WORDS), max_size=60))
def test_rubbish_in_every_register(is_x2apic: bool, writes: list[tuple[int, int]]) -> None:
    rig = Rig(3)
    if is_x2apic:
        for lapic in rig.lapics:
            x2apic(lapic)
    for register, value in writes:
        for number, lapic in enumerate(rig.lapics):
            lapic.msr_write(register, value) if is_x2apic else lapic.write(register, value ^ number)
            lapic.read(register)
        rig.advance(100_000)
        rig.take()
    for lapic in rig.lapics:
        assert 0 <= lapic.irr < 1 << 256 and 0 <= lapic.isr < 1 << 256
        assert len(lapic_page.pack(lapic, False)) == 1024
