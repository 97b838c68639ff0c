"""The reference scenario: tasks that yield and add to shared cells, and nothing else.

Three tasks of ten points are what explorers are compared on (bench/explorer.py): 30! / 10!^3 schedules, so what counts
is how many executions a second a search without memory makes, and whether one with it ends at all. Outcomes can be
counted, so two strategies can be held against each other.
"""

from __future__ import annotations

import marshal
from collections.abc import Callable
from typing import Any

from guestmem.check.scenario import Scenario
from guestmem.sched import Policy, Scheduler, Task


class Cells:
    """`tasks` tasks of `points` points over `cells` shared numbers."""

    failures_left = 0

    def __init__(self, tasks: int, points: int, cells: int) -> None:
        self.scheduler = Scheduler()
        self.cells = [0] * cells
        self.answers: dict[str, tuple[str, ...]] = {}
        self._points = points
        self._tasks = [Task(number, "", self._add(number)) for number in range(tasks)]

    def start(self, policy: Policy) -> list[Task[Any]]:
        """Every task stands before its first point."""
        scheduler = self.scheduler
        scheduler.explores = True
        scheduler.policy = policy
        scheduler.parked = list(self._tasks)
        for task in self._tasks:
            task.operation = task.coroutine.send(None)
        return self._tasks

    async def _add(self, number: int) -> None:
        cells, preempt = self.cells, self.scheduler.preempt
        for point in range(self._points):
            await preempt("point")
            if not point & 1:
                cell = (number * 7 + point * 3) % len(cells)
                cells[cell] = cells[cell] * 3 + number + 1

    def digest(self) -> bytes:
        """The numbers, and how far each task has come: it has no other state."""
        return marshal.dumps((self.cells, [task.turns for task in self._tasks]), 2)

    def check_state(self) -> None:
        """Every state is as good as any other."""

    def check_end(self) -> None:
        self.answers["cells"] = (repr(self.cells),)

    def forget(self) -> None:
        for task in self._tasks:
            task.coroutine.close()


def reference(tasks: int = 3, points: int = 10, cells: int = 4) -> Scenario:
    """As a scenario; its answers are the final numbers."""
    build: Callable[[], Cells] = lambda: Cells(tasks, points, cells)  # noqa: E731
    return Scenario(f"reference {tasks}x{points} on {cells}", build)
