"""User 3 of the provider: the IOMMU. IO address spaces, domains of two kinds, and the devices whose DMA goes through
them.

It imports `memory` and nothing of KVM or of userspace. Start with `context.py`, where a file meets an address space.
"""

from guestmem.iommu.addresses import Iova
from guestmem.iommu.device import DmaDevice, DmaFault
from guestmem.iommu.domain import Domain
from guestmem.iommu.engine import Descriptor, DmaEngine
from guestmem.iommu.ioas import Ioas
from guestmem.iommu.iommufd import Iommu, Iommufd

__all__ = ["Descriptor", "DmaDevice", "DmaEngine", "DmaFault", "Domain", "Ioas", "Iommu", "Iommufd", "Iova"]
