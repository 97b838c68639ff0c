"""H01: two faults on one huge page take a page each from the subpool, and the second finds it empty.

Listed as unsolved in the cover letter of "[RFC PATCH v2 00/51] 1G page support for guest_memfd".
"""

from guestmem.check.mutants import mutant
from guestmem.memory import Access, Inode, PageRange
from guestmem.memory.restructure import prepare_split


@mutant("H01", replaces="guestmem.memory.fill:_fill_huge_page", breaks={"never"})
async def huge_page_without_mutex(inode: Inode, huge_page: PageRange, populate: bool) -> None:
    """Allocate first and look afterwards whether somebody else was faster, as for single pages."""
    shared = [run for run, access in inode.attributes.runs(huge_page) if access is Access.SHARED]
    with prepare_split(inode.scheduler, inode.folios, shared, huge_page.start) as split:
        pfns = inode.source.allocate(huge_page.pages, inode.order)
        await inode.scheduler.preempt("huge page allocated, not in the file yet")
        if huge_page.start in inode.folios.present:
            for run in pfns:
                inode.source.free(run)
            return
        inode.folios.insert(huge_page, pfns)
        split.commit()
