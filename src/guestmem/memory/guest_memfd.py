"""guest_memfd: one inode, the memory itself. Every conversion, fault and hole of guestmem happens here.

The provider serves pages by file offset to whoever registered, decides who may have which page, and changes that in
place. It tells its users before it does, never maps anything for them, and knows nothing of what they are: no word of
KVM, of an IOMMU or of an architecture.

Protocol. `invalidate_lock` is held exclusively by whatever changes what a page means (convert, punch_hole, poison,
destroy) and shared by whatever looks a page up (fault, allocate). A change tells its users first, in a window from
invalidate_begin to invalidate_end:

Conversion is in convert.py. A fault asks for an access, shared or private; if the page has the other one it gets no
page (R3). A hole tells all users, then the pages leave the file.

Memory comes and goes by huge pages of the file's `order`, which may be 0; inside, a huge page may be split (splits.py).

Sources: virt/kvm/guest_memfd.c; "[PATCH v8 00/46] guest_memfd: In-place conversion support"; spec/semantics.md 2 to 4.
Unlike Linux today, userspace is a registered user like the others, and the architecture is told by KVM (seed.md R1,
R10).
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterator

from pyroaring import BitMap64

from guestmem.memory.attributes import Attributes
from guestmem.memory.backing import Backing
from guestmem.memory.convert import convert
from guestmem.memory.fallocate import FALLOC_FL_PUNCH_HOLE, check_fallocate
from guestmem.memory.fill import fill, zero
from guestmem.memory.folio import Folios
from guestmem.memory.interface import Abilities, HugePolicy, InodeStatistics, Owner, Page, Split
from guestmem.memory.notifier import BOTH, Access, Invalidation, MemoryUser, Reason, Registration, Users
from guestmem.memory.pages import (
    PAGE_SHIFT,
    PAGE_SIZE,
    PageIndex,
    PageRange,
    Range,
    block,
    offset_of,
    whole_blocks,
)
from guestmem.memory.pool import FolioSource
from guestmem.memory.splits import Blocks, hull
from guestmem.sched import LockClass, RefCount, RwLock, Scheduler
from guestmem.trace import EHWPOISON, Refusal, Tracer
from guestmem.trace import events as event


class Inode:
    """The memory of one guest_memfd. Held by its files (views); destroyed with the last.

    `number` is the inode number, `size` is in bytes and immutable. Folios come from `source`; `orders` are those that
    they may have, largest first, 0 last. `owner` is held until the inode is destroyed: memory never outlives its
    virtual machine (R23).
    """

    allocate_batch = 512
    """Pages allocated between two looks at the signal and two points where others may run: 2 MiB of 4K pages, or one
    huge page."""

    def __init__(
        self,
        scheduler: Scheduler,
        tracer: Tracer,
        source: FolioSource,
        backing: Backing,
        *,
        number: int,
        size: int,
        abilities: Abilities,
        owner: Owner | None = None,
        orders: tuple[int, ...] = (0,),
        policy: HugePolicy = HugePolicy(),  # noqa: B008 (immutable)
    ) -> None:
        assert size > 0 and not size & ((PAGE_SIZE << orders[0]) - 1), "the creator checks the size"
        self.number = number
        self.size = size
        self.pages = size >> PAGE_SHIFT
        self.abilities = abilities
        self.owner = owner
        if owner is not None:
            owner.get()
        self.order = orders[0]
        self.orders = orders
        self.policy = policy
        self.invalidate_lock = RwLock(scheduler, LockClass.INVALIDATE_LOCK, f"invalidate_lock inode {number}")
        self.attributes: Attributes[PageIndex] = Attributes(
            self.pages, Access.SHARED if abilities.init_shared else Access.PRIVATE
        )
        self.backing = backing
        self.folios = Folios(
            scheduler, source, backing, f"inode {number}", orders, split_whole=policy.split is Split.WHOLE
        )
        self.unmap_failed = BitMap64()
        self.users = Users(scheduler, tracer, number, self.record_unmap_failure)
        self.references = RefCount(scheduler, f"inode {number} references")
        self.destroyed = False
        self.frozen = False
        self.scheduler = scheduler
        self.tracer = tracer
        self.conversions = 0
        self.source = source
        self._faults: Counter[tuple[str, str]] = Counter()
        self._splits: Counter[int] = Counter()
        self._merges: Counter[int] = Counter()
        self._peak = 0
        if tracer.enabled:
            tracer.emit(event.GmemCreate(number, size, abilities.mmap | abilities.init_shared << 1))

    # Users

    def register(self, user: MemoryUser, *, last: bool = False) -> Registration:
        """From now on `user` may fault pages and is told before they change. End it with `Registration.unregister`.

        One that is to be `last` is told after the others: nobody maps the pages any more then.
        """
        return self.users.register(user, last=last)

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
        EPERM `frozen.fault`; ENOMEM `pool.empty`, `backing.full`.
        Source: kvm_gmem_get_pfn, kvm_gmem_fault_user_mapping.
        """
        assert self.invalidate_lock.held_by_me, "fault without invalidate_lock"
        self._check_fault(registration.user, index, access)
        if index not in self.folios.present:
            if self.frozen:
                raise Refusal(errno.EPERM, "frozen.fault", index=index)
            await fill(self, self.folios.huge_page(index))
        reference = self.folios.get(index)
        try:
            if index in self.folios.poisoned:
                raise Refusal(EHWPOISON, "fault.poisoned", index=index)
            if index not in self.folios.uptodate:
                await zero(self, index)
        finally:
            reference.put()
        self._faults[registration.user.kind, access.value] += 1
        page = Page(reference.pfn, self.mapping_order(index), self.backing.hva(index), self.backing.window(index))
        if self.tracer.enabled:
            user = registration.user.kind
            self.tracer.emit(event.GmemFault(self.number, index, user, access.value, page.pfn, page.order))
        return page

    def _check_fault(self, user: MemoryUser, index: PageIndex, access: Access) -> None:
        if not 0 <= index < self.pages:
            raise Refusal(errno.EFAULT, "fault.past_end", index=index, pages=self.pages)
        if access is Access.PRIVATE and not user.may_map_private:
            raise Refusal(errno.EFAULT, "fault.user_private", user=user.kind, index=index)
        state = self.attributes.get(index)
        if state is not access:
            raise Refusal(errno.EFAULT, "fault.access", index=index, access=access.value, state=state.value)

    async def absorb(self, pages: PageRange) -> None:
        """Learn of pages that a user brought into being through a mapping of the backing itself.

        For a user whose faults the host's kernel handles. Such pages are zero at birth, so they are up to date.
        """
        inside = pages.intersection(Range(PageIndex(0), PageIndex(self.pages)))
        if inside is None or self.folios.present.contains_range(inside.start, inside.end):
            return
        for run in self.backing.existing(inside):
            around = hull(run, self.order)
            new = list(self.folios.absent(around))
            await fill(self, around)
            for gap in new:
                self.folios.set_uptodate(gap)

    # fallocate

    async def fallocate(self, mode: int, offset: int, length: int) -> None:
        """fallocate(2), all checks in the kernel's order. Bytes.

        Raises: Refusal with the rules `fallocate.*`, `pool.*`, `backing.full`, `split.vmemmap`, `punch.busy`.
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
            self._check_not_frozen()
            batch = max(self.allocate_batch, 1 << self.order)
            for start in range(pages.start, pages.end, batch):
                if self.scheduler.signal_pending:
                    raise Refusal(errno.EINTR, "fallocate.interrupted", done_pages=start - pages.start)
                end = min(start + batch, pages.end)
                await fill(self, Range(PageIndex(start), PageIndex(end)), populate=True)
                await self.scheduler.cond_resched("allocated a batch")

    async def punch_hole(self, pages: PageRange) -> None:
        """Free the folios in `pages`; their access stays as it is, their bytes are zero when they come back.

        Users are told (reason TRUNCATE) before a folio leaves the file. A pinned 4K folio lives on detached with its
        holder; a huge page of which a part is pinned refuses, and so does the whole hole. A huge page that the hole
        covers in part stays, and that part becomes zero. What lies beyond the end of the file is no error and nothing.

        Raises: Refusal EAGAIN `punch.busy`, for files of huge pages only; EPERM `frozen.fallocate`.
        Source: kvm_gmem_punch_hole; semantics.md sections 4 and 10.
        """
        inside = pages.intersection(Range(PageIndex(0), PageIndex(self.pages)))
        if inside is None:
            return
        huge_pages, parts = whole_blocks(inside, self.order)
        invalidation = Invalidation(inside, Reason.TRUNCATE, BOTH, hull(inside, self.order) if self.order else None)
        async with self.invalidate_lock.exclusive, self.users.tell(invalidation) as telling:
            self._check_not_frozen()
            if self.order and huge_pages is not None:
                await telling.begin(through_references=True)
                busy = self.folios.first_referenced(huge_pages)
                if busy is not None:  # before those are told who give private pages back, and with them their bytes
                    raise Refusal(errno.EAGAIN, "punch.busy", offset=offset_of(busy))
            await telling.begin()
            if huge_pages is not None:
                self._truncate(huge_pages)
            for part in parts:
                self._zero_range(part)

    async def freeze(self, frozen: bool = True) -> None:
        """From the return of this no page comes, goes or is converted; those that are there can be had as ever.

        So a description of the file stays true until it is handed over. Source: kvm_gmem_freeze, "[RFC PATCH v2 00/10]
        liveupdate: kvm: Guest_memfd preservation", where SRCU keeps the same things out.
        """
        async with self.invalidate_lock.exclusive:
            self.frozen = frozen

    def _check_not_frozen(self) -> None:
        if self.frozen:
            raise Refusal(errno.EPERM, "frozen.fallocate", inode=self.number)

    def _truncate(self, pages: PageRange) -> None:
        self._peak = max(self._peak, len(self.folios.present))  # only a hole makes it less
        detached = self.folios.remove(pages)
        self.unmap_failed.remove_range(pages.start, pages.end)
        if self.tracer.enabled:
            self.tracer.emit(event.GmemFolioFree(self.number, pages.start, pages.end, detached))

    def _zero_range(self, pages: PageRange) -> None:
        for run in self.folios.present_in(pages):
            self.backing.clear(run)
            if self.tracer.enabled:
                self.tracer.emit(event.GmemZeroRange(self.number, run.start, run.end))

    # Conversion, splitting and merging

    async def convert(self, pages: PageRange, to: Access) -> None:
        """Give every page of `pages` the access `to`; see convert.py. Raises: Refusal `convert.*`, `split.*`."""
        await convert(self, pages, to)

    def note_split(self, split: list[Blocks]) -> None:
        """Folios were split: count it and say so."""
        for order, blocks in split:
            self._splits[order] += len(blocks)
            if self.tracer.enabled:
                self.tracer.emit(event.GmemSplit(self.number, *_extent(order, blocks)))

    def note_merged(self, merged: list[Blocks]) -> None:
        """Folios were merged: count it and say so."""
        for order, blocks in merged:
            self._merges[order] += len(blocks)
            if self.tracer.enabled:
                self.tracer.emit(event.GmemMerge(self.number, *_extent(order, blocks)))

    # Queries (seed.md Q1 to Q3)

    def access_at(self, index: PageIndex) -> Access:
        """Whether a page is shared or private now. Lockless, as in KVM's fault path."""
        return self.attributes.get(index)

    def runs(self, pages: PageRange) -> Iterator[tuple[PageRange, Access]]:
        """The stretches of one access inside `pages`, in order."""
        return self.attributes.runs(pages)

    def mapping_order(self, index: PageIndex) -> int:
        """The order of the largest leaf that may map `index`: within its folio, and of one access throughout."""
        largest = self.folios.order_of(index)
        for order in self.orders:
            if order <= largest and self.attributes.is_uniform(block(index, order)):
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
                if self.tracer.enabled:
                    self.tracer.emit(event.GmemPoison(self.number, index))
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
        self.source.close()
        self.destroyed = True
        if self.owner is not None:
            self.owner.put()
        if self.tracer.enabled:
            self.tracer.emit(event.GmemDestroy(self.number))

    def record_unmap_failure(self, pages: PageRange) -> None:
        """A user could not unmap, or give back: the pages are bad from now on, as if their memory had failed (Q12)."""
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
            conversions=self.conversions,
            faults=dict(self._faults),
            invalidations=dict(self.users.invalidations),
            order=self.order,
            folios=self.folios.splits.folios(len(self.folios.present)),
            splits=dict(self._splits),
            merges=dict(self._merges),
            memory=self.backing.kind,
        )

    def check(self) -> None:
        """Walk everything and assert what must always hold of an inode by itself."""
        self.folios.check()
        assert not self.folios.present or self.folios.present.max() < self.pages, "S5: a page beyond the end"
        assert not (self.destroyed and self.folios.present), "L3: pages left after the end"
        for run, access in self.runs(Range(PageIndex(0), PageIndex(self.pages))) if self.order else ():
            for part in self.folios.present_in(run) if access is Access.SHARED else ():
                assert not self.folios.splits.missing(part), f"S13: a huge folio meets the shared pages {part}"
        assert self.unmap_failed.isdisjoint(self.folios.present - self.folios.poisoned), "S19: bad page not poisoned"


def _extent(order: int, blocks: BitMap64) -> tuple[int, int, int, int]:
    """Blocks of an order as events have them: first page, end, order, how many."""
    return blocks.min() << order, (blocks.max() + 1) << order, order, len(blocks)
