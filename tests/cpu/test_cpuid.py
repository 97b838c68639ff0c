"""The lookup, and what the engine takes from the table."""

from __future__ import annotations

from guestmem.cpu.cpuid import DEFAULT_CPUID, default, lookup, physical_bits
from guestmem.cpu.engine import PageBit


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


def test_physical_bits() -> None:
    assert physical_bits({}) == 52
    assert physical_bits({(0x8000_0008, 0): (0x3028, 0, 0, 0)}) == 40


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
