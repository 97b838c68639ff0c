"""B35: as B07, in fallocate: an error value goes into the file as a page."""

from guestmem.check.mutants import mutant
from guestmem.memory import Inode, PageRange, Pfn, Range
from guestmem.memory.fill import fill
from guestmem.trace import Refusal

_fill = fill


@mutant("B35", replaces="guestmem.memory.fill:fill", breaks={"S10", "S14", "S15"})
async def allocation_error_as_folio(inode: Inode, pages: PageRange, populate: bool = False) -> None:
    """`if (!folio)` where the helper returns ERR_PTR."""
    if inode.order:
        await _fill(inode, pages, populate)
        return
    while gap := next(inode.folios.absent(pages), None):
        try:
            if inode.scheduler.fails("folio: allocate"):
                raise Refusal(12, "pool.empty", wanted=gap.pages)
            pfns = inode.source.allocate(gap.pages, 0)
        except Refusal as refusal:
            error = -(refusal.errno or 0)
            pfns = [Range(Pfn(error), Pfn(error + gap.pages))]
        await inode.scheduler.preempt("allocated, not in the file yet")
        if inode.folios.present.range_cardinality(gap.start, gap.end):
            for run in pfns:
                inode.source.free(run)
            continue
        inode.folios.insert(gap, pfns)
