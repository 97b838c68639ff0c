"""B24: a conversion looks for references first and unmaps afterwards."""

from guestmem.check.mutants import mutant
from guestmem.memory import Access, Inode, Invalidation, PageRange
from guestmem.memory.attributes import other
from guestmem.memory.guest_memfd import _CONVERSION
from guestmem.trace.events import GmemConvert


@mutant("B24", replaces="guestmem.memory.guest_memfd:Inode.convert", breaks={"S1"})
async def references_before_unmap(self: Inode, pages: PageRange, to: Access) -> None:
    """A pin can still be taken through the entry that is there."""
    async with self.invalidate_lock.exclusive:
        if self.attributes.is_all(pages, to):
            return
        if to is Access.PRIVATE:
            self._check_no_references(pages)
        async with self.users.tell(Invalidation(pages, _CONVERSION[to], (other(to),))) as telling:
            await telling.begin()
            self._check_all_unmapped(pages)
            self.attributes.set(pages, to)
            self._tracer.emit(GmemConvert(self.number, pages.start, pages.end, to.value))
