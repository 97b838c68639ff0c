"""A page walk in Python: the oracle for native/walk.c, which it shares nothing with.

It agreed with Unicorn's own MMU on random tables, in all modes, as long as it was the engine's.

A walk reads and updates entries through two callbacks, so that each touch of a page-table page goes through stage 2: a
table that stage 2 does not hold is a `TableMiss`, not a fault of the guest. The accessed bit of an entry is set when
the walk goes through it, that of the leaf and its dirty bit when the access is allowed. A read through a clean leaf is
answered as not writable, so that the first write walks again and sets the dirty bit.

Source: Intel SDM vol. 3, chapter 5 "Paging"; engine.PageBit for the bit that says private or shared. Not modelled:
protection keys, and the cache of PDPTEs that PAE paging loads with CR3 (they are read at each walk).
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from guestmem.cpu.engine import PageBit
from guestmem.cpu.x86 import (
    CR0_PG,
    CR0_WP,
    CR4_LA57,
    CR4_PAE,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_LMA,
    EFER_NXE,
    PTE_A,
    PTE_ADDRESS,
    PTE_D,
    PTE_NX,
    PTE_P,
    PTE_PS,
    PTE_U,
    PTE_W,
)

PF_VECTOR, GP_VECTOR = 14, 13
PF_PRESENT, PF_WRITE, PF_USER, PF_RESERVED, PF_FETCH = 1, 2, 4, 8, 16


class Access(enum.Enum):
    """What the guest wants to do at the address."""

    READ = enum.auto()
    WRITE = enum.auto()
    FETCH = enum.auto()


class GuestPage(NamedTuple):
    """A translation: `gpa` of the 4K page, and what the same privilege level may do there without another walk.

    `private` is what the page bit of the leaf says, None in a guest that has none.
    """

    gpa: int
    readable: bool
    writable: bool
    executable: bool
    private: bool | None = None


class WalkFault(NamedTuple):
    """The exception that the access raises: #PF, or #GP(0) for an address that is not canonical."""

    vector: int
    error_code: int


class TableMiss(NamedTuple):
    """Stage 2 refused the entry at `gpa`; `write` if it was to be marked accessed or dirty."""

    gpa: int
    write: bool


Walk: TypeAlias = GuestPage | WalkFault | TableMiss
Read64: TypeAlias = Callable[[int], int | None]
Write64: TypeAlias = Callable[[int, int], bool]


class Paging:
    """What a translation depends on besides the tables. Immutable; one instance serves many walks.

    `ac` is EFLAGS.AC, which suspends SMAP; an implicit supervisor access (descriptor tables, the frame of an exception)
    passes False and `cpl` 0. `physical_bits` is MAXPHYADDR. `no_table` are the bits that no entry with a table under
    it may have: the shared bit of a TD.
    """

    __slots__ = (
        "ac",
        "address_mask",
        "cpl",
        "cr0",
        "cr3",
        "cr4",
        "efer",
        "mask",
        "no_table",
        "page_bit",
        "physical_bits",
        "reserved",
    )

    def __init__(
        self,
        cr0: int,
        cr3: int,
        cr4: int,
        efer: int,
        cpl: int = 0,
        ac: bool = False,
        physical_bits: int = 52,
        page_bit: PageBit | None = None,
    ) -> None:
        self.cr0, self.cr3, self.cr4, self.efer = cr0, cr3, cr4, efer
        self.cpl, self.ac = cpl, ac
        self.physical_bits, self.page_bit = physical_bits, page_bit
        self.mask = 1 << page_bit.position if page_bit else 0
        self.no_table = 0 if page_bit is None or page_bit.set_is_private else self.mask
        self.address_mask = PTE_ADDRESS & ~self.mask
        beyond = PTE_ADDRESS & ~((1 << physical_bits) - 1) & ~self.mask
        self.reserved = beyond if efer & EFER_NXE else beyond | PTE_NX

    @property
    def long_mode(self) -> bool:
        """Whether linear addresses have 64 bits."""
        return bool(self.efer & EFER_LMA)

    def implicit(self) -> Paging:
        """The same address space for an implicit supervisor access."""
        if self.cpl == 0 and not self.ac:
            return self
        return Paging(self.cr0, self.cr3, self.cr4, self.efer, 0, False, self.physical_bits, self.page_bit)

    @property
    def without_bit(self) -> bool | None:
        """The kind of an access through entries that have no page bit."""
        return True if self.page_bit else None


