"""/dev/iommu and what VFIO adds to it: numbers and argument structures, sizes and offsets as in the kernel's headers.

Every structure of iommufd begins with its own size, so that it can grow: `MIN_SIZE` is what a caller must pass, and
what it passes beyond `SIZE` must be zero. VFIO's begin with `argsz` and are read up to the last field that is known.

What is guestmem's own, because nothing is posted, is marked so; the numbers are from the ends of their spaces.

Source: include/uapi/linux/iommufd.h, include/uapi/linux/vfio.h.
"""

from __future__ import annotations

import dataclasses
import struct
from typing import ClassVar

from guestmem.uapi.structs import Argument

_TYPE = ord(";")


def _io(nr: int) -> int:
    return _TYPE << 8 | nr


IOMMU_DESTROY = _io(0x80)
IOMMU_IOAS_ALLOC = _io(0x81)
IOMMU_IOAS_ALLOW_IOVAS = _io(0x82)
IOMMU_IOAS_COPY = _io(0x83)
IOMMU_IOAS_IOVA_RANGES = _io(0x84)
IOMMU_IOAS_MAP = _io(0x85)
IOMMU_IOAS_UNMAP = _io(0x86)
IOMMU_OPTION = _io(0x87)
IOMMU_HWPT_ALLOC = _io(0x89)
IOMMU_IOAS_MAP_FILE = _io(0x8F)

VFIO_DEVICE_GET_INFO = _io(0x6B)
VFIO_DEVICE_RESET = _io(0x6F)
VFIO_DEVICE_BIND_IOMMUFD = _io(0x76)
VFIO_DEVICE_ATTACH_IOMMUFD_PT = _io(0x77)
VFIO_DEVICE_DETACH_IOMMUFD_PT = _io(0x78)
GUESTMEM_DMA_DOORBELL = _io(0xFF)
"""guestmem's own: in the place of a register, see `DmaDoorbell`."""

IOMMU_IOAS_MAP_FIXED_IOVA = 1 << 0
IOMMU_IOAS_MAP_WRITEABLE = 1 << 1
IOMMU_IOAS_MAP_READABLE = 1 << 2
GUESTMEM_IOAS_MAP_FOLLOW = 1 << 31
"""guestmem's own, for a guest_memfd: map by page requests alone, pages of either access may lie in the range."""

GUESTMEM_HWPT_ALLOC_TRUSTED = 1 << 31
"""guestmem's own: a page table of T=1, which maps private pages."""

IOMMU_OPTION_RLIMIT_MODE = 0
IOMMU_OPTION_HUGE_PAGES = 1
IOMMU_OPTION_OP_SET = 0
IOMMU_OPTION_OP_GET = 1

VFIO_DEVICE_FLAGS_RESET = 1 << 0


class IommuArgument(Argument):
    """An argument that begins with its size."""

    MIN_SIZE: ClassVar[int]


@dataclasses.dataclass(frozen=True, slots=True)
class Destroy(IommuArgument):
    """struct iommu_destroy."""

    _LAYOUT = struct.Struct("<II")
    SIZE = MIN_SIZE = 8

    size: int
    id: int


@dataclasses.dataclass(frozen=True, slots=True)
class IoasAlloc(IommuArgument):
    """struct iommu_ioas_alloc."""

    _LAYOUT = struct.Struct("<III")
    SIZE = MIN_SIZE = 12

    size: int
    flags: int = 0
    out_ioas_id: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class IoasIovaRanges(IommuArgument):
    """struct iommu_ioas_iova_ranges."""

    _LAYOUT = struct.Struct("<IIIIQQ")
    SIZE = MIN_SIZE = 32

    size: int
    ioas_id: int
    num_iovas: int
    reserved_word: int = 0
    allowed_iovas: int = 0
    out_iova_alignment: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class IoasAllowIovas(IommuArgument):
    """struct iommu_ioas_allow_iovas."""

    _LAYOUT = struct.Struct("<IIIIQ")
    SIZE = MIN_SIZE = 24

    size: int
    ioas_id: int
    num_iovas: int
    reserved_word: int = 0
    allowed_iovas: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class IoasMap(IommuArgument):
    """struct iommu_ioas_map."""

    _LAYOUT = struct.Struct("<IIIIQQQ")
    SIZE = MIN_SIZE = 40

    size: int
    flags: int
    ioas_id: int
    reserved_word: int = 0
    user_va: int = 0
    length: int = 0
    iova: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class IoasMapFile(IommuArgument):
    """struct iommu_ioas_map_file."""

    _LAYOUT = struct.Struct("<IIIiQQQ")
    SIZE = MIN_SIZE = 40

    size: int
    flags: int
    ioas_id: int
    fd: int = -1
    start: int = 0
    length: int = 0
    iova: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class IoasCopy(IommuArgument):
    """struct iommu_ioas_copy."""

    _LAYOUT = struct.Struct("<IIIIQQQ")
    SIZE = MIN_SIZE = 40

    size: int
    flags: int
    dst_ioas_id: int
    src_ioas_id: int
    length: int = 0
    dst_iova: int = 0
    src_iova: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class IoasUnmap(IommuArgument):
    """struct iommu_ioas_unmap."""

    _LAYOUT = struct.Struct("<IIQQ")
    SIZE = MIN_SIZE = 24

    size: int
    ioas_id: int
    iova: int = 0
    length: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Option(IommuArgument):
    """struct iommu_option."""

    _LAYOUT = struct.Struct("<IIHHIQ")
    SIZE = MIN_SIZE = 24

    size: int
    option_id: int
    op: int
    reserved_word: int = 0
    object_id: int = 0
    val64: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class HwptAlloc(IommuArgument):
    """struct iommu_hwpt_alloc; `fault_id` came later."""

    _LAYOUT = struct.Struct("<8IQII")
    SIZE = 48
    MIN_SIZE = 24

    size: int
    flags: int
    dev_id: int
    pt_id: int
    out_hwpt_id: int = 0
    reserved_word: int = 0
    data_type: int = 0
    data_len: int = 0
    data_uptr: int = 0
    fault_id: int = 0
    reserved_word2: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class VfioBindIommufd(Argument):
    """struct vfio_device_bind_iommufd."""

    _LAYOUT = struct.Struct("<IIiI")
    SIZE = 16

    argsz: int
    flags: int
    iommufd: int
    out_devid: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class VfioAttachPt(Argument):
    """struct vfio_device_attach_iommufd_pt, as far as it was at first."""

    _LAYOUT = struct.Struct("<III")
    SIZE = 12

    argsz: int
    flags: int
    pt_id: int


@dataclasses.dataclass(frozen=True, slots=True)
class VfioDetachPt(Argument):
    """struct vfio_device_detach_iommufd_pt, as far as it was at first."""

    _LAYOUT = struct.Struct("<II")
    SIZE = 8

    argsz: int
    flags: int


@dataclasses.dataclass(frozen=True, slots=True)
class VfioDeviceInfo(Argument):
    """struct vfio_device_info, as far as it was at first."""

    _LAYOUT = struct.Struct("<IIII")
    SIZE = 16

    argsz: int
    flags: int = 0
    num_regions: int = 0
    num_irqs: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class DmaDoorbell(Argument):
    """guestmem's own, struct guestmem_dma_doorbell: work on `count` descriptors of the ring of `entries` at IOVA
    `ring`, from the `first` on. `done` comes back: how many have a status."""

    _LAYOUT = struct.Struct("<IIQIIII")
    SIZE = 32

    argsz: int
    flags: int
    ring: int
    entries: int
    first: int
    count: int
    done: int = 0
