"""B63: where a mapping was to be taken away it is made once more."""

from guestmem.check.mutants import mutant
from guestmem.iommu.areas import PinnedArea


@mutant("B63", replaces="guestmem.iommu.areas:PinnedArea.unpin", breaks={"L3", "S14"})
def map_at_teardown(self: PinnedArea) -> None:
    """The call that sets up in the place of the call that tears down: the pages stay pinned for ever."""
    if self.pinned:
        for page in self.slice:
            self.source.users[page] += 1
