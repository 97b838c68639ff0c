"""The pair of 8259As by rows of the datasheet, and by a model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestmem.kvm.irqchip.pic import Pic
from tests.kvm.irqchip.rig import Rig

FIRST, SECOND = 0x20, 0xA0
PORTS = (0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1)


def pic(rig: Rig) -> Pic:
    assert rig.chip.pic is not None
    return rig.chip.pic


def initialise(chip: Pic, icw4: int = 1) -> None:
    for base, vector, icw3 in ((FIRST, 0x20, 4), (SECOND, 0x28, 2)):
        chip.write(base, 1, 0x11)
        for value in (vector, icw3, icw4):
            chip.write(base + 1, 1, value)
        chip.write(base + 1, 1, 0)


@pytest.fixture
def chip() -> Pic:
    made = pic(Rig())
    initialise(made)
    return made


def raise_lines(chip: Pic, *lines: int) -> None:
    for line in lines:
        chip.set_line(line, 0, True)
        chip.set_line(line, 0, False)


def test_lower_lines_first_and_the_second_chip_at_line_2(chip: Pic) -> None:
    raise_lines(chip, 5, 1, 12, 3)
    got = []
    for _ in range(4):
        got.append(chip.acknowledge())
        chip.write(SECOND, 1, 0x20)
        chip.write(FIRST, 1, 0x20)
    assert got == [0x21, 0x2C, 0x23, 0x25]
    assert not chip.output


def test_nested_by_priority(chip: Pic) -> None:
    raise_lines(chip, 3)
    assert chip.acknowledge() == 0x23
    raise_lines(chip, 5)
    assert not chip.output
    raise_lines(chip, 1)
    assert chip.output and chip.acknowledge() == 0x21
    chip.write(FIRST, 1, 0x20)
    assert not chip.output, "3 is in service"
    chip.write(FIRST, 1, 0x20)
    assert chip.output


def test_spurious_interrupts(chip: Pic) -> None:
    assert chip.acknowledge() == 0x27
    assert chip.controllers[0].isr == 0
    chip.write(0x4D1, 1, 0x04)
    chip.set_line(10, 0, True)
    chip.set_line(10, 0, False)  # level-triggered, and gone before INTA
    assert chip.acknowledge() == 0x2F


def test_edge_and_level(chip: Pic) -> None:
    chip.write(0x4D0, 1, 0xFF)
    assert chip.read(0x4D0, 1) == 0xF8, "lines 0 to 2 are edge-triggered on every board"
    assert chip.set_line(5, 0, True) == 1
    assert chip.acknowledge() == 0x25
    chip.write(FIRST, 1, 0x20)
    assert chip.output, "the level is still up"
    chip.set_line(5, 0, False)
    assert not chip.output
    assert [chip.set_line(1, 0, True), chip.set_line(1, 0, True)] == [1, 1]
    chip.acknowledge()
    chip.write(FIRST, 1, 0x20)
    assert not chip.output, "an edge is one interrupt"


def test_the_mask_and_what_a_masked_line_answers(chip: Pic) -> None:
    chip.write(0x21, 1, 0x08)
    assert chip.read(0x21, 1) == 0x08
    assert chip.set_line(3, 0, True) == -1
    assert not chip.output
    chip.write(0x21, 1, 0)
    assert chip.output


def test_ocw3_reads_irr_and_isr(chip: Pic) -> None:
    raise_lines(chip, 3)
    assert chip.read(FIRST, 1) == 8
    chip.acknowledge()
    assert chip.read(FIRST, 1) == 0
    chip.write(FIRST, 1, 0x0B)
    assert chip.read(FIRST, 1) == 8


def test_rotation(chip: Pic) -> None:
    raise_lines(chip, 3)
    chip.acknowledge()
    chip.write(FIRST, 1, 0xA0)  # rotate on non-specific EOI: 3 is the lowest now
    raise_lines(chip, 3, 4)
    assert chip.acknowledge() == 0x24
    chip.write(FIRST, 1, 0x64)  # specific EOI
    assert chip.acknowledge() == 0x23
    chip.write(FIRST, 1, 0xE3)  # rotate on specific EOI
    chip.write(FIRST, 1, 0xC0)  # set priority: 1 is the highest
    raise_lines(chip, 0, 1)
    assert chip.acknowledge() == 0x21


def test_auto_eoi_with_rotation() -> None:
    chip = pic(Rig())
    initialise(chip, icw4=3)
    chip.write(FIRST, 1, 0x80)
    raise_lines(chip, 3, 4)
    assert [chip.acknowledge(), chip.controllers[0].isr] == [0x23, 0]
    raise_lines(chip, 3)
    assert chip.acknowledge() == 0x24


def test_poll(chip: Pic) -> None:
    raise_lines(chip, 6)
    chip.write(FIRST, 1, 0x0C)
    assert chip.read(FIRST, 1) == 6
    assert not chip.output
    chip.write(FIRST, 1, 0x0C)
    assert chip.read(FIRST, 1) == 7, "nothing: as spurious"


def test_icw1_forgets_edges_and_the_mask(chip: Pic) -> None:
    chip.write(0x21, 1, 0xFF)
    raise_lines(chip, 3)
    chip.write(FIRST, 1, 0x11)
    assert (chip.read(0x21, 1), chip.read(FIRST, 1)) == (0, 0)


def test_wide_accesses_are_nothing(chip: Pic) -> None:
    chip.write(0x21, 2, 0xFFFF)
    assert (chip.read(0x21, 1), chip.read(0x21, 2)) == (0, 0)


def test_the_state_survives_get_and_set(chip: Pic) -> None:
    raise_lines(chip, 3, 9)
    chip.acknowledge()
    other = Rig()
    for which in (0, 1):
        other.chip.set_state(which, chip.pack(which).ljust(512, b"\0"))
        assert other.chip.get_state(which)[:16] == chip.pack(which)
    chip.write(FIRST, 1, 0x20)
    pic(other).write(FIRST, 1, 0x20)
    assert pic(other).acknowledge() == chip.acknowledge()


@given(st.permutations(range(8)), st.integers(0, 255), st.integers(0, 7))
def test_priorities_as_a_sorted_list(lines: list[int], mask: int, lowest: int) -> None:
    chip = pic(Rig())
    initialise(chip)
    chip.write(0x21, 1, mask | 4)  # line 2 is the other chip's
    chip.write(FIRST, 1, 0xC0 | lowest)
    raise_lines(chip, *lines)
    expected = sorted((n for n in lines if not (mask | 4) >> n & 1), key=lambda n: (n - lowest - 1) % 8)
    got = []
    while chip.output:
        got.append(chip.acknowledge() - 0x20)
        chip.write(FIRST, 1, 0x20)
    assert got == expected


@given(
    st.lists(st.tuples(st.sampled_from(PORTS), st.integers(0, 255)), max_size=80), st.binary(min_size=32, max_size=32)
)
def test_rubbish_in_every_register(writes: list[tuple[int, int]], state: bytes) -> None:
    rig = Rig()
    for which in (0, 1):
        rig.chip.set_state(which, state[16 * which : 16 * which + 16].ljust(512, b"\0"))
    for port, value in writes:
        pic(rig).write(port, 1, value)
        rig.chip.pulse(value % 16, 0)
        assert 0 <= pic(rig).read(port, 1) < 256
        assert 0 <= pic(rig).acknowledge() < 256
