"""Firmware: a user of memory that scenarios bring along, for what the product's own users never do: fail, and leave."""

from __future__ import annotations

from guestmem.check.invariants import Violation
from guestmem.memory import Inode, Invalidation, PageIndex, Range, UnmapFailed
from guestmem.sched import Scheduler


class Firmware:
    """A user of memory that maps nothing, may fail to give a page back, and may leave at any time."""

    kind = "firmware"
    may_map_private = True
    takes_references = False

    def __init__(self, scheduler: Scheduler, inode: Inode) -> None:
        self.gone = False
        self.registration = inode.register(self)
        self._scheduler = scheduler

    def __fingerprint__(self) -> bool:
        return self.gone

    async def invalidate_begin(self, invalidation: Invalidation) -> None:
        await self._scheduler.preempt("firmware call")
        self._check_registered()
        if self._scheduler.fails("firmware: remove page"):
            first = invalidation.pages.start
            raise UnmapFailed(Range(first, PageIndex(first + 1)), "firmware is busy")

    async def invalidate_end(self, invalidation: Invalidation) -> None:
        self._check_registered()

    async def leave(self) -> None:
        """Unregister and be gone: the module may be unloaded now."""
        await self.registration.unregister()
        self.gone = True

    def _check_registered(self) -> None:
        if self.gone:
            raise Violation("S20", "the firmware's user is told after it has left")
