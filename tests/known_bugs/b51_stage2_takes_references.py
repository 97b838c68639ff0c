"""B51: a mapping in stage 2 (there: the S-EPT) holds a reference to its folio."""

from guestmem.check.mutants import mutant
from guestmem.kvm.addresses import Gfn
from guestmem.kvm.context import KvmGmemContext
from guestmem.kvm.memslots import MemorySlot
from guestmem.memory import Access, Page


@mutant("B51", replaces="guestmem.kvm.context:KvmGmemContext.get_pfn", breaks={"L1", "L3", "S14"})
async def stage2_takes_references(
    self: KvmGmemContext, slot: MemorySlot, gfn: Gfn, access: Access | None
) -> tuple[Page, Access]:
    """get_page() on map."""
    async with self.inode.invalidate_lock.shared:
        asked = access or self.inode.access_at(slot.index_of(gfn))
        page = await self.page_at(slot, gfn, asked)
        self.inode.folios.get(slot.index_of(gfn))
        return page, asked
