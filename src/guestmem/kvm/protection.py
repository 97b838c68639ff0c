"""KVM tells the architecture when pages change hands, so that guest_memfd need not know that there is one (R10).

    guest fault       make_private, under mmu_lock, before the leaf is installed
    invalidation      when every view has zapped, once an inode: make_shared for a conversion, reclaim for pages that
                      leave the file, invalidate for poison
    memslot deletion  invalidate of what no other view shows; then by the policy of lifetime: reclaim what the binding
                      showed, or nothing
    end of the VM     teardown

What gives pages back is a user of the inode like any other, told after all those that may map. It belongs to the
virtual machine and not to a view, so it is there until the last page has left the file. Pages that hardware or firmware
does not give back are bad from then on: never recycled, never anybody's (S19).

Source: kvm_gmem_prepare_folio, kvm_gmem_free_folio; in-place v8, make_private, make_shared, reclaim; spec/seed.md 6.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, cast

from guestmem.arch import Block, DmaRules, FirmwareError, Lifetime
from guestmem.kvm.addresses import Gfn
from guestmem.kvm.identity import VirtualMachine
from guestmem.kvm.stage2 import Leaf
from guestmem.memory import (
    PAGE_SHIFT,
    Access,
    Inode,
    Invalidation,
    Owner,
    PageIndex,
    PageRange,
    Pfn,
    Range,
    Reason,
    UnmapFailed,
)
from guestmem.memory.pages import block
from guestmem.trace import Refusal

if TYPE_CHECKING:
    from guestmem.kvm.context import KvmGmemContext
    from guestmem.kvm.memslots import MemorySlot
    from guestmem.kvm.vm import Kvm


class Ownership:
    """The user of an inode that gives pages back to the host when nobody maps them any more."""

    kind = "ownership"
    may_map_private = True
    takes_references = False

    def __init__(self, machine: VirtualMachine, inode: Inode) -> None:
        self.architecture = machine.architecture
        self.inode = inode
        self.registration = inode.register(self, last=True)

    async def invalidate_begin(self, invalidation: Invalidation) -> None:
        """Poison takes a page out of the guest and leaves it in the file; pages become private when first used."""
        if invalidation.reason is Reason.CONVERT_TO_SHARED:
            found = list(blocks(self.inode, invalidation.pages))
            try:
                self.architecture.make_shared([one for _, one in found])
            except FirmwareError as error:
                raise UnmapFailed(_pages_of(error, found), str(error)) from error
        elif invalidation.reason in (Reason.TRUNCATE, Reason.RELEASE):
            reclaim(self.inode, invalidation.pages)
        elif invalidation.reason is Reason.POISON:
            for view in filter(lambda view: view.is_owners, _views(self.inode)):
                _invalidate(view, view.gfns_of(invalidation.pages))

    async def invalidate_end(self, invalidation: Invalidation) -> None:
        """Nothing waits for it."""


def blocks(inode: Inode, pages: PageRange) -> Iterator[tuple[PageRange, Block]]:
    """The private pages of a range that the file has, in the largest aligned blocks that lie inside; bad ones are left
    out, since nobody knows whose they are."""
    for run, access in list(inode.runs(pages)):
        for part in inode.folios.present_in(run) if access is Access.PRIVATE else ():
            index = part.start
            while index < part.end:
                here = _largest_block(inode, index, part)
                pfn = inode.folios.pfn(index)
                assert pfn is not None
                if index not in inode.unmap_failed:
                    yield here, Block(pfn, here.pages.bit_length() - 1, inode.backing.hva(index))
                index = here.end


def _pages_of(error: FirmwareError, found: list[tuple[PageRange, Block]]) -> PageRange:
    """Where the page is that a call failed for; the first block if the call was for no page of them."""
    pfn = error.facts.get("pfn")
    inside = (pages for pages, one in found if isinstance(pfn, int) and one.pfn <= pfn < one.pfn + one.pages)
    return next(inside, found[0][0])


def _largest_block(inode: Inode, index: PageIndex, inside: PageRange) -> PageRange:
    limit = inode.folios.order_of(index)
    for order in inode.orders:
        here = block(index, order)
        if order <= limit and here.start == index and inside.covers(here):
            return here
    return block(index, 0)


def reclaim(inode: Inode, pages: PageRange) -> None:
    """Every private page of a range is the host's again, or bad. For pages that stay private in the file without being
    anybody's binding, and for those that leave it."""
    machine = inode.owner
    assert isinstance(machine, VirtualMachine)
    for run, one in blocks(inode, pages):
        try:
            machine.architecture.reclaim(one)
        except FirmwareError:
            inode.record_unmap_failure(run)


