"""Memslots: which guest frames exist, and where their memory comes from.

Readers (faults) look at one immutable `SlotTable` under SRCU; an update makes a new table and swaps it in. A slot that
goes is first marked invalid and swapped, so that no new fault uses it, then zapped after a grace period, then left out.

A guest_memfd slot has a weak pointer to its file: neither holds the other, and either may go first. Whoever follows it
gets a reference or finds the file dying (S6).

Source: virt/kvm/kvm_main.c, struct kvm_memslots; spec/semantics.md section 5.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import TYPE_CHECKING

from guestmem.kvm.addresses import Gfn
from guestmem.memory import PAGE_SHIFT, File, PageIndex, PageRange, Range
from guestmem.uapi.kvm import KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY

if TYPE_CHECKING:
    from guestmem.kvm.context import KvmGmemContext


class MemorySlot:
    """`gfns` of guest memory. Immutable but for `invalid`, `dirty`, the two pointers of a binding, and userfault with
    its flag.

    `context` is set while the slot is bound, `pages` are those of the file that it shows, the last ones if it is bound
    no more; `gmem_only` says that shared accesses too are served from the file and not from `userspace_addr`. `dirty`
    has the frames, counted from the slot's first, that were written since the log was last asked for; None without one.
    `userfault_bitmap` is the host address of a bit for each frame: where it is set, the VMM has yet to bring the page;
    None without KVM_MEM_USERFAULT. It changes under slots_lock, and who has read it before is waited for.
    """

    __slots__ = (
        *("context", "dirty", "flags", "freed", "gfns", "gmem_only", "id", "invalid", "pages", "userfault_bitmap"),
        "userspace_addr",
    )

    def __init__(self, number: int, flags: int, gfns: Range[Gfn], userspace_addr: int) -> None:
        self.id = number
        self.flags = flags
        self.gfns = gfns
        self.userspace_addr = userspace_addr
        self.userfault_bitmap: int | None = None
        self.invalid = False
        self.freed = False
        self.context: KvmGmemContext | None = None
        self.pages: PageRange = Range(PageIndex(0), PageIndex(0))
        self.gmem_only = False
        self.dirty: set[int] | None = set() if flags & KVM_MEM_LOG_DIRTY_PAGES else None

    def __repr__(self) -> str:
        return f"slot {self.id} [{self.gfns.start:#x}, {self.gfns.end:#x})"

    @property
    def has_gmem(self) -> bool:
        """Whether the slot was made with a guest_memfd; its file may be gone since."""
        return bool(self.flags & KVM_MEM_GUEST_MEMFD)

    @property
    def writable(self) -> bool:
        return not self.flags & KVM_MEM_READONLY

    @property
    def file(self) -> File | None:
        """The file that the slot is bound to; it may be dying."""
        return self.context.file if self.context else None

    def index_of(self, gfn: Gfn) -> PageIndex:
        """The file page of a frame of this slot."""
        return PageIndex(self.pages.start + gfn - self.gfns.start)

    def gfns_of(self, pages: PageRange) -> Range[Gfn] | None:
        """Where the slot shows any of `pages`; None if nowhere."""
        inside = self.pages.intersection(pages)
        if inside is None:
            return None
        shift = self.gfns.start - self.pages.start
        return Range(Gfn(inside.start + shift), Gfn(inside.end + shift))

    def hva_of(self, gfn: Gfn) -> int:
        """The host address of a frame of this slot."""
        return self.userspace_addr + ((gfn - self.gfns.start) << PAGE_SHIFT)

    def gfns_of_hvas(self, start: int, end: int) -> Range[Gfn] | None:
        """Frames whose host addresses meet start..end; None if none do."""
        first = max(start, self.userspace_addr) - self.userspace_addr
        last = min(end, self.userspace_addr + (self.gfns.pages << PAGE_SHIFT)) - self.userspace_addr
        if first >= last:
            return None
        page = 1 << PAGE_SHIFT
        base = self.gfns.start
        return Range(Gfn(base + first // page), Gfn(base + -(-last // page)))


class SlotTable:
    """An immutable set of slots by frame, which readers search without a lock.

    `by_id` is for who holds slots_lock: it is one dict for all tables of a VM and has what the newest has. A VM may
    have 32764 slots, and copying them by id as well would be most of the cost of adding one.
    """

    __slots__ = ("_starts", "by_gfn", "by_id")

    def __init__(
        self,
        by_id: dict[int, MemorySlot] | None = None,
        by_gfn: list[MemorySlot] | None = None,
        starts: list[Gfn] | None = None,
    ) -> None:
        self.by_id: dict[int, MemorySlot] = {} if by_id is None else by_id
        self.by_gfn: list[MemorySlot] = by_gfn or []
        self._starts: list[Gfn] = starts or []

    def find(self, gfn: Gfn) -> MemorySlot | None:
        """The slot that `gfn` belongs to. Source: gfn_to_memslot()."""
        place = bisect.bisect_right(self._starts, gfn) - 1
        if place < 0 or not self.by_gfn[place].gfns.contains(gfn):
            return None
        return self.by_gfn[place]

    def overlapping(self, gfns: Range[Gfn]) -> Iterator[MemorySlot]:
        """The slots that meet `gfns`, in order."""
        place = max(bisect.bisect_right(self._starts, gfns.start) - 1, 0)
        while place < len(self.by_gfn) and self.by_gfn[place].gfns.start < gfns.end:
            if self.by_gfn[place].gfns.overlaps(gfns):
                yield self.by_gfn[place]
            place += 1

    def replace(self, old: MemorySlot | None, new: MemorySlot | None) -> SlotTable:
        """A table with `new` in the place of `old`, about to be swapped in. slots_lock held."""
        by_gfn, starts = list(self.by_gfn), list(self._starts)
        if old is not None:
            del self.by_id[old.id]
            place = bisect.bisect_left(starts, old.gfns.start)
            del by_gfn[place], starts[place]
        if new is not None:
            self.by_id[new.id] = new
            place = bisect.bisect_left(starts, new.gfns.start)
            by_gfn.insert(place, new)
            starts.insert(place, new.gfns.start)
        return SlotTable(self.by_id, by_gfn, starts)
