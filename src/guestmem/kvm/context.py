"""KvmGmemContext: KVM's adapter to one guest_memfd file; the only place that knows both file offsets and guest frames.

It is KVM's registered user of the inode: it receives invalidations in file pages, intersects them with its bindings,
and opens and closes windows in the VM's stage 2 over the frames that come out. Bindings are disjoint ranges of the file
and change under the exclusive invalidate_lock only, so a window's begin and end see the same ones (S4, S5).

The context lives and dies with its file. It holds its struct kvm; a memslot holds neither.

Source: virt/kvm/guest_memfd.c, struct gmem_file; seed.md R17 to R20.
"""

from __future__ import annotations

import bisect
import errno
from typing import TYPE_CHECKING

from guestmem.kvm import protection
from guestmem.kvm.addresses import Gfn
from guestmem.kvm.memslots import MemorySlot
from guestmem.kvm.protected import state_page
from guestmem.memory import Access, File, Inode, Invalidation, Page, PageIndex, PageRange, Range, Reason
from guestmem.memory.notifier import BOTH
from guestmem.trace import Refusal
from guestmem.trace import events as event

if TYPE_CHECKING:
    from guestmem.kvm.vm import Kvm


class KvmGmemContext:
    """One struct kvm's view of one inode: its bindings and its registration."""

    kind = "kvm"
    may_map_private = True
    takes_references = False

    file: File

    def __init__(self, kvm: Kvm, inode: Inode) -> None:
        self.kvm = kvm
        self.inode = inode
        self.bindings: list[MemorySlot] = []  # by first page; disjoint
        self.registration = inode.register(self)
        kvm.get()

    @property
    def is_owners(self) -> bool:
        """Whether this struct kvm has the identity that the memory belongs to. Not so for the destination of a
        migration before the identity comes, and for the source afterwards: such a view maps nothing (S7)."""
        owner = self.inode.owner
        return owner is None or self.kvm.machine.identity == owner.identity

    # From memory to KVM: invalidations

    async def invalidate_begin(self, invalidation: Invalidation) -> None:
        """Zap the frames that show the pages. A view without a slot in the range is not touched."""
        ranges = self.gfns_of(invalidation.pages)
        if ranges:
            around = self.gfns_of(invalidation.hull) if invalidation.hull else ranges
            await self.kvm.stage2.begin(ranges, invalidation.accesses, around)
            has_tables = self.kvm.machine.architecture.has_tables
            if has_tables and Access.PRIVATE in invalidation.accesses and self.is_owners:
                await state_page.reload(self.kvm, ranges)

    async def invalidate_end(self, invalidation: Invalidation) -> None:
        if self._overlapping(invalidation.pages):
            await self.kvm.stage2.end()

    def gfns_of(self, pages: PageRange) -> list[Range[Gfn]]:
        """The image of file pages under the bindings (R19)."""
        return [gfns for slot in self._overlapping(pages) if (gfns := slot.gfns_of(pages))]

    def pages_of(self, gfns: Range[Gfn]) -> PageRange:
        """The file pages behind frames that one binding shows."""
        slot = next(slot for slot in self.bindings if slot.gfns.covers(gfns))
        return Range(slot.index_of(gfns.start), PageIndex(slot.index_of(gfns.start) + gfns.pages))

    def frames_shared_with(self, slot: MemorySlot) -> list[Range[Gfn]]:
        """The frames at which a slot of another view, and one of this, show the same pages."""
        distance = slot.gfns.start - slot.pages.start
        same = (mine for mine in self._overlapping(slot.pages) if mine.gfns.start - mine.pages.start == distance)
        return [gfns for mine in same if (gfns := mine.gfns_of(slot.pages))]

    # From KVM to memory: faults

    async def get_pfn(self, slot: MemorySlot, gfn: Gfn, access: Access | None) -> tuple[Page, Access]:
        """The page behind a frame of a bound slot, and the access that it was given with.

        `access` None takes the page with whatever access it has: what a kernel without conversion does, where the
        file has one for all its pages.

        Raises: Refusal EIO `fault.binding`; EFAULT `fault.identity`; what Inode.fault refuses.
        Source: kvm_gmem_get_pfn.
        """
        async with self.inode.invalidate_lock.shared:
            asked = access or self.inode.access_at(slot.index_of(gfn))
            return await self.page_at(slot, gfn, asked), asked

    async def page_at(self, slot: MemorySlot, gfn: Gfn, access: Access) -> Page:
        """The page behind a frame of a bound slot. The caller holds invalidate_lock.

        Raises: as get_pfn; Refusal EFAULT `fault.identity`.
        """
        index = slot.index_of(gfn)
        if self.binding_at(index) is not slot:
            raise Refusal(errno.EIO, "fault.binding", slot=slot.id, gfn=gfn, index=index)
        if not self.is_owners:
            raise Refusal(errno.EFAULT, "fault.identity", vm=self.kvm.number, inode=self.inode.number)
        return await self.inode.fault(self.registration, index, access)

    # Bindings

    def binding_at(self, index: PageIndex) -> MemorySlot | None:
        """The slot that is bound to a page."""
        place = bisect.bisect_right(self.bindings, index, key=_first_page) - 1
        return self.bindings[place] if place >= 0 and self.bindings[place].pages.contains(index) else None

    async def bind(self, slot: MemorySlot, first: PageIndex) -> None:
        """Tie a slot that nobody can see yet to the pages from `first` on; the caller holds the file.

        Raises: Refusal `bind.overlap`, EINVAL or EEXIST by ABI level; ENOMEM `bind.nomem`. Source: kvm_gmem_bind.
        """
        pages = Range(first, PageIndex(first + slot.gfns.pages))
        async with self.inode.invalidate_lock.exclusive:
            if taken := next(iter(self._overlapping(pages)), None):
                raise Refusal(
                    self.kvm.level.overlap_errno, "bind.overlap", slot=slot.id, first=first, bound_to=taken.id
                )
            if self.kvm.scheduler.fails("bind: store"):
                raise Refusal(errno.ENOMEM, "bind.nomem", slot=slot.id)
            slot.pages = pages
            bisect.insort(self.bindings, slot, key=_first_page)
            slot.context = self
            slot.gmem_only = self.kvm.level.in_place or self.inode.abilities.mmap
            self._trace_binding(slot, bound=True)

    async def unbind(self, slot: MemorySlot) -> File | None:
        """The slot is going: take it out of the bindings. slots_lock held.

        A file that is dying is no reason to do nothing: its release may only run after the slot was freed, and would
        write to it (known bug B01). The lock is needed then too, unlike in the kernel: another view of the memory may
        have opened a window here, and its end must find what its begin found (S4). The inode is there, as release
        cannot get past slots_lock.

        Returns the file if a reference was taken; the caller puts it once it holds no lock.
        Source: kvm_gmem_unbind; ae431059e75d.
        """
        held = self.file.get_unless_dying()
        async with self.inode.invalidate_lock.exclusive:
            self._erase(slot)
        return self.file if held else None

    async def release(self) -> None:
        """The file's last reference is gone: no slot may find it any more, no mapping of it may stay.

        Source: kvm_gmem_release; spec/semantics.md section 1.
        """
        async with self.kvm.slots_lock, self.inode.invalidate_lock.exclusive:
            everything = Invalidation(Range(PageIndex(0), PageIndex(self.inode.pages)), Reason.RELEASE, BOTH)
            await self.invalidate_begin(everything)
            ranges = self.gfns_of(everything.pages)
            protection.unmapped(self, self.bindings)
            for slot in list(self.bindings):
                self._erase(slot)
            if ranges:
                await self.kvm.stage2.end()
        if self.kvm.stage2.remote is not None:
            await self.kvm.stage2.remote.forget(self.inode)
        await self.registration.unregister()
        await self.kvm.put()

    def _erase(self, slot: MemorySlot) -> None:
        self.bindings.remove(slot)
        slot.context = None
        protection.unbound(self, slot)
        self._trace_binding(slot, bound=False)

    def _overlapping(self, pages: PageRange) -> list[MemorySlot]:
        place = max(bisect.bisect_right(self.bindings, pages.start, key=_first_page) - 1, 0)
        found = []
        for slot in self.bindings[place:]:
            if slot.pages.start >= pages.end:
                break
            if slot.pages.overlaps(pages):
                found.append(slot)
        return found

    def _trace_binding(self, slot: MemorySlot, bound: bool) -> None:
        tracer = self.kvm.tracer
        if not tracer.enabled:
            return
        vm, inode, pages = self.kvm.number, self.inode.number, slot.pages
        if bound:
            tracer.emit(event.KvmBind(vm, slot.id, inode, pages.start, pages.end, slot.gfns.start))
        else:
            tracer.emit(event.KvmUnbind(vm, slot.id, inode, pages.start, pages.end))

    def check(self) -> None:
        """S5: bindings are disjoint, inside the file, and known to their slots."""
        for slot in self.bindings:
            assert slot.context is self, f"S5: {slot} is bound here and does not know it"
            assert not slot.freed, f"S6: {slot} is freed and still bound"
            limit = (1 << 51) if self.kvm.level.signed_range_end else self.inode.pages
            assert slot.pages.end <= limit, f"S5: {slot} is bound beyond the end of the file"
        for before, after in zip(self.bindings, self.bindings[1:], strict=False):
            assert not before.pages.overlaps(after.pages), f"S5: {before} and {after} share a page"


def _first_page(slot: MemorySlot) -> PageIndex:
    return slot.pages.start
