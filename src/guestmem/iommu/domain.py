"""Domain: one IO page table, its IOTLB, and the window that keeps stale look-ups out; what a device is attached to.

A domain is of one kind. T=0 is the untrusted device's: it maps shared pages only. T=1 is the trusted device's: it maps
private pages only. So a conversion concerns a domain wholly or not at all, and a device of the wrong kind finds nothing
mapped where it has no business.

`lock` guards table and window. A leaf is installed only through `install`, which asks the window first. Removing is two
steps, as in hardware: `zap` changes the table, `flush` the IOTLB; `begin` and `drop` do both. A translation and the
access that uses it are one step, because an IOTLB flush waits for the accesses that were translated before.

Where the guest has ownership tables, the leaves of T=1 agree with their entries, page by page and size by size, after
every step: before a leaf is cut the entry under it is, and an entry that is cut or goes takes the leaves over it along
(`follow`). That is done without the lock, in the step of the change itself: all that is done under the lock is one step
too, so nobody is in the middle of it.

Source: drivers/iommu/iommu.c iommu_map, iommu_unmap, iommu_iotlb_sync; spec/semantics.md section 11; seed.md Q13.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from guestmem.arch import FirmwareError
from guestmem.iommu.addresses import IoPage, blocks
from guestmem.iommu.leaves import GmemLeaf, IoLeaf, Iotlb
from guestmem.iommu.secure import Frames, fitting
from guestmem.memory import Access, PageTable, Pfn, Range, Window
from guestmem.sched import Lock, LockClass, Scheduler
from guestmem.trace import Tracer
from guestmem.trace import events as event


class CannotSplit(Exception):
    """A leaf sticks out of what must go, and there is no memory for the table that would take its place; or hardware or
    firmware does not split the entry under it. `page` is in the leaf."""

    def __init__(self, page: IoPage) -> None:
        self.page = page
        super().__init__(f"the leaf over IO page {page:#x}")


@dataclasses.dataclass(frozen=True, slots=True)
class DomainStatistics:
    """Leaves and IOTLB entries now; look-ups since creation."""

    number: int
    trusted: bool
    leaves: int
    iotlb_entries: int
    iotlb_hits: int
    walks: int


class Domain:
    """`access` is that of every guest_memfd page it maps. `orders` are those that a leaf can have, largest first.
    `number` names it in traces."""

    def __init__(
        self, scheduler: Scheduler, tracer: Tracer, number: int, access: Access, orders: Sequence[int]
    ) -> None:
        self.number = number
        self.access = access
        self.lock = Lock(scheduler, LockClass.IO_PAGE_TABLE_LOCK, f"IO page table lock domain {number}")
        self.window: Window[IoPage] = Window(f"IO invalidate_seq domain {number}")
        self.table: PageTable[IoPage, IoLeaf] = PageTable()
        self.iotlb = Iotlb()
        self._frames = Frames()
        self._orders = orders
        self._hits = 0
        self._walks = 0
        self._scheduler = scheduler
        self._tracer = tracer

    @property
    def trusted(self) -> bool:
        return self.access is Access.PRIVATE

    # The hardware's side

    def translate(self, page: IoPage) -> IoLeaf | None:
        """What an access to `page` finds: a cached translation, else the table's. Lockless, like the hardware's
        walk."""
        leaf = self.iotlb.lookup(page)
        if leaf is not None:
            self._hits += 1
            return leaf
        self._walks += 1
        leaf = self.table.lookup(page)
        if leaf is not None:
            self.iotlb.insert(leaf)
        return leaf

    # The driver's side

    def install(self, leaf: IoLeaf, seen: int) -> bool:
        """Map `leaf` unless the look-up behind it is void; whether it was mapped. The lock is held.

        `seen` is the window's sequence from before the look-up. A window over any page of the leaf makes it void (S13).
        """
        assert self.lock.held_by_me, "install without the lock"
        if self.is_void(leaf, seen):
            return False
        self._map(leaf)
        if self._tracer.enabled:
            pfn = leaf.pfn if isinstance(leaf, GmemLeaf) else -1
            self._tracer.emit(event.IommuMap(self.number, leaf.page, leaf.order, self.access.value, pfn))
        return True

    def is_void(self, leaf: IoLeaf, seen: int) -> bool:
        """Whether the look-up behind a leaf may be out of date. The lock is held."""
        return self.window.blocks(seen, Range(leaf.page, IoPage(leaf.page + (1 << leaf.order))))

    def zap(self, pages: Range[IoPage]) -> int:
        """Take `pages` out of the table, not yet out of the IOTLB; how many leaves went. The lock is held.

        What a larger leaf maps beside them stays mapped, by smaller ones: a device may be without the means to ask for
        it again. Raises: CannotSplit, with nothing done.
        """
        assert self.lock.held_by_me, "zap without the lock"
        sticking_out = self._sticking_out(pages)
        for leaf in sticking_out:
            self._cut_under(leaf, pages)
        pieces = self._beside(pages) if sticking_out else ()
        zapped = self.table.zap(pages)
        for piece in pieces:
            self._map(piece)
        if zapped and self._tracer.enabled:
            self._tracer.emit(event.IommuUnmap(self.number, pages.start, pages.end, zapped))
        return zapped

    def flush(self, pages: Range[IoPage]) -> None:
        """Have the IOTLB forget `pages`; returns when no access that was translated before is under way."""
        self.iotlb.flush(pages)

    def drop(self, pages: Range[IoPage]) -> None:
        """Zap and flush. The lock is held. Raises: CannotSplit."""
        if self.zap(pages):
            self.flush(pages)

    def forget(self, pages: Range[IoPage]) -> None:
        """As drop, with all of a leaf that sticks out: nobody gets what is beside `pages` but by asking again."""
        leaves = self._sticking_out(pages)
        start = min([pages.start, *(leaf.page for leaf in leaves)])
        around = Range(start, max([pages.end, *(leaf.end for leaf in leaves)]))
        if self.table.zap(around):
            self.flush(around)

    def follow(self, pfn: Pfn, pages: int) -> None:
        """The ownership tables have another entry for these pages now, or none: leaves over them give way to those
        that agree. Raises: CannotSplit, with that leaf as it was."""
        for page in self._frames.near(pfn, pages, self._orders):
            leaf = self.table.lookup(page)
            if isinstance(leaf, GmemLeaf) and leaf.pfn < pfn + pages and pfn < leaf.pfn + (1 << leaf.order):
                self._replace(leaf, list(fitting(leaf, self._orders)))

    def _replace(self, leaf: GmemLeaf, parts: list[GmemLeaf]) -> None:
        if parts == [leaf]:
            return
        if parts and self._scheduler.fails("IO page table: split a leaf"):
            raise CannotSplit(leaf.page)
        gone = Range(leaf.page, leaf.end)
        self.table.zap(gone)
        for part in parts:
            self._map(part)
        self.flush(gone)
        if self._tracer.enabled:
            self._tracer.emit(event.IommuUnmap(self.number, leaf.page, leaf.end, 1))
            for part in parts:
                self._tracer.emit(event.IommuMap(self.number, part.page, part.order, self.access.value, part.pfn))

    def _map(self, leaf: IoLeaf) -> None:
        self.table.map(leaf.page, leaf.order, leaf)
        if self.trusted and leaf.rules is not None:
            self._frames.note(leaf, self.table)

    def _cut_under(self, leaf: GmemLeaf, pages: Range[IoPage]) -> None:
        """Make it possible to cut a leaf along the ends of `pages`. Raises: CannotSplit."""
        if self._scheduler.fails("IO page table: split a leaf"):
            raise CannotSplit(leaf.page)
        inside = Range(leaf.page, leaf.end).intersection(pages)
        if leaf.rules is None or not self.trusted or inside is None:
            return
        try:
            leaf.rules.cut(Pfn(leaf.pfn + inside.start - leaf.page), inside.pages)
        except FirmwareError as error:
            raise CannotSplit(leaf.page) from error

    def begin(self, ranges: Iterable[Range[IoPage]]) -> None:
        """Open a window over the hull of `ranges`: nothing is installed there until `end`. The lock is held."""
        ranges = tuple(ranges)
        self.window.begin(Range(min(r.start for r in ranges), max(r.end for r in ranges)))

    async def end(self) -> None:
        """Close one window."""
        async with self.lock:
            self.window.end()

    def _beside(self, pages: Range[IoPage]) -> list[GmemLeaf]:
        """Leaves for what those that stick out of `pages` map beside them."""
        found: list[GmemLeaf] = []
        for leaf in self._sticking_out(pages):
            found += self._parts(leaf, Range(leaf.page, pages.start))
            found += self._parts(leaf, Range(pages.end, leaf.end))
        return found

    def _sticking_out(self, pages: Range[IoPage]) -> list[GmemLeaf]:
        """Those that map some of `pages`, and something beside."""
        found: list[GmemLeaf] = []
        for end in (pages.start, IoPage(pages.end - 1)):
            leaf = self.table.lookup(end)
            out = isinstance(leaf, GmemLeaf) and (leaf.page < pages.start or pages.end < leaf.end)
            if isinstance(leaf, GmemLeaf) and out and leaf not in found:
                found.append(leaf)
        return found

    def _parts(self, leaf: GmemLeaf, pages: Range[IoPage]) -> list[GmemLeaf]:
        smaller = [order for order in self._orders if order < leaf.order]
        return [leaf.part(page, order) for page, order in blocks(pages, smaller)]

    # For the reader

    def statistics(self) -> DomainStatistics:
        return DomainStatistics(
            self.number, self.trusted, len(self.table), sum(1 for _ in self.iotlb.leaves()), self._hits, self._walks
        )

    def check(self) -> None:
        """Nothing is cached that the table does not have, T=1 leaves agree with the ownership tables, and no window is
        open at a quiet moment."""
        for _, _, leaf in self.table.leaves() if self.trusted else ():
            agrees = not isinstance(leaf, GmemLeaf) or leaf.rules is None or leaf.rules.fits(leaf.block)
            assert agrees, f"S13: {leaf} is over entries of another size, or none"
        for leaf in self.iotlb.leaves():
            current = self.table.lookup(leaf.page)
            assert current is not None and current.place_at(leaf.page) == leaf.place_at(leaf.page), f"S3: stale {leaf}"
        assert not self.window.open, f"S4: {self.window.open} windows of domain {self.number} are open"
