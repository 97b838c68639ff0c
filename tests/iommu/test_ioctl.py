"""The ioctls of /dev/iommu and of a device: errnos in the kernel's order, and what is written back."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from guestmem import Host, Refusal, VmType
from guestmem.host import Gmem
from guestmem.iommu import DmaFault, Iommufd
from guestmem.iommu.ioctl import MemoryFile, ioctl
from guestmem.iommu.vfio import VfioDevice
from guestmem.memory import PAGE_SIZE, File
from guestmem.trace import errno_name
from guestmem.uapi import iommufd as uapi
from guestmem.uapi.iommufd import IommuArgument
from guestmem.uapi.structs import Argument
from guestmem.userspace import AddressSpace
from guestmem.userspace.process import PROT_READ

K = PAGE_SIZE
BASE = 1 << 30
RW = uapi.IOMMU_IOAS_MAP_READABLE | uapi.IOMMU_IOAS_MAP_WRITEABLE
FIXED = uapi.IOMMU_IOAS_MAP_FIXED_IOVA


class Caller:
    """A process of the host that has /dev/iommu open, and a device."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.open = host.iommu.open()
        self.vfio = VfioDevice(host.new_dma_device())
        self.scratch = host.anonymous(2 * K)

    @property
    def mm(self) -> AddressSpace:
        return self.host.process.mm

    async def iommufd(self, fd: int) -> Iommufd | None:
        return self.open if fd == 100 else None

    async def memory_file(self, fd: int) -> File | MemoryFile:
        file = self.host.process.fds.get(fd)
        assert isinstance(file, File)
        return file

    def __call__(self, request: int, argument: Argument | bytes, tail: bytes = b"") -> str:
        """The answer, by name; the argument is in `scratch` afterwards."""
        self.scratch.write(0, (argument if isinstance(argument, bytes) else argument.pack()) + tail)
        try:
            if (request >> 8 == ord(";") and request & 0xFF < 0x80) or request == uapi.GUESTMEM_DMA_DOORBELL:
                self.host.run(self.vfio.ioctl(self, request, self.scratch.hva))
            else:
                self.host.run(ioctl(self, self.open, request, self.scratch.hva))
        except Refusal as refusal:
            return f"{errno_name(refusal.errno)} {refusal.rule}"
        return "0"

    def word(self, at: int, layout: str = "<I") -> int:
        return int(struct.unpack(layout, self.scratch.read(at, struct.calcsize(layout)))[0])

    def alloc(self) -> int:
        assert self(uapi.IOMMU_IOAS_ALLOC, uapi.IoasAlloc(12)) == "0"
        return self.word(8)

    def attached(self) -> tuple[int, int]:
        """A new address space with the device attached: its number, and the device's."""
        ioas = self.alloc()
        assert self(uapi.VFIO_DEVICE_BIND_IOMMUFD, uapi.VfioBindIommufd(16, 0, 100)) == "0"
        device = self.word(12)
        assert self(uapi.VFIO_DEVICE_ATTACH_IOMMUFD_PT, uapi.VfioAttachPt(12, 0, ioas)) == "0"
        return ioas, device


@pytest.fixture
def host() -> Iterator[Host]:
    with Host(memory=4 << 20, debug=True) as host:
        yield host


@pytest.fixture
def call(host: Host) -> Iterator[Caller]:
    caller = Caller(host)
    yield caller
    host.run(caller.open.put())
    host.run(caller.vfio.release())
    host.check()
    assert not host.iommu.ioases


@pytest.fixture
def gmem(host: Host) -> Gmem:
    return host.create_vm(VmType.SW_PROTECTED).create_guest_memfd(8 * K, mmap=True, init_shared=True)


