"""Mappings of a guest_memfd into host processes: userspace as a registered user of the provider.

One user for each inode, for all processes together: the address_space's i_mmap. It never maps a private page, and
references can be taken through what it maps, so the provider tells it before it looks for references.

A fault holds invalidate_lock from the look-up until the entry is installed; so no window is needed here, and when
`invalidate_begin` (which comes under the exclusive lock) has zapped, nothing old can appear.

Source: virt/kvm/guest_memfd.c kvm_gmem_fault_user_mapping; mm/memory.c unmap_mapping_range.
"""

from __future__ import annotations

import errno

from guestmem.memory import Access, File, Inode, Invalidation, PageRange
from guestmem.memory.fallocate import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from guestmem.memory.pages import offset_of
from guestmem.trace import EHWPOISON, Refusal
from guestmem.userspace.addresses import Vpn, hva_of
from guestmem.userspace.area import Area, PageSource, Pte
from guestmem.userspace.signals import BUS_ADRERR, BUS_MCEERR_AR, SigBus


class GmemMappings:
    """Every area of every process that shows one inode."""

    kind = "userspace"
    may_map_private = False
    takes_references = True

    def __init__(self, inode: Inode) -> None:
        self.areas: list[Area] = []
        self.registration = inode.register(self)

    async def invalidate_begin(self, invalidation: Invalidation) -> None:
        """Unmap the pages from all processes. Userspace maps shared pages only, so no other kind concerns it."""
        if Access.SHARED not in invalidation.accesses:
            return
        for area in list(self.areas):
            vpns = area.vpns_of(invalidation.pages)
            if vpns is not None:
                await area.mm.zap(vpns)

    async def invalidate_end(self, invalidation: Invalidation) -> None:
        """Nothing to open again: faults were kept out by invalidate_lock."""


class GmemSource:
    """A guest_memfd file as areas show it. Each area holds the file."""

    def __init__(self, file: File, mappings: GmemMappings) -> None:
        self.file = file
        self.mappings = mappings

    def attach(self, area: Area) -> None:
        self.file.get()
        self.mappings.areas.append(area)

    def detach(self, area: Area) -> None:
        self.mappings.areas.remove(area)

    async def put(self) -> None:
        await self.file.put()

    async def fault(self, area: Area, vpn: Vpn, write: bool) -> None:
        inode = self.file.inode
        index = area.index_of(vpn)
        async with inode.invalidate_lock.shared:
            try:
                page = await inode.fault(self.mappings.registration, index, Access.SHARED)
            except Refusal as refusal:
                if refusal.errno == errno.ENOMEM:
                    raise
                code = BUS_MCEERR_AR if refusal.errno == EHWPOISON else BUS_ADRERR
                raise SigBus(hva_of(vpn), code, refusal) from refusal
            entry = Pte(page.pfn, page.hva, page.window, area.writable, inode.folios, index)
            await area.mm.install(vpn, entry)

    async def discard(self, area: Area, pages: PageRange) -> None:
        """A shared mapping's pages stay in the file."""

    async def remove(self, pages: PageRange) -> None:
        mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
        await self.file.inode.fallocate(mode, offset_of(pages.start), pages.pages << 12)

    async def reclaim(self, area: Area, vpn: Vpn) -> bool:
        """Pages of a guest_memfd are unevictable."""
        return False

    def copy_for_fork(self, area: Area) -> PageSource:
        return self