def walk(paging: Paging, linear: int, access: Access, read64: Read64, write64: Write64) -> Walk:
    """Translate the 4K page of `linear`.

    `read64(gpa)` gives the eight bytes at `gpa` (a multiple of 8), or None where stage 2 refuses; `write64(gpa, value)`
    stores them and says whether stage 2 let it.
    """
    if not paging.cr0 & CR0_PG:
        return GuestPage(linear & 0xFFFF_F000, True, True, True, paging.without_bit)
    if not paging.cr4 & CR4_PAE:
        return _walk_32(paging, linear, access, read64, write64)
    if paging.efer & EFER_LMA:
        top = 48 if paging.cr4 & CR4_LA57 else 39
        sign = linear >> (top + 8)
        if sign and sign != (1 << (56 - top)) - 1:
            return WalkFault(GP_VECTOR, 0)
        if paging.cr3 & paging.no_table:
            return _page_fault(paging, access, PF_PRESENT | PF_RESERVED)
        return _walk_64(paging, paging.cr3 & paging.address_mask, top, linear, access, read64, write64, paging.reserved)
    pdpte_gpa = (paging.cr3 & 0xFFFF_FFE0) + (linear >> 30 & 3) * 8
    pdpte = read64(pdpte_gpa)
    if pdpte is None:
        return TableMiss(pdpte_gpa, False)
    reserved = paging.reserved | 0x7FF0_0000_0000_0000
    if not pdpte & PTE_P:
        return _page_fault(paging, access, 0)
    if pdpte & (reserved | PTE_NX | paging.no_table):
        return _page_fault(paging, access, PF_PRESENT | PF_RESERVED)
    return _walk_64(paging, pdpte & paging.address_mask, 21, linear, access, read64, write64, reserved)


def _walk_64(
    paging: Paging,
    table: int,
    shift: int,
    linear: int,
    access: Access,
    read64: Read64,
    write64: Write64,
    reserved: int,
) -> Walk:
    """From `table`, whose entries of 8 bytes each cover 1 << `shift` bytes, down to a leaf."""
    allowed, nx = PTE_W | PTE_U, 0
    while True:
        gpa = table + (linear >> shift & 0x1FF) * 8
        entry = read64(gpa)
        if entry is None:
            return TableMiss(gpa, False)
        if not entry & PTE_P:
            return _page_fault(paging, access, 0)
        allowed &= entry
        nx |= entry & PTE_NX
        if shift == 12 or (entry & PTE_PS and shift <= 30):
            break
        # An entry of the two top levels has no page size bit: it is reserved there.
        if entry & (reserved | PTE_PS | paging.no_table):
            return _page_fault(paging, access, PF_PRESENT | PF_RESERVED)
        if not entry & PTE_A and not write64(gpa, entry | PTE_A):
            return TableMiss(gpa, True)
        table = entry & paging.address_mask
        shift -= 9
    # Bit 12 of a large leaf is its PAT bit; the address bits between it and the page size are reserved.
    if entry & (reserved | (((1 << shift) - 1) & ~0x1FFF)):
        return _page_fault(paging, access, PF_PRESENT | PF_RESERVED)
    private = bool(entry & paging.mask) is paging.page_bit.set_is_private if paging.page_bit else None
    base = (entry & paging.address_mask) >> shift << shift
    page = _leaf(paging, access, entry, allowed, nx, base, linear, shift, private)
    if isinstance(page, GuestPage):
        used = entry | (PTE_A | PTE_D if access is Access.WRITE else PTE_A)
        if used != entry and not write64(gpa, used):
            return TableMiss(gpa, True)
    return page


