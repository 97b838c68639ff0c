"""Guard: how a client's mapping of a guest_memfd is closed for its private pages, and opened again.

A touch of a closed page is SIGBUS with BUS_ADRERR, a system call that touches it fails with EFAULT, and the bytes stay
where they are. Two ways, both measured in design/feasibility.md section 1:

- userfaultfd: closed ranges are registered for MISSING and MINOR with FEATURE_SIGBUS and their page-table entries are
  dropped. The server registers; only the dropping needs code in the client. Open ranges are not registered, so they
  fault in at the kernel's own speed. (The road not taken: register all and open page by page with CONTINUE. It has to
  bring every shared page into being at conversion, which guest_memfd never does (R9), and a hole closes a shared page.)
  The kernel has 65530 areas for a process, and every border of a closed range is one. When there are no more, the whole
  mapping is closed as one area after all and its shared pages are opened one by one (`GmemArea.by_page`).
- overlay: where userfaultfd is refused, an empty memfd is mapped over closed ranges; a touch is past its end.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from typing import TYPE_CHECKING, Protocol

from guestmem.memory import PAGE_SHIFT, PAGE_SIZE, Access, PageIndex, Range
from guestmem.serve.channel import ClientGone
from guestmem.serve.wire import Upcall

if TYPE_CHECKING:
    from guestmem.serve.client import Client
    from guestmem.serve.gmem_mappings import GmemArea

HvaRange = tuple[int, int]
"""Start and end, bytes of a client's address space."""

_UFFDIO_REGISTER = 0xC020AA00
_UFFDIO_UNREGISTER = 0x8010AA01
_UFFDIO_CONTINUE = 0xC020AA07
_MODE_MISSING, _MODE_MINOR = 1 << 0, 1 << 2


class Guard(Protocol):
    """One client's guard. `cover` and `close_ranges` are for ranges of `area` that are open, `open_ranges` for closed
    ones; each is also right if they are so already."""

    async def cover(self, area: GmemArea, ranges: list[HvaRange]) -> None:
        """Close ranges of a mapping that is new: no page of it has been touched."""
        ...

    async def close_ranges(self, area: GmemArea, ranges: list[HvaRange]) -> None:
        """When this returns no thread of the client has an entry for the ranges, and none gets one.

        Raises: OSError if the kernel cannot do it (65530 areas of one process are its limit).
        """
        ...

    async def open_ranges(self, area: GmemArea, ranges: list[HvaRange]) -> None:
        """Let the client fault the ranges in."""
        ...

    def cover_alias(self, start: int, size: int) -> None:
        """Close all of a mapping that a vCPU has of a guest_memfd and the client does not know."""
        ...

    def open_alias(self, fd: int, hva: int, offset: int) -> None:
        """Let vCPUs of the process reach the page at `hva`, which is the one at `offset` of the file `fd`."""
        ...

    def close(self) -> None: ...


