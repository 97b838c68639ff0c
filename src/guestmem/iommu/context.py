"""IommuGmemContext: the IOMMU's adapter to one guest_memfd inode; the counterpart of KVM's.

It is the registered user of the inode for one IO address space: it receives invalidations in file pages, finds where
its areas show them, and closes those parts of every domain that maps pages of that access. It holds neither the file
nor a page: a virtual machine does not live on because a device could do DMA to it, and no reference of an IOMMU ever
vetoes a conversion.

Private pages of a guest with ownership tables (`rules`) are mapped as far as those have them, and no further: the IOMMU
makes no page the guest's. Which frame it would be at only KVM's bindings know, and what the guest has not accepted no
device of its can use (semantics.md section 17: a DMA mapping leaves the table alone).

What keeps a late leaf out: a page is looked up under invalidate_lock and installed under the domain's lock, after the
window was asked. The windows that `invalidate_begin` opened are noted in `told`, and `invalidate_end` closes those and
no others, so areas and domains may come and go meanwhile: a new one finds its pages after the end, since it waits for
invalidate_lock.

Source: no kernel has this. seed.md R1, R16, Q6 to Q9; spec/semantics.md 2.3 and 11.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from guestmem.iommu.addresses import IoPage
from guestmem.iommu.areas import GmemArea
from guestmem.iommu.domain import CannotSplit, Domain
from guestmem.iommu.leaves import GmemLeaf
from guestmem.iommu.secure import largest_fitting
from guestmem.memory import PAGE_SHIFT, Inode, Invalidation, Page, Pfn, Reason
from guestmem.memory.pages import block
from guestmem.trace import Refusal
from guestmem.trace import events as event

if TYPE_CHECKING:
    from guestmem.iommu.ioas import Ioas


class IommuGmemContext:
    """All areas of one IO address space that show one inode."""

    kind = "iommu"
    takes_references = False

    def __init__(self, ioas: Ioas, inode: Inode) -> None:
        self.ioas = ioas
        self.inode = inode
        self.areas: list[GmemArea] = []
        self.told: list[Domain] = []
        self.may_map_private = any(domain.trusted for domain in ioas.domains)
        self.closed = False
        self.rules = ioas.rules_of(inode.owner)
        if self.rules is not None:
            self.rules.followers.add(self.follow)
        self.registration = inode.register(self)

    # From memory to the IOMMU: invalidations

    async def invalidate_begin(self, invalidation: Invalidation) -> None:
        """Nothing of the pages is mapped, cached or under way in any domain of these accesses when it returns."""
        revoked: list[GmemArea] = []
        for domain in list(self.ioas.domains):
            if domain.access in invalidation.accesses:
                await self._close(domain, invalidation, revoked)
        if invalidation.reason is Reason.RELEASE:
            revoked += [area for area in self.areas if area not in revoked]
            for area in revoked:
                self._revoke(area, "the memory is gone")
        for area in revoked:
            await self._drop_everywhere(area)

    async def invalidate_end(self, invalidation: Invalidation) -> None:
        """The pages may be mapped again. Nothing is mapped here: that is for who wants them (R9)."""
        while self.told:
            await self.told[-1].end()
            self.told.pop()

    async def _close(self, domain: Domain, invalidation: Invalidation, revoked: list[GmemArea]) -> None:
        if not any(area.io_pages_of(invalidation.pages) for area in self.areas):
            return
        async with domain.lock:
            ranges = [(area, pages) for area in self.areas if (pages := area.io_pages_of(invalidation.pages))]
            if not ranges:
                return  # unmapped while we waited
            hull = invalidation.hull or invalidation.pages
            domain.begin(around for area in self.areas if (around := area.io_pages_of(hull)))
            self.told.append(domain)
            for area, pages in ranges:
                try:
                    domain.drop(pages)
                except CannotSplit:
                    self._revoke(area, "a leaf cannot be split")
                    domain.forget(area.pages)
                    revoked.append(area)

    def _revoke(self, area: GmemArea, why: str) -> None:
        """From now on the area maps nothing; what it has mapped, the caller drops."""
        if area.revoked:
            return
        area.revoked = True
        tracer = self.ioas.tracer
        if tracer.enabled:
            tracer.emit(event.IommuRevoke(self.ioas.number, area.pages.start, area.pages.end, why))

    async def _drop_everywhere(self, area: GmemArea) -> None:
        for domain in list(self.ioas.domains):
            async with domain.lock:
                domain.drop(area.pages)

    # From the architecture to the IOMMU: entries of the ownership tables that are split, or go

    def follow(self, pfn: Pfn, pages: int) -> None:
        """No trusted domain has a leaf over these pages that disagrees with the tables when it returns."""
        for domain in self.ioas.domains:
            while domain.trusted:
                try:
                    domain.follow(pfn, pages)
                    break
                except CannotSplit as cannot:
                    area = self.ioas.area_at(cannot.page)
                    assert isinstance(area, GmemArea)
                    area.context._revoke(area, "a leaf cannot be split")
                    for each in self.ioas.domains:
                        each.forget(area.pages)

    # From the IOMMU to memory: look-ups

    async def map_page(self, domain: Domain, area: GmemArea, page: IoPage) -> GmemLeaf:
        """Have `page` of the area mapped in the domain; the leaf over it. The IOAS's lock is held, shared will do.

        Raises: Refusal EIO `iommu.revoked`; EFAULT `iommu.not_guests`; what Inode.fault refuses.
        """
        inode = self.inode
        if area.revoked or not inode.references.get_unless_zero():
            raise Refusal(errno.EIO, "iommu.revoked", iova=page << PAGE_SHIFT)
        try:
            while True:
                seen = domain.window.sequence.read()
                async with inode.invalidate_lock.shared:
                    found = await inode.fault(self.registration, area.index_of(page), domain.access)
                await self.ioas.scheduler.preempt("page looked up, IO leaf not installed")
                async with domain.lock:
                    if area.revoked:
                        raise Refusal(errno.EIO, "iommu.revoked", iova=page << PAGE_SHIFT)
                    leaf = self._leaf(area, page, found)
                    if domain.trusted and self.rules is not None and not domain.is_void(leaf, seen):
                        leaf = self._agreeing(leaf, page)
                    if domain.install(leaf, seen):
                        return leaf
        finally:
            await inode.put()

    def _leaf(self, area: GmemArea, page: IoPage, found: Page) -> GmemLeaf:
        largest = found.order if self.ioas.large_pages else 0
        order = area.leaf_order(page, [order for order in self.ioas.orders if order <= largest])
        start = block(page, order).start
        inside = page - start
        return GmemLeaf(
            start,
            order,
            Pfn(found.pfn - inside),
            found.hva - (inside << PAGE_SHIFT),
            area.readable,
            area.writable,
            self.inode,
            area.index_of(start),
            self.rules,
        )

    def _agreeing(self, leaf: GmemLeaf, page: IoPage) -> GmemLeaf:
        """As much of a leaf as the ownership tables have. Raises: Refusal EFAULT `iommu.not_guests`."""
        agreeing = largest_fitting(leaf, page, self.ioas.orders)
        if agreeing is None:
            raise Refusal(errno.EFAULT, "iommu.not_guests", iova=page << PAGE_SHIFT, pfn=leaf.pfn + page - leaf.page)
        return agreeing

    async def close(self) -> None:
        """The last area is gone. Returns when no notification is in flight."""
        if self.registration in self.inode.users.registrations:  # an inode that has ended has none
            await self.registration.unregister()
        if self.rules is not None:
            self.rules.followers.remove(self.follow)
        self.closed = True

    def check(self) -> None:
        """Areas know their context, are inside the file, and nothing is told at a quiet moment."""
        assert not self.told, "S4: a window was opened and not closed"
        for area in self.areas:
            assert area.context is self, "S5: an area of another context"
            assert area.indices.end <= self.inode.pages, "S5: an area beyond the end of the file"
