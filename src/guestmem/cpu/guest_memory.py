"""Guest memory as one vCPU sees it: stage 2 behind a cache, and linear addresses on top of that.

`GuestPhysical` asks stage 2 once for a page and keeps the answer until `flush`, as a TLB keeps a combined translation;
refusals are not kept. `LinearMemory` reads and writes linear addresses as the CPU itself does when it delivers an
exception: implicit supervisor accesses, each byte through the guest's page tables.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from guestmem.cpu.engine import GuestMemory, HostWindow
from guestmem.cpu.guest_walk import Access, GuestPage, Paging, TableMiss, walk

PAGE = 4096
_CACHED_PAGES_MAX = 1 << 16


class Stage2Refused(Exception):
    """Stage 2 does not hold the page for such an access; the fields are those of the stop Stage2Miss.

    `whole_page`: `gpa` is the first byte of the page, the access is somewhere in it.
    """

    def __init__(
        self, gpa: int, write: bool, fetch: bool = False, private: bool | None = None, whole_page: bool = False
    ) -> None:
        super().__init__(f"stage 2 refused gpa {gpa:#x}")
        self.gpa, self.write, self.fetch, self.private, self.whole_page = gpa, write, fetch, private, whole_page


class GuestFault(Exception):
    """An access raises an exception of the guest: `address` is for CR2."""

    def __init__(self, vector: int, error_code: int, address: int = 0) -> None:
        super().__init__(f"vector {vector}, error code {error_code:#x}, address {address:#x}")
        self.vector, self.error_code, self.address = vector, error_code, address


class HostPage(NamedTuple):
    """A 4K page that stage 2 holds.

    `words[first_word]` and `data[start]` are its first eight bytes and its first byte, in views of the whole window.
    """

    hva: int
    writable: bool
    window: HostWindow
    words: memoryview[int]
    first_word: int
    data: memoryview[int]
    start: int


class GuestPhysical:
    """Stage 2 and the pages that it gave. `tables_private` is the kind of page-table pages: True with SEV."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._pages: dict[tuple[int, bool | None], HostPage] = {}
        self._tables: dict[int, memoryview[int]] = {}
        self._views: dict[HostWindow, tuple[memoryview[int], memoryview[int]]] = {}
        self.tables_private: bool | None = None

    def flush(self) -> None:
        """Forget the pages: the next access to each asks stage 2 again."""
        self._pages.clear()
        self._tables.clear()

    def page(self, gpa: int, write: bool, private: bool | None) -> HostPage | None:
        """The page of `gpa`, or None if stage 2 refuses the access."""
        frame = gpa & -PAGE
        page = self._pages.get((frame, private))
        if page is not None and (page.writable or not write):
            return page
        translation = self._memory.translate(frame, write, private)
        if translation is None:
            return None
        words, data = self._view(translation.window)
        offset = translation.hva - translation.window.base
        page = HostPage(*translation, words, offset >> 3, data, offset)
        if len(self._pages) >= _CACHED_PAGES_MAX:
            self.flush()
        self._pages[frame, private] = page
        return page

    def read64(self, gpa: int) -> int | None:
        """A page-table entry."""
        table = self._tables.get(gpa >> 12)
        if table is None:
            page = self.page(gpa, False, self.tables_private)
            if page is None:
                return None
            table = self._tables[gpa >> 12] = page.words[page.first_word : page.first_word + 512]
        return table[gpa >> 3 & 511]

    def write64(self, gpa: int, value: int) -> bool:
        """Store a page-table entry; whether stage 2 let it."""
        page = self.page(gpa, True, self.tables_private)
        if page is None:
            return False
        page.words[page.first_word + (gpa >> 3 & 511)] = value
        return True

    def _view(self, window: HostWindow) -> tuple[memoryview[int], memoryview[int]]:
        views = self._views.get(window)
        if views is None:
            data = memoryview((ctypes.c_char * window.size).from_address(window.base)).cast("B")
            views = self._views[window] = (data.cast("Q"), data)
        return views


class LinearMemory:
    """The linear addresses of one address space. `read` and `write` are implicit supervisor accesses.

    All methods raise: GuestFault, Stage2Refused. A write that raises may have stored its first part: whoever
    repeats it stores the same bytes again.
    """

    def __init__(self, paging: Paging, physical: GuestPhysical) -> None:
        self._paging, self._implicit = paging, paging.implicit()
        self._physical = physical

    def read(self, address: int, size: int) -> int:
        """`size` bytes at `address`, little endian."""
        return int.from_bytes(self._load(self._implicit, address, size, Access.READ), "little")

    def fetch(self, address: int, size: int) -> bytes:
        """`size` bytes of code, with the rights of the code that executes."""
        return self._load(self._paging, address, size, Access.FETCH)

    def _load(self, paging: Paging, address: int, size: int, access: Access) -> bytes:
        data = b""
        while len(data) < size:
            page, start, length = self._part(paging, address + len(data), size - len(data), access)
            data += page.data[start : start + length]
        return data

    def write(self, address: int, value: int, size: int) -> None:
        """Store the `size` low bytes of `value` at `address`, little endian."""
        data, done = (value & (1 << size * 8) - 1).to_bytes(size, "little"), 0
        while done < size:
            page, start, length = self._part(self._implicit, address + done, size - done, Access.WRITE)
            page.data[start : start + length] = data[done : done + length]
            done += length

    def _part(self, paging: Paging, address: int, size: int, access: Access) -> tuple[HostPage, int, int]:
        """The page of `address`, where in its view the bytes start, and how many of `size` it holds."""
        write = access is Access.WRITE
        address &= 0xFFFF_FFFF_FFFF_FFFF if paging.long_mode else 0xFFFF_FFFF
        physical = self._physical
        found = walk(paging, address, access, physical.read64, physical.write64)
        if isinstance(found, TableMiss):
            raise Stage2Refused(found.gpa, found.write, private=physical.tables_private)
        if not isinstance(found, GuestPage):
            raise GuestFault(found.vector, found.error_code, address)
        page = physical.page(found.gpa, write, found.private)
        offset = address & PAGE - 1
        if page is None:
            raise Stage2Refused(found.gpa + offset, write, access is Access.FETCH, found.private)
        return page, page.start + offset, min(size, PAGE - offset)
