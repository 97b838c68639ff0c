"""H02: a huge page that was converted before it was allocated comes into the file whole.

The 1G series splits at conversion; a range without folios has none to split (spec/semantics.md section 10).
"""

from collections.abc import Iterable

from guestmem.check.mutants import mutant
from guestmem.memory import Folios, PageIndex, PageRange
from guestmem.memory.restructure import PreparedSplit
from guestmem.sched import Scheduler


@mutant("H02", replaces="guestmem.memory.restructure:prepare_split", breaks={"S13"})
def shared_page_comes_in_whole(
    scheduler: Scheduler, folios: Folios, shared: Iterable[PageRange], start: PageIndex
) -> PreparedSplit:
    """Split what is there, and not what is about to be."""
    present = [part for pages in shared for part in folios.present_in(pages)]
    plan = [blocks for pages in present for blocks in folios.splits.missing(pages)]
    return PreparedSplit(folios, plan, 0)
