"""KVM_SET_USER_MEMORY_REGION2: create, move, change or delete a memslot.

Every check stands in the kernel's order, one function for each group of the table in spec/uapi.md section 7, so that a
call with two faults gets the errno that a kernel gives (rows R1 to R102 of golden_6_18.md). What is checked has become
a `Region`; what the client passed stays an allegation.

Source: virt/kvm/kvm_main.c kvm_set_memory_region and kvm_set_memslot; virt/kvm/guest_memfd.c kvm_gmem_bind.
"""

from __future__ import annotations

import errno
from typing import NamedTuple, Protocol

from guestmem.kvm import protection
from guestmem.kvm.addresses import Gfn
from guestmem.kvm.context import KvmGmemContext
from guestmem.kvm.memslots import MemorySlot
from guestmem.kvm.protected import state_page
from guestmem.kvm.vm import Kvm
from guestmem.memory import PAGE_SHIFT, PAGE_SIZE, File, PageIndex, Range
from guestmem.memory.notifier import BOTH
from guestmem.trace import Refusal
from guestmem.uapi.kvm import (
    KVM_ADDRESS_SPACE_NUM,
    KVM_MEM_GUEST_MEMFD,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_MAX_NR_PAGES,
    KVM_MEM_READONLY,
    KVM_USER_MEM_SLOTS,
    MAX_PHYSICAL_ADDRESS_BITS,
)
from guestmem.uapi.structs import UserspaceMemoryRegion2

_TASK_SIZE = (1 << 47) - PAGE_SIZE
_U64 = 1 << 64
_S64_MAX = (1 << 63) - 1


class OpenFiles(Protocol):
    """The caller's descriptors."""

    def get(self, fd: int) -> object:
        """Raises: Refusal EBADF."""
        ...


class Region(NamedTuple):
    """A checked request. `pages` is 0 for a deletion. `fd` and `offset` mean something with KVM_MEM_GUEST_MEMFD."""

    slot: int
    flags: int
    gfn: Gfn
    pages: int
    userspace_addr: int
    fd: int
    offset: int


async def set_user_memory_region2(kvm: Kvm, files: OpenFiles, alleged: UserspaceMemoryRegion2) -> None:
    """Do what `alleged` asks, all or nothing.

    Raises: Refusal EIO `ioctl.vm_dead`; with the rules `region.*`, `bind.*`, `fd.not_open`.
    """
    kvm.check_alive()
    region = check_region(kvm, alleged)
    leftover: list[File] = []
    try:
        async with kvm.slots_lock:
            old = kvm.memslots.by_id.get(region.slot)
            if not region.pages:
                if old is None:
                    raise Refusal(errno.EINVAL, "region.no_slot", slot=region.slot)
                await _delete(kvm, old, leftover)
            elif old is None:
                await _create(kvm, files, region, leftover)
            else:
                await _change(kvm, old, region)
    finally:
        for file in leftover:
            await file.put()


def check_region(kvm: Kvm, alleged: UserspaceMemoryRegion2) -> Region:
    """Checks 2 to 7: what can be said of the numbers alone."""
    slot = alleged.slot & 0xFFFF
    if slot >= KVM_USER_MEM_SLOTS:
        raise Refusal(errno.EINVAL, "region.slot_id", slot=slot, slots=KVM_USER_MEM_SLOTS)
    _check_flags(kvm, alleged.flags)
    size, gpa = alleged.memory_size, alleged.guest_phys_addr
    if (size | gpa) & (PAGE_SIZE - 1):
        raise Refusal(errno.EINVAL, "region.unaligned", size=size, gpa=gpa)
    hva = alleged.userspace_addr
    if hva & (PAGE_SIZE - 1) or hva + size > _TASK_SIZE:
        raise Refusal(errno.EINVAL, "region.userspace_addr", userspace_addr=hva, size=size)
    if alleged.flags & KVM_MEM_GUEST_MEMFD:
        offset = alleged.guest_memfd_offset
        if offset & (PAGE_SIZE - 1) or offset + size >= _U64:
            raise Refusal(errno.EINVAL, "region.offset", offset=offset, size=size)
    if alleged.slot >> 16 >= KVM_ADDRESS_SPACE_NUM:
        raise Refusal(errno.EINVAL, "region.address_space", address_space=alleged.slot >> 16)
    if gpa + size >= _U64:
        raise Refusal(errno.EINVAL, "region.gpa_wraps", gpa=gpa, size=size)
    if size >> PAGE_SHIFT > KVM_MEM_MAX_NR_PAGES:
        raise Refusal(errno.EINVAL, "region.too_big", pages=size >> PAGE_SHIFT, limit=KVM_MEM_MAX_NR_PAGES)
    return Region(
        slot,
        alleged.flags,
        Gfn(gpa >> PAGE_SHIFT),
        size >> PAGE_SHIFT,
        hva,
        alleged.guest_memfd,
        alleged.guest_memfd_offset,
    )


def _check_flags(kvm: Kvm, flags: int) -> None:
    """Private memory can neither be logged nor read-only: known bug B11 was the latter."""
    legal = KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY
    if flags & KVM_MEM_GUEST_MEMFD and (kvm.level.mmap or kvm.has_private_memory):
        legal = KVM_MEM_GUEST_MEMFD
    if flags & ~legal:
        raise Refusal(errno.EINVAL, "region.flags", flags=flags, legal=legal)


