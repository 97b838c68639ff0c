"""Pct: random priorities, and a few points at which the highest drops to the lowest.

A bug of depth d (d ordering constraints) among n tasks and k steps is found by one execution with a probability of at
least 1/(n k^(d-1)), whatever the program: Burckhardt, Kothari, Musuvathi, Nagarakatte, "A randomized scheduler with
probabilistic guarantees of finding bugs", ASPLOS 2010. k is the longest execution so far.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from guestmem.check.choices import MAX_ACTORS
from guestmem.check.run import Run
from guestmem.check.strategies.random_walk import FAILURE_RATE
from guestmem.check.strategies.strategy import Start, Stateless


class Pct(Stateless):
    """Probabilistic concurrency testing for bugs of `depth`."""

    name = "pct"

    def __init__(self, seed: int = 0, depth: int = 3) -> None:
        self._seed = seed
        self._depth = depth
        self._executions = 0
        self._longest = 20
        self._random = random.Random(seed)
        self._priorities: list[float] = []
        self._changes: list[int] = []

    def start(self) -> Start | None:
        chance = self._random
        chance.seed(f"{self._seed}/{self._executions}")
        self._executions += 1
        self._priorities = [chance.random() + 1 for _ in range(MAX_ACTORS)]
        self._changes = sorted(chance.randrange(1, self._longest + 1) for _ in range(self._depth - 1))
        return Start()

    def choose(self, run: Run, ready: Sequence[int]) -> int:
        step = len(run.choices)
        self._longest = max(self._longest, step)
        highest = max(ready, key=self._priorities.__getitem__)
        if step in self._changes or run.tasks[highest].operation.kind == "resched":  # type: ignore[union-attr]
            self._priorities[highest] = -step  # below all that were lowered before
            highest = max(ready, key=self._priorities.__getitem__)
        return highest

    def fails(self, run: Run, step: str) -> bool:
        return self._random.random() < FAILURE_RATE
