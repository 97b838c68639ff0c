"""ABI levels: what a kernel of that age has. A level is data; the code asks for the feature, never for the name.

Source: spec/uapi.md section 1.
"""

from __future__ import annotations

import dataclasses
import errno


@dataclasses.dataclass(frozen=True, slots=True)
class AbiLevel:
    """`mmap`: GUEST_MEMFD_FLAG_MMAP and INIT_SHARED exist, and a VM without private memory may have guest_memfd slots
    (kvm_arch_supports_gmem; before, kvm_arch_has_private_mem). `in_place`: pages carry their access in the file and are
    converted there; otherwise the VM has attributes by guest frame. `overlap_errno`: for a file range that is bound
    already. `signed_range_end`: the end of a bound file range is compared as a signed number (known bug B04).
    `hugetlb`: files of huge pages, and the conversion calls that were posted with them. `own_file_system`: files lie in
    one of guest_memfd's own, with one NUMA policy for each inode, from 6.19 on. `gmem_dma`: IOMMU_IOAS_MAP_FILE takes a
    guest_memfd. `link`: files can be linked to another VM, and software-protected VMs migrate and have helpers."""

    name: str
    mmap: bool
    in_place: bool
    overlap_errno: int
    signed_range_end: bool
    own_file_system: bool = True
    hugetlb: bool = False
    gmem_dma: bool = False
    link: bool = False


LEVELS: dict[str, AbiLevel] = {
    level.name: level
    for level in (
        AbiLevel(
            "v6.12",
            mmap=False,
            in_place=False,
            overlap_errno=errno.EINVAL,
            signed_range_end=True,
            own_file_system=False,
        ),
        AbiLevel(
            "v6.18", mmap=True, in_place=False, overlap_errno=errno.EINVAL, signed_range_end=True, own_file_system=False
        ),
        AbiLevel("v7.3", mmap=True, in_place=False, overlap_errno=errno.EEXIST, signed_range_end=False),
        AbiLevel("v7.4", mmap=True, in_place=True, overlap_errno=errno.EEXIST, signed_range_end=False),
        AbiLevel(
            "future",
            mmap=True,
            in_place=True,
            overlap_errno=errno.EEXIST,
            signed_range_end=False,
            hugetlb=True,
            gmem_dma=True,
            link=True,
        ),
    )
}
FUTURE = LEVELS["future"]
