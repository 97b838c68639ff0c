"""B47: a huge page is split in the RMP and in the nested page table, and not in the IO page table."""

from guestmem.check.mutants import mutant
from guestmem.iommu.domain import Domain
from guestmem.memory import Pfn


@mutant("B47", replaces="guestmem.iommu.domain:Domain.follow", breaks={"S13"})
def leaf_stays_large(self: Domain, pfn: Pfn, pages: int) -> None:
    """The PSMASH is KVM's, or another device's table asked for it; this one goes on with its 2M leaf."""
