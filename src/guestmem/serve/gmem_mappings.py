"""Mappings of a guest_memfd in client processes: userspace as a registered user of the provider, with real page tables.

The counterpart of `userspace.gmem_mapping`, whose page tables are a model. Here the client's kernel faults shared pages
in by itself, straight from the memfd; the provider learns of such pages when it next looks (`Inode.absorb`).

When `invalidate_begin` returns, no client has an entry for the range. What opens pages again is `invalidate_end`, by
the state that the pages have then; so a conversion that failed leaves the mappings as they were (S15).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from guestmem.memory import PAGE_SHIFT, Access, Inode, Invalidation, PageIndex, PageRange, Range, Reason
from guestmem.memory.notifier import UnmapFailed
from guestmem.serve.guard import HvaRange

if TYPE_CHECKING:
    from guestmem.serve.client import Client

PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
_CONVERSIONS = (Reason.CONVERT_TO_PRIVATE, Reason.CONVERT_TO_SHARED)


class GmemArea:
    """Bytes `start`..`end` of a client's memory show an inode from page `first` on. `prot` as mmap(2)."""

    def __init__(
        self, client: Client, mappings: GmemMappings, start: int, end: int, first: PageIndex, prot: int
    ) -> None:
        self.client = client
        self.mappings = mappings
        self.start = start
        self.end = end
        self.first = first
        self.prot = prot
        self.by_page = False  # see `guard`

    @property
    def inode(self) -> Inode:
        return self.mappings.inode

    @property
    def backing_fd(self) -> int:
        return self.mappings.backing_fd

    @property
    def pages(self) -> PageRange:
        """Those that the area shows; they may reach beyond the end of the file."""
        return Range(self.first, PageIndex(self.first + ((self.end - self.start) >> PAGE_SHIFT)))

    def index_of(self, hva: int) -> PageIndex:
        return PageIndex(self.first + ((hva - self.start) >> PAGE_SHIFT))

    def offset_of(self, hva: int) -> int:
        """The byte of the file that `hva` shows."""
        return (self.first << PAGE_SHIFT) + hva - self.start

    def hvas_of(self, pages: PageRange) -> HvaRange | None:
        """Where the area shows any of `pages`; None if nowhere."""
        inside = self.pages.intersection(pages)
        if inside is None:
            return None
        base = self.start - (self.first << PAGE_SHIFT)
        return base + (inside.start << PAGE_SHIFT), base + (inside.end << PAGE_SHIFT)

    def cut(self, start: int, end: int) -> GmemArea:
        """The part of the area between two addresses, as an area of its own; not attached."""
        part = GmemArea(self.client, self.mappings, start, end, self.index_of(start), self.prot)
        part.by_page = self.by_page
        return part

    def ranges(self, pages: PageRange, access: Access) -> list[HvaRange]:
        """Where the area shows those of `pages` that have `access` now."""
        inside = pages.intersection(Range(PageIndex(0), PageIndex(self.inode.pages)))
        if inside is None:
            return []
        runs = (run for run, has in self.inode.runs(inside) if has is access)
        return [hvas for run in runs if (hvas := self.hvas_of(run))]


class GmemMappings:
    """Every area of every client that shows one inode. `backing_fd` is the memfd behind it."""

    kind = "userspace"
    may_map_private = False
    takes_references = True

    def __init__(self, inode: Inode, backing_fd: int) -> None:
        self.inode = inode
        self.backing_fd = backing_fd
        self.areas: list[GmemArea] = []
        self.registration = inode.register(self)

    async def attach(self, area: GmemArea) -> None:
        """A mapping that is new, and that the client cannot touch yet: close it where the pages are private."""
        async with self.inode.invalidate_lock.shared:
            self.areas.append(area)
            await area.client.guard.cover(area, area.ranges(area.pages, Access.PRIVATE) + self._frozen_ranges(area))

    def detach(self, area: GmemArea) -> None:
        self.areas.remove(area)

    async def freeze(self) -> None:
        """The inode is frozen: close every page that is not there, in the mappings of all files."""
        await self.learn()
        for mappings in self._of_every_file():
            for area in list(mappings.areas):
                if area.client.alive and (ranges := mappings._frozen_ranges(area)):
                    await area.client.guard.close_ranges(area, ranges)

    async def thaw(self) -> None:
        """It is frozen no more: open what is shared."""
        for mappings in self._of_every_file():
            for area in list(mappings.areas):
                if area.client.alive and (ranges := area.ranges(area.pages, Access.SHARED)):
                    await area.client.guard.open_ranges(area, ranges)

    def _of_every_file(self) -> list[GmemMappings]:
        users = (registration.user for registration in self.inode.users.registrations)
        return [user for user in users if isinstance(user, GmemMappings)]

    def _frozen_ranges(self, area: GmemArea) -> list[HvaRange]:
        inside = area.pages.intersection(Range(PageIndex(0), PageIndex(self.inode.pages)))
        if not self.inode.frozen or inside is None:
            return []
        return [hvas for gap in self.inode.folios.absent(inside) if (hvas := area.hvas_of(gap))]

    async def learn(self) -> None:
        """Have the provider know every page that clients have faulted in, for its statistics."""
        async with self.inode.invalidate_lock.shared:
            await self.inode.absorb(Range(PageIndex(0), PageIndex(self.inode.pages)))

    async def invalidate_begin(self, invalidation: Invalidation) -> None:
        """Close what is about to become private. A hole needs nothing: freeing the page in the memfd unmaps it."""
        await self.inode.absorb(invalidation.pages)
        if Access.SHARED not in invalidation.accesses:
            return
        closes = invalidation.reason in (Reason.CONVERT_TO_PRIVATE, Reason.POISON)
        for area in list(self.areas):
            hvas = area.hvas_of(invalidation.pages)
            if hvas is None or not area.client.alive:
                continue
            await area.client.memory.tell_kvm(*hvas)
            if closes:
                await self._close(area, hvas, invalidation.pages)

    async def _close(self, area: GmemArea, hvas: HvaRange, pages: PageRange) -> None:
        try:
            await area.client.guard.close_ranges(area, [hvas])
        except OSError as error:
            raise UnmapFailed(pages, f"client {area.client.pid}: {os.strerror(error.errno or 0)}") from error

    async def invalidate_end(self, invalidation: Invalidation) -> None:
        for area in list(self.areas):
            if invalidation.reason not in _CONVERSIONS and not area.by_page:
                continue
            if area.client.alive and (ranges := area.ranges(invalidation.pages, Access.SHARED)):
                await area.client.guard.open_ranges(area, ranges)
