"""U04, e6ecb88711d9: nobody looks at what storing a binding returns, and the slot counts as bound.

Upstream: "KVM: guest_memfd: Gracefully handle xarray errors when binding a memslot". Made from that subject, since the
patch was not to be had.
"""

import bisect

from guestmem.check.mutants import mutant
from guestmem.kvm.context import KvmGmemContext, _first_page
from guestmem.kvm.memslots import MemorySlot
from guestmem.memory import PageIndex, Range


@mutant("U04", replaces="guestmem.kvm.context:KvmGmemContext.bind", breaks={"S5", "S6", "S15"})
async def bind_error_ignored(self: KvmGmemContext, slot: MemorySlot, first: PageIndex) -> None:
    """A binding that was not stored, and a slot that points to the file."""
    async with self.inode.invalidate_lock.exclusive:
        slot.pages = Range(first, PageIndex(first + slot.gfns.pages))
        if not self.kvm.scheduler.fails("bind: store"):
            bisect.insort(self.bindings, slot, key=_first_page)
        slot.context = self
        slot.gmem_only = True
