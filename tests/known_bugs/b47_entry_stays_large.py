"""B47, the other way round: the leaf is split for a conversion while the RMP entry under it is still one."""

from guestmem.check.mutants import mutant
from guestmem.iommu.addresses import IoPage
from guestmem.iommu.domain import Domain
from guestmem.iommu.leaves import GmemLeaf
from guestmem.memory import Range


@mutant("B47", replaces="guestmem.iommu.domain:Domain._cut_under", breaks={"S13"})
def entry_stays_large(self: Domain, leaf: GmemLeaf, pages: Range[IoPage]) -> None:
    """The device faults on pages that nobody converts, until the PSMASH comes."""
