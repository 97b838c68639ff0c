"""B35: as B07, in fallocate: an error value goes into the file as a page."""

from guestmem.check.mutants import mutant
from guestmem.memory import Inode, PageRange, Pfn, Range
from guestmem.trace import Refusal


@mutant("B35", replaces="guestmem.memory.guest_memfd:Inode._fill", breaks={"S10", "S14", "S15"})
async def allocation_error_as_folio(self: Inode, pages: PageRange, populate: bool = False) -> None:
    """`if (!folio)` where the helper returns ERR_PTR."""
    while gap := next(self.folios.absent(pages), None):
        try:
            if self._scheduler.fails("folio: allocate"):
                raise Refusal(12, "pool.empty", wanted=gap.pages)
            pfns = self._pool.allocate(gap.pages, self.order)
        except Refusal as refusal:
            error = -(refusal.errno or 0)
            pfns = [Range(Pfn(error), Pfn(error + gap.pages))]
        await self._scheduler.preempt("allocated, not in the file yet")
        if self.folios.present.range_cardinality(gap.start, gap.end):
            self._give_back(pfns)
            continue
        self.folios.insert(gap, pfns)