async def _create(kvm: Kvm, files: OpenFiles, region: Region, leftover: list[File]) -> None:
    """Checks 10 to 19, then the new slot becomes visible."""
    slot = _new_slot(region)
    _check_free(kvm, slot)
    if kvm.scheduler.fails("region: allocate"):
        raise Refusal(errno.ENOMEM, "region.nomem", slot=slot.id)
    if region.flags & KVM_MEM_GUEST_MEMFD:
        await _bind(kvm, files, slot, region, leftover)
    try:
        _check_reachable(kvm, slot)
    except Refusal:
        await _unbind(slot, leftover)
        raise
    await kvm.swap_memslots(kvm.memslots.replace(None, slot))
    await kvm.stage2.memory_appears(slot.gfns)


async def _change(kvm: Kvm, old: MemorySlot, region: Region) -> None:
    """Check 9: a guest_memfd slot is immutable; another may move or change its dirty logging."""
    if region.flags & KVM_MEM_GUEST_MEMFD:
        raise Refusal(errno.EINVAL, "region.gmem_immutable", slot=old.id)
    fixed = KVM_MEM_READONLY | KVM_MEM_GUEST_MEMFD
    if (old.flags ^ region.flags) & fixed:
        raise Refusal(errno.EINVAL, "region.fixed_flags", slot=old.id, flags=region.flags, was=old.flags)
    if region.userspace_addr != old.userspace_addr or region.pages != old.gfns.pages:
        raise Refusal(errno.EINVAL, "region.resized", slot=old.id, pages=region.pages, was=old.gfns.pages)
    new = _new_slot(region)
    if region.gfn == old.gfns.start:
        if region.flags != old.flags:
            await kvm.swap_memslots(kvm.memslots.replace(old, new))
            async with kvm.stage2.mmu_lock:  # writable leaves would write past a log that has begun
                kvm.stage2.zap(new.gfns, BOTH)
                await kvm.stage2.flush_remote()
            old.freed = True
        return
    _check_free(kvm, new)
    _check_reachable(kvm, new)
    await _retire(kvm, old)
    await kvm.swap_memslots(kvm.memslots.replace(old, new))
    await kvm.stage2.memory_appears(new.gfns)
    old.freed = True


async def _delete(kvm: Kvm, slot: MemorySlot, leftover: list[File]) -> None:
    """Out of sight, out of stage 2, out of the bindings: in this order. Bytes and access stay with the file."""
    await _retire(kvm, slot)
    await kvm.swap_memslots(kvm.memslots.replace(slot, None))
    await _unbind(slot, leftover)
    slot.freed = True


async def _retire(kvm: Kvm, slot: MemorySlot) -> None:
    """Let no new fault use the slot, wait for those that do, zap what they mapped. Source: kvm_invalidate_memslot."""
    slot.invalid = True
    await kvm.swap_memslots(kvm.memslots.replace(None, None))
    await state_page.reload(kvm, [slot.gfns])
    async with kvm.stage2.mmu_lock:
        kvm.stage2.zap(slot.gfns, BOTH)
        await kvm.stage2.flush_remote()
        if slot.context is not None:
            protection.unmapped(slot.context, [slot])


async def _bind(kvm: Kvm, files: OpenFiles, slot: MemorySlot, region: Region, leftover: list[File]) -> None:
    """Checks 12 to 17."""
    file = files.get(region.fd)
    if not isinstance(file, File) or not isinstance(file.private_data, KvmGmemContext):
        raise Refusal(errno.EINVAL, "bind.not_gmem", fd=region.fd)
    context = file.private_data
    if context.kvm is not kvm:
        raise Refusal(errno.EINVAL, "bind.other_vm", fd=region.fd)
    size = region.pages << PAGE_SHIFT
    _check_inside_file(region.offset, size, file.inode.size, signed=kvm.level.signed_range_end)
    file.get()
    leftover.append(file)
    await context.bind(slot, PageIndex(region.offset >> PAGE_SHIFT))


def _check_inside_file(offset: int, size: int, file_size: int, signed: bool) -> None:
    """Check 15. Kernels before 7.2 compare a signed end, so one at or past 2**63 passes (known bug B04, row R27)."""
    end = offset + size
    if offset > _S64_MAX or (end > file_size and not (signed and end > _S64_MAX)):
        raise Refusal(errno.EINVAL, "bind.past_end", offset=offset, size=size, file_size=file_size)


async def _unbind(slot: MemorySlot, leftover: list[File]) -> None:
    if slot.context is not None:
        file = await slot.context.unbind(slot)
        if file is not None:
            leftover.append(file)


def _new_slot(region: Region) -> MemorySlot:
    gfns = Range(region.gfn, Gfn(region.gfn + region.pages))
    return MemorySlot(region.slot, region.flags, gfns, region.userspace_addr)


def _check_free(kvm: Kvm, slot: MemorySlot) -> None:
    for other in kvm.memslots.overlapping(slot.gfns):
        if other.id != slot.id:
            raise Refusal(errno.EEXIST, "region.overlap", slot=slot.id, other=other.id, gfn=other.gfns.start)


def _check_reachable(kvm: Kvm, slot: MemorySlot) -> None:
    """Checks 18 and 19, the architecture's: frames that no guest can address, and those that are others by a TD's
    shared bit, which a kernel knows from KVM_TDX_INIT_VM on. Source: kvm_arch_prepare_memory_region, kvm_is_gfn_alias.
    """
    if slot.gfns.end > 1 << (MAX_PHYSICAL_ADDRESS_BITS - PAGE_SHIFT):
        raise Refusal(errno.EINVAL, "region.unreachable", gfn_end=slot.gfns.end, bits=MAX_PHYSICAL_ADDRESS_BITS)
    bit = kvm.stage2.page_bit
    if bit is not None and not bit.set_is_private and slot.gfns.end - 1 >> bit.position - PAGE_SHIFT & 1:
        raise Refusal(errno.EINVAL, "region.alias", gfn_end=slot.gfns.end, shared_bit=bit.position)