def test_the_size_comes_first(call: Caller) -> None:
    ioas = call.alloc()
    destroy = uapi.Destroy(8, ioas)
    assert call(uapi.IOMMU_DESTROY, struct.pack("<II", 7, ioas)) == "EINVAL iommufd.size"
    assert call(uapi.IOMMU_DESTROY, struct.pack("<II", 12, ioas), b"\1\0\0\0") == "E2BIG iommufd.too_big"
    assert call(uapi.IOMMU_DESTROY, struct.pack("<II", K + 1, ioas)) == "E2BIG iommufd.too_big"
    assert call(uapi.IOMMU_DESTROY, struct.pack("<II", 12, ioas), bytes(4)) == "0"
    assert call(uapi.IOMMU_DESTROY, destroy) == "ENOENT iommufd.no_object"
    assert call(0x3BFE, destroy) == "ENOTTY ioctl.unknown"


def test_an_argument_that_cannot_be_read(call: Caller) -> None:
    with pytest.raises(Refusal, match=r"EFAULT \[user.copy\]"):
        call.host.run(ioctl(call, call.open, uapi.IOMMU_IOAS_ALLOC, 0))


def test_numbers_are_the_lowest_free(call: Caller) -> None:
    assert [call.alloc(), call.alloc(), call.alloc()] == [1, 2, 3]
    assert call(uapi.IOMMU_DESTROY, uapi.Destroy(8, 2)) == "0"
    assert call.alloc() == 2


def test_the_checks_of_map_in_order(call: Caller, gmem: Gmem) -> None:
    ioas = call.alloc()
    map_file, end = uapi.IOMMU_IOAS_MAP_FILE, (1 << 64) - 1
    answers = [
        (uapi.IoasMapFile(40, 1 << 5, 9, gmem.fd), "EOPNOTSUPP iommufd.unsupported"),
        (uapi.IoasMapFile(40, 0, 9, gmem.fd, length=end), "EOVERFLOW iommu.overflow"),
        (uapi.IoasMapFile(40, FIXED, 9, gmem.fd), "EINVAL iommufd.argument"),
        (uapi.IoasMapFile(40, RW, 9, 77), "ENOENT iommufd.no_object"),
        (uapi.IoasMapFile(40, RW, ioas, 77), "EBADF fd.not_open"),
        (uapi.IoasMapFile(40, RW, ioas, gmem.fd), "EINVAL iommu.unaligned"),
        (uapi.IoasMapFile(40, RW, ioas, gmem.fd, 0, 9 * K), "EINVAL iommu.past_end"),
        (uapi.IoasMapFile(40, RW | FIXED, ioas, gmem.fd, 0, K, 1), "EINVAL iommu.unaligned"),
        (uapi.IoasMapFile(40, RW | FIXED, ioas, gmem.fd, 0, K, (1 << 64) - K), "0"),
        (uapi.IoasMapFile(40, RW | FIXED, ioas, gmem.fd, 0, 2 * K, (1 << 64) - K), "EOVERFLOW iommu.overflow"),
        (uapi.IoasMapFile(40, RW, ioas, gmem.fd, K, 2 * K), "0"),
    ]
    for argument, answer in answers:
        assert call(map_file, argument) == answer, argument
    assert call.word(32, "<Q") == K
    assert call(map_file, uapi.IoasMapFile(40, RW | FIXED, ioas, gmem.fd, 0, K, 2 * K)) == "EEXIST iommu.exists"


def test_map_of_own_memory(call: Caller) -> None:
    ioas, _ = call.attached()
    memory = call.host.anonymous(4 * K)
    flags = RW | FIXED
    assert call(uapi.IOMMU_IOAS_MAP, uapi.IoasMap(40, flags, ioas, 1)) == "EOPNOTSUPP iommufd.unsupported"
    assert call(uapi.IOMMU_IOAS_MAP, uapi.IoasMap(40, flags, ioas, 0, 1, K, BASE)) == "EINVAL iommu.unaligned"
    wraps = uapi.IoasMap(40, flags, ioas, 0, (1 << 64) - K, 2 * K, BASE)
    assert call(uapi.IOMMU_IOAS_MAP, wraps) == "EOVERFLOW iommu.overflow"
    assert call(uapi.IOMMU_IOAS_MAP, uapi.IoasMap(40, flags, ioas, 0, 16 * K, K, BASE)) == "EFAULT user.page"
    assert call(uapi.IOMMU_IOAS_MAP, uapi.IoasMap(40, flags, ioas, 0, memory.hva, 4 * K, BASE)) == "0"
    call.host.run(call.vfio.device.write(BASE + K - 1, b"ab"))
    assert memory[K - 1 : K + 1] == b"ab"
    part = uapi.IoasUnmap(24, ioas, BASE, K)
    assert call(uapi.IOMMU_IOAS_UNMAP, part) == "ENOENT iommu.part"
    assert call(uapi.IOMMU_IOAS_UNMAP, uapi.IoasUnmap(24, ioas, 0, 0)) == "EINVAL iommu.unaligned"
    assert call(uapi.IOMMU_IOAS_UNMAP, uapi.IoasUnmap(24, ioas, 0, (1 << 64) - 1)) == "0"
    assert call.word(16, "<Q") == 4 * K
    assert call(uapi.IOMMU_IOAS_UNMAP, uapi.IoasUnmap(24, ioas, 0, (1 << 64) - 1)) == "0"


