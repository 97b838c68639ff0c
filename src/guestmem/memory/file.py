"""File: one view of an inode, as an open file descriptor or a mapping holds it.

The last reference runs the release of whoever made the file (KVM's adapter takes its bindings off) and then drops the
inode. Between the count reaching zero and the release running, others may run: the kernel queues the release as task
work. That gap is known bug B01, so it is a scheduling point here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from guestmem.memory.guest_memfd import Inode
from guestmem.sched import LockClass, RefCount, Scheduler


class File:
    """A counted view. `release` is called once, by the last put, before the inode reference goes.

    `release_takes` is the outermost lock that it takes: whoever puts must be able to take it, last or not.
    `private_data` is the creator's and nobody else's.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        inode: Inode,
        *,
        release: Callable[[File], Awaitable[None]],
        release_takes: LockClass,
        private_data: object,
    ) -> None:
        self.inode = inode
        self.private_data = private_data
        self.references = RefCount(scheduler, f"file of inode {inode.number}")
        self.released = False
        self._release = release
        self._release_takes = release_takes
        self._scheduler = scheduler

    def get(self) -> None:
        self.references.get()

    def get_unless_dying(self) -> bool:
        """The only way from a weak pointer to the file. Source: get_file_active()."""
        return self.references.get_unless_zero()

    async def put(self) -> None:
        """One holder less. Not inside an SRCU read section that the release waits for: the kernel defers it to task
        work for the same reason."""
        if self._scheduler.current is not None:
            self._scheduler.current.might_lock(self._release_takes)
        if not self.references.put():
            return
        await self._scheduler.preempt("last put of a file, release queued")
        await self._release(self)
        self.released = True
        await self.inode.put()
