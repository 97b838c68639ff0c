"""What client descriptors refer to, by inode number: tokens for /dev/kvm, VMs and vCPUs, and guest_memfds.

A token is one end of a socket pair. When its last descriptor in any process is closed the other end, here, reads
end-of-file. A guest_memfd is a memfd opened a second time; inotify tells when that second open file is gone, its
mappings included. Either way the moment is the kernel's own, and the release runs then.

Linked guest_memfds are several open files of one memfd. What tells them apart is kept by the kernel in the open file
itself: its position is the number of the view, since nobody can seek there; and a lock of its own, on a byte that only
it locks, is gone when it is. See `views`.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

from guestmem.iommu import Iommufd
from guestmem.iommu.vfio import VfioDevice
from guestmem.kvm.vcpu import Vcpu
from guestmem.kvm.vm import Kvm
from guestmem.memory import PAGE_SIZE, File, InodeStatistics, MemfdBacking
from guestmem.serve.client_cpus import ClientCpu, ClientCpus
from guestmem.serve.gmem_mappings import GmemMappings
from guestmem.serve.kvm_run import CoalescedRing, KvmRun
from guestmem.serve.views import Views, file_id
from guestmem.serve.wire import FileKind

if TYPE_CHECKING:
    from guestmem.serve.client import Client
    from guestmem.serve.engine_process import EngineProcess


class ServedFile:
    """An open file of a client, which takes over one reference to what it shows. `owner` is the client that made it;
    None for files that belong to nobody."""

    kind = FileKind.KVM

    def __init__(self, owner: Client | None) -> None:
        self.owner = owner
        self.inode_number = 0
        self.calls = 0  # under way on it: they hold it as a descriptor does
        self.closed = False

    async def release(self) -> None:
        """The last descriptor is gone."""


class KvmDevice(ServedFile):
    """/dev/kvm."""


class VmFile(ServedFile):
    """A VM."""

    kind = FileKind.VM

    def __init__(self, owner: Client, kvm: Kvm) -> None:
        super().__init__(owner)
        self.kvm = kvm
        self.ring = CoalescedRing()
        if owner.runs_vcpus:
            kvm.stage2.remote = ClientCpus(owner, kvm)

    async def release(self) -> None:
        await self.kvm.put()


class VcpuFile(ServedFile):
    """A vCPU and the memory that it shares with its VMM."""

    kind = FileKind.VCPU

    def __init__(self, owner: Client, vcpu: Vcpu) -> None:
        super().__init__(owner)
        self.vcpu = vcpu
        self.run = KvmRun()
        self.cpu = vcpu.engine if isinstance(vcpu.engine, ClientCpu) else None
        if self.cpu is not None:
            self.cpu.file = self

    async def release(self) -> None:
        await self.vcpu.put()
        self.run.close()


class GmemFile(ServedFile):
    """A guest_memfd. `mappings` are those of all clients."""

    kind = FileKind.GMEM

    def __init__(self, owner: Client, file: File) -> None:
        super().__init__(owner)
        assert isinstance(file.inode.backing, MemfdBacking)
        self.last_words: InodeStatistics | None = None
        self.file = file
        self.view = 0  # its number among the open files of the inode
        self.locked = False  # see views
        self.mappings = GmemMappings(file.inode, file.inode.backing.fd)

    async def blocks(self) -> tuple[int, int]:
        """st_blksize, st_blocks. A file of huge pages says how many are there; any other says what Linux 6.18 says."""
        inode = self.file.inode
        if not inode.order:
            return PAGE_SIZE, 0
        await self.mappings.learn()
        return PAGE_SIZE << inode.order, inode.statistics().allocated * PAGE_SIZE // 512

    async def release(self) -> None:
        """A mapping that is left belongs to a client that has ended, or a descriptor would be left too."""
        await self.mappings.learn()
        self.last_words = self.file.inode.statistics()
        for area in list(self.mappings.areas):
            await area.client.memory.unmap(area.start, area.end)
        await self.mappings.registration.unregister()
        await self.file.put()


class IommuFile(ServedFile):
    """/dev/iommu."""

    kind = FileKind.IOMMU

    def __init__(self, owner: Client, iommufd: Iommufd) -> None:
        super().__init__(owner)
        self.iommufd = iommufd

    async def release(self) -> None:
        await self.iommufd.put()


class VfioFile(ServedFile):
    """A device file. `process` is that of its engine, if it has one of its own."""

    kind = FileKind.VFIO

    def __init__(self, owner: Client, vfio: VfioDevice, process: EngineProcess | None) -> None:
        super().__init__(owner)
        self.vfio = vfio
        self.process = process

    async def release(self) -> None:
        if self.process is not None:
            self.process.close()
        await self.vfio.release()


class Files:
    """The open files of all clients."""

    def __init__(self) -> None:
        self.by_inode: dict[int, ServedFile] = {}
        self.views = Views()
        self.gmem_device = _memfd_device()
        """st_dev of every memfd, and so of every guest_memfd."""

    def get(self, file: int) -> ServedFile | None:
        """By `inode_number`: st_ino, and the number of the view above it. What is only a st_ino may be any view."""
        return self.by_inode.get(file) or self.views.any_of(file)

    def add_token(self, file: ServedFile) -> tuple[socket.socket, int]:
        """Make the token of a file: our end, and the client's, which is a descriptor to be given away."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._add(file, theirs.fileno())
        return ours, theirs.detach()

    def add_gmem(self, file: GmemFile, adopted: bool = False) -> int:
        """Open a guest_memfd for a client: a descriptor to be given away. `adopted`: of a server before."""
        fd = self.views.open(file, file.mappings.backing_fd, adopted)
        file.inode_number = file_id(os.fstat(fd).st_ino, file.view)
        self.by_inode[file.inode_number] = file
        return fd

    def lock_view(self, fd: int) -> None:
        """The guest_memfd behind a descriptor of ours for a client's open file is about to be linked."""
        file = self.get(file_id(os.fstat(fd).st_ino, os.lseek(fd, 0, os.SEEK_CUR)))
        if isinstance(file, GmemFile) and not file.locked:
            self.views.lock(file, fd)

    def remove(self, file: ServedFile) -> None:
        self.by_inode.pop(file.inode_number, None)

    def close(self) -> None:
        self.views.close()

    def _add(self, file: ServedFile, fd: int) -> None:
        file.inode_number = os.fstat(fd).st_ino
        self.by_inode[file.inode_number] = file


def _memfd_device() -> int:
    fd = os.memfd_create("guestmem:probe", os.MFD_CLOEXEC)
    try:
        return os.fstat(fd).st_dev
    finally:
        os.close(fd)
