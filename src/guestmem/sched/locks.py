"""Lock, RwLock and AllOf: sleeping locks with a class and an order.

The order is checked before the wait, so a wrong nesting is reported by the task that made it, uncontended or not.
Holding is tied to the task: `held_by_me` is the lockdep_assert_held() of this house.
"""

from __future__ import annotations

import types
from collections.abc import Generator, Iterable
from types import TracebackType
from typing import Any

from guestmem.sched.lock_order import LockClass
from guestmem.sched.scheduler import HeldLock, Operation, Scheduler, Task


class Lock(HeldLock):
    """A mutex. `async with lock:` holds it."""

    __slots__ = ("_acquire", "_scheduler", "owner")

    def __init__(self, scheduler: Scheduler, lock_class: LockClass, name: str) -> None:
        super().__init__(lock_class, name)
        self._scheduler = scheduler
        self.owner: Task[Any] | None = None
        self._acquire = Operation("lock", self, self._is_free)

    def __repr__(self) -> str:
        return f"{self.name}{f' (held by {self.owner.name})' if self.owner else ''}"

    def _is_free(self) -> bool:
        return self.owner is None

    @property
    def held_by_me(self) -> bool:
        return self.owner is not None and self.owner is self._scheduler.current

    @types.coroutine
    def __aenter__(self) -> Generator[Operation, None, None]:
        scheduler = self._scheduler
        task = scheduler._running()
        task.check_order(self)
        if scheduler.explores or self.owner is not None:
            yield self._acquire
        self.owner = task
        task.take(self)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.owner is not None, f"{self.name} released twice"
        self.owner.drop(self)
        self.owner = None


class _Mode:
    """One way to take an RwLock; made once, so that taking it allocates nothing."""

    __slots__ = ("_lock", "_operation", "_write")

    def __init__(self, lock: RwLock, write: bool) -> None:
        self._lock = lock
        self._write = write
        self._operation = Operation(
            "lock exclusive" if write else "lock shared", lock, lock._free_to_write if write else lock._free_to_read
        )

    @types.coroutine
    def __aenter__(self) -> Generator[Operation, None, None]:
        lock = self._lock
        scheduler = lock._scheduler
        task = scheduler._running()
        task.check_order(lock)
        free = lock._free_to_write() if self._write else lock._free_to_read()
        if scheduler.explores or not free:
            lock._waiting_writers += self._write
            try:
                yield self._operation
            finally:
                lock._waiting_writers -= self._write
        if self._write:
            lock.writer = task
        else:
            lock.readers.append(task)
        task.take(lock)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lock = self._lock
        task = lock._scheduler._running()
        if self._write:
            assert lock.writer is task, f"{lock.name} released by {task.name}, which does not hold it"
            lock.writer = None
        else:
            lock.readers.remove(task)
        task.drop(lock)


class RwLock(HeldLock):
    """Many readers or one writer. `async with lock.shared:` or `async with lock.exclusive:`.

    Under fifo a waiting writer keeps new readers out, as in the kernel's rw_semaphore; an exploring policy may let
    either go first, since the kernel promises no order.
    """

    __slots__ = ("_scheduler", "_waiting_writers", "exclusive", "readers", "shared", "writer")

    def __init__(self, scheduler: Scheduler, lock_class: LockClass, name: str) -> None:
        super().__init__(lock_class, name)
        self._scheduler = scheduler
        self.writer: Task[Any] | None = None
        self.readers: list[Task[Any]] = []
        self._waiting_writers = 0
        self.shared = _Mode(self, write=False)
        self.exclusive = _Mode(self, write=True)

    def __repr__(self) -> str:
        holders = [f"{self.writer.name} exclusive"] if self.writer else [f"{task.name} shared" for task in self.readers]
        return f"{self.name}{' (held by ' + ', '.join(holders) + ')' if holders else ''}"

    def _free_to_write(self) -> bool:
        return self.writer is None and not self.readers

    def _free_to_read(self) -> bool:
        return self.writer is None and (self._scheduler.explores or not self._waiting_writers)

    @property
    def held_exclusive_by_me(self) -> bool:
        return self.writer is not None and self.writer is self._scheduler.current

    @property
    def held_by_me(self) -> bool:
        return self.held_exclusive_by_me or self._scheduler.current in self.readers


class AllOf(HeldLock):
    """Several locks of one class, taken together as soon as all are free: among them there is no order.

    Where the kernel nests locks of one class (two kvm->lock, all vcpu->mutex of a VM) it needs an outer lock or a
    trylock to make that safe. `on_kill` is raised if the waiting task is killed: mutex_lock_killable().
    """

    __slots__ = ("_locks", "_on_kill", "_scheduler")

    def __init__(self, scheduler: Scheduler, locks: Iterable[Lock], name: str, on_kill: Exception) -> None:
        self._locks = list(locks)
        super().__init__(max(lock.lock_class for lock in self._locks), name)
        self._scheduler = scheduler
        self._on_kill = on_kill

    def __fingerprint__(self) -> list[Lock]:
        return self._locks

    def _are_free(self) -> bool:
        return all(lock.owner is None for lock in self._locks)

    @types.coroutine
    def __aenter__(self) -> Generator[Operation, None, None]:
        task = self._scheduler._running()
        task.check_order(self)
        if self._scheduler.explores or not self._are_free():
            yield Operation("lock", self, lambda: task.signal_pending or self._are_free())
        if not self._are_free():
            raise self._on_kill
        for lock in self._locks:
            lock.owner = task
        task.take(self)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._scheduler._running().drop(self)
        for lock in self._locks:
            lock.owner = None
