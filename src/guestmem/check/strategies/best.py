"""Best: states in order of what it takes to get there: preemptions, then steps, then actors that ran.

Uniform-cost search, one step at each execution. Ten times the replays of `States`, but the first violation that it
meets is the simplest that there is: this is how witnesses are shrunk.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence

from guestmem.check.choices import FAIL, MAX_ACTORS, Schedule
from guestmem.check.run import Run, is_preempted
from guestmem.check.strategies.strategy import SEEN, STOP, Start, Stateless


class Best(Stateless):
    """Cheapest states first."""

    name = "best"
    exhaustive = True

    def __init__(self) -> None:
        self._counter = itertools.count()
        self._queue = [((0, 0, 0), next(self._counter), Start())]
        self._visited: set[bytes] = set()

    def start(self) -> Start | None:
        return heapq.heappop(self._queue)[2] if self._queue else None

    def choose(self, run: Run, ready: Sequence[int]) -> int:
        running = run.last if run.last in ready else MAX_ACTORS
        key = run.world.digest() + bytes((running,))
        if key in self._visited:
            return SEEN
        self._visited.add(key)
        made = bytes(run.choices)
        leaving = run.last in ready and is_preempted(run.tasks[run.last])
        for number in ready:
            self._open(made + bytes((number,)), run.preemptions + (leaving and number != run.last))
        return STOP

    def fails(self, run: Run, step: str) -> bool:
        self._open(bytes(run.choices) + bytes((FAIL,)), run.preemptions)
        return False

    def _open(self, choices: bytes, preemptions: int) -> None:
        cost = (preemptions, Schedule(choices).steps, len({choice for choice in choices if choice < MAX_ACTORS}))
        heapq.heappush(self._queue, (cost, next(self._counter), Start(choices, preemptions)))
