"""Anonymous private memory of a process: what plain memslots and populate sources are made of.

A page that is short of memory's wants is *reclaimed*: taken from the page tables, saved if it is dirty, and freed if
nobody holds it. A store through a page table makes it dirty; who writes through a reference must say so himself, or the
page is freed later as it was saved before (known bug B17).

Source: mm/vmscan.c shrink_folio_list: try_to_unmap, pageout, __remove_mapping.
"""

from __future__ import annotations

from collections.abc import Callable

from guestmem.memory import PAGE_SIZE, Backing, Folios, PageIndex, PageRange, Pool, Range, read_host, write_host
from guestmem.sched import Scheduler
from guestmem.userspace.addresses import Vpn
from guestmem.userspace.area import Area, PageSource, Pte


class AnonymousMemory:
    """`pages` pages that belong to one area (MAP_PRIVATE | MAP_ANONYMOUS). Discarding loses the bytes.

    fork() copies at once what the kernel would copy at the first write: what each process reads is the same.
    """

    def __init__(self, scheduler: Scheduler, pool: Pool, new_backing: Callable[[int], Backing], pages: int) -> None:
        self.folios = Folios(scheduler, pool, new_backing(pages), "anonymous")
        self.folios.dirty = self._dirty = set[PageIndex]()
        self.pages = pages
        self.swapped: dict[PageIndex, bytes] = {}  # what was saved of pages last
        self._pool = pool
        self._scheduler = scheduler
        self._new_backing = new_backing
        self._areas = 0

    def attach(self, area: Area) -> None:
        self._areas += 1

    def detach(self, area: Area) -> None:
        self._lose(area.indices_of(area.vpns))
        self._areas -= 1

    async def put(self) -> None:
        if not self._areas:
            self.folios.backing.close()

    async def fault(self, area: Area, vpn: Vpn, write: bool) -> None:
        await self._scheduler.preempt("anonymous fault")
        index = area.index_of(vpn)
        async with area.mm.page_table_lock:  # so that no page is freed between look-up and entry
            self._have(index)
            pfn = self.folios.pfn(index)
            assert pfn is not None
            backing = self.folios.backing
            entry = Pte(pfn, backing.hva(index), backing.window(index), area.writable, self.folios, index)
            area.mm.page_table.map(vpn, 0, entry)

    async def discard(self, area: Area, pages: PageRange) -> None:
        self._lose(pages)

    async def remove(self, pages: PageRange) -> None:
        self._lose(pages)

    async def reclaim(self, area: Area, vpn: Vpn) -> bool:
        """Unmap the page, save it if it is dirty, free it unless somebody holds it or has it mapped again."""
        index, page = area.index_of(vpn), Range(vpn, Vpn(vpn + 1))
        await area.mm.zap(page)
        if index not in self.folios.present or area.mm.page_table.lookup(vpn) is not None:
            return False
        if index in self._dirty:
            self._dirty.discard(index)
            self.swapped[index] = read_host(self.folios.backing.hva(index), PAGE_SIZE)
            await self._scheduler.preempt("page saved, not freed")
        mapped = area.mm.page_table.lookup(vpn) is not None
        if mapped or index in self._dirty or index in self.folios.references or index not in self.folios.present:
            return False
        self.folios.remove(area.indices_of(page))
        return True

    def copy_for_fork(self, area: Area) -> PageSource:
        twin = AnonymousMemory(self._scheduler, self._pool, self._new_backing, self.pages)
        twin.swapped = dict(self.swapped)
        for run in self.folios.present_in(area.indices_of(area.vpns)):
            for index in map(PageIndex, range(run.start, run.end)):
                twin._have(index)
                twin.folios.set_dirty(index)
                write_host(twin.folios.backing.hva(index), read_host(self.folios.backing.hva(index), PAGE_SIZE))
        return twin

    def _lose(self, pages: PageRange) -> None:
        """The pages go, and what was saved of them."""
        self.folios.remove(pages)
        self._dirty.difference_update([index for index in self._dirty if pages.contains(index)])
        for index in [index for index in self.swapped if pages.contains(index)]:
            del self.swapped[index]

    def _have(self, index: PageIndex) -> None:
        page = Range(index, PageIndex(index + 1))
        if index not in self.folios.present:
            self.folios.insert(page, self._pool.allocate(1))
            self.folios.backing.zero(page)
            self.folios.set_uptodate(page)
            if index in self.swapped:
                write_host(self.folios.backing.hva(index), self.swapped[index])
