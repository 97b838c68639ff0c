"""B72: a part of a larger mapping cannot be unmapped, and nobody looks."""

from guestmem.check.mutants import mutant
from guestmem.iommu.areas import GmemArea
from guestmem.iommu.context import IommuGmemContext
from guestmem.iommu.domain import Domain
from guestmem.memory import Invalidation


@mutant("B72", replaces="guestmem.iommu.context:IommuGmemContext._close", breaks={"S1", "S3", "S13"})
async def part_of_a_mapping(
    self: IommuGmemContext, domain: Domain, invalidation: Invalidation, revoked: list[GmemArea]
) -> None:
    """The unmap of a sub-range changes nothing, and its error is ignored."""
    ranges = [(area, pages) for area in self.areas if (pages := area.io_pages_of(invalidation.pages))]
    if not ranges:
        return
    async with domain.lock:
        domain.begin(pages for _, pages in ranges)
        self.told.append(domain)
        for area, pages in ranges:
            if pages == area.pages:
                domain.drop(pages)
