"""Ioas: an IO address space. Its areas say what each IOVA shows, its domains are the page tables that show it.

`lock` guards areas and domains: exclusive to change them, shared for a page request. It is outside of every lock that
pinning or looking up a page takes. Whoever is told by the provider does not take it (see `context`).

A mapping of a guest_memfd comes in two forms. Plain: all its pages have an access that a domain of this address space
maps, or the call is refused; they are there when it returns, and what a conversion takes out comes back by a page
request or a new mapping. FOLLOW: it says only where the file is; pages of either access may lie in it, and page
requests bring those that the domain may have.

Source: drivers/iommu/iommufd/io_pagetable.c iopt_map_pages, iopt_unmap_iova, iopt_get_pages, iopt_table_add_domain.
"""

from __future__ import annotations

import bisect
import errno
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

from guestmem.arch import DmaRules
from guestmem.iommu.addresses import IoPage, Iova, io_page_of, io_pages, iova_of
from guestmem.iommu.areas import Area, GmemArea, PinnedArea, PinnedPages
from guestmem.iommu.context import IommuGmemContext
from guestmem.iommu.domain import CannotSplit, Domain
from guestmem.iommu.iova_space import IovaRange, IovaSpace
from guestmem.iommu.leaves import IoLeaf, PinnedLeaf
from guestmem.memory import PAGE_SHIFT, PAGE_SIZE, Access, Inode, Owner, PageIndex, Range
from guestmem.sched import LockClass, RwLock, Scheduler
from guestmem.trace import Refusal, Tracer


class Protection(NamedTuple):
    """What a device may do with a mapping."""

    readable: bool = True
    writable: bool = True


class GmemSlice(NamedTuple):
    """Pages of a guest_memfd, from `first` on. `follow`: see above."""

    inode: Inode
    first: PageIndex
    pages: int
    follow: bool


class PinnedSlice(NamedTuple):
    """Pages of memory that will be pinned."""

    source: PinnedPages
    first: int
    pages: int


Slice: TypeAlias = GmemSlice | PinnedSlice
RulesOf: TypeAlias = Callable[[Owner | None], DmaRules | None]
"""From the owner of memory, whom only the builder of the machine knows, to the rules of its architecture."""