def test_a_part_of_a_guest_memfd_and_a_copy(call: Caller, gmem: Gmem) -> None:
    ioas, _ = call.attached()
    assert call(uapi.IOMMU_IOAS_MAP_FILE, uapi.IoasMapFile(40, RW | FIXED, ioas, gmem.fd, 0, 8 * K, BASE)) == "0"
    assert call(uapi.IOMMU_IOAS_COPY, uapi.IoasCopy(40, RW | FIXED, ioas, ioas, 2 * K, 2 * BASE, BASE + K)) == "0"
    assert call(uapi.IOMMU_IOAS_COPY, uapi.IoasCopy(40, RW, ioas, ioas, K, 0, 3 * BASE)) == "ENOENT iommu.not_mapped"
    assert call(uapi.IOMMU_IOAS_COPY, uapi.IoasCopy(40, RW, ioas, 9, K, 0, BASE)) == "ENOENT iommufd.no_object"
    assert call(uapi.IOMMU_IOAS_UNMAP, uapi.IoasUnmap(24, ioas, BASE + 2 * K, K)) == "0"
    gmem.mmap()[2 * K] = 7
    assert call.host.run(call.vfio.device.read(2 * BASE + K, 1)) == b"\7"
    with pytest.raises(DmaFault):
        call.host.run(call.vfio.device.read(BASE + 2 * K, 1))


def test_the_ranges_that_may_be_used(call: Caller) -> None:
    ioas, _ = call.attached()
    room = call.scratch.hva + K
    ranges = uapi.IoasIovaRanges(32, ioas, 1, 0, room)
    assert call(uapi.IOMMU_IOAS_IOVA_RANGES, ranges) == "EMSGSIZE iommufd.ranges"
    assert (call.word(8), call.word(24, "<Q")) == (2, K)
    assert call(uapi.IOMMU_IOAS_IOVA_RANGES, uapi.IoasIovaRanges(32, ioas, 2, 0, room)) == "0"
    assert struct.unpack("<4Q", call.scratch.read(K, 32)) == (0, 0xFEDF_FFFF, 0xFEF0_0000, (1 << 48) - 1)
    call.scratch.write(K, struct.pack("<2Q", BASE, BASE + 4 * K - 1))
    assert call(uapi.IOMMU_IOAS_ALLOW_IOVAS, uapi.IoasAllowIovas(24, ioas, 1, 0, room)) == "0"
    call.scratch.write(K, struct.pack("<2Q", BASE, BASE))
    assert call(uapi.IOMMU_IOAS_ALLOW_IOVAS, uapi.IoasAllowIovas(24, ioas, 1, 0, room)) == "EINVAL iommufd.argument"
    call.scratch.write(K, struct.pack("<2Q", 0, 1 << 50))
    assert call(uapi.IOMMU_IOAS_ALLOW_IOVAS, uapi.IoasAllowIovas(24, ioas, 1, 0, room)) == "EADDRINUSE iommu.reserved"
    too_many = uapi.IoasAllowIovas(24, ioas, 1 << 20, 0, room)
    assert call(uapi.IOMMU_IOAS_ALLOW_IOVAS, too_many) == "ENOMEM iommu.nomem"


