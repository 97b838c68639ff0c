"""What of a VM and its memory outlives the host: a record of each, to be made here and built up again in another host.

As the kernel's live-update orchestrator does with files: *preserve* freezes a guest_memfd and notes its VM, *record*
describes them when everything else has stopped, and *restore* builds them in the host that comes after. The bytes are
not described: they stay in the memfd, which is handed over as a descriptor. Beyond what is posted for the kernel
(shared memory only), pages may be private: their state is in the record and they belong to the same identity as before.
Huge pages are refused, as there.

Source: "[RFC PATCH v2 00/10] liveupdate: kvm: Guest_memfd preservation" (kvm_vm_luo, guest_memfd_luo), June 2026;
spec/semantics.md section 12.
"""

from __future__ import annotations

import errno

import msgspec

from guestmem.kvm.context import KvmGmemContext
from guestmem.kvm.gmem import open_view
from guestmem.kvm.identity import Identity
from guestmem.kvm.vm import Kvm
from guestmem.memory import Abilities, Access, File, Inode, PageIndex, Range
from guestmem.trace import EHWPOISON, Refusal


class VmRecord(msgspec.Struct, frozen=True, tag="vm"):
    """A virtual machine: `vm_type` as KVM_CREATE_VM's argument, and the identity that its memory belongs to."""

    vm_type: int
    number: int
    generation: int

    @property
    def identity(self) -> Identity:
        return Identity(self.number, self.generation)


class GmemRecord(msgspec.Struct, frozen=True, tag="guest_memfd"):
    """A guest_memfd. `size` in bytes; `converted` are the stretches (first page, page after the last) whose access is
    not that of birth; `number` and `generation` name the virtual machine."""

    size: int
    mmap: bool
    init_shared: bool
    convertible: bool
    converted: list[tuple[int, int]]
    number: int
    generation: int

    @property
    def identity(self) -> Identity:
        return Identity(self.number, self.generation)


def preserve_vm(kvm: Kvm) -> None:
    """From now on the identity stays with this struct kvm. Undone by `unpreserve_vm`.

    Raises: Refusal EIO `ioctl.vm_dead`; EBUSY `preserve.twice`; EOPNOTSUPP `preserve.helper`,
    `preserve.architecture`.
    """
    kvm.check_alive()
    if kvm.preserved:
        raise Refusal(errno.EBUSY, "preserve.twice", vm=kvm.number)
    if kvm.mirror_of is not None:
        raise Refusal(errno.EOPNOTSUPP, "preserve.helper", vm=kvm.number)
    if kvm.machine.architecture.has_tables:
        raise Refusal(errno.EOPNOTSUPP, "preserve.architecture", vm=kvm.number)
    kvm.preserved = True


def unpreserve_vm(kvm: Kvm) -> None:
    kvm.preserved = False


def record_vm(kvm: Kvm) -> VmRecord:
    return VmRecord(int(kvm.vm_type), *kvm.machine.identity)


async def preserve_gmem(file: File) -> None:
    """Freeze the inode of a guest_memfd. Undone by `unpreserve_gmem`.

    Raises: Refusal EINVAL `preserve.owner` for a view that is not of the memory's virtual machine; EBUSY
    `preserve.twice`; EOPNOTSUPP `preserve.huge`; EHWPOISON `preserve.poisoned`.
    """
    context, inode = file.private_data, file.inode
    assert isinstance(context, KvmGmemContext)
    if not context.is_owners:
        raise Refusal(errno.EINVAL, "preserve.owner", vm=context.kvm.number, inode=inode.number)
    if inode.frozen:
        raise Refusal(errno.EBUSY, "preserve.twice", inode=inode.number)
    if inode.order:
        raise Refusal(errno.EOPNOTSUPP, "preserve.huge", inode=inode.number, order=inode.order)
    if inode.folios.poisoned:
        raise Refusal(EHWPOISON, "preserve.poisoned", inode=inode.number)
    await inode.freeze()


async def unpreserve_gmem(file: File) -> None:
    await file.inode.freeze(False)


def record_gmem(file: File) -> GmemRecord:
    inode, context = file.inode, file.private_data
    assert isinstance(context, KvmGmemContext)
    abilities = inode.abilities
    born = Access.SHARED if abilities.init_shared else Access.PRIVATE
    everything = Range(PageIndex(0), PageIndex(inode.pages))
    runs = inode.runs(everything)
    converted: list[tuple[int, int]] = [(run.start, run.end) for run, access in runs if access is not born]
    identity = context.kvm.machine.identity
    return GmemRecord(inode.size, abilities.mmap, abilities.init_shared, abilities.convertible, converted, *identity)


def abilities_of(record: GmemRecord) -> Abilities:
    return Abilities(record.mmap, record.init_shared, record.convertible)


async def restore_gmem(kvm: Kvm, inode: Inode, record: GmemRecord) -> File:
    """A file of `kvm` on an inode that nobody has used yet, with the state of every page as it was recorded.
    `kvm` is of the virtual machine that it belongs to.
    """
    assert kvm.machine.identity == record.identity, "S7: restored for another virtual machine"
    born = Access.SHARED if record.init_shared else Access.PRIVATE
    other = Access.PRIVATE if record.init_shared else Access.SHARED
    assert inode.attributes.is_all(Range(PageIndex(0), PageIndex(inode.pages)), born)
    async with inode.invalidate_lock.exclusive:
        for start, end in record.converted:
            inode.attributes.set(Range(PageIndex(start), PageIndex(end)), other)
        await inode.absorb(Range(PageIndex(0), PageIndex(inode.pages)))
    return open_view(kvm, inode)
