"""Srcu: readers that never wait, and an updater that waits for those who came before it.

A reader that waits for the updater while it reads can never be waited for: that is known bug B26, and why
`synchronize` inside a read section is an error at once.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

from guestmem.sched.scheduler import Operation, Scheduler, Task, park


class _ReadSection:
    __slots__ = ("_epoch", "_srcu", "_task")

    def __init__(self, srcu: Srcu) -> None:
        self._srcu = srcu

    def __enter__(self) -> None:
        self._task = self._srcu._scheduler._running()
        self._epoch = self._srcu.epoch
        self._srcu.readers.append((self._epoch, self._task))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._srcu.readers.remove((self._epoch, self._task))


class Srcu:
    """Sleepable read-copy-update. Source: include/linux/srcu.h."""

    __slots__ = ("_scheduler", "epoch", "name", "readers")

    def __init__(self, scheduler: Scheduler, name: str) -> None:
        self._scheduler = scheduler
        self.name = name
        self.epoch = 0
        self.readers: list[tuple[int, Task[Any]]] = []

    def __repr__(self) -> str:
        readers = ", ".join(sorted(task.name for _, task in self.readers))
        return f"{self.name}{f' (read by {readers})' if readers else ''}"

    def read(self) -> _ReadSection:
        """`with srcu.read():` a read section; it may await."""
        return _ReadSection(self)

    async def synchronize(self) -> None:
        """Wait for every read section that began before this call."""
        me = self._scheduler._running()
        if any(task is me for _, task in self.readers):
            raise AssertionError(f"L5: task {me.name!r} waits for a grace period of {self.name} inside its own read")
        before = self.epoch
        self.epoch += 1

        def drained() -> bool:
            return all(epoch > before for epoch, _ in self.readers)

        if self._scheduler.explores or not drained():
            await park(Operation("synchronize", self, drained))
