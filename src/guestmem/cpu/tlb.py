"""The TLB of one vCPU: what Unicorn asks when its own TLB misses.

Unicorn's physical address space is the server's virtual one: all of it is one region, mapped at its own address, and
the answer to a TLB fill is the host address of the page. So whatever memory stage 2 names, from however many mappings
that come and go, is there without a change to Unicorn's memory map, which cost milliseconds beyond a thousand regions.
Above all host addresses lies an area for MMIO, in which a page stands at its guest-physical address.

Only what is fetched is made executable: Unicorn takes each store to an executable page the slow way, a fifth of the
speed, and CodeWatch must see each fetch.
"""

from __future__ import annotations

import struct
from typing import Any

from guestmem.cpu import uc_native
from guestmem.cpu.code_watch import CodeWatch
from guestmem.cpu.engine import GuestMemory
from guestmem.cpu.guest_memory import HOST, PAGE, GuestFault, GuestPhysical, LinearMemory, Stage2Refused
from guestmem.cpu.guest_walk import Access, GuestPage, Paging, TableMiss, walk
from guestmem.cpu.uc_core import CODE_CHANGED, HOOK_TLB_FILL, Core, Refusal
from guestmem.cpu.x86_env import Env

MMIO_BASE = 1 << 51
"""Of the area for MMIO, which is as large: a device beyond 51 bits, if CPUID allows such addresses, is not emulated."""

_READ, _WRITE, _EXECUTE = 1, 2, 4
_ACCESS = {16: Access.READ, 17: Access.WRITE, 18: Access.FETCH}  # UC_MEM_READ, UC_MEM_WRITE, UC_MEM_FETCH
_RFLAGS_AC = 1 << 18
_ENTRIES_MIN, _ENTRIES_MAX = 1 << 8, 1 << 13  # of Unicorn's TLB


def _pad(start: int, end: int) -> str:
    return f"{end - start}x"


_MODE = struct.Struct(
    "<Q" + _pad(Env.eflags.offset + 8, Env.hflags.offset) + "I" + _pad(Env.hflags.offset + 4, Env.cr.offset)
    + "5Q" + _pad(Env.cr.offset + 40, Env.efer.offset) + "Q"
)  # fmt: skip
"""RFLAGS without arithmetic flags, hflags, CR0 to CR4, EFER."""


class Tlb:
    """The fill hook.

    `mmio` are the guest-physical pages that the instruction under emulation may use as MMIO; `refused_access` is the
    kind of access that was refused last.
    """

    def __init__(self, core: Core, memory: GuestMemory) -> None:
        self._core = core
        self._physical = GuestPhysical(memory)
        self.page_bit = memory.page_bit
        self.code = CodeWatch()
        self.mmio: frozenset[int] = frozenset()
        self._physical_bits = 52
        self.refused_access = Access.READ
        self._fills, self._entries = 0, _ENTRIES_MIN
        self._fetched: dict[int, int] = {}
        self._mode: tuple[int, ...] = ()
        self._paging = Paging(0, 0, 0, 0)
        core.hook(HOOK_TLB_FILL, uc_native.FillHook(core.guard(self._fill, False)))

    def set_physical_bits(self, physical_bits: int) -> None:
        """MAXPHYADDR, from CPUID."""
        self._physical_bits = physical_bits
        self.flush()

    def flush(self) -> None:
        """Forget every translation."""
        uc_native.flush_tlb(self._core.handle)
        self._fills = 0
        self._physical.flush()
        self.code.tlb_flushed()
        self._fetched.clear()
        self._mode = ()

    def flush_code(self) -> None:
        """Forget every translation of code; what stage 2 said stays."""
        uc_native.flush_tlb(self._core.handle)
        uc_native.flush_code(self._core.handle)
        self.code.code_flushed()
        self._fetched.clear()

    def slice_over(self) -> None:
        """Unicorn's TLB doubles when it is flushed while it is full, and only then; without, it stays at 256 pages."""
        if self._fills > self._entries < _ENTRIES_MAX:
            uc_native.flush_tlb(self._core.handle)
            self._fills, self._entries = 0, self._entries * 2

    def linear_memory(self) -> LinearMemory:
        """The linear addresses of the registers as they are now."""
        env = self._core.cpu.env
        return LinearMemory(self._paging_of(env.eflags, env.hflags, env.cr, env.efer), self._physical)

    def code_bytes(self, linear: int, size: int) -> bytes:
        """Code at `linear`. Raises: GuestFault, Stage2Refused."""
        offset = linear & PAGE - 1
        hva = self._fetched.get(linear - offset)
        if hva is not None and offset + size <= PAGE:
            return bytes(HOST[hva + offset : hva + offset + size])
        return self.linear_memory().fetch(linear, size)

    def _paging_of(self, eflags: int, hflags: int, cr: Any, efer: int) -> Paging:
        ac = bool(eflags & _RFLAGS_AC)
        return Paging(cr[0], cr[3], cr[4], efer, hflags & 3, ac, self._physical_bits, self.page_bit)

    def _fill(self, _uc: int, linear: int, kind: int, entry: Any, _data: int) -> bool:
        core = self._core
        if core.sealed:
            return False
        self._fills += 1
        mode = _MODE.unpack_from(core.cpu.view, Env.eflags.offset)
        if mode != self._mode:
            self._mode = mode
            self._paging = self._paging_of(mode[0], mode[1], mode[2:7], mode[7])
        access = _ACCESS[kind]
        answer = self._translate(linear, access)
        if isinstance(answer, tuple):
            entry[0].paddr, entry[0].perms = answer
            return True
        core.refused, self.refused_access = answer, access
        return False

    def _translate(self, linear: int, access: Access) -> tuple[int, int] | Refusal:
        """Host address and permissions of the page at `linear`, or why not."""
        physical, paging = self._physical, self._paging
        if paging.cpl == 3 and access is not Access.FETCH and self._holds_descriptors(linear):
            paging = paging.implicit()
        found = walk(paging, linear, access, physical.read64, physical.write64)
        if isinstance(found, TableMiss):
            return Stage2Refused(found.gpa, found.write, private=physical.tables_private)
        if not isinstance(found, GuestPage):
            return GuestFault(found.vector, found.error_code)
        write = access is Access.WRITE
        page = physical.page(found.gpa, write, found.private)
        if page is None:
            if found.gpa in self.mmio and found.gpa < MMIO_BASE and access is not Access.FETCH:
                return MMIO_BASE + found.gpa, _WRITE if write else _READ
            return Stage2Refused(found.gpa, write, access is Access.FETCH, found.private, whole_page=True)
        permissions = _READ if found.readable else 0
        if found.writable and page.writable:
            permissions |= _WRITE
        if access is Access.FETCH:
            if not self.code.fetched(page.hva, HOST[page.hva : page.hva + PAGE]):
                return CODE_CHANGED
            self._fetched[linear] = page.hva
            permissions |= _EXECUTE
        return page.hva, permissions

    def _holds_descriptors(self, linear: int) -> bool:
        """Whether the page overlaps the GDT, or the LDT or TSS if one is loaded.

        At CPL 3 the CPU reads them as supervisor, to load a segment or call a gate. Unicorn does not tell such an
        access from one of the program, so a program that reads the page of its own GDT is not stopped.
        """
        env = self._core.cpu.env
        tables = (env.gdt, *(table for table in (env.ldt, env.tr) if table.selector))
        return any(table.base - PAGE < linear <= table.base + table.limit for table in tables)
