"""One file under replay: the provider's inode, its two users, and what each event of the trace does to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from guestmem.memory import Access, PageIndex, PageRange, Range, Registration
from guestmem.memory.pages import ORDER_1G, ORDER_2M, whole_blocks
from guestmem.memory.splits import hull
from guestmem.simulate.backing import NoBacking
from guestmem.simulate.leaves import NONE, Entries, Leaves
from guestmem.simulate.machine import Machine
from guestmem.simulate.spent import Spent, now
from guestmem.simulate.user import CountingUser, kvm, vmm
from guestmem.trace import events as event


class ReplayedFile:
    """`counts` are items of the cost model, shared by all files of a replay. `entries` are KVM's, now.

    `took` is told the provider's time of each conversion.
    """

    def __init__(
        self, machine: Machine, created: event.GmemCreate, counts: Counter[str], took: Callable[[Spent], None]
    ) -> None:
        self.machine = machine
        self.inode = machine.create(created.size, created.flags)
        self.kvm = kvm(Leaves(self.inode.folios))
        self.vmm = vmm(Leaves(self.inode.folios))
        self.entries = NONE
        self._registrations = {user: self.inode.register(user) for user in (self.vmm, self.kvm)}
        self._counts = counts
        self._took = took

    @property
    def everything(self) -> PageRange:
        return Range(PageIndex(0), PageIndex(self.inode.pages))

    def touch(self, fault: event.GmemFault) -> None:
        """A user reaches a block of pages: those that it has not mapped are faulted in. Raises: Refusal."""
        access = Access(fault.access)
        user = self.kvm if fault.user == self.kvm.kind or access is Access.PRIVATE else self.vmm
        index = PageIndex(fault.index)
        start = index >> fault.order << fault.order
        pages = Range(PageIndex(start), PageIndex(min(start + (1 << fault.order), self.inode.pages)))
        touched = user.leaves.touched[0].contains_range(pages.start, pages.end)
        if touched and self.inode.attributes.is_all(pages, access):
            return
        around = self._around(pages)
        before = user.leaves.count(around)
        self.machine.run(self._fault(self._registrations[user], index, access))
        if self.inode.folios.order_of(index) < fault.order:
            self.machine.run(self._fault_all(pages))
        for run, state in self.inode.runs(pages):
            if state is access:
                user.leaves.add(run, access is Access.SHARED)
        after = user.leaves.count(around)
        self._counts["fault"] += max(after.leaves - before.leaves, 1)
        if user is self.kvm:
            self._counts["rmp_assign"] += max(after.rmp - before.rmp, access is Access.PRIVATE)
            self._changed(before, after)

    async def _fault(self, registration: Registration, index: PageIndex, access: Access) -> None:
        async with self.inode.invalidate_lock.shared:
            await self.inode.fault(registration, index, access)

    async def _fault_all(self, pages: PageRange) -> None:
        """The other folios of a block at once, as if the host's kernel had handled the faults; new ones are zeroed."""
        folios = self.inode.folios
        around = hull(pages, self.inode.order)
        async with self.inode.invalidate_lock.shared:
            missing = around.pages - folios.uptodate.range_cardinality(around.start, around.end)
            await self.inode.absorb(pages)
            folios.set_uptodate(around)
        assert isinstance(self.inode.backing, NoBacking)
        self.inode.backing.zeroed += missing

    def allocate(self, pages: PageRange) -> None:
        """fallocate of the huge pages that `pages` are in. Raises: Refusal."""
        self.machine.run(self.inode.allocate(hull(pages, self.inode.order)))

    def convert(self, pages: PageRange, to: Access) -> None:
        """Raises: Refusal; what was converted before it is counted."""
        changing = [run for run, access in self.inode.runs(pages) if access is not to]
        around = self._around(pages)
        before = self.kvm.leaves.count(around)
        split_before = self.kvm.leaves.split_blocks(around)
        resets, wholly = self._rmp_of(changing) if to is Access.SHARED else (0, 0)
        zapped_before = self.kvm.zapped
        own_before = self.kvm.own.plus(self.vmm.own)
        began = now()
        try:
            self.machine.run(self.inode.convert(pages, to))
        finally:
            took = now().minus(began)
            self._took(took.minus(self.kvm.own.plus(self.vmm.own).minus(own_before)))
            self._counts["request"] += 1
            for run in changing:
                for done, access in self.inode.runs(run):
                    if access is to:
                        self._forget(done)
            after = self.kvm.leaves.count(around)
            self._again(before, after, self.kvm.zapped - zapped_before)
            smashed = self.kvm.leaves.split_blocks(around) - split_before
            self._counts["rmp_reset"] += resets
            self._counts["psmash"] += max(smashed - wholly, 0)
            self._counts["unsmash"] += max(-smashed, 0)

    def punch(self, pages: PageRange) -> None:
        """Raises: Refusal."""
        around = self._around(pages)
        before = self.kvm.leaves.count(around)
        present = self.inode.folios.present.range_cardinality(around.start, around.end)
        zapped_before = self.kvm.zapped
        self._counts["request"] += 1
        self.machine.run(self.inode.punch_hole(pages))
        self._forget(pages)
        after = self.kvm.leaves.count(around)
        self._again(before, after, self.kvm.zapped - zapped_before)
        self._counts["rmp_reset"] += max(before.rmp - after.rmp, 0)
        left = self.inode.folios.present.range_cardinality(around.start, around.end)
        self._counts["free"] += (present - left) >> self.inode.order

    def unbind(self, pages: PageRange) -> None:
        """A memslot goes, and KVM's leaves with it."""
        before = self.kvm.leaves.count(self.everything)
        self.kvm.leaves.remove(pages)
        after = self.kvm.leaves.count(self.everything)
        self._counts["zap"] += before.leaves - after.leaves
        self._counts["flush"] += before.leaves > after.leaves
        self._changed(before, after)

    def destroy(self) -> None:
        """The last file is closed."""
        self._counts["free"] += len(self.inode.folios.present) >> self.inode.order
        self._counts["rmp_reset"] += self.entries.rmp
        self.machine.run(self.inode.put())
        self.entries = NONE

    def problems(self) -> list[str]:
        """What is not as it was when the file was new; and whether the entries were counted right."""
        found = []
        foreign = sum(run.pages for run, access in self.inode.runs(self.everything) if access is not self._birth)
        if foreign:
            found.append(f"{foreign:,} pages do not have the access that they were born with")
        lost = self.lost
        if lost and self._birth is Access.PRIVATE:
            found.append(f"{lost:,} huge pages are split")
        if self.kvm.leaves.count(self.everything) != self.entries:
            found.append("the entries that were counted are not those that there are")
        return found

    @property
    def lost(self) -> int:
        """Huge pages that are split now."""
        return len(self.inode.folios.splits.split[self.inode.order]) if self.inode.order else 0

    @property
    def _birth(self) -> Access:
        return self.inode.attributes.birth

    def _around(self, pages: PageRange) -> PageRange:
        """Whose entries may change with those of `pages`: the huge pages that they are in, or less of one that stays
        split whatever becomes of them."""
        around = hull(pages, self.inode.order)
        splits = self.inode.folios.splits
        if self.inode.order < ORDER_1G or splits.whole or around.pages > 1 << ORDER_1G:
            return around
        if around.start >> ORDER_1G not in splits.split[ORDER_1G]:
            return around
        near = hull(pages, ORDER_2M)
        split = splits.split[ORDER_2M]
        counts = [split.range_cardinality(part.start >> ORDER_2M, part.end >> ORDER_2M) for part in (around, near)]
        return near if counts[0] > counts[1] else around

    def _forget(self, pages: PageRange) -> None:
        for user in self._registrations:
            user.leaves.remove(pages)

    def _rmp_of(self, runs: list[PageRange]) -> tuple[int, int]:
        """RMP entries of pages that become shared, and how many of them are of 2M and go without being smashed."""
        entries = wholly = 0
        for run in runs:
            inner, ends = whole_blocks(run, ORDER_2M)
            if inner is not None:
                counted = self.kvm.leaves.count(inner)
                entries += counted.rmp
                wholly += counted.rmp_2m
            entries += sum(self.kvm.leaves.touched[0].range_cardinality(end.start, end.end) for end in ends)
        return entries, wholly

    def _again(self, before: Entries, after: Entries, zapped: int) -> None:
        """Leaves that were zapped and are still wanted fault in again; those that a larger one replaces go."""
        again = after.leaves - (before.leaves - zapped)
        self._counts["refault" if again > 0 else "zap"] += abs(again)
        self._changed(before, after)

    def _changed(self, before: Entries, after: Entries) -> None:
        self.entries = self.entries.plus(after).plus(before, sign=-1)

    def users(self) -> tuple[CountingUser, CountingUser]:
        return self.kvm, self.vmm
