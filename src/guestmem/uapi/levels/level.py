"""AbiLevel: one kernel's interface, as read from its file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from guestmem.uapi import kvm as uapi
from guestmem.uapi.kvm import VmType

LEVEL_IOCTLS = (
    "SET_USER_MEMORY_REGION2",
    "SET_MEMORY_ATTRIBUTES",
    "SET_MEMORY_ATTRIBUTES2",
    "CREATE_GUEST_MEMFD",
    "PRE_FAULT_MEMORY",
    "LINK_GUEST_MEMFD",
    "GMEM_CONVERT_SHARED",
    "GMEM_CONVERT_PRIVATE",
)
"""What a level can have or not have, and under which number. Every level has all other ioctls."""

CREATE_FLAGS: Mapping[str, int] = {
    "MMAP": uapi.GUEST_MEMFD_FLAG_MMAP,
    "INIT_SHARED": uapi.GUEST_MEMFD_FLAG_INIT_SHARED,
    "HUGETLB": uapi.GUEST_MEMFD_FLAG_HUGETLB,
}
"""GUEST_MEMFD_FLAG_* that have something behind them here, with their masks at the newest level that has them."""

REGION_FLAGS: Mapping[str, int] = {"USERFAULT": uapi.KVM_MEM_USERFAULT}
"""The same of KVM_MEM_*, besides the three whose bits no kernel has moved."""

REQUESTS: Mapping[str, int] = {name: getattr(uapi, f"KVM_{name}") for name in LEVEL_IOCTLS}
"""Their numbers in our code."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class AbiLevel:
    """`in_place`: pages carry their access in the file and are converted there; else the VM has attributes by guest
    frame. `own_file_system`: files lie in one of guest_memfd's own, with one NUMA policy for each inode. `gmem_dma`:
    IOMMU_IOAS_MAP_FILE takes a guest_memfd. `overlap_errno`: for a file range that is bound already.
    `signed_range_end`: the end of a bound file range is compared as a signed number (known bug B04).
    `prepare_before_overlap`: the architecture looks at a new slot before its file range is bound, not after.

    `capabilities` are the numbers that the kernel's headers name, without KVM_CAP_; `answers` what KVM_CHECK_EXTENSION
    says where it is not what is behind the capability here. `ioctls` are requests by name, without KVM_.
    `create_flags` are masks by name, without GUEST_MEMFD_FLAG_; `region_flags` without KVM_MEM_, only what is posted.
    """

    name: str
    about: str
    in_place: bool
    own_file_system: bool
    gmem_dma: bool
    overlap_errno: int
    signed_range_end: bool
    prepare_before_overlap: bool
    vm_types: tuple[VmType, ...]
    capabilities: Mapping[str, int]
    answers: Mapping[str, int]
    ioctls: Mapping[str, int]
    create_flags: Mapping[str, int]
    region_flags: Mapping[str, int]
    _by_number: Mapping[int, str] = dataclasses.field(init=False)
    _requests: Mapping[int, int | None] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_number", {number: name for name, number in self.capabilities.items()})
        object.__setattr__(self, "_requests", self._translation())

    def _translation(self) -> dict[int, int | None]:
        there: dict[int, int | None] = {number: REQUESTS[name] for name, number in self.ioctls.items()}
        return dict.fromkeys(REQUESTS.values(), None) | there

    @property
    def mmap(self) -> bool:
        """Whether userspace may map a file, and a VM without private memory may have guest_memfd slots. Source:
        kvm_arch_supports_gmem; before it, kvm_arch_has_private_mem."""
        return "MMAP" in self.create_flags

    @property
    def hugetlb(self) -> bool:
        """Files of huge pages."""
        return "HUGETLB" in self.create_flags

    @property
    def link(self) -> bool:
        """Whether files can be linked to another VM, and software-protected VMs migrate and have helpers."""
        return "LINK_GUEST_MEMFD" in self.ioctls

    @property
    def vm_type_mask(self) -> int:
        """KVM_CAP_VM_TYPES."""
        return sum(1 << vm_type for vm_type in self.vm_types)

    def create_flag(self, name: str) -> int:
        """The mask of GUEST_MEMFD_FLAG_`name`; where this kernel has no such flag, another's, which it will refuse."""
        return self.create_flags.get(name, CREATE_FLAGS[name])

    def capability(self, number: int) -> str | None:
        """The name of a capability's number here; None if the kernel's headers have none of that number."""
        return self._by_number.get(number)

    def request(self, number: int) -> int | None:
        """An ioctl's number in our code for its number here; None if it is one that this kernel does not have."""
        return self._requests.get(number, number)
