"""B60: a file is linked without a reference to it, while its last descriptor may be closed."""

from guestmem.check.mutants import mutant
from guestmem.kvm.gmem import open_view
from guestmem.kvm.link import OpenFiles
from guestmem.kvm.vm import Kvm
from guestmem.memory import File
from guestmem.uapi.structs import LinkGuestMemfd


@mutant("B60", replaces="guestmem.kvm.link:link_guest_memfd", breaks={"S6", "S14"})
async def linked_without_reference(kvm: Kvm, fds: OpenFiles, alleged: LinkGuestMemfd) -> int:
    """The inode's reference is taken from what the file was, once it may be zero."""
    source = fds.get(alleged.fd)
    assert isinstance(source, File)
    await kvm.scheduler.preempt("file looked up, not linked yet")
    source.inode.references.value += 1
    fd = fds.reserve()
    fds.install(fd, open_view(kvm, source.inode))
    return fd
