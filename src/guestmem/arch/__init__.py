"""Models of what hardware and firmware enforce of a guest's memory, one file or package for each architecture.

Start with `architecture.py`, what KVM asks of all of them, and `dma.py`, what the IOMMU asks.
"""

from guestmem.arch.architecture import FirmwareError, GuestArchitecture, Lifetime, Owner, Platform
from guestmem.arch.dma import Block, DmaRules
from guestmem.arch.sw import SoftwarePlatform

__all__ = [
    "Block",
    "DmaRules",
    "FirmwareError",
    "GuestArchitecture",
    "Lifetime",
    "Owner",
    "Platform",
    "SoftwarePlatform",
]
