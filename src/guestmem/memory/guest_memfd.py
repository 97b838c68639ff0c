"""guest_memfd: one inode, the memory itself. Every conversion, fault and hole of guestmem happens here.

The provider serves pages by file offset to whoever registered, decides who may have which page, and changes that in
place. It tells its users before it does, never maps anything for them, and knows nothing of what they are: no word of
KVM, of an IOMMU or of an architecture.

Protocol. `invalidate_lock` is held exclusively by whatever changes what a page means (convert, punch_hole, poison,
destroy) and shared by whatever looks a page up (fault, allocate). A change tells its users first, in a window from
invalidate_begin to invalidate_end:

    convert:  already there? -> room -> to private: users that take references first, then look for references
              -> the other users -> did all unmap? -> STORE -> end
    hole:     all users -> pages leave the file -> end

Everything that may fail comes before STORE, and a failure ends the window with nothing changed (S15). A fault asks for
an access, shared or private; if the page has the other one it gets no page (R3).

Sources: virt/kvm/guest_memfd.c; "[PATCH v8 00/46] guest_memfd: In-place conversion support"; spec/semantics.md 2 to 4.
Unlike Linux today, userspace is a registered user like the others, and the architecture is told by KVM (seed.md R1,
R10).
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterator

from pyroaring import BitMap64

from guestmem.memory.attributes import Attributes, other
from guestmem.memory.backing import Backing
from guestmem.memory.fallocate import FALLOC_FL_PUNCH_HOLE, check_fallocate
from guestmem.memory.folio import Folios
from guestmem.memory.interface import Abilities, InodeStatistics, Owner, Page
from guestmem.memory.notifier import BOTH, Access, Invalidation, MemoryUser, Reason, Registration, Users
from guestmem.memory.pages import (
    ORDERS,
    PAGE_SHIFT,
    PAGE_SIZE,
    PageIndex,
    PageRange,
    Pfn,
    Range,
    block,
    offset_of,
)
from guestmem.memory.pool import Pool
from guestmem.sched import LockClass, RefCount, RwLock, Scheduler
from guestmem.trace import EHWPOISON, Refusal, Tracer
from guestmem.trace import events as event

_CONVERSION = {Access.PRIVATE: Reason.CONVERT_TO_PRIVATE, Access.SHARED: Reason.CONVERT_TO_SHARED}


class Inode:
    """The memory of one guest_memfd. Held by its files (views); destroyed with the last.

    `number` is the inode number, `size` is in bytes and immutable, `order` is that of every folio. `owner` is held
    until every page has gone back: memory never outlives its virtual machine (R23).
    """

    allocate_batch = 512
    """Pages allocated between two looks at the signal and two points where others may run: 2 MiB of 4K pages."""

    def __init__(
        self,
        scheduler: Scheduler,
        tracer: Tracer,
        pool: Pool,
        backing: Backing,
        *,
        number: int,
        size: int,
        abilities: Abilities,
        owner: Owner | None = None,
        order: int = 0,
    ) -> None:
        assert size > 0 and not size & ((PAGE_SIZE << order) - 1), "the creator checks the size"
        self.number = number
        self.size = size
        self.pages = size >> PAGE_SHIFT
        self.abilities = abilities
        self.owner = owner
        if owner is not None:
            owner.get()
        self.order = order
        self.invalidate_lock = RwLock(scheduler, LockClass.INVALIDATE_LOCK, f"invalidate_lock inode {number}")
        self.attributes: Attributes[PageIndex] = Attributes(
            self.pages, Access.SHARED if abilities.init_shared else Access.PRIVATE
        )
        self.backing = backing
        self.folios = Folios(scheduler, pool, backing, order, f"inode {number}")
        self.unmap_failed = BitMap64()
        self.users = Users(scheduler, tracer, number, self._record_unmap_failure)
        self.references = RefCount(scheduler, f"inode {number} references")
        self.destroyed = False
        self._pool = pool
        self._scheduler = scheduler
        self._tracer = tracer
        self._faults: Counter[tuple[str, str]] = Counter()
        self._conversions = 0
        self._peak = 0
        if tracer.enabled:
            tracer.emit(event.GmemCreate(number, size, abilities.mmap | abilities.init_shared << 1))

    # Users

    def register(self, user: MemoryUser) -> Registration:
        """From now on `user` may fault pages and is told before they change. End it with `Registration.unregister`."""
        return self.users.register(user)

    async def put(self) -> None:
        """One file less holds this inode; the last one destroys it."""
        if self.references.put():
            await self._destroy()

    # Faults

    async def fault(self, registration: Registration, index: PageIndex, access: Access) -> Page:
        """The page at `index` for a user that will map it with `access`; allocated and zeroed if it is new.

        The caller holds invalidate_lock (shared will do), and either keeps it until its mapping is installed or checks
        its `Window` before it installs. No reference is kept.

        Raises: Refusal EFAULT `fault.past_end`, `fault.user_private`, `fault.access`; EHWPOISON `fault.poisoned`;
        ENOMEM `pool.empty`, `backing.full`.
        Source: kvm_gmem_get_pfn, kvm_gmem_fault_user_mapping.
        """
        assert self.invalidate_lock.held_by_me, "fault without invalidate_lock"
        self._check_fault(registration.user, index, access)
        if index not in self.folios.present:
            await self._fill(self.folios.folio(index))
        reference = self.folios.get(index)
        try:
            if index in self.folios.poisoned:
                raise Refusal(EHWPOISON, "fault.poisoned", index=index)
            if index not in self.folios.uptodate:
                await self._zero(index)
        finally:
            reference.put()
        self._faults[registration.user.kind, access.value] += 1
        page = Page(reference.pfn, self.mapping_order(index), self.backing.hva(index), self.backing.window(index))
        if self._tracer.enabled:
            user = registration.user.kind
            self._tracer.emit(event.GmemFault(self.number, index, user, access.value, page.pfn, page.order))
        return page

    def _check_fault(self, user: MemoryUser, index: PageIndex, access: Access) -> None:
        if not 0 <= index < self.pages:
            raise Refusal(errno.EFAULT, "fault.past_end", index=index, pages=self.pages)
        if access is Access.PRIVATE and not user.may_map_private:
            raise Refusal(errno.EFAULT, "fault.user_private", user=user.kind, index=index)
        state = self.attributes.get(index)
        if state is not access:
            raise Refusal(errno.EFAULT, "fault.access", index=index, access=access.value, state=state.value)

    async def _fill(self, pages: PageRange, populate: bool = False) -> None:
        """Give every absent page of the range a folio. Two tasks may do so at once; who inserts second gives back."""
        while gap := next(self.folios.absent(pages), None):
            if self._scheduler.fails("folio: allocate"):
                raise Refusal(errno.ENOMEM, "pool.empty", wanted=gap.pages)
            pfns = self._pool.allocate(gap.pages, self.order)
            await self._scheduler.preempt("allocated, not in the file yet")
            if self.folios.present.range_cardinality(gap.start, gap.end):
                self._give_back(pfns)
                continue
            if populate:
                try:
                    self.backing.populate(gap)
                except OSError as error:
                    self._give_back(pfns)
                    raise Refusal(errno.ENOMEM, "backing.full", start=gap.start, pages=gap.pages) from error
            self.folios.insert(gap, pfns)
            if self._tracer.enabled:
                self._tracer.emit(event.GmemFolioAlloc(self.number, gap.start, gap.end))

    async def absorb(self, pages: PageRange) -> None:
        """Learn of pages that a user brought into being through a mapping of the backing itself.

        For a user whose faults the host's kernel handles. Such pages are zero at birth, so they are up to date.
        """
        inside = pages.intersection(Range(PageIndex(0), PageIndex(self.pages)))
        if inside is None or self.folios.present.contains_range(inside.start, inside.end):
            return
        for run in self.backing.existing(inside):
            new = list(self.folios.absent(run))
            await self._fill(run)
            for gap in new:
                self.folios.set_uptodate(gap)

    def _give_back(self, pfns: list[Range[Pfn]]) -> None:
        for run in reversed(pfns):
            self._pool.free(run)

    async def _zero(self, index: PageIndex) -> None:
        """Zero the folio once, under its lock; whoever waited for the lock finds it done (S12)."""
        async with self.folios.lock(index):
            if index in self.folios.uptodate:
                return
            folio = self.folios.folio(index)
            self.backing.zero(folio)
            if self._tracer.enabled:
                self._tracer.emit(event.GmemFolioZero(self.number, folio.start, self.order))
            await self._scheduler.preempt("zeroed, not up to date yet")
            self.folios.set_uptodate(folio)

    # fallocate

    async def fallocate(self, mode: int, offset: int, length: int) -> None:
        """fallocate(2), all checks in the kernel's order. Bytes.

        Raises: Refusal with the rules `fallocate.*`, `pool.empty`, `backing.full`, `punch.busy`.
        Source: fs/open.c vfs_fallocate, then kvm_gmem_fallocate; spec/uapi.md section 8.
        """
        pages = check_fallocate(mode, offset, length, folio_size=PAGE_SIZE << self.order)
        if mode & FALLOC_FL_PUNCH_HOLE:
            await self.punch_hole(pages)
        elif offset + length > self.size:
            raise Refusal(errno.EINVAL, "fallocate.past_end", offset=offset, length=length, file_size=self.size)
        else:
            await self.allocate(pages)

    async def allocate(self, pages: PageRange) -> None:
        """Have folios for `pages`, not zeroed yet: zeroing is the first fault's. Maps nothing anywhere (R2, R9).

        Raises: Refusal EINTR `fallocate.interrupted` (pages allocated so far stay); ENOMEM.
        Source: kvm_gmem_allocate.
        """
        async with self.invalidate_lock.shared:
            for start in range(pages.start, pages.end, self.allocate_batch << self.order):
                if self._scheduler.signal_pending:
                    raise Refusal(errno.EINTR, "fallocate.interrupted", done_pages=start - pages.start)
                end = min(start + (self.allocate_batch << self.order), pages.end)
                await self._fill(Range(PageIndex(start), PageIndex(end)), populate=True)
                await self._scheduler.cond_resched("allocated a batch")

    async def punch_hole(self, pages: PageRange) -> None:
        """Free the folios in `pages`; their access stays as it is, their bytes are zero when they come back.

        Users are told (reason TRUNCATE) before a folio leaves the file. A pinned 4K folio lives on detached with its
        holder; a pinned huge one refuses. What lies beyond the end of the file is no error and nothing.

        Raises: Refusal EAGAIN `punch.busy`, for files of huge folios only.
        Source: kvm_gmem_punch_hole; semantics.md sections 4 and 10.
        """
        inside = pages.intersection(Range(PageIndex(0), PageIndex(self.pages)))
        if inside is None:
            return
        async with (
            self.invalidate_lock.exclusive,
            self.users.tell(Invalidation(inside, Reason.TRUNCATE, BOTH)) as telling,
        ):
            await telling.begin()
            busy = self.folios.first_referenced(inside) if self.order else None
            if busy is not None:
                raise Refusal(errno.EAGAIN, "punch.busy", offset=offset_of(busy))
            self._truncate(inside)

    def _truncate(self, pages: PageRange) -> None:
        self._peak = max(self._peak, len(self.folios.present))  # only a hole makes it less
        detached = self.folios.remove(pages)
        self.unmap_failed.remove_range(pages.start, pages.end)
        if self._tracer.enabled:
            self._tracer.emit(event.GmemFolioFree(self.number, pages.start, pages.end, detached))

    # Conversion

    async def convert(self, pages: PageRange, to: Access) -> None:
        """Give every page of `pages` the access `to`, all or none. Bytes stay where they are.

        Nothing happens, and nobody is told, if all have it. To private: the users through whose mappings references
        can be taken drop theirs first, then a folio that is still referenced is busy; the entries that were dropped
        fault in again. To shared needs no such look: a private page has no foreign references (S1).

        Raises: Refusal, with `error_offset` in bytes among its facts: ENOMEM `convert.nomem`; EAGAIN `convert.busy`,
        the first busy folio; EHWPOISON `convert.bad_page`, a user could not unmap. EINVAL `convert.folio` for part of a
        huge folio, which needs a split.
        Source: in-place conversion v8, kvm_gmem_set_attributes; spec/semantics.md section 3.
        """
        size = 1 << self.order
        if (pages.start | pages.end) & (size - 1):
            raise Refusal(errno.EINVAL, "convert.folio", start=pages.start, end=pages.end, order=self.order)
        async with self.invalidate_lock.exclusive:
            if self.attributes.is_all(pages, to):
                return
            if self._scheduler.fails("convert: preallocate"):
                raise Refusal(errno.ENOMEM, "convert.nomem", error_offset=offset_of(pages.start))
            async with self.users.tell(Invalidation(pages, _CONVERSION[to], (other(to),))) as telling:
                if to is Access.PRIVATE:
                    await telling.begin(through_references=True)
                    await self._scheduler.preempt("unmapped, references not looked at yet")
                    self._check_no_references(pages)
                await telling.begin()
                self._check_all_unmapped(pages)
                # The point of no return: nothing below may fail.
                self.attributes.set(pages, to)
                self._conversions += 1
                if self._tracer.enabled:
                    self._tracer.emit(event.GmemConvert(self.number, pages.start, pages.end, to.value))

    def _check_no_references(self, pages: PageRange) -> None:
        busy = self.folios.first_referenced(pages)
        if busy is not None:
            offset = offset_of(max(pages.start, busy))
            references = self.folios.references[busy]
            raise Refusal(errno.EAGAIN, "convert.busy", error_offset=offset, references=references)

    def _check_all_unmapped(self, pages: PageRange) -> None:
        """Look again after the users were told: a page that stayed mapped must not change hands (B53, S19)."""
        if self.unmap_failed.range_cardinality(pages.start, pages.end):
            bad = PageIndex(self.unmap_failed.next_set_bit(pages.start))
            raise Refusal(EHWPOISON, "convert.bad_page", error_offset=offset_of(bad))

    # Queries (seed.md Q1 to Q3)

    def access_at(self, index: PageIndex) -> Access:
        """Whether a page is shared or private now. Lockless, as in KVM's fault path."""
        return self.attributes.get(index)

    def runs(self, pages: PageRange) -> Iterator[tuple[PageRange, Access]]:
        """The stretches of one access inside `pages`, in order."""
        return self.attributes.runs(pages)

    def mapping_order(self, index: PageIndex) -> int:
        """The order of the largest leaf that may map `index`: within its folio, and of one access throughout."""
        for order in ORDERS:
            if order <= self.order and self.attributes.is_uniform(block(index, order)):
                return order
        return 0

    # Poison and the end

    async def memory_failure(self, index: PageIndex) -> bool:
        """The memory of a page went bad: users drop it, and it is never given out again. False if there is no page.

        Source: kvm_gmem_error_folio; spec/semantics.md section 6. The kernel takes the lock shared, since KVM has its
        window and core mm unmaps userspace under the folio lock. Here userspace is a user whose faults rely on
        invalidate_lock alone, so it is taken exclusively.
        """
        async with self.invalidate_lock.exclusive:
            if index not in self.folios.present:
                return False
            folio = self.folios.folio(index)
            async with self.users.tell(Invalidation(folio, Reason.POISON, BOTH)) as telling:
                await telling.begin()
                self.folios.poisoned.add_range(folio.start, folio.end)
                if self._tracer.enabled:
                    self._tracer.emit(event.GmemPoison(self.number, index))
            return True

    async def _destroy(self) -> None:
        """The last file is gone: whoever is still registered is told, every page goes back, and then the owner does."""
        everything = Range(PageIndex(0), PageIndex(self.pages))
        async with (
            self.invalidate_lock.exclusive,
            self.users.tell(Invalidation(everything, Reason.RELEASE, BOTH)) as telling,
        ):
            await telling.begin()
            self._truncate(everything)
        self.users.registrations.clear()
        self.backing.close()
        self.destroyed = True
        if self.owner is not None:
            self.owner.put()
        if self._tracer.enabled:
            self._tracer.emit(event.GmemDestroy(self.number))

    def _record_unmap_failure(self, pages: PageRange) -> None:
        """A user could not unmap: the pages are bad from now on, as if their memory had failed (Q12)."""
        self.unmap_failed.add_range(pages.start, pages.end)
        for run in self.folios.present_in(pages):
            self.folios.poisoned.add_range(run.start, run.end)

    # For the reader

    def statistics(self) -> InodeStatistics:
        return InodeStatistics(
            number=self.number,
            size=self.size,
            allocated=len(self.folios.present),
            allocated_peak=max(self._peak, len(self.folios.present)),
            private=self.attributes.private_count(),
            poisoned=len(self.folios.poisoned),
            conversions=self._conversions,
            faults=dict(self._faults),
            invalidations=dict(self.users.invalidations),
        )

    def check(self) -> None:
        """Walk everything and assert what must always hold of an inode by itself."""
        self.folios.check()
        assert not self.folios.present or self.folios.present.max() < self.pages, "S5: a page beyond the end"
        assert not (self.destroyed and self.folios.present), "L3: pages left after the end"
        assert self.unmap_failed.isdisjoint(self.folios.present - self.folios.poisoned), "S19: bad page not poisoned"
