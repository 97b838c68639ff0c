"""B15: populate lets go of the page that it looked up before it is measured and mapped."""

from guestmem.check.mutants import mutant
from guestmem.kvm.addresses import Gfn
from guestmem.kvm.context import KvmGmemContext
from guestmem.kvm.memslots import MemorySlot
from guestmem.kvm.populate import PostPopulate
from guestmem.memory import Access


@mutant("B15", replaces="guestmem.kvm.populate:_populate_page", breaks={"S12"})
async def page_looked_up_twice(
    context: KvmGmemContext,
    slot: MemorySlot,
    gfn: Gfn,
    source_hva: int | None,
    post_populate: PostPopulate,
    corrects_source: bool,
) -> None:
    """The lock does not cover both the look-up and the step that relies on it."""
    source = await context.kvm.mm.pin_page(source_hva, write=corrects_source) if source_hva is not None else None
    try:
        async with context.inode.invalidate_lock.exclusive:
            page = await context.page_at(slot, gfn, Access.PRIVATE)
        await post_populate(gfn, page, source)
    finally:
        if source is not None:
            source.put()