def prepare(kvm: Kvm, leaf: Leaf, gfn: Gfn, orders: tuple[int, ...]) -> Leaf:
    """Make the pages of a private leaf the guest's; the leaf, smaller if the architecture's tables want that.

    mmu_lock is held and the look-up is good. Raises: Refusal EINVAL `arch.make_private`, nothing changed.
    """
    architecture = kvm.machine.architecture
    for order in orders:
        if order > leaf.order:
            continue
        start = block(gfn, order).start
        inside = start - leaf.gfn
        smaller = Leaf(
            start, order, Pfn(leaf.pfn + inside), leaf.hva + (inside << PAGE_SHIFT), leaf.window, leaf.writable
        )
        one = Block(smaller.pfn, order, smaller.hva)
        if not order or architecture.leaf_order(start, one) == order:
            break
    try:
        architecture.make_private(smaller.gfn, one)
    except FirmwareError as error:
        raise Refusal(
            errno.EINVAL, "arch.make_private", call=error.call, code=error.code, gpa=gfn << PAGE_SHIFT
        ) from error
    return smaller


def check_guest_access(kvm: Kvm, leaf: Leaf, gfn: Gfn, write: bool) -> None:
    """Whether the guest could use what was prepared for it: a page may be its own and at another address.

    Raises: Refusal EFAULT `arch.guest_access`, where a guest on hardware would fault for ever.
    """
    pfn = Pfn(leaf.pfn + gfn - leaf.gfn)
    if not kvm.machine.architecture.check_access(gfn, pfn, leaf.order, write):
        raise Refusal(errno.EFAULT, "arch.guest_access", gpa=gfn << PAGE_SHIFT, pfn=pfn)


def _views(inode: Inode) -> list[KvmGmemContext]:
    users = (registration.user for registration in inode.users.registrations)
    return [cast("KvmGmemContext", user) for user in users if hasattr(user, "binding_at")]


def unmapped(context: KvmGmemContext, slots: Iterable[MemorySlot]) -> None:
    """Slots go, and their private leaves were zapped: so the architecture's own leaves go too, but where another view
    shows the same pages at the same frames, and may have mapped them. A page that the architecture keeps is bad."""
    if not context.kvm.machine.architecture.has_tables or not context.is_owners:
        return
    others = [view for view in _views(context.inode) if view is not context]
    for slot in slots:
        shown = [gfns for view in others for gfns in view.frames_shared_with(slot)]
        start = slot.gfns.start
        for gfns in [*sorted(shown, key=lambda gfns: gfns.start), Range(slot.gfns.end, slot.gfns.end)]:
            if start < gfns.start:
                _invalidate(context, [Range(start, gfns.start)])
            start = max(start, gfns.end)


def _invalidate(context: KvmGmemContext, ranges: list[Range[Gfn]]) -> None:
    architecture = context.kvm.machine.architecture
    for gfns in ranges:
        start = gfns.start
        while start < gfns.end:
            try:
                architecture.invalidate(start, gfns.end - start)
                break
            except FirmwareError as error:
                bad = Gfn(int(str(error.facts.get("gfn", start))))
                context.inode.record_unmap_failure(context.pages_of(Range(bad, Gfn(bad + 1))))
                start = Gfn(bad + 1)


def dma_rules(owner: Owner | None) -> DmaRules | None:
    """What the hardware asks of DMA to somebody's memory. For the IOMMU, to which owners are opaque."""
    return owner.architecture.dma if isinstance(owner, VirtualMachine) else None


def unbound(context: KvmGmemContext, slot: MemorySlot) -> None:
    """A binding has ended. Under the policy `binding` its private pages are the host's again, but for those that
    another view of the same memory has bound."""
    machine = context.inode.owner
    if not isinstance(machine, VirtualMachine) or machine.lifetime is not Lifetime.BINDING:
        return
    if not machine.architecture.has_tables or context.inode.destroyed:
        return
    others = [view for view in _views(context.inode) if view is not context]
    start = slot.pages.start
    for index in range(slot.pages.start, slot.pages.end + 1):
        here = PageIndex(index)
        if index == slot.pages.end or any(other.binding_at(here) for other in others):
            if start < here:
                reclaim(context.inode, Range(start, here))
            start = PageIndex(index + 1)
