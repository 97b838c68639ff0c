"""B24: a conversion looks for references first and unmaps afterwards."""

from guestmem.check.mutants import mutant
from guestmem.memory import Access, Inode, Invalidation, PageRange
from guestmem.memory.attributes import other
from guestmem.memory.convert import REASON, check_all_unmapped, check_no_references, store
from guestmem.memory.restructure import prepare_split, present_parts


@mutant("B24", replaces="guestmem.memory.convert:convert_range", breaks={"S1"})
async def references_before_unmap(inode: Inode, pages: PageRange, to: Access) -> None:
    """A pin can still be taken through the entry that is there."""
    async with inode.invalidate_lock.exclusive:
        if inode.attributes.is_all(pages, to):
            return
        if to is Access.PRIVATE:
            check_no_references(inode, pages)
        shared = present_parts(inode.folios, pages) if to is Access.SHARED else ()
        with prepare_split(inode.scheduler, inode.folios, shared, pages.start) as split:
            async with inode.users.tell(Invalidation(pages, REASON[to], (other(to),))) as telling:
                await telling.begin(last=False)
                check_all_unmapped(inode, pages)
                await telling.begin()
                check_all_unmapped(inode, pages)
                store(inode, pages, to, split)
