"""Time that went by, and what of it was spent on a CPU: on a busy machine only the second says what something costs."""

from __future__ import annotations

import time
from typing import NamedTuple


class Spent(NamedTuple):
    """Nanoseconds."""

    wall: int
    cpu: int

    def plus(self, other: Spent) -> Spent:
        return Spent(self.wall + other.wall, self.cpu + other.cpu)

    def minus(self, other: Spent) -> Spent:
        return Spent(self.wall - other.wall, self.cpu - other.cpu)


NO_TIME = Spent(0, 0)


def now() -> Spent:
    """Since some moment; of this thread."""
    return Spent(time.perf_counter_ns(), time.thread_time_ns())
