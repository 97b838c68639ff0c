"""A policy that explores, for tests: every interleaving of a small scenario.

The product's own strategies are richer; this one is as small as can be, for tests of the primitives that they stand on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from guestmem.sched import Task


class Follow:
    """Takes the choices of `prefix`, then always the first; notes how many there were each time."""

    explores = True

    def __init__(self, prefix: Sequence[int] = (), failures: int = 0) -> None:
        self.prefix = prefix
        self.failures = failures
        self.taken: list[tuple[int, int]] = []

    def choose(self, ready: Sequence[Task[Any]]) -> Task[Any]:
        return ready[self._pick(len(ready))]

    def fails(self, task: Task[Any], step: str) -> bool:
        if not self.failures:
            return False
        failed = self._pick(2) == 1
        self.failures -= failed
        return failed

    def _pick(self, options: int) -> int:
        place = len(self.taken)
        choice = self.prefix[place] if place < len(self.prefix) else 0
        self.taken.append((choice, options))
        return choice


def every_schedule(scenario: Callable[[Follow], None], limit: int = 200_000, failures: int = 0) -> int:
    """Run `scenario` under every list of choices, depth first; how many runs that were. Fails beyond `limit`."""
    prefix: list[int] = []
    for runs in range(1, limit + 1):
        policy = Follow(prefix, failures)
        scenario(policy)
        taken = policy.taken
        while taken and taken[-1][0] + 1 == taken[-1][1]:
            taken.pop()
        if not taken:
            return runs
        prefix = [choice for choice, _ in taken]
        prefix[-1] += 1
    raise AssertionError(f"more than {limit} schedules")
