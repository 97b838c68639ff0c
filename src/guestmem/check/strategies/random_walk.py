"""RandomWalk: at every point each ready task is as likely as any other. Seed and number of the execution decide.

Finds much, proves nothing.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from guestmem.check.run import Run
from guestmem.check.strategies.strategy import Start, Stateless

FAILURE_RATE = 0.2


class RandomWalk(Stateless):
    """Uniform choices from `seed`."""

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._executions = 0
        self._random = random.Random(seed)

    def start(self) -> Start | None:
        self._random.seed(f"{self._seed}/{self._executions}")
        self._executions += 1
        return Start()

    def choose(self, run: Run, ready: Sequence[int]) -> int:
        return self._random.choice(ready)

    def fails(self, run: Run, step: str) -> bool:
        return self._random.random() < FAILURE_RATE
