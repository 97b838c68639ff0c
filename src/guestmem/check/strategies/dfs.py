"""Dfs: every schedule, depth first, each by a run from the start; with a bound on preemptions if need be.

What is left to do is a stack of prefixes: at each new point the first choice is taken at once and the others wait. So
nothing is kept of the tree but the brothers along the present path.

With a bound, a switch away from a task that could go on costs one preemption. Most bugs need two (Musuvathi and Qadeer,
"Iterative context bounding", PLDI 2007); the switches that waiting forces are free.
"""

from __future__ import annotations

from collections.abc import Sequence

from guestmem.check.choices import FAIL, ONE
from guestmem.check.run import Run, is_preempted
from guestmem.check.strategies.strategy import Start, Stateless


class Dfs(Stateless):
    """Stateless depth-first search. `preemptions` None is no bound."""

    name = "dfs"
    exhaustive = True

    def __init__(self, preemptions: int | None = None) -> None:
        self.preemptions = preemptions
        self._stack = [Start()]

    def start(self) -> Start | None:
        return self._stack.pop() if self._stack else None

    def choose(self, run: Run, ready: Sequence[int]) -> int:
        if len(ready) == 1:
            return ready[0]
        if self.preemptions is None:
            first, others, used = run.last, ready, 0
            if first not in ready:
                first = ready[0]
        else:
            first, others, used = branches(run, ready, self.preemptions)
        made = bytes(run.choices)
        for number in others:
            if number != first:
                self._stack.append(Start(made + ONE[number], used))
        return first

    def fails(self, run: Run, step: str) -> bool:
        self._stack.append(Start(bytes(run.choices) + ONE[FAIL], run.preemptions))
        return False


def branches(run: Run, ready: Sequence[int], bound: int | None) -> tuple[int, list[int], int]:
    """The task to go on with (the one that ran last, if it can), the others that may be tried, and the preemptions
    that these will then have."""
    last, used = run.last, run.preemptions
    first = ready[0]
    if last in ready:
        first = last
        used += is_preempted(run.tasks[last])
    if bound is not None and used > bound:
        return first, [], used
    return first, [number for number in reversed(ready) if number != first], used
