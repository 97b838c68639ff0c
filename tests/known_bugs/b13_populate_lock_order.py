"""B13: populate pins its source under invalidate_lock, which may have to take mmap_lock."""

from guestmem.check.mutants import mutant
from guestmem.kvm.addresses import Gfn
from guestmem.kvm.context import KvmGmemContext
from guestmem.kvm.memslots import MemorySlot
from guestmem.kvm.populate import PostPopulate
from guestmem.memory import Access


@mutant("B13", replaces="guestmem.kvm.populate:_populate_page", breaks={"S17", "L5"})
async def populate_lock_order(
    context: KvmGmemContext,
    slot: MemorySlot,
    gfn: Gfn,
    source_hva: int | None,
    post_populate: PostPopulate,
    corrects_source: bool,
) -> None:
    """get_user_pages inside the locked section."""
    async with context.inode.invalidate_lock.exclusive:
        source = await context.kvm.mm.pin_page(source_hva, write=corrects_source) if source_hva is not None else None
        page = await context.page_at(slot, gfn, Access.PRIVATE)
        await post_populate(gfn, page, source)
    if source is not None:
        source.put()