def test_options(call: Caller) -> None:
    get, set_, mode, pages = 1, 0, uapi.IOMMU_OPTION_RLIMIT_MODE, uapi.IOMMU_OPTION_HUGE_PAGES
    option = uapi.IOMMU_OPTION
    assert call(option, uapi.Option(24, mode, set_, 0, 0, 1)) == "0"
    assert call(option, uapi.Option(24, mode, get)) == "0" and call.word(16) == 1
    ioas = call.alloc()
    assert call(option, uapi.Option(24, mode, set_, 0, 0, 0)) == "EBUSY iommufd.in_use"
    assert call(option, uapi.Option(24, mode, get, 0, 3)) == "EOPNOTSUPP iommufd.unsupported"
    assert call(option, uapi.Option(24, pages, get, 0, ioas)) == "0" and call.word(16) == 1
    assert call(option, uapi.Option(24, pages, set_, 0, ioas, 2)) == "EINVAL iommufd.argument"
    assert call(option, uapi.Option(24, pages, set_, 0, ioas, 0)) == "0"
    assert call(option, uapi.Option(24, pages, get, 0, 99)) == "ENOENT iommufd.no_object"
    assert call(option, uapi.Option(24, 7, get)) == "EOPNOTSUPP iommufd.unsupported"
    assert call(option, uapi.Option(24, pages, 2, 0, ioas)) == "EOPNOTSUPP iommufd.unsupported"


def test_page_tables_of_both_kinds(call: Caller, gmem: Gmem) -> None:
    ioas, device = call.attached()
    alloc = uapi.IOMMU_HWPT_ALLOC
    assert call(alloc, uapi.HwptAlloc(48, 0, 99, ioas)) == "ENOENT iommufd.no_object"
    assert call(alloc, uapi.HwptAlloc(48, 0, device, 99)) == "EINVAL iommufd.not_a_pt"
    assert call(alloc, uapi.HwptAlloc(48, 1, device, ioas)) == "EOPNOTSUPP iommufd.unsupported"
    assert call(alloc, uapi.HwptAlloc(48, 0, device, ioas, data_len=1)) == "EINVAL iommufd.argument"
    assert call(alloc, uapi.HwptAlloc(48, uapi.GUESTMEM_HWPT_ALLOC_TRUSTED, device, ioas)) == "0"
    hwpt = call.word(16)
    assert call(alloc, uapi.HwptAlloc(48, 0, device, hwpt)) == "EOPNOTSUPP iommufd.unsupported"
    assert call(uapi.IOMMU_DESTROY, uapi.Destroy(8, ioas)) == "EBUSY iommufd.in_use"
    assert call(uapi.VFIO_DEVICE_ATTACH_IOMMUFD_PT, uapi.VfioAttachPt(12, 0, hwpt)) == "0"
    assert call.word(8) == hwpt
    follow = RW | FIXED | uapi.GUESTMEM_IOAS_MAP_FOLLOW
    assert call(uapi.IOMMU_IOAS_MAP_FILE, uapi.IoasMapFile(40, follow, ioas, gmem.fd, 0, K, BASE)) == "0"
    with pytest.raises(DmaFault, match=r"fault.access"):
        call.host.run(call.vfio.device.read(BASE, 1))


