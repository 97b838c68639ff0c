"""The walk of the engine: against a model on random tables; then the model, case by case."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guestmem.cpu.cpuid import DEFAULT_CPUID
from guestmem.cpu.engine import PageBit, PortOut, Stage2Miss, Stop
from guestmem.cpu.registers import DescriptorTable, Events, Regs, Segment, Sregs
from guestmem.cpu.unicorn import UnicornEngine
from guestmem.cpu.x86 import (
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_LA57,
    CR4_PAE,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    PTE_A,
    PTE_D,
    PTE_NX,
    PTE_P,
    PTE_PS,
    PTE_U,
    PTE_W,
)
from tests.cpu.guests import Memory, run
from tests.cpu.walk_model import Access, GuestPage, Paging, TableMiss, Walk, WalkFault, walk

PAGE = 4096
PAGES, CODE_PAGE, IDT_PAGE, FIRST_DATA = 64, 30, 31, 32
PHYSICAL_BITS = 40
RWA = PTE_P | PTE_W | PTE_U | PTE_A
OUT = b"\xe6\x80"


class Mode(NamedTuple):
    """What selects a mode of paging; where in a linear address its levels are; an address apart for code."""

    cr4: int
    efer: int
    shifts: tuple[int, ...]
    code: int

    @property
    def entry_size(self) -> int:
        return 4 if self.shifts[0] == 22 else 8


MODES = {
    "4-level": Mode(CR4_PAE, EFER_LME | EFER_LMA, (39, 30, 21, 12), 1 << 39),
    "5-level": Mode(CR4_PAE | CR4_LA57, EFER_LME | EFER_LMA, (48, 39, 30, 21, 12), 1 << 48),
    "PAE": Mode(CR4_PAE, 0, (30, 21, 12), 2 << 30),
    "32-bit": Mode(CR4_PSE, 0, (22, 12), 2 << 30),
}


class Tables:
    """Guest memory of 64 pages: the root of the tables in page 0, other tables, code, and data from FIRST_DATA on."""

    def __init__(self) -> None:
        self.bytes = bytearray(FIRST_DATA * PAGE) + bytearray(OUT * ((PAGES - FIRST_DATA) * PAGE // 2))
        self.missing: set[int] = set()
        self.read_only: set[int] = set()

    def read64(self, gpa: int) -> int | None:
        return None if gpa // PAGE in self.missing else int.from_bytes(self.bytes[gpa : gpa + 8], "little")

    def write64(self, gpa: int, value: int) -> bool:
        if gpa // PAGE in self.missing | self.read_only:
            return False
        self.bytes[gpa : gpa + 8] = value.to_bytes(8, "little")
        return True

    def map(self, mode: Mode, linear: int, entries: list[int], tables: int) -> list[int]:
        """Write the path of `linear`, whose tables below the root are the pages from `tables` on; where it lies."""
        table, places = 0, []
        for shift, entry in zip(mode.shifts, entries, strict=True):
            size = mode.entry_size
            gpa = table * PAGE + (linear >> shift & PAGE // size - 1) * size
            if shift > 12 and not entry & PTE_PS:
                entry |= tables * PAGE
            self.bytes[gpa : gpa + size] = entry.to_bytes(size, "little")
            places.append(gpa)
            table, tables = tables, tables + 1
        return places

    def walk(self, paging: Paging, linear: int, access: Access) -> Walk:
        return walk(paging, linear, access, self.read64, self.write64)


class Machine:
    """The engine on a copy of the tables.

    The guest does one access, and then OUT; or it faults, and the delivery of the exception meets a page that stage 2
    refuses, where the registers tell which it is.
    """

    CODE = {Access.READ: b"\x8a\x07" + OUT, Access.WRITE: b"\x88\x07" + OUT, Access.FETCH: b"\xff\xe7"}

    def __init__(self, bit: PageBit | None = None) -> None:
        self.memory = Memory(PAGES * PAGE, bit)
        self.engine = UnicornEngine(self.memory)

    def close(self) -> None:
        self.engine.close()
        self.memory.close()

    def access(
        self, tables: Tables, paging: Paging, code: int, linear: int, access: Access
    ) -> WalkFault | bytes | Stop:
        """The fault, memory afterwards, or what stage 2 refused."""
        memory, engine = self.memory, self.engine
        memory.bytes[:] = bytes(tables.bytes)
        memory.write(CODE_PAGE * PAGE, self.CODE[access])
        memory.denied, memory.read_only = {IDT_PAGE, *tables.missing}, set(tables.read_only)
        memory.asked.clear()
        cpl, long_mode = paging.cpl, int(paging.long_mode)
        sregs = Sregs(cr0=paging.cr0, cr3=paging.cr3, cr4=paging.cr4, efer=paging.efer)
        sregs.cs = Segment(0, 0xFFFFFFFF, 8 + cpl, type=11, dpl=cpl, l=long_mode, db=1 - long_mode, g=1)
        sregs.ss = sregs.ds = sregs.es = Segment(0, 0xFFFFFFFF, 16 + cpl, type=3, dpl=cpl, db=1, g=1)
        sregs.idt, sregs.gdt = DescriptorTable(code + PAGE, 0xFFF), DescriptorTable(1 << 40, 0)
        engine.set_cpuid(DEFAULT_CPUID | {(0x8000_0008, 0): (57 << 8 | paging.physical_bits, 0, 0, 0)})
        engine.set_sregs(sregs)
        engine.set_regs(Regs(rip=code, rdi=linear, rax=0xCC, rflags=2 | 3 << 12 | int(paging.ac) << 18))
        engine.set_events(Events())
        engine.flush_tlb()
        stop = run(engine)
        if isinstance(stop, PortOut):
            return memory.bytes[:]
        events = engine.get_events()
        if isinstance(stop, Stage2Miss) and events.exception_injected:
            return WalkFault(events.exception_nr, events.exception_error_code or 0)
        return stop


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    machine.close()


def with_code(tables: Tables, mode: Mode, cpl: int = 0) -> None:
    """Map the code, and behind it the IDT, at an address apart."""
    path = [PTE_P if mode is MODES["PAE"] else RWA] + [RWA] * (len(mode.shifts) - 1)
    rights = PTE_P | PTE_A | (PTE_U if cpl == 3 else 0)
    path[-1] = CODE_PAGE * PAGE | rights
    last = tables.map(mode, mode.code, path, 10)[-1]
    size = mode.entry_size
    idt = IDT_PAGE * PAGE | PTE_P | PTE_A
    tables.bytes[last + size : last + 2 * size] = idt.to_bytes(size, "little")


@st.composite
def an_entry(draw: st.DrawFn, mode: Mode) -> int:
    """Mostly one that allows everything, so that the walk gets deep; at most two bits differ."""
    entry = RWA ^ draw(st.sampled_from((0, 0, 0, PTE_P, PTE_W, PTE_U, PTE_A, PTE_PS)))
    entry ^= draw(st.sampled_from((0, 0, 0, PTE_W, PTE_U, PTE_D, PTE_PS)))
    if mode.entry_size == 8:
        entry |= draw(st.sampled_from((0, 0, 0, 0, PTE_NX, 1 << 45, 1 << 13, 1 << 52)))
    return entry


@pytest.mark.parametrize("name", MODES)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_against_the_model(machine: Machine, name: str, data: st.DataObject) -> None:
    mode, draw = MODES[name], data.draw
    cpl = draw(st.sampled_from((0, 3)))
    bits = [draw(st.sampled_from((0, bit))) for bit in (CR0_WP, CR4_SMEP, CR4_SMAP, EFER_NXE)]
    paging = Paging(
        CR0_PE | CR0_PG | bits[0],
        0,
        mode.cr4 | bits[1] | bits[2],
        mode.efer | (bits[3] if mode.cr4 & CR4_PAE else 0),
        cpl,
        draw(st.booleans()),
        PHYSICAL_BITS,
    )
    # Whatever the size of the page, the data is at the same place in memory.
    linear = draw(st.integers(FIRST_DATA, PAGES - 1)) * PAGE
    if mode.efer:
        linear |= draw(st.sampled_from((0, 0, 0x7000_0000_0000, 0xFFFF_F000_0000_0000, 1 << 62)))
    entries = [draw(an_entry(mode)) for _ in mode.shifts]
    # Bit 13 is reserved in a large page only; in the last level it is address.
    entries[-1] = entries[-1] & ~(1 << 13) | linear & (PAGES - 1) * PAGE
    tables = Tables()
    tables.map(mode, linear, entries, 1)
    with_code(tables, mode, cpl)
    access = draw(st.sampled_from(Access))
    found = machine.access(tables, paging, mode.code, linear, access)
    expected = tables.walk(paging, linear, access)
    if isinstance(expected, WalkFault):
        assert found == expected
    else:
        assert isinstance(expected, GuestPage)
        assert isinstance(found, bytes), found
        assert tables.bytes[: CODE_PAGE * PAGE] == found[: CODE_PAGE * PAGE], "accessed and dirty bits"
        if access is Access.WRITE:
            assert found[expected.gpa] == 0xCC


def both(
    tables: Tables, paging: Paging, linear: int, access: Access, mode: str = "4-level"
) -> tuple[Walk, WalkFault | bytes | Stop, list[tuple[int, bool, bool | None]]]:
    """What the model says, what the engine does, and what it asked of stage 2."""
    with_code(tables, MODES[mode], paging.cpl)
    machine = Machine(paging.page_bit)
    try:
        found = machine.access(tables, paging, MODES[mode].code, linear, access)
        return tables.walk(paging, linear, access), found, list(machine.memory.asked)
    finally:
        machine.close()


@pytest.mark.parametrize("level", range(4))
@pytest.mark.parametrize("write", [False, True])
def test_table_that_stage_2_refuses(level: int, write: bool) -> None:
    """To be read, or to be marked: the stop names the entry."""
    tables, places = long_tables(RWA & ~PTE_A | FIRST_DATA * PAGE)
    for gpa in places:
        entry = tables.read64(gpa)
        assert entry is not None
        tables.write64(gpa, entry & ~PTE_A)
    refused = tables.read_only if write else tables.missing
    if level == 0 and not write:
        return  # the code is reached through the same table
    refused.add(places[level] // PAGE)
    _, found, _ = both(tables, long_paging(), 0, Access.READ)
    assert found == Stage2Miss(places[level], write=write)


@pytest.mark.parametrize("bit", [PageBit(51, set_is_private=True), PageBit(47, set_is_private=False)])
@pytest.mark.parametrize("is_set", [True, False])
def test_what_the_page_bit_asks_of_stage_2(bit: PageBit, is_set: bool) -> None:
    """It is no part of the address, and says which kind of page the guest means; tables are private."""
    mask = 1 << bit.position if is_set else 0
    code = 1 << bit.position if bit.set_is_private else 0
    tables = Tables()
    tables.map(MODES["4-level"], 0, [RWA, RWA, RWA, RWA | PTE_D | FIRST_DATA * PAGE | mask], 1)
    expected, found, asked = both(tables, long_paging(physical_bits=48, page_bit=bit), 0, Access.WRITE)
    assert isinstance(expected, GuestPage) and isinstance(found, bytes)
    assert (FIRST_DATA * PAGE, True, is_set is bit.set_is_private) in asked
    assert {private for gpa, _, private in asked if gpa < CODE_PAGE * PAGE} == {True}
    assert code in (0, 1 << 51)


@pytest.mark.parametrize("level", range(4))
def test_shared_bit_where_a_td_may_not_have_it(level: int) -> None:
    """In tables, and in the leaf of code."""
    entries = [RWA & ~PTE_U | (1 << 47 if at == level else 0) for at in range(4)]
    entries[3] |= FIRST_DATA * PAGE | PTE_D
    tables = Tables()
    tables.map(MODES["4-level"], 1 << 30, entries, 1)
    paging = long_paging(page_bit=SHARED_BIT, cr4=CR4_SMEP)
    for access in (Access.READ, Access.FETCH):
        if level == 0:
            continue  # the code is reached through the same entry
        expected, found, _ = both(tables, paging, 1 << 30, access)
        assert isinstance(expected, GuestPage) == isinstance(found, bytes)
        if isinstance(expected, WalkFault):
            assert found == expected


def long_tables(leaf: int = RWA | PTE_D | FIRST_DATA * PAGE) -> tuple[Tables, list[int]]:
    tables = Tables()
    return tables, tables.map(MODES["4-level"], 0, [RWA, RWA, RWA, leaf], 1)


def long_paging(
    cr4: int = 0, ac: bool = False, physical_bits: int = 52, page_bit: PageBit | None = None, cr3: int = 0
) -> Paging:
    cr0, efer = CR0_PE | CR0_PG | CR0_WP, EFER_LME | EFER_LMA
    return Paging(cr0, cr3, CR4_PAE | cr4, efer, 0, ac, physical_bits, page_bit)


def test_paging_off() -> None:
    tables = Tables()
    assert tables.walk(Paging(CR0_PE, 0, 0, 0), 0x1_2345_6789, Access.WRITE) == GuestPage(0x2345_6000, True, True, True)


def test_read_of_a_clean_page_is_not_writable_and_the_write_sets_dirty() -> None:
    tables, places = long_tables(RWA & ~PTE_A | FIRST_DATA * PAGE)
    gpa, leaf = FIRST_DATA * PAGE, places[-1]
    assert tables.walk(long_paging(), 0x123, Access.READ) == GuestPage(gpa, True, False, True)
    assert tables.read64(leaf) == RWA | gpa
    assert tables.walk(long_paging(), 0x123, Access.WRITE) == GuestPage(gpa, True, True, True)
    assert tables.read64(leaf) == RWA | PTE_D | gpa
    assert tables.walk(long_paging(), 0x123, Access.READ) == GuestPage(gpa, True, True, True)


@pytest.mark.parametrize("level", range(4))
def test_table_that_stage_2_does_not_hold(level: int) -> None:
    tables, places = long_tables(RWA & ~PTE_A)
    for gpa in places:
        entry = tables.read64(gpa)
        assert entry is not None
        tables.write64(gpa, entry & ~PTE_A)
    tables.missing.add(places[level] // PAGE)
    assert tables.walk(long_paging(), 0, Access.READ) == TableMiss(places[level], False)
    tables.missing.clear()
    tables.read_only.add(places[level] // PAGE)
    assert tables.walk(long_paging(), 0, Access.READ) == TableMiss(places[level], True)


def test_tables_that_are_marked_already_are_not_written() -> None:
    tables, _ = long_tables()
    tables.read_only.update(range(FIRST_DATA))
    assert isinstance(tables.walk(long_paging(), 0, Access.WRITE), GuestPage)


def test_page_of_1g() -> None:
    tables = Tables()
    tables.map(MODES["4-level"], 0, [RWA, RWA | PTE_PS | PTE_D | 5 << 30, 0, 0], 1)
    assert tables.walk(long_paging(), 0x1234_5678, Access.READ) == GuestPage(5 << 30 | 0x1234_5000, True, True, True)


def test_pse_36() -> None:
    """Bits 20:13 of a 4M page are bits 39:32 of its address."""
    tables = Tables()
    tables.map(MODES["32-bit"], 0, [RWA | PTE_PS | PTE_D | 0x0080_0000 | 0xAB << 13, 0], 1)
    found = tables.walk(Paging(CR0_PE | CR0_PG, 0, CR4_PSE, 0), 0x12_3000, Access.READ)
    assert found == GuestPage(0xAB_0092_3000, True, True, True)


C_BIT, SHARED_BIT = PageBit(51, set_is_private=True), PageBit(47, set_is_private=False)


@pytest.mark.parametrize("bit", [C_BIT, SHARED_BIT])
@pytest.mark.parametrize("is_set", [True, False])
@pytest.mark.parametrize("size", ["4K", "2M"])
def test_page_bit_of_a_leaf(bit: PageBit, is_set: bool, size: str) -> None:
    """It is no part of the address, and says which kind of page the guest means."""
    mask = 1 << bit.position if is_set else 0
    tables = Tables()
    if size == "4K":
        tables.map(MODES["4-level"], 0, [RWA, RWA, RWA, RWA | PTE_D | FIRST_DATA * PAGE | mask], 1)
    else:
        tables.map(MODES["4-level"], 0, [RWA, RWA, RWA | PTE_PS | PTE_D | 6 << 21 | mask, 0], 1)
    gpa = FIRST_DATA * PAGE if size == "4K" else 6 << 21
    found = tables.walk(long_paging(physical_bits=48, page_bit=bit), 0, Access.WRITE)
    assert found == GuestPage(gpa, True, True, True, is_set is bit.set_is_private)


def test_page_bit_without_the_architecture_is_reserved() -> None:
    tables, _ = long_tables(RWA | 1 << 51)
    assert tables.walk(long_paging(physical_bits=48), 0, Access.READ) == WalkFault(14, 9)


@pytest.mark.parametrize("bit", [C_BIT, SHARED_BIT])
def test_without_a_page_bit_in_the_entries_all_is_private(bit: PageBit) -> None:
    """No paging, and entries of 32 bits. Source: amd-memory-encryption.rst; in a TD the shared bit is out of reach."""
    assert Tables().walk(Paging(0, 0, 0, 0, page_bit=bit), 0, Access.READ) == GuestPage(0, True, True, True, True)
    tables = Tables()
    tables.map(MODES["32-bit"], 0, [RWA | PTE_PS | PTE_D, 0], 1)
    found = tables.walk(Paging(CR0_PE | CR0_PG, 0, CR4_PSE, 0, page_bit=bit), 0, Access.READ)
    assert found == GuestPage(0, True, True, True, True)


def test_a_c_bit_in_tables_and_for_code_is_not_asked() -> None:
    """Page walks and fetches are private either way; data in a page of such code is as its leaf says."""
    paging = long_paging(physical_bits=48, page_bit=C_BIT, cr3=1 << 51)
    for mask in (0, 1 << 51):
        tables = Tables()
        tables.map(MODES["4-level"], 0, [RWA | mask, RWA | mask, RWA | mask, RWA | PTE_D], 1)
        assert isinstance(found := tables.walk(paging, 0, Access.READ), GuestPage) and found.private is False
        assert tables.walk(paging, 0, Access.FETCH) == GuestPage(0, False, False, True, True)


@pytest.mark.parametrize("level", range(3))
def test_a_td_has_no_tables_in_shared_memory(level: int) -> None:
    """From memory: Intel TDX CPU architectural extensions, a page fault with the reserved bit."""
    tables = Tables()
    entries = [RWA | (1 << 47 if at == level else 0) for at in range(3)]
    tables.map(MODES["4-level"], 0, [*entries, RWA | PTE_D], 1)
    assert tables.walk(long_paging(page_bit=SHARED_BIT), 0, Access.READ) == WalkFault(14, 9)


def test_a_td_has_no_root_in_shared_memory() -> None:
    tables, _ = long_tables()
    assert tables.walk(long_paging(page_bit=SHARED_BIT, cr3=1 << 47), 0, Access.WRITE) == WalkFault(14, 11)


def test_a_td_executes_nothing_in_shared_memory() -> None:
    """Source: Documentation/arch/x86/tdx.rst and KVM's tdx_handle_ept_violation, to which no such fetch comes."""
    tables, _ = long_tables(RWA & ~PTE_U | PTE_D | 1 << 47)
    paging = long_paging(page_bit=SHARED_BIT, cr4=CR4_SMEP)  # as with EFER.NXE, the error code tells a fetch
    assert isinstance(tables.walk(paging, 0, Access.READ), GuestPage)
    assert tables.walk(paging, 0, Access.FETCH) == WalkFault(14, 0x19)


def test_supervisor_rights() -> None:
    """A user page in ring 0: SMEP forbids to execute it, SMAP to touch it unless AC is set."""
    tables, _ = long_tables()
    walks = {
        (cr4, ac): tables.walk(
            long_paging(cr4=cr4, ac=ac), 0, Access.FETCH if cr4 == CR4_SMAP and not ac else Access.READ
        )
        for cr4 in (0, CR4_SMEP, CR4_SMAP)
        for ac in (False, True)
    }
    gpa = FIRST_DATA * PAGE
    assert walks[0, False] == walks[CR4_SMAP, True] == GuestPage(gpa, True, True, True)
    assert walks[CR4_SMEP, False] == GuestPage(gpa, True, True, False)
    assert walks[CR4_SMAP, False] == GuestPage(gpa, False, False, True)
    assert tables.walk(long_paging(cr4=CR4_SMAP, ac=True).implicit(), 0, Access.READ) == WalkFault(14, 1)
