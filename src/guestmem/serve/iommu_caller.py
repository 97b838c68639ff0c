"""The client as /dev/iommu and the devices ask for it: its memory to copy and to pin, its descriptors; and its devices.

There are VFIO_DEVICES of them, made when they are first opened: 0 and 1 ask for pages that they find not mapped, 2 and
3 cannot, 4 and 5 are as the first two, with an engine in a process of its own.
"""

from __future__ import annotations

import errno
import os
import weakref

from guestmem.iommu import Iommufd
from guestmem.iommu.leaves import PinnedPage
from guestmem.iommu.vfio import VfioDevice
from guestmem.memory import PAGE_SHIFT, File
from guestmem.serve.call import Call
from guestmem.serve.engine_process import EngineProcess
from guestmem.serve.files import GmemFile, IommuFile, ServedFile, VfioFile
from guestmem.serve.pins import PinnedFilePage, pin_long_term
from guestmem.trace import Refusal

_CANNOT_ASK = (2, 3)
_OWN_PROCESS = (4, 5)


def open_vfio(call: Call, number: int) -> VfioFile:
    """open("/dev/vfio/devices/vfioN")."""
    server = call.server
    device = server.dma_devices.get(number)
    if device is None:
        device = server.host.new_dma_device(page_requests=number not in _CANNOT_ASK)
        server.dma_devices[number] = device
    process = EngineProcess(server, device) if number in _OWN_PROCESS else None
    return VfioFile(call.client, VfioDevice(device, process), process)


class IommuCaller:
    """See iommu.ioctl.Caller and iommu.vfio.VfioCaller."""

    def __init__(self, call: Call) -> None:
        self._call = call

    @property
    def mm(self) -> IommuCaller:
        return self

    async def copy_from_user(self, hva: int, size: int) -> bytes:
        return await self._call.client.memory.copy_from_user(hva, size)

    async def copy_to_user(self, hva: int, data: bytes) -> None:
        await self._call.client.memory.copy_to_user(hva, data)

    async def pin_page(self, hva: int, write: bool) -> PinnedPage:
        return await pin_long_term(self._call.client, hva, write)

    async def iommufd(self, fd: int) -> Iommufd | None:
        file = await self._call.descriptor(fd)
        return file.iommufd if isinstance(file, IommuFile) else None

    async def memory_file(self, fd: int) -> File | Memfd:
        """A guest_memfd only where a kernel of this level would take one."""
        found = await self._call.descriptor(fd)
        if isinstance(found, GmemFile) and self._call.server.host.level.gmem_dma:
            return found.file
        if isinstance(found, ServedFile):
            raise Refusal(errno.EINVAL, "iommu.not_file", fd=fd)
        return self._memfd(fd, await self._call.take_descriptor(fd))

    def _memfd(self, fd: int, ours: int) -> Memfd:
        try:
            status = os.fstat(ours)
            if status.st_dev != self._call.server.files.gmem_device:
                raise Refusal(errno.EINVAL, "iommu.not_file", fd=fd)
            return Memfd(os.dup(ours), status.st_size)
        finally:
            os.close(ours)


class Memfd:
    """A client's memfd of `size` bytes."""

    def __init__(self, fd: int, size: int) -> None:
        self.size = size
        self._fd = fd
        weakref.finalize(self, os.close, fd)

    async def pin_page(self, page: int, write: bool) -> PinnedPage:
        """What a truncation takes away is then a page that nobody else has, as with the kernel's pin."""
        return PinnedFilePage(os.dup(self._fd), page << PAGE_SHIFT)
