"""Anonymous private memory of a process: what plain memslots and populate sources are made of."""

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
        self.pages = pages
        self._pool = pool
        self._scheduler = scheduler
        self._new_backing = new_backing
        self._areas = 0

    def attach(self, area: Area) -> None:
        self._areas += 1

    def detach(self, area: Area) -> None:
        self.folios.remove(area.indices_of(area.vpns))
        self._areas -= 1

    async def put(self) -> None:
        if not self._areas:
            self.folios.backing.close()

    async def fault(self, area: Area, vpn: Vpn, write: bool) -> None:
        await self._scheduler.preempt("anonymous fault")
        index = area.index_of(vpn)
        self._have(index)
        pfn = self.folios.pfn(index)
        assert pfn is not None
        backing = self.folios.backing
        await area.mm.install(
            vpn, Pte(pfn, backing.hva(index), backing.window(index), area.writable, self.folios, index)
        )

    async def discard(self, area: Area, pages: PageRange) -> None:
        self.folios.remove(pages)

    async def remove(self, pages: PageRange) -> None:
        self.folios.remove(pages)

    def copy_for_fork(self, area: Area) -> PageSource:
        twin = AnonymousMemory(self._scheduler, self._pool, self._new_backing, self.pages)
        for run in self.folios.present_in(area.indices_of(area.vpns)):
            for index in map(PageIndex, range(run.start, run.end)):
                twin._have(index)
                write_host(twin.folios.backing.hva(index), read_host(self.folios.backing.hva(index), PAGE_SIZE))
        return twin

    def _have(self, index: PageIndex) -> None:
        page = Range(index, PageIndex(index + 1))
        if index not in self.folios.present:
            self.folios.insert(page, self._pool.allocate(1))
            self.folios.backing.zero(page)
            self.folios.set_uptodate(page)
