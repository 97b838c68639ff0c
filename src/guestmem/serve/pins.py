"""Pins of a client's memory, as gup_test, the IOMMU and a launch take them.

A page of a guest_memfd is held by a counted reference, so that a conversion of it is busy. A page of another shared
file is held by a descriptor of the file. Private memory is the client's: who pins it has its address, and a thread of
the client copies. So a device sees what is at the address when it moves bytes, and not, as with a kernel's pin, the
page that was there before the client dropped or replaced it.
"""

from __future__ import annotations

import errno
import os
import weakref
from typing import TYPE_CHECKING

from guestmem.kvm.vm import PinnedPage
from guestmem.memory import PAGE_SIZE, Access
from guestmem.serve.channel import ClientGone
from guestmem.serve.gmem_mappings import PROT_WRITE, GmemArea
from guestmem.serve.proc_maps import find_vma, open_mapped_file
from guestmem.serve.wire import Upcall
from guestmem.trace import Refusal

if TYPE_CHECKING:
    from guestmem.serve.client import Client


class PinnedUserPage:
    """A page of private memory of a client, by its address."""

    def __init__(self, client: Client, hva: int) -> None:
        self._client = client
        self._hva = hva

    async def read(self, offset: int, size: int) -> bytes:
        """See kvm.vm.PinnedPage."""
        return await self._client.memory.copy_from_user(self._hva + offset, size)

    async def write(self, offset: int, data: bytes) -> None:
        """See kvm.vm.PinnedPage."""
        await self._client.memory.copy_to_user(self._hva + offset, data)

    def set_dirty(self) -> None:
        """Nothing to say: the client wrote it itself."""

    def put(self) -> None:
        """Nothing is held."""


class PinnedFilePage:
    """The page of a file at byte `place`. The descriptor `fd`, which is taken over, keeps the file."""

    def __init__(self, fd: int, place: int) -> None:
        self._fd = fd
        self._place = place
        self._close = weakref.finalize(self, os.close, fd)

    async def read(self, offset: int, size: int) -> bytes:
        """See kvm.vm.PinnedPage. What was cut off the file meanwhile reads as zeros: nobody else has that page."""
        return os.pread(self._fd, size, self._place + offset).ljust(size, b"\0")

    async def write(self, offset: int, data: bytes) -> None:
        """See kvm.vm.PinnedPage. A write beyond the end would make the file larger: it goes nowhere."""
        inside = os.fstat(self._fd).st_size - self._place - offset
        if inside > 0:
            os.pwrite(self._fd, data[:inside], self._place + offset)

    def set_dirty(self) -> None:
        """Nothing to say: the file's own page was written."""

    def put(self) -> None:
        self._close()


async def pin_long_term(client: Client, hva: int, write: bool) -> PinnedPage:
    """The page at an address, held until it is put; of a guest_memfd by a counted reference.

    The look at the page and the reference are made under the lock that conversions take exclusively (known bug B24).
    Raises: Refusal EFAULT `user.page`.
    """
    area = client.memory.area_at(hva)
    if not isinstance(area, GmemArea):
        return await client.memory.pin_page(hva, write)
    if write and not area.prot & PROT_WRITE:
        raise Refusal(errno.EFAULT, "user.page", hva=hva, write=write)
    inode, index = area.inode, area.index_of(hva)
    async with inode.invalidate_lock.shared:
        try:
            await inode.fault(area.mappings.registration, index, Access.SHARED)
        except Refusal as refusal:
            raise Refusal(errno.EFAULT, "user.page", hva=hva, write=write) from refusal
        return inode.folios.get(index)


async def pin_memory(client: Client, hva: int, write: bool) -> PinnedPage:
    """The page at an address of a client whose vCPUs run in it. Raises: Refusal EFAULT `user.page`."""
    try:
        result = await client.upcall(Upcall.POPULATE, a=hva, b=PAGE_SIZE, c=write)
    except ClientGone:
        raise Refusal(errno.EFAULT, "user.page", hva=hva, write=write) from None
    if result.error:
        raise Refusal(errno.EFAULT, "user.page", hva=hva, write=write, host_errno=result.error)
    vma = find_vma(client.pid, hva)
    fd = open_mapped_file(client.pid, vma) if vma is not None and vma.shared and not vma.hugetlb else None
    if vma is None or fd is None:
        return PinnedUserPage(client, hva)
    return PinnedFilePage(fd, vma.offset + hva - vma.start)
