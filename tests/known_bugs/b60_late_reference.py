"""B60: an object is looked up first and referenced later, while its owner destroys it.

Upstream iommufd's mmap; here mmap of a guest_memfd, which waits for mmap_lock between the two.
"""

from guestmem.check.mutants import mutant
from guestmem.memory import File, PageIndex
from guestmem.userspace import Process
from guestmem.userspace.addresses import Hva
from guestmem.userspace.gmem_mapping import GmemSource


@mutant("B60", replaces="guestmem.userspace.process:Process.mmap", breaks={"S6"})
async def late_reference(self: Process, fd: int, size: int, offset: int = 0, prot: int = 3) -> Hva:
    """The file is not held while the call waits."""
    file = self.fds.get(fd)
    assert isinstance(file, File)
    source = GmemSource(file, self._userspace.mappings_of(file.inode))
    return await self.mm.map(source, size, PageIndex(offset >> 12), writable=bool(prot & 2))
