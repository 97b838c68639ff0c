"""The TLB fill: kinds of memory, rings, and Unicorn's own TLB under it."""

from __future__ import annotations

import pytest

from guestmem.cpu.cpuid import DEFAULT_CPUID
from guestmem.cpu.engine import Halt, PageBit, PortOut, Shutdown, Stage2Miss
from guestmem.cpu.unicorn import UnicornEngine
from tests.cpu.guests import CODE, DATA, PAGE, SIZE, TABLES, Memory, run, start_long

HLT = b"\xf4"
C_BIT, SHARED_BIT = PageBit(51, set_is_private=True), PageBit(47, set_is_private=False)


def leaf(gpa: int) -> int:
    """Where the page table of start_long has the entry of `gpa`."""
    return TABLES + 4 * PAGE + gpa // PAGE * 8


def guest_of(bit: PageBit | None, mask: int) -> tuple[UnicornEngine, Memory]:
    """mov al, [rdi]; out 0x80, al; RDI at DATA, whose leaf has `mask` in it."""
    memory = Memory(page_bit=bit)
    engine = UnicornEngine(memory)
    start_long(engine, memory, b"\x8a\x07\xe6\x80" + HLT)
    memory.set_word(leaf(DATA), memory.word(leaf(DATA)) | mask)
    regs = engine.get_regs()
    regs.rdi = DATA
    engine.set_regs(regs)
    memory.asked.clear()
    return engine, memory


