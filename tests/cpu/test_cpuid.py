"""The lookup, in Python and by the guest."""

from __future__ import annotations

from guestmem.cpu.cpuid import DEFAULT_CPUID, default, lookup
from guestmem.cpu.engine import Halt, PageBit
from guestmem.cpu.unicorn import UnicornEngine
from tests.cpu.guests import Memory, run, start_long


def test_default() -> None:
    assert lookup(DEFAULT_CPUID, 0x4000_0000, 0)[1:] == (0x4B4D564B, 0x564B4D56, 0x4D)
    assert lookup(DEFAULT_CPUID, 0x8000_0001, 0)[3] >> 29 & 1, "long mode"
    assert lookup(DEFAULT_CPUID, 1, 0)[2] >> 31, "hypervisor"


def test_subleaves() -> None:
    """A leaf without subleaves answers for any ECX, one with subleaves only for those it has."""
    table = {(1, 0): (1, 2, 3, 4), (7, 0): (5, 6, 7, 8), (0x1234, 0): (1, 1, 1, 1), (0x1234, 3): (3, 3, 3, 3)}
    assert lookup(table, 1, 99) == (1, 2, 3, 4)
    assert lookup(table, 7, 1) == (0, 0, 0, 0)
    assert lookup(table, 0x1234, 3) == (3, 3, 3, 3)
    assert lookup(table, 2, 0) == (0, 0, 0, 0)


def test_the_guest_finds_what_the_lookup_says(engine: UnicornEngine, memory: Memory) -> None:
    table = DEFAULT_CPUID | {(leaf, index): (leaf, index, 3, 4) for leaf in (2, 7, 0x23, 0x24) for index in (0, 1, 3)}
    engine.set_cpuid(table)
    for leaf in (0, 1, 2, 7, 0x23, 0x24, 0x99):
        for index in range(5):
            start_long(engine, memory, b"\x0f\xa2\xf4")
            regs = engine.get_regs()
            regs.rax, regs.rcx = leaf, index
            engine.set_regs(regs)
            assert run(engine) == Halt()
            regs = engine.get_regs()
            assert (regs.rax, regs.rbx, regs.rcx, regs.rdx) == lookup(table, leaf, index)


def test_an_snp_guest_finds_its_c_bit() -> None:
    """As Linux looks for it. Source: arch/x86/boot/compressed/sev.c sev_enable, snp_cpuid."""
    table = default(PageBit(51, set_is_private=True))
    assert lookup(table, 0x8000_0000, 0)[0] >= 0x8000_001F
    eax, ebx, _, _ = lookup(table, 0x8000_001F, 0)
    assert eax & 0b11010 == 0b11010, "SEV, SEV-ES, SEV-SNP"
    assert ebx & 0x3F == 51 and ebx >> 6 & 0x3F == 0


def test_others_have_no_leaf_of_sev() -> None:
    for page_bit in (None, PageBit(47, set_is_private=False)):
        assert lookup(default(page_bit), 0x8000_001F, 0) == (0, 0, 0, 0)