class Ioas:
    """`number` names it in traces. `orders` are those that a leaf can have, largest first; with `large_pages` not set
    (IOMMU_OPTION_HUGE_PAGES) all are of order 0. `rules_of` is what the hardware asks of DMA to somebody's memory."""

    def __init__(
        self, scheduler: Scheduler, tracer: Tracer, number: int, orders: Sequence[int], rules_of: RulesOf
    ) -> None:
        self.scheduler = scheduler
        self.tracer = tracer
        self.number = number
        self.orders = orders
        self.rules_of = rules_of
        self.lock = RwLock(scheduler, LockClass.IOAS_LOCK, f"iova lock ioas {number}")
        self.areas: list[Area] = []  # by IOVA; disjoint
        self.domains: list[Domain] = []
        self.contexts: dict[int, IommuGmemContext] = {}  # by inode number
        self.iovas = IovaSpace()
        self.large_pages = True
        self.closed = False

    # Mapping

    async def map(self, slices: list[Slice], iova: int | None, protection: Protection, start: int = 0) -> Iova:
        """Show `slices`, one after another, at `iova`, or where there is room (`start`: see IovaSpace.find); the IOVA.

        All or nothing. Raises: Refusal `iommu.*`; what pinning or faulting the pages refuses.
        """
        length = sum(each.pages for each in slices) << PAGE_SHIFT
        async with self.lock.exclusive:
            self._check_open()
            if iova is None:
                iova = self.iovas.find(length, start, self._used())
            else:
                self.iovas.check(iova, length, self._used())
            made: list[Area] = []
            try:
                page = io_page_of(iova)
                for each in slices:
                    made.append(self._add_area(page, each, protection))
                    page = IoPage(page + each.pages)
                for area in made:
                    await self._check_accesses(area)
                    await self._fill_all(area)
            except OSError:
                for area in made:
                    await self._remove_area(area)
                raise
        return Iova(iova)

    def _add_area(self, page: IoPage, what: Slice, protection: Protection) -> Area:
        pages = Range(page, IoPage(page + what.pages))
        area: Area
        if isinstance(what, PinnedSlice):
            if protection.writable and not what.source.writable:
                raise Refusal(errno.EPERM, "iommu.read_only", iova=iova_of(page))
            area = PinnedArea(pages, what.source, what.first, *protection)
        else:
            context = self.contexts.get(what.inode.number)
            if context is None:
                context = self.contexts[what.inode.number] = IommuGmemContext(self, what.inode)
            area = GmemArea(pages, context, what.first, *protection, follow=what.follow)
            context.areas.append(area)
        bisect.insort(self.areas, area, key=_start)
        return area

    async def _check_accesses(self, area: Area) -> None:
        """Raises: Refusal EFAULT `iommu.access`."""
        if isinstance(area, PinnedArea) or area.follow:
            return
        mappable = {domain.access for domain in self.domains} | {Access.SHARED}
        async with area.inode.invalidate_lock.shared:
            for run, access in area.inode.runs(area.indices):
                if access not in mappable:
                    page = area.pages.start + run.start - area.first
                    raise Refusal(errno.EFAULT, "iommu.access", iova=iova_of(page), state=access.value)

    async def _fill_all(self, area: Area) -> None:
        for domain in self.domains:
            await self._fill(domain, area)

    async def _fill(self, domain: Domain, area: Area) -> None:
        """Map all that the domain may have of an area. Raises: Refusal."""
        if isinstance(area, PinnedArea):
            await self._fill_pinned(domain, area)
        elif not area.follow and not area.revoked:
            for run in [run for run, access in area.inode.runs(area.indices) if access is domain.access]:
                await self._fill_run(domain, area, IoPage(area.pages.start + run.start - area.first), run.pages)

    async def _fill_run(self, domain: Domain, area: GmemArea, page: IoPage, pages: int) -> None:
        end = page + pages
        while page < end:
            try:
                leaf = await area.context.map_page(domain, area, page)
            except Refusal as refusal:
                if refusal.rule not in ("fault.access", "iommu.not_guests"):
                    raise
                page = IoPage(page + 1)  # converted since we looked, or never touched by its guest
            else:
                page = IoPage(leaf.page + (1 << leaf.order))

    async def _fill_pinned(self, domain: Domain, area: PinnedArea) -> None:
        if domain.trusted:
            return  # host memory is shared memory
        await area.pin()
        async with domain.lock:
            for page in map(IoPage, range(area.pages.start, area.pages.end)):
                leaf = PinnedLeaf(page, area.pinned_at(page), area.readable, area.writable)
                domain.install(leaf, domain.window.sequence.read())

    # Unmapping

    async def unmap(self, iova: int, length: int) -> int:
        """Take away what is mapped in the range; how many bytes were.

        A guest_memfd's area that sticks out is cut: nothing is held, so nothing stands in the way. A pinned one that
        sticks out is no such mapping, and nothing is unmapped at all: only what was mapped as one is unpinned as one.

        Raises: Refusal ENOENT `iommu.part`, `iommu.not_mapped`. Source: iopt_unmap_iova_range, which unmaps what comes
        before the area that sticks out and does not say how much.
        """
        pages = Range(io_page_of(iova), io_page_of(iova + length))
        async with self.lock.exclusive:
            self._check_open()
            inside = [area for area in self.areas if area.pages.overlaps(pages)]
            for area in inside:
                if isinstance(area, PinnedArea) and not pages.covers(area.pages):
                    raise Refusal(errno.ENOENT, "iommu.part", iova=iova, length=length, mapped=area.pages.pages)
            if not inside:
                raise Refusal(errno.ENOENT, "iommu.not_mapped", iova=iova, length=length)
            unmapped = 0
            for area in inside:
                gone = self._cut(area, pages) if isinstance(area, GmemArea) else area
                unmapped += gone.pages.pages
                await self._remove_area(gone)
        return unmapped << PAGE_SHIFT

    async def unmap_all(self) -> int:
        """Take everything away; how many bytes. Source: iopt_unmap_all."""
        async with self.lock.exclusive:
            self._check_open()
            return await self._remove_all()

    def _cut(self, area: GmemArea, pages: Range[IoPage]) -> GmemArea:
        """The part of an area that lies in `pages`, now an area of its own like what is left of it."""
        inside = area.pages.intersection(pages)
        assert inside is not None
        if inside == area.pages:
            return area
        self.areas.remove(area)
        area.context.areas.remove(area)
        part = area.cut(inside)
        rest = (Range(area.pages.start, inside.start), Range(inside.end, area.pages.end))
        for each in (part, *(area.cut(left) for left in rest if left.pages)):
            bisect.insort(self.areas, each, key=_start)
            area.context.areas.append(each)
        return part

    async def _remove_area(self, area: Area) -> None:
        """Out of the page tables and IOTLBs first, then out of the books, and only then are pins given back."""
        for domain in self.domains:
            async with domain.lock:
                self._drop(domain, area)
        self.areas.remove(area)
        if isinstance(area, PinnedArea):
            area.unpin()
            return
        context = area.context
        context.areas.remove(area)
        if not context.areas:
            del self.contexts[context.inode.number]
            await context.close()

    def _drop(self, domain: Domain, area: Area) -> None:
        """A leaf sticks out if the area was a part of a larger one. What cannot stay beside it is asked for again."""
        try:
            domain.drop(area.pages)
        except CannotSplit:
            domain.forget(area.pages)

    async def _remove_all(self) -> int:
        pages = 0
        for area in list(self.areas):
            pages += area.pages.pages
            await self._remove_area(area)
        return pages << PAGE_SHIFT

    # Domains

    async def add_domain(self, domain: Domain) -> None:
        """A new domain shows all areas. Raises: Refusal EADDRINUSE `iommu.reserved`; as `map`. Nothing is done then."""
        async with self.lock.exclusive:
            self._check_open()
            self.iovas.reserve(self._used())
            self._join(domain)
            try:
                for area in self.areas:
                    await self._fill(domain, area)
            except OSError:
                await self._leave(domain)
                raise

    async def remove_domain(self, domain: Domain) -> None:
        """No device is attached to it: it shows nothing any more, and what was pinned for the last one is not."""
        async with self.lock.exclusive:
            await self._leave(domain)

    def _join(self, domain: Domain) -> None:
        self.domains.append(domain)
        for context in self.contexts.values():
            context.may_map_private |= domain.trusted

    async def _leave(self, domain: Domain) -> None:
        for area in self.areas:
            async with domain.lock:
                domain.drop(area.pages)
        self.domains.remove(domain)
        if not self.domains:
            self.iovas.reserved = ()
        if all(other.trusted for other in self.domains):
            for area in self.areas:
                if isinstance(area, PinnedArea):
                    area.unpin()

    # Page requests

    async def page_request(self, domain: Domain, page: IoPage, write: bool) -> None:
        """A device found `page` not mapped, and asks for it (ATS and PRI). Maps it, or refuses.

        Raises: Refusal EFAULT `dma.unmapped`, `dma.permission`; as IommuGmemContext.map_page.
        """
        async with self.lock.shared:
            area = self.area_at(page)
            if domain not in self.domains or not isinstance(area, GmemArea):
                raise Refusal(errno.EFAULT, "dma.unmapped", iova=iova_of(page))
            check_permission(area, page, write)
            await area.context.map_page(domain, area, page)

    # Queries

    def area_at(self, page: int) -> Area | None:
        place = bisect.bisect_right(self.areas, page, key=_start) - 1
        return self.areas[place] if place >= 0 and page < self.areas[place].pages.end else None

    async def slices(self, iova: int, length: int) -> list[Slice]:
        """What is mapped at a range of IOVAs, without a hole, as it can be mapped elsewhere.

        Raises: Refusal EINVAL `iommu.unaligned`; ENOENT `iommu.not_mapped`. Source: iopt_get_pages.
        """
        pages = io_pages(iova, length)
        if pages is None:
            raise Refusal(errno.EINVAL, "iommu.unaligned", iova=iova, length=length)
        async with self.lock.shared:
            self._check_open()
            return list(self._slices(pages))

    def _slices(self, pages: Range[IoPage]) -> Iterator[Slice]:
        page = pages.start
        while page < pages.end:
            area = self.area_at(page)
            if area is None:
                raise Refusal(errno.ENOENT, "iommu.not_mapped", iova=iova_of(page))
            inside, count = page - area.pages.start, min(area.pages.end, pages.end) - page
            if isinstance(area, PinnedArea):
                yield PinnedSlice(area.source, area.first + inside, count)
            else:
                yield GmemSlice(area.inode, area.index_of(page), count, area.follow)
            page = IoPage(page + count)

    async def close(self) -> None:
        """The object is destroyed: no domain is left."""
        async with self.lock.exclusive:
            assert not self.domains, "an IOAS with domains is destroyed"
            await self._remove_all()
            self.closed = True

    def _used(self) -> Iterator[IovaRange]:
        return (IovaRange(area.pages.start * PAGE_SIZE, area.pages.end * PAGE_SIZE - 1) for area in self.areas)

    def _check_open(self) -> None:
        """Somebody may have destroyed it while we waited. Raises: Refusal ENOENT `iommufd.no_object`."""
        if self.closed:
            raise Refusal(errno.ENOENT, "iommufd.no_object", ioas=self.number)

    def check(self) -> None:
        """Areas are disjoint and known to their contexts; pins are as many as pinned areas say."""
        for before, after in zip(self.areas, self.areas[1:], strict=False):
            assert before.pages.end <= after.pages.start, f"S5: {before} and {after} share a page"
        for context in self.contexts.values():
            context.check()
            assert context.areas, "L3: a context without areas"
        for domain in self.domains:
            domain.check()


def check_permission(mapping: Area | IoLeaf, page: int, write: bool) -> None:
    """Raises: Refusal EFAULT `dma.permission`."""
    if not (mapping.writable if write else mapping.readable):
        raise Refusal(errno.EFAULT, "dma.permission", iova=iova_of(page), write=write)


def _start(area: Area) -> int:
    return area.pages.start
