"""guestmem: guest_memfd as its long-term design has it, running in user space.

A script starts with `Host`; the rooms behind it are described in DESIGN.md.
"""

from guestmem.host import Gmem, Host, VcpuHandle, Vm
from guestmem.iommu import Descriptor, DmaFault
from guestmem.memory import Access
from guestmem.trace import Refusal
from guestmem.uapi.kvm import VmType
from guestmem.userspace import Pin, SigBus, SigSegv, View

__all__ = [
    "Access",
    "Descriptor",
    "DmaFault",
    "Gmem",
    "Host",
    "Pin",
    "Refusal",
    "SigBus",
    "SigSegv",
    "VcpuHandle",
    "View",
    "Vm",
    "VmType",
]
