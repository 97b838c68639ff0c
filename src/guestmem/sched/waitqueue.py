"""WaitQueue: sleep until somebody wakes the queue and a condition holds.

The condition is looked at when the sleeper starts and after each wake-up, not in between: a change that nobody
announces leaves the sleeper asleep, as it would in the kernel, and the deadlock report then names it.
"""

from __future__ import annotations

from collections.abc import Callable

from guestmem.sched.scheduler import Operation, Scheduler, park


class WaitQueue:
    """Source: include/linux/wait.h, wait_event() and wake_up_all()."""

    __slots__ = ("_scheduler", "_wakeups", "name")

    def __init__(self, scheduler: Scheduler, name: str) -> None:
        self._scheduler = scheduler
        self._wakeups = 0
        self.name = name

    def __repr__(self) -> str:
        return self.name

    def wake_all(self) -> None:
        self._wakeups += 1

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            seen = self._wakeups
            await park(Operation("wait", self, lambda seen=seen: self._wakeups != seen))  # type: ignore[misc]