class Userfaultfd:
    """By the client's own userfaultfd, `fd`."""

    def __init__(self, client: Client, fd: int) -> None:
        self._client = client
        self._fd = fd

    async def cover(self, area: GmemArea, ranges: list[HvaRange]) -> None:
        for start, end in ranges:
            modes = _MODE_MISSING | _MODE_MINOR
            fcntl.ioctl(self._fd, _UFFDIO_REGISTER, struct.pack("<QQQQ", start, end - start, modes, 0))

    async def close_ranges(self, area: GmemArea, ranges: list[HvaRange]) -> None:
        try:
            await self.cover(area, ranges)
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            self._close_by_page(area)
        payload = b"".join(struct.pack("<QQ", start, end - start) for start, end in ranges)
        with contextlib.suppress(ClientGone):  # and with it every entry
            await self._client.upcall(Upcall.ZAP, payload)

    async def open_ranges(self, area: GmemArea, ranges: list[HvaRange]) -> None:
        if not area.by_page:
            try:
                for start, end in ranges:
                    fcntl.ioctl(self._fd, _UFFDIO_UNREGISTER, struct.pack("<QQ", start, end - start))
                return
            except OSError as error:
                if error.errno != errno.ENOMEM:
                    raise
            self._close_by_page(area)
        self._open_pages(area, ranges)

    def cover_alias(self, start: int, size: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            modes = _MODE_MISSING | _MODE_MINOR
            fcntl.ioctl(self._fd, _UFFDIO_REGISTER, struct.pack("<QQQQ", start, size, modes, 0))

    def open_alias(self, fd: int, hva: int, offset: int) -> None:
        argument = struct.pack("<QQQq", hva, PAGE_SIZE, 0, 0)
        with contextlib.suppress(ProcessLookupError, FileExistsError):
            try:
                fcntl.ioctl(self._fd, _UFFDIO_CONTINUE, argument)
            except OSError as error:
                if error.errno != errno.EFAULT:
                    raise
                os.posix_fallocate(fd, offset, PAGE_SIZE)  # no memory yet
                fcntl.ioctl(self._fd, _UFFDIO_CONTINUE, argument)

    def close(self) -> None:
        os.close(self._fd)

    def _close_by_page(self, area: GmemArea) -> None:
        """Register all of a mapping, which makes one area of many, and keep what is shared open."""
        area.by_page = True
        size, modes = area.end - area.start, _MODE_MISSING | _MODE_MINOR
        fcntl.ioctl(self._fd, _UFFDIO_REGISTER, struct.pack("<QQQQ", area.start, size, modes, 0))
        self._open_pages(area, area.ranges(area.pages, Access.SHARED))

    def _open_pages(self, area: GmemArea, ranges: list[HvaRange]) -> None:
        """Map every page of ranges that are registered. There must be a page to be mapped, so holes are filled."""
        for start, end in ranges:
            first = PageIndex(area.offset_of(start) >> PAGE_SHIFT)
            area.inode.backing.populate(Range(first, PageIndex(first + ((end - start) >> PAGE_SHIFT))))
            while start < end:
                start += self._continue(start, end - start)

    def _continue(self, start: int, size: int) -> int:
        """Map pages from `start` on, up to one that is mapped already; bytes that need no more work."""
        argument = bytearray(struct.pack("<QQQq", start, size, 0, 0))
        try:
            fcntl.ioctl(self._fd, _UFFDIO_CONTINUE, argument)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.EAGAIN):
                raise
            (done,) = struct.unpack_from("<q", argument, 24)
            return max(done, 0) or PAGE_SIZE
        return size


class Overlay:
    """By mapping over, in the client."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def cover(self, area: GmemArea, ranges: list[HvaRange]) -> None:
        await self.close_ranges(area, ranges)

    async def close_ranges(self, area: GmemArea, ranges: list[HvaRange]) -> None:
        for start, end in ranges:
            await self._do(Upcall.OVERLAY, start, end)

    async def open_ranges(self, area: GmemArea, ranges: list[HvaRange]) -> None:
        for start, end in ranges:
            await self._do(Upcall.UNCOVER, start, end, area.prot, area.offset_of(start), (area.backing_fd,))

    async def _do(
        self, op: Upcall, start: int, end: int, prot: int = 0, offset: int = 0, fds: tuple[int, ...] = ()
    ) -> None:
        try:
            result = await self._client.upcall(op, a=start, b=end - start, c=prot, d=offset, fds=fds)
        except ClientGone:
            return
        if result.error:
            raise OSError(result.error, f"{op.name.lower()} of {start:#x}..{end:#x}: {os.strerror(result.error)}")

    def cover_alias(self, start: int, size: int) -> None:
        """Without a userfaultfd aliases are open, and a drop waits for the vCPUs."""

    def open_alias(self, fd: int, hva: int, offset: int) -> None:
        """It is open."""

    def close(self) -> None:
        """It holds nothing."""
