"""B59: the last page to unpin is computed from the wrong first one."""

from guestmem.check.mutants import mutant
from guestmem.iommu.areas import PinnedPages


@mutant("B59", replaces="guestmem.iommu.areas:PinnedPages.unpin", breaks={"S3", "S14"})
def unpins_too_many(self: PinnedPages, pages: range) -> None:
    """The first page is clipped to what is pinned once, the count is not: pages that others use are put."""
    first = next((page for page in pages if self.users[page] == 1), pages.start)
    last = first + len(pages) - 1
    for page in range(pages.start, last + 1):
        self.users[page] -= 1
        if page >= first:
            self.held.pop(page).put()
