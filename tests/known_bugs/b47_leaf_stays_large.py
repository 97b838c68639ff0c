"""B47: a huge page is split everywhere but in the IO page table. As far as it goes without an ownership table."""

from guestmem.check.mutants import mutant
from guestmem.iommu.addresses import IoPage
from guestmem.iommu.domain import Domain
from guestmem.memory import Range


@mutant("B47", replaces="guestmem.iommu.domain:Domain.zap", breaks={"S2", "S13"})
def leaf_stays_large(self: Domain, pages: Range[IoPage]) -> int:
    """Folio and stage 2 are of small pages, the leaf over them spans both accesses."""
    return 0 if self._beside(pages) else self.table.zap(pages)
