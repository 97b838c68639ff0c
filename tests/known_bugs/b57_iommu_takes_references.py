"""B57: the IOMMU takes a reference to each page that it maps, and keeps it."""

from guestmem.check.mutants import mutant
from guestmem.iommu.addresses import IoPage
from guestmem.iommu.areas import GmemArea
from guestmem.iommu.context import IommuGmemContext
from guestmem.iommu.domain import Domain
from guestmem.iommu.leaves import GmemLeaf


@mutant("B57", replaces="guestmem.iommu.context:IommuGmemContext.map_page", breaks={"L1", "S14"})
async def iommu_takes_references(self: IommuGmemContext, domain: Domain, area: GmemArea, page: IoPage) -> GmemLeaf:
    """Every conversion of a page that a device can reach is busy."""
    async with self.inode.invalidate_lock.shared:
        found = await self.inode.fault(self.registration, area.index_of(page), domain.access)
        self.inode.folios.get(area.index_of(page))
    async with domain.lock:
        leaf = self._leaf(area, page, found)
        assert domain.install(leaf, domain.window.sequence.read())
        return leaf
