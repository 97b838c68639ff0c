"""The guest_memfd calls: KVM_CREATE_GUEST_MEMFD on a VM; KVM_SET_MEMORY_ATTRIBUTES2 and KVM_GMEM_CONVERT_* on a file.

What the users of an inode may do is decided here, from the type of the VM and the ABI level, and then carried by the
inode, which enforces it without asking what the VM is (R14).

Source: virt/kvm/guest_memfd.c kvm_gmem_create; in-place v8; the 1G series; spec/uapi.md sections 6, 13 and 14.
"""

from __future__ import annotations

import errno
from typing import Protocol

from guestmem.kvm.context import KvmGmemContext
from guestmem.kvm.protection import Ownership
from guestmem.kvm.vm import Kvm
from guestmem.memory import PAGE_SHIFT, PAGE_SIZE, Abilities, Access, File, Inode, page_range
from guestmem.sched import LockClass
from guestmem.trace import Refusal
from guestmem.uapi.kvm import (
    GUEST_MEMFD_HUGETLB_SHIFT,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
)
from guestmem.uapi.structs import CreateGuestMemfd, GmemConvert, MemoryAttributes2

_MAX_SIZE = (1 << 63) - PAGE_SIZE
_U64 = 1 << 64
_PAGE_SIZE_BITS = _U64 - (1 << GUEST_MEMFD_HUGETLB_SHIFT)


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
    flags = kvm.level.create_flags
    not_here = not kvm.level.in_place and kvm.has_private_memory
    return sum(mask for name, mask in flags.items() if not (not_here and name == "INIT_SHARED"))


async def create_guest_memfd(kvm: Kvm, fds: FileDescriptors, alleged: CreateGuestMemfd) -> int:
    """A new inode and its first file; the descriptor. `reserved` is not looked at, as in the kernel.

    Raises: Refusal EIO `ioctl.vm_dead`; EINVAL `create.flags`, `create.huge_size`, `create.size`,
    `create.huge_unaligned`; EMFILE `fd.limit`; ENOMEM `create.nomem`, `create.reservation`, `create.cgroup`. In this
    order.

    Source: kvm_gmem_create; for huge pages "[RFC PATCH v2 00/51] 1G page support for guest_memfd".
    """
    kvm.check_alive()
    flags, size = alleged.flags, alleged.size
    supported = supported_flags(kvm)
    known = supported
    if kvm.level.hugetlb:
        known |= _PAGE_SIZE_BITS
    if flags & ~known:
        raise Refusal(errno.EINVAL, "create.flags", flags=flags, supported=supported)
    asked = {name for name, mask in kvm.level.create_flags.items() if flags & mask}
    order = _huge_order(kvm, flags, "HUGETLB" in asked)
    if not 0 < size <= _MAX_SIZE or size % PAGE_SIZE:
        raise Refusal(errno.EINVAL, "create.size", size=size)
    if size % (PAGE_SIZE << order):
        raise Refusal(errno.EINVAL, "create.huge_unaligned", size=size, page_size=PAGE_SIZE << order)
    fd = fds.reserve()
    if kvm.scheduler.fails("create: allocate the view"):
        fds.unreserve(fd)
        raise Refusal(errno.ENOMEM, "create.nomem", size=size)
    abilities = Abilities(
        mmap="MMAP" in asked,
        init_shared="INIT_SHARED" in asked,
        convertible=kvm.has_private_memory and kvm.level.in_place,
    )
    try:
        inode = kvm.environment.new_inode(size=size, abilities=abilities, owner=kvm.machine, order=order)
    except Refusal:
        fds.unreserve(fd)
        raise
    if kvm.machine.architecture.has_tables:
        Ownership(kvm.machine, inode)
    fds.install(fd, open_view(kvm, inode))
    return fd


def open_view(kvm: Kvm, inode: Inode) -> File:
    """A file of `kvm` on an inode, whose reference it takes over. Source: kvm_gmem_alloc_view (link RFC v2)."""
    context = KvmGmemContext(kvm, inode)
    context.file = File(
        kvm.scheduler,
        inode,
        release=lambda _: context.release(),
        release_takes=LockClass.SLOTS_LOCK,
        private_data=context,
    )
    return context.file


def _huge_order(kvm: Kvm, flags: int, huge: bool) -> int:
    """The order of the huge pages that flags ask for, 0 for none. Raises: Refusal EINVAL `create.huge_size`."""
    log2 = flags >> GUEST_MEMFD_HUGETLB_SHIFT
    order = log2 - PAGE_SHIFT
    if huge != bool(log2) or (log2 and order not in kvm.environment.huge_orders):
        offered = [offered + PAGE_SHIFT for offered in kvm.environment.huge_orders]
        raise Refusal(errno.EINVAL, "create.huge_size", flags=flags, log2=log2, offered=offered)
    return order if log2 else 0


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
    if not file.inode.abilities.convertible or not context.kvm.has_private_memory:
        raise Refusal(errno.EINVAL, "attributes2.no_private_memory", vm_type=context.kvm.vm_type.name)
    if not context.is_owners:
        raise Refusal(errno.EINVAL, "attributes2.owner", vm=context.kvm.number, inode=file.inode.number)
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


def require_hugetlb(file: File) -> KvmGmemContext:
    """The context of a file whose ABI level has huge pages. Raises: Refusal ENOTTY `gmem_convert.off`."""
    context = file.private_data
    assert isinstance(context, KvmGmemContext)
    if not context.kvm.level.hugetlb:
        raise Refusal(errno.ENOTTY, "gmem_convert.off", level=context.kvm.level.name)
    return context


async def gmem_convert(file: File, alleged: GmemConvert, to: Access) -> None:
    """KVM_GMEM_CONVERT_SHARED and _PRIVATE: what the 1G series has for KVM_SET_MEMORY_ATTRIBUTES2.

    An empty range is no error, and nothing; an `error_offset` that is not zero is one. `reserved` is not looked at.

    Raises: Refusal ENOTTY `gmem_convert.off`; EINVAL `gmem_convert.*`, in the order of the posting; as Inode.convert.
    Source: "[RFC PATCH v2 04/51] KVM: guest_memfd: Introduce KVM_GMEM_CONVERT_SHARED/PRIVATE ioctls",
    kvm_gmem_ioctl_convert_range.
    """
    context = require_hugetlb(file)
    offset, size = alleged.offset, alleged.size
    if not file.inode.abilities.convertible or not context.kvm.has_private_memory:
        raise Refusal(errno.EINVAL, "gmem_convert.no_private_memory", vm_type=context.kvm.vm_type.name)
    if not context.is_owners:
        raise Refusal(errno.EINVAL, "attributes2.owner", vm=context.kvm.number, inode=file.inode.number)
    if alleged.error_offset:
        raise Refusal(errno.EINVAL, "gmem_convert.error_offset", error_offset_given=alleged.error_offset)
    if not size:
        return
    if offset + size > file.inode.size:
        raise Refusal(errno.EINVAL, "gmem_convert.range", offset=offset, size=size, file_size=file.inode.size)
    pages = page_range(offset, size)
    if pages is None:
        raise Refusal(errno.EINVAL, "gmem_convert.unaligned", offset=offset, size=size)
    await file.inode.convert(pages, to)
