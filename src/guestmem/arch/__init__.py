"""Models of what hardware and firmware enforce of a guest's memory, one file or package for each architecture.

Start with `architecture.py`: what KVM and the IOMMU ask of all of them.
"""

from guestmem.arch.architecture import Block, FirmwareError, GuestArchitecture, Lifetime, Owner, Platform
from guestmem.arch.sw import SoftwarePlatform

__all__ = ["Block", "FirmwareError", "GuestArchitecture", "Lifetime", "Owner", "Platform", "SoftwarePlatform"]