@pytest.mark.parametrize("bit", [C_BIT, SHARED_BIT])
@pytest.mark.parametrize("private", [True, False])
class TestPageBit:
    """A guest whose hardware has a bit in page-table entries for private or shared."""

    def start(self, bit: PageBit, private: bool) -> tuple[UnicornEngine, Memory]:
        return guest_of(bit, 1 << bit.position if private is bit.set_is_private else 0)

    def test_kinds(self, bit: PageBit, private: bool) -> None:
        """Data is what its leaf says; tables and code are private."""
        engine, memory = self.start(bit, private)
        memory.write(DATA, b"\x11")
        assert run(engine) == PortOut(0x80, 1, 0x11)
        kinds = {gpa: kind for gpa, _, kind in memory.asked}
        assert kinds[DATA] is private
        assert kinds[TABLES + PAGE] is True
        # start_long sets no bit in the leaf of the code: shared, to the C-bit.
        assert kinds[CODE] is True
        engine.close()
        memory.close()

    def test_miss(self, bit: PageBit, private: bool) -> None:
        engine, memory = self.start(bit, private)
        memory.denied.add(DATA // PAGE)
        assert run(engine) == Stage2Miss(DATA, private=private)
        engine.close()
        memory.close()


def test_cpuid_does_not_make_a_page_bit() -> None:
    """A VMM may copy what the machine has into any VM: the bit is reserved there all the same."""
    engine, memory = guest_of(None, 1 << 51)
    engine.set_cpuid(DEFAULT_CPUID | {(0x8000_0008, 0): (0x3030, 0, 0, 0), (0x8000_001F, 0): (2, 51, 0, 0)})
    assert run(engine) == Shutdown()
    engine.close()
    memory.close()


def test_code_in_a_shared_page_of_a_td_is_a_page_fault() -> None:
    engine, memory = guest_of(SHARED_BIT, 0)
    memory.set_word(leaf(CODE), memory.word(leaf(CODE)) | 1 << 47)
    assert run(engine) == Shutdown()
    assert engine.get_sregs().cr2 == CODE
    engine.close()
    memory.close()


def test_ring_3_and_ring_0_have_entries_of_their_own(engine: UnicornEngine, memory: Memory) -> None:
    """A page of the supervisor, touched in ring 0 first, stays out of reach for ring 3."""
    start_long(engine, memory, b"\x8a\x07" + HLT)
    memory.set_word(leaf(DATA), memory.word(leaf(DATA)) & ~4)
    regs, sregs = engine.get_regs(), engine.get_sregs()
    regs.rdi = DATA
    engine.set_regs(regs)
    assert run(engine) == Halt()
    sregs.cs.dpl = sregs.ss.dpl = 3
    engine.set_sregs(sregs)
    engine.set_regs(regs)
    assert run(engine) == Shutdown()
    assert engine.get_sregs().cr2 == DATA


def test_segment_load_in_ring_3_reads_the_gdt_of_the_supervisor(engine: UnicornEngine, memory: Memory) -> None:
    start_long(engine, memory, b"\x8e\xd8\xe6\x80")  # mov ds, ax; out 0x80, al
    gdt = 0x22000
    memory.set_word(gdt + 8, 0x00CF_F300_0000_FFFF)
    memory.set_word(leaf(gdt), memory.word(leaf(gdt)) & ~4)
    regs, sregs = engine.get_regs(), engine.get_sregs()
    sregs.gdt.base, sregs.gdt.limit = gdt, 15
    sregs.cs.dpl = sregs.ss.dpl = 3
    regs.rax, regs.rflags = 0x0B, 0x3002
    engine.set_sregs(sregs)
    engine.set_regs(regs)
    assert run(engine) == PortOut(0x80, 1, 0x0B)
    assert engine.get_sregs().ds.selector == 0x0B


def test_guest_changes_its_page_tables(engine: UnicornEngine, memory: Memory) -> None:
    """INVLPG, and a load of CR3."""
    for flush in (b"\x0f\x01\x3f", b"\x0f\x20\xd8\x0f\x22\xd8"):  # invlpg [rdi]; mov rax, cr3; mov cr3, rax
        # mov al, [rdi]; mov [rsi], rdx; flush; mov al, [rdi]; out 0x80, al
        start_long(engine, memory, b"\x8a\x07\x48\x89\x16" + flush + b"\x8a\x07\xe6\x80")
        memory.write(DATA, b"\x01")
        memory.write(0x6000, b"\x02")
        regs = engine.get_regs()
        regs.rdi, regs.rsi, regs.rdx = DATA, leaf(DATA), memory.word(leaf(0x6000))
        engine.set_regs(regs)
        assert run(engine) == PortOut(0x80, 1, 2)


def test_guest_switches_between_two_address_spaces(engine: UnicornEngine, memory: Memory) -> None:
    """The same linear page of code is another page after a load of CR3."""
    start_long(engine, memory, b"\x0f\x22\xd8\x90\xb0\x01\xe6\x80")  # mov cr3, rax; nop; mov al, 1; out 0x80, al
    memory.write(0x9000, b"\x0f\x22\xd8\x90\xb0\x02\xe6\x80")
    tables = 0x200000
    memory.write(tables, memory.read(TABLES, 16 * PAGE))
    for level in (1, 2, 3):
        memory.set_word(tables + level * PAGE, tables + (level + 1) * PAGE | 7)
    memory.set_word(tables + 4 * PAGE + CODE // PAGE * 8, 0x9007)
    regs = engine.get_regs()
    regs.rax = tables + PAGE
    engine.set_regs(regs)
    assert run(engine) == PortOut(0x80, 1, 2)


def test_code_page_that_becomes_dirty(engine: UnicornEngine, memory: Memory) -> None:
    """A fetch makes the page executable and not writable as long as it is clean."""
    start_long(engine, memory, b"\x88\x04\x25\x00\x18\x00\x00" + HLT)  # mov [0x1800], al
    assert run(engine) == Halt()
    assert memory.word(leaf(CODE)) & 0x60 == 0x60


def test_address_space_set_from_outside(engine: UnicornEngine, memory: Memory) -> None:
    start_long(engine, memory, b"\x8a\x07\xe6\x80")  # mov al, [rdi]; out 0x80, al
    memory.write(DATA, b"\x01")
    memory.write(0x6000, b"\x02")
    regs, sregs = engine.get_regs(), engine.get_sregs()
    regs.rdi = DATA
    for _ in range(2):
        engine.set_regs(regs)
        assert run(engine) == PortOut(0x80, 1, 1)
    memory.set_word(leaf(DATA), memory.word(leaf(0x6000)))
    engine.set_sregs(sregs)
    engine.set_regs(regs)
    assert run(engine) == PortOut(0x80, 1, 2)


def test_code_is_read_through_the_translation_of_now(engine: UnicornEngine, memory: Memory) -> None:
    start_long(engine, memory, b"\xe6\x80" + HLT)
    assert run(engine) == PortOut(0x80, 1, 0)
    memory.write(0x9000, b"\x90" + HLT)
    memory.set_word(leaf(CODE), 0x9007)
    for flushed, stop in ((False, PortOut(0x80, 1, 0)), (True, Halt())):
        if flushed:
            engine.flush_tlb()
        regs = engine.get_regs()
        regs.rip = CODE
        engine.set_regs(regs)
        assert run(engine) == stop


def test_unicorns_tlb_grows_with_the_guest(engine: UnicornEngine, memory: Memory) -> None:
    """A loop over two thousand pages fills each entry a few times and not once a round."""
    # 1: mov rdi, rsi; mov rcx, rdx; 2: mov al, [rdi]; add rdi, 4096; dec rcx; jnz 2b; dec rbx; jnz 1b; hlt
    code = b"\x48\x89\xf7\x48\x89\xd1\x8a\x07\x48\x81\xc7\x00\x10\x00\x00\x48\xff\xc9\x75\xf2\x48\xff\xcb\x75\xe7" + HLT
    start_long(engine, memory, code)
    regs = engine.get_regs()
    pages, rounds = 2000, 100
    regs.rsi, regs.rdx, regs.rbx = SIZE - pages * PAGE, pages, rounds
    engine.set_regs(regs)
    assert run(engine) == Halt()
    assert pages < engine.block.fills < pages * rounds // 5
