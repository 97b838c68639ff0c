"""A guest touches a page: from the missed access to the installed leaf.

    slot under SRCU -> sequence noted -> access of the page against access of the guest -> file -> provider (or host
    address) -> mmu_lock: is the look-up still good? -> leaf

Nothing is locked from the look-up to the installation; the sequence number is what makes that sound. A look-up that an
invalidation has overtaken is void and the guest repeats its access.

Source: arch/x86/kvm/mmu/mmu.c kvm_tdp_mmu_page_fault, kvm_mmu_faultin_pfn; spec/semantics.md 2.2.
"""

from __future__ import annotations

import enum
import errno
from typing import TYPE_CHECKING

from guestmem.kvm import protection
from guestmem.kvm.addresses import Gfn, gfn_of
from guestmem.kvm.memslots import MemorySlot
from guestmem.kvm.stage2 import Leaf
from guestmem.memory import PAGE_SHIFT, Access, File, Pfn
from guestmem.memory.pages import block
from guestmem.trace import Refusal

if TYPE_CHECKING:
    from guestmem.kvm.vm import Kvm


_USER_ORDERS = (18, 9)


class FaultResult(enum.Enum):
    """MAPPED: repeat the access. RETRY: so too, but nothing was mapped. MMIO: no memory there."""

    MAPPED = "mapped"
    RETRY = "retry"
    MMIO = "mmio"


async def page_fault(
    kvm: Kvm, gpa: int, *, write: bool, private: bool | None = None, prefault: bool = False, accessed: bool = True
) -> FaultResult:
    """Handle a guest access that stage 2 does not map.

    `private` is the access that the guest asserts, None where it cannot. `prefault` says that no guest waits: a slot
    that is being deleted is then an error and not a retry, since the caller would retry inside its read section while
    the deletion waits for that section to end (known bug B26). `accessed` is false for an instruction about
    the page, which works on one that the guest could not use yet.

    Raises: Refusal. EFAULT `fault.mismatch`, `fault.no_slot`, `fault.no_gmem`, `fault.file_gone`, `user.page`; EIO
    `fault.binding`; EHWPOISON `fault.poisoned`; ENOMEM; EAGAIN `prefault.slot_deleted`; EINVAL `arch.make_private`,
    EFAULT `arch.guest_access`. Nothing is mapped then.
    """
    gfn = gfn_of(gpa)
    held: list[File] = []  # references taken inside the read section, to be put after it
    try:
        with kvm.srcu.read():
            slot = kvm.memslots.find(gfn)
            if slot is None:
                if _asked_access(kvm, None, gfn, private) is Access.PRIVATE:  # private MMIO does not exist
                    raise Refusal(errno.EFAULT, "fault.no_slot", gfn=gfn)
                return FaultResult.MMIO
            if slot.invalid:
                if prefault:
                    raise Refusal(errno.EAGAIN, "prefault.slot_deleted", slot=slot.id, gpa=gpa)
                return FaultResult.RETRY
            if write and not slot.writable:
                return FaultResult.MMIO
            seen = kvm.stage2.window.sequence.read()
            await kvm.scheduler.preempt("sequence noted, page not looked up")
            asked = _asked_access(kvm, slot, gfn, private)
            leaf, access = await _find_page(kvm, slot, gfn, asked, write, held)
            await kvm.scheduler.preempt("page looked up, leaf not installed")
            async with kvm.stage2.mmu_lock:
                if access is Access.PRIVATE and kvm.machine.architecture.has_tables:
                    if kvm.stage2.is_void(leaf, seen):
                        return FaultResult.RETRY
                    leaf = protection.prepare(kvm, leaf, gfn, (*kvm.environment.huge_orders, 0))
                    if accessed and not prefault:
                        protection.check_guest_access(kvm, leaf, gfn, write)
                mapped = kvm.stage2.install(leaf, access, seen)
                if mapped and write and slot.dirty is not None:
                    slot.dirty.add(gfn - slot.gfns.start)
            return FaultResult.MAPPED if mapped else FaultResult.RETRY
    finally:
        for file in held:
            await file.put()


def _asked_access(kvm: Kvm, slot: MemorySlot | None, gfn: Gfn, private: bool | None) -> Access:
    """The access that the guest makes, checked against the state of the page (R3)."""
    state = kvm.access_of(gfn, slot)
    if private is None:
        asked = state if kvm.guest_access_follows_state else Access.SHARED
    else:
        asked = Access.PRIVATE if private else Access.SHARED
    if asked is not state:
        raise Refusal(errno.EFAULT, "fault.mismatch", gfn=gfn, asked=asked.value, state=state.value)
    return asked


async def _find_page(
    kvm: Kvm, slot: MemorySlot, gfn: Gfn, asked: Access, write: bool, held: list[File]
) -> tuple[Leaf, Access]:
    """The leaf that would serve the access: from the file, or from the slot's host address."""
    if asked is Access.PRIVATE and not slot.has_gmem:
        raise Refusal(errno.EFAULT, "fault.no_gmem", slot=slot.id, gfn=gfn)
    if asked is Access.PRIVATE or slot.gmem_only:
        return await find_gmem_page(kvm, slot, gfn, asked, held)
    entry = await kvm.mm.user_page(slot.hva_of(gfn), write)
    writable = entry.writable and slot.writable and (write or slot.dirty is None)
    order = _user_order(kvm, slot, gfn, entry.order)
    start = block(gfn, order).start
    return Leaf(
        start, order, entry.pfn, entry.hva - ((gfn - start) << PAGE_SHIFT), entry.window, writable
    ), Access.SHARED


async def find_gmem_page(kvm: Kvm, slot: MemorySlot, gfn: Gfn, asked: Access, held: list[File]) -> tuple[Leaf, Access]:
    """The leaf that would serve it from the slot's file, whose reference goes to `held`. Raises: as page_fault."""
    context = slot.context
    if context is None or not context.file.get_unless_dying():
        raise Refusal(errno.EFAULT, "fault.file_gone", slot=slot.id, gfn=gfn)
    held.append(context.file)
    page, access = await context.get_pfn(slot, gfn, asked if kvm.level.in_place else None)
    order = _leaf_order(slot, gfn, page.order, context.inode.orders)
    start = block(gfn, order).start
    inside = gfn - start
    leaf = Leaf(start, order, Pfn(page.pfn - inside), page.hva - (inside << PAGE_SHIFT), page.window, writable=True)
    return leaf, access


def _user_order(kvm: Kvm, slot: MemorySlot, gfn: Gfn, limit: int) -> int:
    """The largest order, up to that of the host's memory, whose block lies inside the slot. Pages that are logged or
    may be private are mapped one by one. Source: kvm_mmu_max_mapping_level, kvm_mmu_hugepage_adjust."""
    if not limit or slot.dirty is not None or kvm.has_private_memory:
        return 0
    return next((order for order in _USER_ORDERS if order <= limit and slot.gfns.covers(block(gfn, order))), 0)


def _leaf_order(slot: MemorySlot, gfn: Gfn, limit: int, orders: tuple[int, ...]) -> int:
    """The largest order, up to the page's, whose block lies inside the slot, with frame and file page congruent (S13).

    Source: spec/semantics.md section 5, last line; kvm_mmu_max_mapping_level.
    """
    for order in orders:
        congruent = not (slot.gfns.start - slot.pages.start) & ((1 << order) - 1)
        if order <= limit and congruent and slot.gfns.covers(block(gfn, order)):
            return order
    return 0
