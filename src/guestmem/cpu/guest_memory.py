"""Guest memory as one vCPU sees it: stage 2 behind a cache, and linear addresses on top of that.

`GuestPhysical` asks stage 2 once for a page and keeps the answer until `flush`, as a TLB keeps a combined translation;
refusals are not kept. `LinearMemory` reads and writes linear addresses as the CPU itself does when it delivers an
exception: implicit supervisor accesses, each byte through the guest's page tables.
"""

from __future__ import annotations

import ctypes

from guestmem.cpu.engine import GuestMemory, Translation
from guestmem.cpu.guest_walk import Access, GuestPage, Paging, TableMiss, walk

PAGE = 4096
_CACHED_PAGES_MAX = 1 << 16

HOST_SIZE = 1 << 48
"""What a host address is below: 47 bits on x86-64, 48 on arm64."""
HOST = memoryview((ctypes.c_char * HOST_SIZE).from_address(0)).cast("B")
"""The memory of this process. What is not mapped must not be touched."""
_WORDS = HOST.cast("Q")


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


class GuestPhysical:
    """Stage 2 and the pages that it gave. `tables_private` is the kind of page-table pages: private, or None."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._pages: dict[tuple[int, bool | None], Translation] = {}
        self._tables: dict[int, memoryview[int]] = {}
        self.tables_private = True if memory.page_bit else None

    def flush(self) -> None:
        """Forget the pages: the next access to each asks stage 2 again."""
        self._pages.clear()
        self._tables.clear()

    def page(self, gpa: int, write: bool, private: bool | None) -> Translation | None:
        """The page of `gpa`, or None if stage 2 refuses the access."""
        frame = gpa & -PAGE
        page = self._pages.get((frame, private))
        if page is not None and (page.writable or not write):
            return page
        page = self._memory.translate(frame, write, private)
        if page is None:
            return None
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
            first = page.hva >> 3
            table = self._tables[gpa >> 12] = _WORDS[first : first + 512]
        return table[gpa >> 3 & 511]

    def write64(self, gpa: int, value: int) -> bool:
        """Store a page-table entry; whether stage 2 let it."""
        page = self.page(gpa, True, self.tables_private)
        if page is None:
            return False
        _WORDS[(page.hva >> 3) + (gpa >> 3 & 511)] = value
        return True


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

    def page(self, address: int, access: Access) -> GuestPage:
        """What the guest's tables have for `address`, with the rights of the code that executes."""
        return self._walk(self._paging, address, access)

    def _walk(self, paging: Paging, address: int, access: Access) -> GuestPage:
        physical = self._physical
        found = walk(paging, address, access, physical.read64, physical.write64)
        if isinstance(found, TableMiss):
            raise Stage2Refused(found.gpa, found.write, private=physical.tables_private)
        if not isinstance(found, GuestPage):
            raise GuestFault(found.vector, found.error_code, address)
        return found

    def _load(self, paging: Paging, address: int, size: int, access: Access) -> bytes:
        data = b""
        while len(data) < size:
            start, length = self._part(paging, address + len(data), size - len(data), access)
            data += HOST[start : start + length]
        return data

    def write(self, address: int, value: int, size: int) -> None:
        """Store the `size` low bytes of `value` at `address`, little endian."""
        data, done = (value & (1 << size * 8) - 1).to_bytes(size, "little"), 0
        while done < size:
            start, length = self._part(self._implicit, address + done, size - done, Access.WRITE)
            HOST[start : start + length] = data[done : done + length]
            done += length

    def _part(self, paging: Paging, address: int, size: int, access: Access) -> tuple[int, int]:
        """Where on the host `address` is, and how many of `size` bytes its page holds."""
        write = access is Access.WRITE
        address &= 0xFFFF_FFFF_FFFF_FFFF if paging.long_mode else 0xFFFF_FFFF
        found = self._walk(paging, address, access)
        page = self._physical.page(found.gpa, write, found.private)
        offset = address & PAGE - 1
        if page is None:
            raise Stage2Refused(found.gpa + offset, write, access is Access.FETCH, found.private)
        return page.hva + offset, min(size, PAGE - offset)
