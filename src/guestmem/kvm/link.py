"""KVM_LINK_GUEST_MEMFD: another struct kvm's view of memory that exists.

The new file is of the same inode, so state and bytes are common, and has bindings, invalidations and a struct kvm of
its own. The descriptor that is linked may come from another process (SCM_RIGHTS).

Whose view it may be: that of a struct kvm of the memory's own virtual machine, such as a helper; or of one that may
become it, because nothing names the identity that it was born with. Such a view can be bound and mapped by the host at
once, and gives its guest pages when the identity is moved here (`enc_context`). VMs without private memory have no
identity that would be worth keeping apart, so there linking itself is what makes the destination the same virtual
machine. Everybody else is a stranger.

Source: virt/kvm/guest_memfd.c kvm_gmem_link, "[RFC PATCH v2 00/13] New KVM ioctl to link a gmem inode to a new gmem
file", 04/13; the check of identity is R20 and R26 of spec/seed.md, which that posting does not have.
"""

from __future__ import annotations

import errno
from typing import Protocol

from guestmem.kvm.context import KvmGmemContext
from guestmem.kvm.gmem import FileDescriptors, open_view
from guestmem.kvm.identity import VirtualMachine
from guestmem.kvm.vm import Kvm
from guestmem.memory import File, Inode
from guestmem.trace import Refusal
from guestmem.trace import events as event
from guestmem.uapi.structs import LinkGuestMemfd


class OpenFiles(FileDescriptors, Protocol):
    """The caller's descriptors."""

    def get(self, fd: int) -> object:
        """Raises: Refusal EBADF."""
        ...


async def link_guest_memfd(kvm: Kvm, fds: OpenFiles, alleged: LinkGuestMemfd) -> int:
    """A file of `kvm` on the inode of a guest_memfd; its descriptor. `reserved` is not looked at.

    Raises: Refusal EIO `ioctl.vm_dead`; EINVAL `link.flags`, `link.not_open`, `link.not_gmem`, `link.same_vm`,
    `link.identity`; EMFILE `fd.limit`; ENOMEM `link.nomem`. In this order.
    """
    kvm.check_alive()
    if alleged.flags:
        raise Refusal(errno.EINVAL, "link.flags", flags=alleged.flags)
    source = _get_file(fds, alleged.fd & 0xFFFF_FFFF)
    try:
        context = source.private_data
        assert isinstance(context, KvmGmemContext)
        await kvm.scheduler.preempt("file looked up, not linked yet")
        if context.kvm is kvm:
            raise Refusal(errno.EINVAL, "link.same_vm", vm=kvm.number)
        _check_identity(kvm, context)
        fd = fds.reserve()
        if kvm.scheduler.fails("link: allocate the view"):
            fds.unreserve(fd)
            raise Refusal(errno.ENOMEM, "link.nomem", inode=source.inode.number)
        if not context.inode.abilities.convertible:
            _join(kvm, source.inode)
        source.inode.references.get()
        fds.install(fd, open_view(kvm, source.inode))
        if kvm.tracer.enabled:
            kvm.tracer.emit(event.KvmGmemLink(kvm.number, context.kvm.number, source.inode.number))
        return fd
    finally:
        await source.put()


def _get_file(fds: OpenFiles, fd: int) -> File:
    """A reference to the guest_memfd behind a descriptor. One that is not open is EINVAL here, not EBADF."""
    try:
        file = fds.get(fd)
    except Refusal as refusal:
        raise Refusal(errno.EINVAL, "link.not_open", fd=fd) from refusal
    if not isinstance(file, File) or not isinstance(file.private_data, KvmGmemContext):
        raise Refusal(errno.EINVAL, "link.not_gmem", fd=fd)
    file.get()
    return file


def _check_identity(kvm: Kvm, context: KvmGmemContext) -> None:
    """Equality compares the generation, never a struct kvm: the allocator may give a stranger a dead one's address, and
    the pool its number (known bug B39)."""
    owner = context.inode.owner
    if owner is None or kvm.machine.identity == owner.identity:
        return
    if kvm.identity_in_use or kvm.has_private_memory != context.inode.abilities.convertible:
        raise Refusal(errno.EINVAL, "link.identity", vm=kvm.number, inode=context.inode.number)


def _join(kvm: Kvm, inode: Inode) -> None:
    """Be the same virtual machine, without private memory, as the one that the memory belongs to."""
    owner = inode.owner
    if isinstance(owner, VirtualMachine) and kvm.machine is not owner:
        unused, kvm.machine = kvm.machine, owner
        owner.get()
        unused.put()
