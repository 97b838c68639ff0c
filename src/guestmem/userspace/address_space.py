"""AddressSpace: the memory of one host process (mm_struct): its areas, its page table, and who watches it.

`mmap_lock` guards the areas: shared for a fault, exclusive for mmap, munmap and fork. `page_table_lock` guards the
entries and is held for moments. An entry that is removed is first announced to the MMU notifiers, as KVM maps plain
memslots through host addresses and must drop its mappings before the page goes.

Source: mm/memory.c, mm/mmap.c, include/linux/mmu_notifier.h, reduced to what a VMM does with guest memory.
"""

from __future__ import annotations

import bisect
import errno
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Protocol

from guestmem.memory import PAGE_SIZE, FolioReference, PageIndex, PageTable, Range, read_host, write_host
from guestmem.sched import Lock, LockClass, RwLock, Scheduler
from guestmem.trace import Refusal, Tracer
from guestmem.trace import events as event
from guestmem.userspace.addresses import Hva, Vpn, hva_of, vpn_of, vpn_range
from guestmem.userspace.area import Area, PageSource, Pte
from guestmem.userspace.signals import SEGV_ACCERR, SEGV_MAPERR, SigBus, SigSegv

_MMAP_BASE = 0x7F00_0000_0000
_MMAP_GAP = 0x20_0000


class MmuNotifier(Protocol):
    """Who must be told before page-table entries of an address space go."""

    async def invalidate_range_start(self, start: int, end: int) -> None: ...

    async def invalidate_range_end(self, start: int, end: int) -> None: ...


