"""B07: the callee answers ERR_PTR, the caller tests for NULL, and an error value is used as a page."""

from guestmem.check.mutants import mutant
from guestmem.kvm.addresses import Gfn
from guestmem.kvm.context import KvmGmemContext
from guestmem.kvm.memslots import MemorySlot
from guestmem.memory import Access, Page, Pfn
from guestmem.trace import Refusal


@mutant("B07", replaces="guestmem.kvm.context:KvmGmemContext.page_at", breaks={"S7", "S3", "S10", "S12", "S15"})
async def error_as_page(self: KvmGmemContext, slot: MemorySlot, gfn: Gfn, access: Access) -> Page:
    """An errno comes out as a page number."""
    index = slot.index_of(gfn)
    try:
        return await self.inode.fault(self.registration, index, access)
    except Refusal as refusal:
        return Page(Pfn(-(refusal.errno or 0)), 0, self.inode.backing.hva(index), self.inode.backing.window(index))