def _walk_32(paging: Paging, linear: int, access: Access, read64: Read64, write64: Write64) -> Walk:
    """Two levels of 4-byte entries, with 4M pages when CR4.PSE is set (and PSE-36: bits 20:13 are address 39:32)."""
    gpa = (paging.cr3 & 0xFFFF_F000) + (linear >> 22 & 0x3FF) * 4
    entry = _read32(read64, gpa)
    if entry is None:
        return TableMiss(gpa, False)
    if not entry & PTE_P:
        return _page_fault(paging, access, 0)
    allowed, shift = entry, 22
    base = (entry & 0xFFC0_0000) | (entry & 0x1F_E000) << 19
    if entry & PTE_PS and paging.cr4 & CR4_PSE:
        if entry & 1 << 21:
            return _page_fault(paging, access, PF_PRESENT | PF_RESERVED)
    else:
        if not entry & PTE_A and not _write32(read64, write64, gpa, entry | PTE_A):
            return TableMiss(gpa, True)
        gpa = (entry & 0xFFFF_F000) + (linear >> 12 & 0x3FF) * 4
        entry = _read32(read64, gpa)
        if entry is None:
            return TableMiss(gpa, False)
        if not entry & PTE_P:
            return _page_fault(paging, access, 0)
        allowed, shift, base = allowed & entry, 12, entry & 0xFFFF_F000
    page = _leaf(paging, access, entry, allowed, 0, base, linear, shift, paging.without_bit)
    if isinstance(page, GuestPage):
        used = entry | (PTE_A | PTE_D if access is Access.WRITE else PTE_A)
        if used != entry and not _write32(read64, write64, gpa, used):
            return TableMiss(gpa, True)
    return page


def _leaf(
    paging: Paging,
    access: Access,
    entry: int,
    allowed: int,
    nx: int,
    base: int,
    linear: int,
    shift: int,
    private: bool | None,
) -> GuestPage | WalkFault:
    """Check the rights of all levels (`allowed`, `nx`) against the access; `base` is the page's first byte."""
    user = bool(allowed & PTE_U)
    if paging.cpl == 3:
        readable = user
        writable = user and bool(allowed & PTE_W)
        executable = user and not nx
    else:
        readable = not (user and paging.cr4 & CR4_SMAP and not paging.ac)
        writable = readable and bool(allowed & PTE_W or not paging.cr0 & CR0_WP)
        executable = not nx and not (user and paging.cr4 & CR4_SMEP)
    permitted = readable if access is Access.READ else writable if access is Access.WRITE else executable
    if not permitted:
        return _page_fault(paging, access, PF_PRESENT)
    gpa = base | (linear & ((1 << shift) - 1) & ~0xFFF)
    if access is Access.FETCH and private is False:
        if paging.no_table:
            return _page_fault(paging, access, PF_PRESENT | PF_RESERVED)
        # Code is private whatever the C-bit says; data in the same page is as it says.
        return GuestPage(gpa, False, False, True, True)
    writable = writable and (access is Access.WRITE or bool(entry & PTE_D))
    return GuestPage(gpa, readable, writable, executable, private)


def _page_fault(paging: Paging, access: Access, code: int) -> WalkFault:
    if access is Access.WRITE:
        code |= PF_WRITE
    elif access is Access.FETCH:
        nx = paging.efer & EFER_NXE and paging.cr4 & CR4_PAE
        if nx or paging.cr4 & CR4_SMEP:
            code |= PF_FETCH
    if paging.cpl == 3:
        code |= PF_USER
    return WalkFault(PF_VECTOR, code)


def _read32(read64: Read64, gpa: int) -> int | None:
    pair = read64(gpa & ~7)
    return None if pair is None else pair >> (gpa & 4) * 8 & 0xFFFF_FFFF


def _write32(read64: Read64, write64: Write64, gpa: int, value: int) -> bool:
    pair = read64(gpa & ~7)
    shift = (gpa & 4) * 8
    return pair is not None and write64(gpa & ~7, pair & ~(0xFFFF_FFFF << shift) | value << shift)
