"""The guest_memfd calls: KVM_CREATE_GUEST_MEMFD on a VM, KVM_SET_MEMORY_ATTRIBUTES2 on a file.

What the users of an inode may do is decided here, from the type of the VM and the ABI level, and then carried by the
inode, which enforces it without asking what the VM is (R14).

Source: virt/kvm/guest_memfd.c kvm_gmem_create; in-place v8; spec/uapi.md sections 6 and 13.
"""

from __future__ import annotations

import errno
from typing import Protocol

from guestmem.kvm.context import KvmGmemContext
from guestmem.kvm.vm import Kvm
from guestmem.memory import PAGE_SIZE, Abilities, Access, File, page_range
from guestmem.sched import LockClass
from guestmem.trace import Refusal
from guestmem.uapi.kvm import (
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
)
from guestmem.uapi.structs import CreateGuestMemfd, MemoryAttributes2

_MAX_SIZE = (1 << 63) - PAGE_SIZE
_U64 = 1 << 64


class FileDescriptors(Protocol):
    """Where a new file goes."""

    def reserve(self) -> int:
        """Raises: Refusal EMFILE."""
        ...

    def unreserve(self, fd: int) -> None: ...

    def install(self, fd: int, file: File) -> None: ...


def supported_flags(kvm: Kvm) -> int:
    """The create flags that are legal for a VM: what KVM_CAP_GUEST_MEMFD_FLAGS reports.

    INIT_SHARED needs a VM without private memory, or pages that can be converted in place. Source: uapi.md section 6.
    """
    if not kvm.level.mmap:
        return 0
    if kvm.level.in_place or not kvm.has_private_memory:
        return GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED
    return GUEST_MEMFD_FLAG_MMAP


async def create_guest_memfd(kvm: Kvm, fds: FileDescriptors, alleged: CreateGuestMemfd) -> int:
    """A new inode and its first file; the descriptor. `reserved` is not looked at, as in the kernel.

    Raises: Refusal EINVAL `create.flags`, `create.size`; EMFILE `fd.limit`; ENOMEM `create.nomem`. In this order.
    """
    flags, size = alleged.flags, alleged.size
    supported = supported_flags(kvm)
    if flags & ~supported:
        raise Refusal(errno.EINVAL, "create.flags", flags=flags, supported=supported)
    if not 0 < size <= _MAX_SIZE or size % PAGE_SIZE:
        raise Refusal(errno.EINVAL, "create.size", size=size)
    fd = fds.reserve()
    if kvm.scheduler.fails("create: allocate the view"):
        fds.unreserve(fd)
        raise Refusal(errno.ENOMEM, "create.nomem", size=size)
    abilities = Abilities(
        mmap=bool(flags & GUEST_MEMFD_FLAG_MMAP),
        init_shared=bool(flags & GUEST_MEMFD_FLAG_INIT_SHARED),
        convertible=kvm.has_private_memory and kvm.level.in_place,
    )
    inode = kvm.environment.new_inode(size=size, abilities=abilities, owner=kvm.machine)
    context = KvmGmemContext(kvm, inode)
    context.file = File(
        kvm.scheduler,
        inode,
        release=lambda _: context.release(),
        release_takes=LockClass.SLOTS_LOCK,
        private_data=context,
    )
    fds.install(fd, context.file)
    return fd


def require_in_place(file: File) -> KvmGmemContext:
    """The context of a file that knows conversion. Raises: Refusal ENOTTY `attributes2.off`."""
    context = file.private_data
    assert isinstance(context, KvmGmemContext)
    if not context.kvm.level.in_place:
        raise Refusal(errno.ENOTTY, "attributes2.off", level=context.kvm.level.name)
    return context


async def set_memory_attributes2(file: File, alleged: MemoryAttributes2) -> None:
    """Convert a range of the file. The refusal's `error_offset`, where it has one, goes back to the caller.

    Raises: Refusal ENOTTY `attributes2.off`; EINVAL `attributes2.*` in the order of uapi.md 13.2; ENOMEM, EAGAIN,
    EHWPOISON as Inode.convert.
    """
    context = require_in_place(file)
    if alleged.flags:
        raise Refusal(errno.EINVAL, "attributes2.flags", flags=alleged.flags)
    if any(alleged.reserved):
        raise Refusal(errno.EINVAL, "attributes2.reserved", reserved=alleged.reserved)
    if not file.inode.abilities.convertible:
        raise Refusal(errno.EINVAL, "attributes2.no_private_memory", vm_type=context.kvm.vm_type.name)
    if alleged.attributes & ~KVM_MEMORY_ATTRIBUTE_PRIVATE:
        raise Refusal(errno.EINVAL, "attributes2.attributes", attributes=alleged.attributes)
    offset, size = alleged.offset, alleged.size
    if not size or offset + size >= _U64:
        raise Refusal(errno.EINVAL, "attributes2.range", offset=offset, size=size)
    pages = page_range(offset, size)
    if pages is None:
        raise Refusal(errno.EINVAL, "attributes2.unaligned", offset=offset, size=size)
    if offset + size > file.inode.size:
        raise Refusal(errno.EINVAL, "attributes2.past_end", offset=offset, size=size, file_size=file.inode.size)
    private = alleged.attributes & KVM_MEMORY_ATTRIBUTE_PRIVATE
    await file.inode.convert(pages, Access.PRIVATE if private else Access.SHARED)