def test_the_sequence_of_a_device(call: Caller) -> None:
    attach, detach, bind = (
        uapi.VFIO_DEVICE_ATTACH_IOMMUFD_PT,
        uapi.VFIO_DEVICE_DETACH_IOMMUFD_PT,
        uapi.VFIO_DEVICE_BIND_IOMMUFD,
    )
    ioas = call.alloc()
    assert call(attach, uapi.VfioAttachPt(12, 0, ioas)) == "EINVAL vfio.not_bound"
    assert call(bind, uapi.VfioBindIommufd(15, 0, 100)) == "EINVAL vfio.argument"
    assert call(bind, uapi.VfioBindIommufd(16, 0, -1)) == "EINVAL vfio.argument"
    assert call(bind, uapi.VfioBindIommufd(16, 0, 5)) == "EBADFD vfio.not_iommufd"
    assert call(bind, uapi.VfioBindIommufd(16, 0, 100)) == "0"
    device = call.word(12)
    assert call(bind, uapi.VfioBindIommufd(16, 0, 100)) == "EINVAL vfio.bound"
    assert call(uapi.IOMMU_DESTROY, uapi.Destroy(8, device)) == "EBUSY iommufd.in_use"
    assert call(attach, uapi.VfioAttachPt(12, 1, ioas)) == "EINVAL vfio.argument"
    assert call(attach, uapi.VfioAttachPt(12, 0, 99)) == "ENOENT iommufd.no_object"
    assert call(attach, uapi.VfioAttachPt(12, 0, device)) == "EINVAL iommufd.not_a_pt"
    assert call(attach, uapi.VfioAttachPt(12, 0, ioas)) == "0"
    hwpt = call.word(8)
    assert call(attach, uapi.VfioAttachPt(12, 0, ioas)) == "0" and call.word(8) == hwpt
    assert call(uapi.VFIO_DEVICE_GET_INFO, uapi.VfioDeviceInfo(16)) == "0" and call.word(4) == 1
    assert call(uapi.VFIO_DEVICE_RESET, b"") == "0"
    assert call(detach, uapi.VfioDetachPt(8, 0)) == "0"
    assert call(detach, uapi.VfioDetachPt(8, 0)) == "0"
    assert call(uapi.IOMMU_DESTROY, uapi.Destroy(8, hwpt)) == "ENOENT iommufd.no_object"
    assert call(uapi.IOMMU_DESTROY, uapi.Destroy(8, ioas)) == "0"


def test_what_cannot_be_answered_is_undone(call: Caller, gmem: Gmem) -> None:
    """The argument lies in memory that the caller can read and not write."""
    ioas, device = call.attached()
    assert call(uapi.VFIO_DEVICE_DETACH_IOMMUFD_PT, uapi.VfioDetachPt(8, 0)) == "0"
    before, view = dict(call.open.objects), gmem.mmap()
    read_only = call.host.run(call.host.process.mmap(gmem.fd, K, prot=PROT_READ))

    def refused(request: int, argument: Argument, of: Callable[..., Any], subject: tuple[object, ...]) -> None:
        view.write(0, argument.pack())
        with pytest.raises(Refusal, match=r"EFAULT \[user.copy\]"):
            call.host.run(of(*subject, request, read_only))

    refused(uapi.IOMMU_IOAS_ALLOC, uapi.IoasAlloc(12), ioctl, (call, call.open))
    refused(uapi.IOMMU_HWPT_ALLOC, uapi.HwptAlloc(48, 0, device, ioas), ioctl, (call, call.open))
    refused(uapi.VFIO_DEVICE_ATTACH_IOMMUFD_PT, uapi.VfioAttachPt(12, 0, ioas), call.vfio.ioctl, (call,))
    assert call.open.objects == before and call.vfio.device.attachment is None


def test_a_doorbell(call: Caller, gmem: Gmem) -> None:
    ioas, _ = call.attached()
    ring = uapi.GUESTMEM_DMA_DOORBELL
    assert call(ring, uapi.DmaDoorbell(32, 0, BASE, 4, 4, 1)) == "EINVAL vfio.argument"
    assert call(ring, uapi.DmaDoorbell(32, 0, BASE, 0, 0, 1)) == "EINVAL vfio.argument"
    assert call(ring, uapi.DmaDoorbell(32, 0, BASE, 4, 0, 2)) == "0" and call.word(28) == 0
    assert call(uapi.IOMMU_IOAS_MAP_FILE, uapi.IoasMapFile(40, RW | FIXED, ioas, gmem.fd, 0, K, BASE)) == "0"
    assert call(ring, uapi.DmaDoorbell(32, 0, BASE, 4, 0, 2)) == "0" and call.word(28) == 2


def test_structures_are_as_long_as_their_headers_say() -> None:
    kinds = [kind for kind in vars(uapi).values() if isinstance(kind, type) and issubclass(kind, Argument)]
    for kind in kinds:
        if kind not in (Argument, IommuArgument):
            assert kind._LAYOUT.size == kind.SIZE, kind
