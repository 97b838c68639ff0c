"""The lookup, and what the engine takes from the table."""

from __future__ import annotations

from guestmem.cpu.cpuid import DEFAULT_CPUID, address_bits, lookup


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


def test_address_bits() -> None:
    assert address_bits({}) == (52, 0)
    assert address_bits({(0x8000_0008, 0): (0x3028, 0, 0, 0)}) == (40, 0)
    sev = {(0x8000_0008, 0): (0x3030, 0, 0, 0), (0x8000_001F, 0): (2, 5 << 6 | 51, 0, 0)}
    assert address_bits(sev) == (43, 1 << 51)
    assert address_bits(sev | {(0x8000_001F, 0): (1, 5 << 6 | 51, 0, 0)}) == (48, 0), "SME alone"
