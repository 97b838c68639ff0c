"""B62: a conversion succeeds though the IOMMU could not be brought up to date."""

from guestmem.check.mutants import mutant
from guestmem.iommu.areas import GmemArea
from guestmem.iommu.context import IommuGmemContext
from guestmem.iommu.domain import CannotSplit, Domain
from guestmem.memory import Invalidation


@mutant("B62", replaces="guestmem.iommu.context:IommuGmemContext._close", breaks={"S1", "S2", "S13"})
async def failure_discarded(
    self: IommuGmemContext, domain: Domain, invalidation: Invalidation, revoked: list[GmemArea]
) -> None:
    """The status of the unmapping is thrown away: the device keeps its old mapping."""
    ranges = [(area, pages) for area in self.areas if (pages := area.io_pages_of(invalidation.pages))]
    if not ranges:
        return
    async with domain.lock:
        domain.begin(pages for _, pages in ranges)
        self.told.append(domain)
        for _, pages in ranges:
            try:
                domain.drop(pages)
            except CannotSplit:
                continue
