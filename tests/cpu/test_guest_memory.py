"""GuestPhysical and LinearMemory on a memory that counts what it is asked."""

from __future__ import annotations

import pytest

from guestmem.cpu import boot
from guestmem.cpu.guest_memory import GuestFault, GuestPhysical, LinearMemory, Stage2Refused
from guestmem.cpu.guest_walk import Paging
from tests.cpu.guests import CODE, DATA, PAGE, SIZE, STACK, TABLES, Memory


@pytest.fixture
def linear(memory: Memory) -> LinearMemory:
    sregs = boot.long_mode(CODE, STACK, TABLES, SIZE, memory.write, boot.PAGE_4K).sregs
    return LinearMemory(Paging(sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer), GuestPhysical(memory))


def test_a_page_is_asked_for_once_and_again_to_write(memory: Memory) -> None:
    physical = GuestPhysical(memory)
    memory.read_only.add(DATA // PAGE)
    assert physical.page(DATA + 5, False, None) is physical.page(DATA, False, None)
    assert memory.asked == [(DATA, False, None)]
    assert physical.page(DATA, True, None) is None
    memory.read_only.clear()
    page = physical.page(DATA, True, None)
    assert page is not None
    assert page.writable
    assert physical.page(DATA, False, None) is page
    assert memory.asked == [(DATA, False, None), (DATA, True, None), (DATA, True, None)]
    physical.flush()
    physical.page(DATA, False, None)
    assert len(memory.asked) == 4


def test_the_two_kinds_of_a_page_are_two_pages(memory: Memory) -> None:
    physical = GuestPhysical(memory)
    physical.page(DATA, False, True)
    physical.page(DATA, False, False)
    assert memory.asked == [(DATA, False, True), (DATA, False, False)]


def test_entries(memory: Memory) -> None:
    physical = GuestPhysical(memory)
    memory.set_word(DATA + 8, 0x1234)
    assert physical.read64(DATA + 8) == 0x1234
    assert physical.write64(DATA + 8, 0x5678)
    assert (physical.read64(DATA + 8), memory.word(DATA + 8)) == (0x5678, 0x5678)
    memory.denied.add(DATA // PAGE)
    physical.flush()
    assert physical.read64(DATA + 8) is None
    assert not physical.write64(DATA + 8, 1)


def test_across_pages(memory: Memory, linear: LinearMemory) -> None:
    linear.write(DATA + PAGE - 3, 0x1122_3344_5566_7788, 8)
    assert memory.word(DATA + PAGE - 3) == 0x1122_3344_5566_7788
    assert linear.read(DATA + PAGE - 3, 8) == 0x1122_3344_5566_7788
    assert linear.fetch(DATA + PAGE - 1, 2) == b"\x66\x55"


def test_refusals_carry_the_address(memory: Memory, linear: LinearMemory) -> None:
    with pytest.raises(GuestFault) as fault:
        linear.read(SIZE + 0x123, 1)
    assert (fault.value.vector, fault.value.error_code, fault.value.address) == (14, 0, SIZE + 0x123)
    memory.denied.add(DATA // PAGE + 1)
    with pytest.raises(Stage2Refused) as refused:
        linear.write(DATA + PAGE - 2, 0, 4)
    assert (refused.value.gpa, refused.value.write, refused.value.fetch) == (DATA + PAGE, True, False)
    memory.denied.add(TABLES // PAGE + 4)
    with pytest.raises(Stage2Refused) as refused:
        LinearMemory(linear._paging, GuestPhysical(memory)).fetch(DATA, 1)
    assert refused.value.gpa == TABLES + 4 * PAGE + DATA // PAGE * 8
