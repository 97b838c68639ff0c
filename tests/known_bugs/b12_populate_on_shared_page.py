"""B12: populate prepares pages whatever their state is."""

from guestmem.check.mutants import mutant
from guestmem.kvm.addresses import Gfn
from guestmem.kvm.context import KvmGmemContext
from guestmem.kvm.memslots import MemorySlot
from guestmem.kvm.populate import PostPopulate


@mutant("B12", replaces="guestmem.kvm.populate:_populate_page", breaks={"S2", "S9"})
async def populate_on_shared_page(
    context: KvmGmemContext,
    slot: MemorySlot,
    gfn: Gfn,
    source_hva: int | None,
    post_populate: PostPopulate,
    corrects_source: bool,
) -> None:
    """The state is not tested."""
    source = await context.kvm.mm.pin_page(source_hva, write=corrects_source) if source_hva is not None else None
    try:
        async with context.inode.invalidate_lock.exclusive:
            page = await context.page_at(slot, gfn, context.kvm.access_of(gfn, slot))
            await post_populate(gfn, page, source)
    finally:
        if source is not None:
            source.put()
