"""Process: an address space and a table of open files; and the system calls that make guest memory visible in it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Protocol
from weakref import WeakKeyDictionary

from guestmem.memory import PAGE_SIZE, Backing, File, Inode, PageIndex, Pool
from guestmem.sched import Scheduler
from guestmem.trace import Refusal, Tracer
from guestmem.userspace.address_space import AddressSpace
from guestmem.userspace.addresses import Hva
from guestmem.userspace.anonymous import AnonymousMemory
from guestmem.userspace.gmem_mapping import GmemMappings, GmemSource
from guestmem.userspace.gup import Pin, pin_pages

PROT_READ = 1
PROT_WRITE = 2
PROT_EXEC = 4


class OpenFile(Protocol):
    """What a descriptor refers to: counted, released by the last put."""

    def get(self) -> None: ...

    async def put(self) -> None: ...


class FdTable:
    """Open files by number, lowest free first. `limit` is RLIMIT_NOFILE."""

    def __init__(self, limit: int = 1024) -> None:
        self.limit = limit
        self._files: dict[int, OpenFile | None] = {}

    def reserve(self) -> int:
        """The lowest free number. Raises: Refusal EMFILE `fd.limit`. Source: get_unused_fd_flags."""
        fd = next(number for number in range(self.limit + 1) if number not in self._files)
        if fd >= self.limit:
            raise Refusal(errno.EMFILE, "fd.limit", limit=self.limit)
        self._files[fd] = None
        return fd

    def unreserve(self, fd: int) -> None:
        del self._files[fd]

    def install(self, fd: int, file: OpenFile) -> None:
        """The reserved number now refers to `file`, whose reference it takes over. Source: fd_install."""
        self._files[fd] = file

    def get(self, fd: int) -> OpenFile:
        """Raises: Refusal EBADF `fd.not_open`."""
        file = self._files.get(fd)
        if file is None:
            raise Refusal(errno.EBADF, "fd.not_open", fd=fd)
        return file

    def dup(self, fd: int) -> int:
        file = self.get(fd)
        twin = self.reserve()
        file.get()
        self.install(twin, file)
        return twin

    async def close(self, fd: int) -> None:
        file = self.get(fd)
        del self._files[fd]
        await file.put()

    def open_fds(self) -> list[int]:
        """The numbers that refer to a file; one that is only reserved does not yet."""
        return sorted(fd for fd, file in self._files.items() if file is not None)


class Userspace:
    """What all processes of one host share: for each inode the one user that stands for all its mappings; who lives;
    what is pinned."""

    def __init__(
        self, scheduler: Scheduler, tracer: Tracer, pool: Pool, new_backing: Callable[[int, str], Backing]
    ) -> None:
        self.scheduler = scheduler
        self.tracer = tracer
        self.pool = pool
        self.new_backing = new_backing
        self.mappings: WeakKeyDictionary[Inode, GmemMappings] = WeakKeyDictionary()
        self.processes: list[Process] = []
        self.pins: list[Pin] = []
        self._next_mm = 0

    def mappings_of(self, inode: Inode) -> GmemMappings:
        mappings = self.mappings.get(inode)
        if mappings is None:
            mappings = self.mappings[inode] = GmemMappings(inode)
        return mappings

    def new_mm_number(self) -> int:
        self._next_mm += 1
        return self._next_mm

    def spawn(self, fd_limit: int = 1024) -> Process:
        """A process with nothing in it."""
        return Process(self, AddressSpace(self.scheduler, self.tracer, self.new_mm_number()), FdTable(fd_limit))


class Process:
    """One host process."""

    def __init__(self, userspace: Userspace, mm: AddressSpace, fds: FdTable) -> None:
        self.mm = mm
        self.fds = fds
        self._userspace = userspace
        userspace.processes.append(self)

    async def mmap(
        self,
        fd: int,
        size: int,
        offset: int = 0,
        *,
        prot: int = PROT_READ | PROT_WRITE,
        shared: bool = True,
    ) -> Hva:
        """mmap(2) of a guest_memfd; the address. Maps no page yet; may reach beyond the file, a touch there may not.

        Raises: Refusal EINVAL `mmap.offset`; EBADF `fd.not_open`; EINVAL `mmap.range`; EPERM `mmap.exec`; ENODEV
        `mmap.not_mappable`; EINVAL `mmap.private`. In the kernel's order: golden_6_18.md rows M1 to M33.
        """
        if offset % PAGE_SIZE or offset < 0:
            raise Refusal(errno.EINVAL, "mmap.offset", offset=offset)
        file = self.fds.get(fd)
        if size <= 0:
            raise Refusal(errno.EINVAL, "mmap.range", size=size)
        if prot & PROT_EXEC:
            raise Refusal(errno.EPERM, "mmap.exec", prot=prot)
        if not isinstance(file, File) or not file.inode.abilities.mmap:
            raise Refusal(errno.ENODEV, "mmap.not_mappable")
        if not shared:
            raise Refusal(errno.EINVAL, "mmap.private")
        file.get()  # its descriptor may be closed while we wait for mmap_lock
        try:
            source = GmemSource(file, self._userspace.mappings_of(file.inode))
            return await self.mm.map(source, size, PageIndex(offset // PAGE_SIZE), writable=bool(prot & PROT_WRITE))
        finally:
            await file.put()

    async def mmap_anonymous(self, size: int) -> Hva:
        """Private anonymous memory of `size` bytes; the address. Raises: Refusal EINVAL `mmap.range`."""
        if size <= 0:
            raise Refusal(errno.EINVAL, "mmap.range", size=size)
        userspace = self._userspace
        pages = -(-size // PAGE_SIZE)
        source = AnonymousMemory(
            userspace.scheduler, userspace.pool, lambda count: userspace.new_backing(count, "anonymous"), pages
        )
        return await self.mm.map(source, size, PageIndex(0))

    async def pin(self, hva: int, pages: int, write: bool = True) -> Pin:
        """A long-term pin, as VFIO, RDMA or io_uring buffers hold it. Raises: as `pin_pages`."""
        return await pin_pages(self._userspace.pins, self._userspace.tracer, self.mm, hva, pages, write)

    async def fork(self) -> Process:
        """fork(2): the child has the same areas and the same open files."""
        mm = await self.mm.fork(self._userspace.new_mm_number())
        fds = FdTable(self.fds.limit)
        for fd in self.fds.open_fds():
            file = self.fds.get(fd)
            file.get()
            fds.install(fd, file)
        return Process(self._userspace, mm, fds)

    async def exit(self) -> None:
        """The end: mappings go, then descriptors, as in do_exit()."""
        await self.mm.exit()
        for fd in self.fds.open_fds():
            await self.fds.close(fd)
        self._userspace.processes.remove(self)
