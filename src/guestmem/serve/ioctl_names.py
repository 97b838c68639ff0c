"""Names of ioctl numbers, for the reader."""

from __future__ import annotations

from guestmem.serve import gup_test
from guestmem.uapi import iommufd, kvm, liveupdate

_PREFIXES = ("KVM_", "PIN_", "IOMMU_", "VFIO_DEVICE_", "GUESTMEM_DMA_", "LIVEUPDATE_")
_TYPES = (kvm.KVMIO, 0xAF, ord("g"), ord(";"), 0xBA)
_NAMES = {
    value: name
    for module in (kvm, gup_test, iommufd, liveupdate)
    for name, value in vars(module).items()
    if isinstance(value, int) and name.startswith(_PREFIXES) and (value >> 8 & 0xFF) in _TYPES
}


def ioctl_name(request: int) -> str:
    """KVM_RUN for 0xae80; the number itself where it has no name here."""
    return _NAMES.get(request, f"ioctl {request:#x}")
