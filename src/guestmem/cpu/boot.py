"""Where a VMM starts a guest: an ELF file in its memory, tables to run it with, and the registers of the first
instruction.

Everything goes into guest memory through `write(gpa, data)`, so this works for any kind of memory and any engine.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple, TypeAlias

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

from guestmem.cpu.registers import DescriptorTable, Regs, Segment, Sregs
from guestmem.cpu.x86 import CR0_PE, CR0_PG, CR4_PAE, EFER_LMA, EFER_LME, PTE_P, PTE_PS, PTE_U, PTE_W

Write: TypeAlias = Callable[[int, bytes], None]

PAGE_4K, PAGE_2M = 1 << 12, 1 << 21
CODE_SELECTOR, DATA_SELECTOR = 0x08, 0x10

_GDT = (0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)
_CR0_ET, _CR0_NE = 1 << 4, 1 << 5
_CR4_OSFXSR, _CR4_OSXMMEXCPT = 1 << 9, 1 << 10
_IDENTITY_MAX = 1 << 39


class Start(NamedTuple):
    """The registers to start with."""

    regs: Regs
    sregs: Sregs


def load_elf(image: bytes, write: Write, memory_size: int) -> int:
    """Load the segments of an x86-64 executable at their physical addresses; the physical address of its entry.

    `memory_size`: bytes of guest memory, from 0. Raises: ValueError that says what is wrong with the file.
    """
    try:
        elf = ELFFile(io.BytesIO(image))
        machine = elf["e_machine"]
    except ELFError as error:
        raise ValueError(f"not an ELF file: {error}") from error
    if elf.elfclass != 64 or machine != "EM_X86_64":
        raise ValueError(f"wrong machine: ELF{elf.elfclass} {machine}, need ELF64 EM_X86_64")
    if elf["e_type"] not in ("ET_EXEC", "ET_DYN"):
        raise ValueError(f"wrong type of file: {elf['e_type']}, need an executable")
    segments = [segment for segment in elf.iter_segments("PT_LOAD") if segment["p_memsz"]]
    if not segments:
        raise ValueError("no segment to load")
    entry: int | None = None
    for segment in segments:
        start, size = segment["p_paddr"], segment["p_memsz"]
        if start + size > memory_size:
            raise ValueError(f"segment {start:#x} to {start + size:#x} outside memory of {memory_size:#x} bytes")
        write(start, segment.data().ljust(size, b"\0"))
        offset = elf["e_entry"] - segment["p_vaddr"]
        if 0 <= offset < size:
            entry = start + offset
    if entry is None:
        raise ValueError(f"entry {elf['e_entry']:#x} in no segment")
    return entry


def real_mode(address: int) -> Start:
    """16-bit code at the physical address, all segments based at 0 as small KVM programs have it.

    Raises: ValueError beyond the 64 KiB that IP reaches.
    """
    if not 0 <= address < 1 << 16:
        raise ValueError(f"address {address:#x} beyond what IP can hold")
    sregs = Sregs()
    sregs.cs.base, sregs.cs.selector = 0, 0
    return Start(Regs(rip=address), sregs)


def tables_size(mapped: int, page: int = PAGE_2M) -> int:
    """Bytes that `long_mode` writes for an identity map of `mapped` bytes. Raises: ValueError."""
    return PAGE_4K * (1 + len(_identity_map(0, mapped, page)))


def long_mode(
    entry: int, stack: int, tables: int, mapped: int, write: Write, page: int = PAGE_2M, user: bool = False
) -> Start:
    """64-bit ring 0 at `entry`, RSP at `stack`, the first `mapped` bytes mapped to themselves, writable, executable.

    The GDT and four levels of page tables go to `tables` (a multiple of 4 KiB), leaves are of `page` bytes; `user` lets
    ring 3 in as well. Raises: ValueError.
    """
    if tables % PAGE_4K:
        raise ValueError(f"tables at {tables:#x}: not a multiple of 4 KiB")
    write(tables, b"".join(entry.to_bytes(8, "little") for entry in _GDT))
    gpa = tables + PAGE_4K
    rights = PTE_U if user else 0
    for index, table in enumerate(_identity_map(gpa, mapped, page)):
        data = b"".join((entry | rights if entry else 0).to_bytes(8, "little") for entry in table)
        write(gpa + index * PAGE_4K, data)
    sregs = Sregs(
        cs=Segment(0, 0xFFFF_FFFF, CODE_SELECTOR, type=11, l=1, g=1),
        ds=_flat_data(),
        es=_flat_data(),
        fs=_flat_data(),
        gs=_flat_data(),
        ss=_flat_data(),
        gdt=DescriptorTable(tables, len(_GDT) * 8 - 1),
        idt=DescriptorTable(0, 0),
        cr0=CR0_PE | _CR0_ET | _CR0_NE | CR0_PG,
        cr3=tables + PAGE_4K,
        cr4=CR4_PAE | _CR4_OSFXSR | _CR4_OSXMMEXCPT,
        efer=EFER_LME | EFER_LMA,
    )
    return Start(Regs(rip=entry, rsp=stack), sregs)


def _flat_data() -> Segment:
    return Segment(0, 0xFFFF_FFFF, DATA_SELECTOR, type=3, db=1, g=1)


def _identity_map(first: int, mapped: int, page: int) -> list[list[int]]:
    """The tables from `first` on, top level first, each as its 512 entries."""
    if page not in (PAGE_4K, PAGE_2M):
        raise ValueError(f"page size {page:#x}: need 4 KiB or 2 MiB")
    if not 0 < mapped <= _IDENTITY_MAX:
        raise ValueError(f"{mapped:#x} bytes to map: need 1 to {_IDENTITY_MAX:#x}")
    large = PTE_PS if page == PAGE_2M else 0
    levels = [[address | PTE_P | PTE_W | large for address in range(0, mapped, page)]]
    while len(levels) < (3 if page == PAGE_2M else 4):
        levels.insert(0, list(range(_tables(levels[0]))))
    gpa = first
    for upper, lower in pairwise(levels):
        gpa += _tables(upper) * PAGE_4K
        upper[:] = [gpa + index * PAGE_4K | PTE_P | PTE_W for index in range(_tables(lower))]
    return [
        entries[i : i + 512] + [0] * (512 - len(entries[i : i + 512]))
        for entries in levels
        for i in range(0, len(entries), 512)
    ]


def _tables(entries: list[int]) -> int:
    return -(-len(entries) // 512)
