"""B18: populate takes source address 0 for "in place"."""

from guestmem.check.mutants import mutant
from guestmem.kvm.addresses import Gfn
from guestmem.kvm.context import KvmGmemContext
from guestmem.kvm.memslots import MemorySlot
from guestmem.kvm.populate import PostPopulate
from guestmem.memory import Access


@mutant("B18", replaces="guestmem.kvm.populate:_populate_page", breaks={"S16", "never"})
async def null_source(
    context: KvmGmemContext,
    slot: MemorySlot,
    gfn: Gfn,
    source_hva: int | None,
    post_populate: PostPopulate,
    corrects_source: bool,
) -> None:
    """`if source:` where `if source is not None:` is meant."""
    source = await context.kvm.mm.pin_page(source_hva, write=corrects_source) if source_hva else None
    try:
        async with context.inode.invalidate_lock.exclusive:
            page = await context.page_at(slot, gfn, Access.PRIVATE)
            await post_populate(gfn, page, source)
    finally:
        if source is not None:
            source.put()
