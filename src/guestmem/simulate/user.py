"""The users of a replayed file: stand-ins for KVM and for the VMM's own mapping, which count what they would do."""

from __future__ import annotations

from guestmem.memory import Access, Invalidation
from guestmem.simulate.leaves import Leaves
from guestmem.simulate.spent import NO_TIME, now


class CountingUser:
    """A MemoryUser. `told`, `flushes` and `zapped` count invalidations, those that found leaves, and these leaves.

    `own` is the time that it took itself, which is not the provider's.
    """

    def __init__(self, kind: str, leaves: Leaves, *, may_map_private: bool, takes_references: bool) -> None:
        self.kind = kind
        self.may_map_private = may_map_private
        self.takes_references = takes_references
        self.leaves = leaves
        self.told = 0
        self.flushes = 0
        self.zapped = 0
        self.own = NO_TIME

    async def invalidate_begin(self, invalidation: Invalidation) -> None:
        began = now()
        self.told += 1
        pages = invalidation.pages
        zapped = self.leaves.shared.range_cardinality(pages.start, pages.end)
        if Access.PRIVATE in invalidation.accesses:
            both = self.leaves.count(pages).leaves
            zapped = both if Access.SHARED in invalidation.accesses else both - zapped
        self.zapped += zapped
        self.flushes += bool(zapped)
        self.own = self.own.plus(now().minus(began))

    async def invalidate_end(self, invalidation: Invalidation) -> None:
        """What may be mapped again is mapped again when the replay counts."""


def kvm(leaves: Leaves) -> CountingUser:
    return CountingUser("kvm", leaves, may_map_private=True, takes_references=False)


def vmm(leaves: Leaves) -> CountingUser:
    return CountingUser("userspace", leaves, may_map_private=False, takes_references=True)