class AddressSpace:
    """One process's memory. `number` names it in traces."""

    def __init__(self, scheduler: Scheduler, tracer: Tracer, number: int) -> None:
        self.number = number
        self.mmap_lock = RwLock(scheduler, LockClass.MMAP_LOCK, f"mmap_lock mm {number}")
        self.page_table_lock = Lock(scheduler, LockClass.PAGE_TABLE_LOCK, f"page_table_lock mm {number}")
        self.page_table: PageTable[Vpn, Pte] = PageTable()
        self.areas: list[Area] = []  # by address
        self.notifiers: list[MmuNotifier] = []
        self._scheduler = scheduler
        self._tracer = tracer
        self._next_hva = _MMAP_BASE

    # Areas

    async def map(self, source: PageSource, size: int, first: PageIndex, writable: bool = True) -> Hva:
        """A new area of `size` bytes that shows `source` from page `first` on; its address, 2 MiB aligned."""
        async with self.mmap_lock.exclusive:
            vpns = vpn_range(self._next_hva, size)
            self._next_hva = -(-hva_of(vpns.end) // _MMAP_GAP) * _MMAP_GAP + _MMAP_GAP
            self._insert(Area(self, vpns, source, first, writable))
        return hva_of(vpns.start)

    async def unmap(self, hva: int, size: int) -> None:
        """munmap(2): whatever is mapped in the range goes; areas that stick out are cut."""
        _check_aligned(hva, size)
        vpns = vpn_range(hva, size)
        async with self.mmap_lock.exclusive:
            gone = [self._cut(area, vpns) for area in list(self._overlapping(vpns))]
            for area in gone:
                await self.zap(area.vpns)
                area.source.detach(area)
        for area in gone:
            await area.source.put()

    async def discard(self, hva: int, size: int) -> None:
        """madvise(MADV_DONTNEED): drop the entries. The bytes of a guest_memfd stay; anonymous ones are lost."""
        async with self._advised("discard", hva, size) as parts:
            for area, vpns in parts:
                await self.zap(vpns)
                await area.source.discard(area, area.indices_of(vpns))

    async def remove(self, hva: int, size: int) -> None:
        """madvise(MADV_REMOVE): punch a hole behind the mapping."""
        async with self._advised("remove", hva, size) as parts:
            for area, vpns in parts:
                await area.source.remove(area.indices_of(vpns))

    async def reclaim(self, hva: int) -> bool:
        """Memory is short, and this page's turn has come: whether it is free now. Not by the process, but by kswapd."""
        vpn = vpn_of(hva)
        area = self.area_at(vpn) if vpn is not None else None
        return vpn is not None and area is not None and await area.source.reclaim(area, vpn)

    async def fork(self, number: int) -> AddressSpace:
        """A child's copy: the same areas, no entries. A private page is no more the child's than the parent's."""
        child = AddressSpace(self._scheduler, self._tracer, number)
        child._next_hva = self._next_hva
        async with self.mmap_lock.exclusive:
            for area in self.areas:
                child._insert(Area(child, area.vpns, area.source.copy_for_fork(area), area.first, area.writable))
        return child

    async def exit(self) -> None:
        """The process ends: every area goes."""
        if self.areas:
            start, end = self.areas[0].vpns.start, self.areas[-1].vpns.end
            await self.unmap(hva_of(start), hva_of(end) - hva_of(start))

    def area_at(self, vpn: Vpn) -> Area | None:
        place = bisect.bisect_right(self.areas, vpn, key=lambda area: area.vpns.start) - 1
        return self.areas[place] if place >= 0 and self.areas[place].vpns.contains(vpn) else None

    # Access

    async def read(self, hva: int, size: int) -> bytes:
        """Load `size` bytes, faulting in what is needed. Raises: SigBus, SigSegv."""
        parts = []
        for address, count in _by_page(hva, size):
            entry = await self.touch(address, write=False)
            parts.append(read_host(entry.hva + address % PAGE_SIZE, count))
        return b"".join(parts)

    async def write(self, hva: int, data: bytes) -> None:
        """Store `data`. A signal half way leaves what was stored before, as it does for the CPU."""
        done = 0
        for address, count in _by_page(hva, len(data)):
            entry = await self.touch(address, write=True)
            write_host(entry.hva + address % PAGE_SIZE, data[done : done + count])
            done += count

    async def copy_from_user(self, hva: int, size: int) -> bytes:
        """What a system call reads from its caller. Raises: Refusal EFAULT `user.copy`."""
        self._may_fail_to_copy(hva, size)
        try:
            return await self.read(hva, size)
        except (SigBus, SigSegv) as signal:
            raise Refusal(errno.EFAULT, "user.copy", hva=hva, size=size) from signal

    async def copy_to_user(self, hva: int, data: bytes) -> None:
        """What a system call writes to its caller. Raises: Refusal EFAULT `user.copy`."""
        self._may_fail_to_copy(hva, len(data))
        try:
            await self.write(hva, data)
        except (SigBus, SigSegv) as signal:
            raise Refusal(errno.EFAULT, "user.copy", hva=hva, size=len(data)) from signal

    async def user_page(self, hva: int, write: bool) -> Pte:
        """The page that KVM maps for a plain memslot. Raises: Refusal EFAULT `user.page`. Source: hva_to_pfn()."""
        try:
            return await self.touch(hva, write)
        except (SigBus, SigSegv) as signal:
            raise Refusal(errno.EFAULT, "user.page", hva=hva, write=write) from signal

    async def pin_page(self, hva: int, write: bool) -> FolioReference:
        """A counted reference to the page of an access (GUP). Raises: Refusal EFAULT `user.page`.

        The entry is looked at and the reference taken under page_table_lock: this is what makes "unmap, then look for
        references" sound. Known bug B24 is the other order.
        """
        vpn = vpn_of(hva)
        while True:
            await self.user_page(hva, write)
            async with self.page_table_lock:
                entry = self.page_table.lookup(vpn) if vpn is not None else None
                if entry is not None and (entry.writable or not write):
                    return entry.get_reference()

    async def touch(self, hva: int, write: bool) -> Pte:
        """The entry for an access, faulted in if need be. Nothing else runs between its return and the next await."""
        vpn = vpn_of(hva)
        if vpn is None:
            raise SigSegv(hva, SEGV_MAPERR)
        while True:
            await self._scheduler.preempt("user access")
            entry = self.page_table.lookup(vpn)
            if entry is not None and (entry.writable or not write):
                if write:
                    entry.folios.set_dirty(entry.page_index)
                return entry
            await self._fault(hva, vpn, write)

    async def _fault(self, hva: int, vpn: Vpn, write: bool) -> None:
        result = "mapped"
        try:
            async with self.mmap_lock.shared:
                area = self.area_at(vpn)
                if area is None:
                    raise SigSegv(hva, SEGV_MAPERR)
                if write and not area.writable:
                    raise SigSegv(hva, SEGV_ACCERR)
                await area.source.fault(area, vpn, write)
        except SigBus as bus:
            result = "SIGBUS"
            raise SigBus(hva, bus.code, bus.reason) from bus.reason
        except SigSegv:
            result = "SIGSEGV"
            raise
        finally:
            if self._tracer.enabled:
                self._tracer.emit(event.UserFault(self.number, hva, write, result))

    def _may_fail_to_copy(self, hva: int, size: int) -> None:
        if self._scheduler.fails("copy to or from user"):
            raise Refusal(errno.EFAULT, "user.copy", hva=hva, size=size)

    # Page table

    async def install(self, vpn: Vpn, entry: Pte) -> None:
        async with self.page_table_lock:
            self.page_table.map(vpn, 0, entry)

    async def zap(self, vpns: Range[Vpn]) -> None:
        """Remove the entries of a range, the watchers first."""
        start, end = hva_of(vpns.start), hva_of(vpns.end)
        watchers = list(self.notifiers)
        for watcher in watchers:
            await watcher.invalidate_range_start(start, end)
        async with self.page_table_lock:
            entries = self.page_table.zap(vpns)
        for watcher in watchers:
            await watcher.invalidate_range_end(start, end)
        if self._tracer.enabled and entries:
            self._tracer.emit(event.UserZap(self.number, start, end, entries))

    # For the reader

    def check(self) -> None:
        """Areas are disjoint and in order; every entry belongs to one and is the page that its source has now."""
        for before, after in zip(self.areas, self.areas[1:], strict=False):
            assert before.vpns.end <= after.vpns.start, "areas overlap"
        for vpn, _, entry in self.page_table.leaves():
            area = self.area_at(Vpn(vpn))
            assert area is not None, f"S10: entry {vpn:#x} outside every area"
            assert entry.page_index == area.index_of(Vpn(vpn)), f"S5: entry {vpn:#x} shows another page than its area"

    # Inside

    def _insert(self, area: Area) -> None:
        bisect.insort(self.areas, area, key=lambda area: area.vpns.start)
        area.source.attach(area)

    def _overlapping(self, vpns: Range[Vpn]) -> Iterator[Area]:
        return (area for area in self.areas if area.vpns.overlaps(vpns))

    def _cut(self, area: Area, vpns: Range[Vpn]) -> Area:
        """Take the part of `area` inside `vpns` out of the list; what sticks out stays as areas of its own."""
        self.areas.remove(area)
        inside = area.vpns.intersection(vpns)
        assert inside is not None
        for rest in (Range(area.vpns.start, inside.start), Range(inside.end, area.vpns.end)):
            if rest.pages:
                self._insert(Area(self, rest, area.source, area.index_of(rest.start), area.writable))
        first = area.index_of(inside.start)
        area.vpns, area.first = inside, first
        return area

    @asynccontextmanager
    async def _advised(self, call: str, hva: int, size: int) -> AsyncIterator[list[tuple[Area, Range[Vpn]]]]:
        """The parts of areas in a range, mmap_lock held. Raises: Refusal EINVAL `range.unaligned`, ENOMEM
        `madvise.unmapped` when part of the range is not mapped."""
        _check_aligned(hva, size)
        vpns = vpn_range(hva, size)
        async with self.mmap_lock.shared:
            parts = [(area, part) for area in self._overlapping(vpns) if (part := area.vpns.intersection(vpns))]
            if sum(part.pages for _, part in parts) != vpns.pages:
                raise Refusal(errno.ENOMEM, "madvise.unmapped", call=call, hva=hva, size=size)
            yield parts


def _check_aligned(hva: int, size: int) -> None:
    if hva % PAGE_SIZE or size <= 0:
        raise Refusal(errno.EINVAL, "range.unaligned", hva=hva, size=size)


def _by_page(hva: int, size: int) -> Iterator[tuple[int, int]]:
    """(address, bytes) of each page's part of `size` bytes from `hva`."""
    end = hva + size
    while hva < end:
        count = min(PAGE_SIZE - hva % PAGE_SIZE, end - hva)
        yield hva, count
        hva += count
