"""B55: an IO address space that maps a guest_memfd is not among those who are told."""

from guestmem.check.mutants import mutant
from guestmem.iommu.context import IommuGmemContext
from guestmem.memory import Invalidation


@mutant("B55", replaces="guestmem.iommu.context:IommuGmemContext.invalidate_begin", breaks={"S1", "S3", "S10", "MC"})
async def iommu_is_not_told(self: IommuGmemContext, invalidation: Invalidation) -> None:
    """Mapped by descriptor, no reference kept, no notifier: the device goes on writing."""
