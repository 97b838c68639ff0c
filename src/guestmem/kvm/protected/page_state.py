"""Page state change: a list of pages in the guest's shared memory, which userspace is to convert, range by range.

Neighbours that want the same are one range. The list is read anew for each: the guest may change it, and where it is
may have been converted itself; how far KVM has come is written into it.

Source: arch/x86/kvm/svm/sev.c snp_begin_psc, snp_complete_one_psc; struct psc_buffer.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from guestmem.kvm.exits import HypercallExit
from guestmem.kvm.protected.guest_page import read_guest, write_guest
from guestmem.memory import PAGE_SHIFT, PAGE_SIZE
from guestmem.uapi.kvm import KVM_HC_MAP_GPA_RANGE, KVM_MAP_GPA_RANGE_ENCRYPTED, KVM_MAP_GPA_RANGE_PAGE_SZ_2M

if TYPE_CHECKING:
    from guestmem.kvm.vm import Kvm

_HEADER = struct.Struct("<HHI")  # cur_entry, end_entry, reserved
_ENTRY = struct.Struct("<Q")  # cur_page 12, gfn 40, operation 4, pagesize 1
MAX_COUNT = 253
PRIVATE, SHARED = 1, 2
ERROR_GENERIC, ERROR_INVALID_HDR, ERROR_INVALID_ENTRY = 0x100 << 32, 1 << 32 | 1, 1 << 32 | 2


class Entry(NamedTuple):
    """One page, of 4K or 2M; `done` of its 4K pages are done."""

    gfn: int
    operation: int
    large: bool
    done: int

    @property
    def pages(self) -> int:
        return 512 if self.large else 1


def unpack(value: int) -> Entry:
    return Entry(value >> 12 & (1 << 40) - 1, value >> 52 & 0xF, bool(value >> 56 & 1), value & 0xFFF)


def pack(entry: Entry) -> int:
    return entry.done | entry.gfn << 12 | entry.operation << 52 | entry.large << 56


class PageStateChange:
    """One request, whose list is at `gpa`. `first` and `count` are the entries that userspace is busy with."""

    def __init__(self, kvm: Kvm, gpa: int) -> None:
        self.gpa = gpa
        self.first = 0
        self.count = 0
        self._kvm = kvm

    async def next(self) -> HypercallExit | int:
        """The next range for userspace, or the code that the request ends with, 0 for success."""
        if not self._kvm.enabled_hypercalls >> KVM_HC_MAP_GPA_RANGE & 1:
            return ERROR_GENERIC
        while True:
            header = await read_guest(self._kvm, self.gpa, _HEADER.size)
            if header is None:
                return ERROR_GENERIC
            current, end, _ = _HEADER.unpack(header)
            if end >= MAX_COUNT or self.gpa % PAGE_SIZE + _HEADER.size + (end + 1) * _ENTRY.size > PAGE_SIZE:
                return ERROR_INVALID_HDR
            entries = await self._entries(current, end + 1 - current)
            if entries is None:
                return ERROR_GENERIC
            step = self._range(entries, current)
            if step is not None:
                return step
            if not await self._mark():  # of neither kind: passed over
                return ERROR_GENERIC

    async def complete(self, ret: int) -> HypercallExit | int:
        """Userspace is done with a range."""
        if ret or not await self._mark():
            return ERROR_GENERIC
        return await self.next()

    def _place(self, index: int) -> int:
        """The guest's address of an entry."""
        return self.gpa + _HEADER.size + index * _ENTRY.size

    async def _entries(self, first: int, count: int) -> list[Entry] | None:
        """None if they are in no memory any more."""
        if count <= 0:
            return []
        data = await read_guest(self._kvm, self._place(first), count * _ENTRY.size)
        return None if data is None else [unpack(value) for (value,) in _ENTRY.iter_unpack(data)]

    def _range(self, entries: list[Entry], current: int) -> HypercallExit | int | None:
        """Of the first entry that is not done, and its neighbours."""
        skipped = 0
        for start in entries:
            if start.done > start.pages or start.gfn % start.pages:
                return ERROR_INVALID_ENTRY
            if start.done < start.pages:
                break
            skipped += 1
        else:
            return 0
        whole = not start.done
        pages = start.pages - start.done
        self.first, self.count = current + skipped, 1
        for other in entries[skipped + 1 :]:
            joins = whole and other.operation == start.operation and other.large == start.large and not other.done
            if not joins or other.gfn != start.gfn + pages:
                break
            pages += other.pages
            self.count += 1
        if start.operation not in (PRIVATE, SHARED):
            return None
        attributes = KVM_MAP_GPA_RANGE_ENCRYPTED if start.operation == PRIVATE else 0
        attributes |= KVM_MAP_GPA_RANGE_PAGE_SZ_2M if start.large else 0
        return HypercallExit(KVM_HC_MAP_GPA_RANGE, (start.gfn + start.done << PAGE_SHIFT, pages, attributes))

    async def _mark(self) -> bool:
        """Say in the list that the range is done; False if it is in no memory. Source: __snp_complete_one_psc."""
        for index in range(self.first, self.first + self.count):
            entries = await self._entries(index, 1)
            if entries is None:
                return False
            done = pack(entries[0]._replace(done=entries[0].pages))
            await write_guest(self._kvm, self._place(index), _ENTRY.pack(done))
        header = await read_guest(self._kvm, self.gpa, _HEADER.size)
        if header is None:
            return False
        _, end, reserved = _HEADER.unpack(header)
        written = await write_guest(self._kvm, self.gpa, _HEADER.pack(self.first + self.count, end, reserved))
        self.count = 0
        return written
