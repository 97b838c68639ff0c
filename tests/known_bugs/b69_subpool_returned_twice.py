"""B69: truncation returns a huge page's reservation, and so does the callback that frees it."""

from guestmem.check.mutants import mutant
from guestmem.memory import Folios, PageRange, Subpool

_remove = Folios.remove


@mutant("B69", replaces="guestmem.memory.folio:Folios.remove", breaks={"S14", "L3"})
def subpool_returned_twice(self: Folios, pages: PageRange) -> int:
    """Call subpool_put in truncate and in free."""
    if isinstance(self.source, Subpool) and not self.source.closed:
        count = self.present.range_cardinality(pages.start, pages.end) >> self.order
        self.source.reserved += count
        self.source.huge.reserved += count
    return _remove(self, pages)
