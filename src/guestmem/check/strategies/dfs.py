"""Dfs: every schedule, depth first, each by a run from the start; with a bound on preemptions if need be.

What is left to do is a stack of prefixes: at each new point the first choice is taken at once and the others wait. So
nothing is kept of the tree but the brothers along the present path.

With a bound, a switch away from a task that could go on costs one preemption. Most bugs need two (Musuvathi and Qadeer,
"Iterative context bounding", PLDI 2007); the switches that waiting forces are free.
"""

from __future__ import annotations

from collections.abc import Sequence

from guestmem.check.choices import FAIL
from guestmem.check.run import Run, is_preempted
from guestmem.check.strategies.strategy import STOP, Start


class Dfs:
    """Stateless depth-first search. `preemptions` None is no bound; `depth` cuts executions after so many choices."""

    name = "dfs"
    exhaustive = True

    def __init__(self, preemptions: int | None = None, depth: int | None = None) -> None:
        self.preemptions = preemptions
        self.depth = depth
        self.cut = False  # whether the depth has left something out
        self._stack = [Start()]

    def start(self) -> Start | None:
        return self._stack.pop() if self._stack else None

    def choose(self, run: Run, ready: Sequence[int]) -> int:
        if self.depth is not None and len(run.choices) >= self.depth:
            self.cut = True
            return STOP
        if len(ready) == 1:
            return ready[0]
        return self._branch(run, ready)

    def fails(self, run: Run, step: str) -> bool:
        self._stack.append(Start(bytes(run.choices) + bytes((FAIL,)), run.preemptions))
        return False

    def end(self, run: Run) -> bool:
        return True

    def _branch(self, run: Run, ready: Sequence[int]) -> int:
        """Go on with the task that ran last if it can; put the alternatives aside."""
        last, used = run.last, run.preemptions
        first, cost = ready[0], 0
        if last in ready:
            first = last
            cost = 1 if is_preempted(run.tasks[last]) else 0
        if self.preemptions is None or used + cost <= self.preemptions:
            made = bytes(run.choices)
            for number in reversed(ready):
                if number != first:
                    self._stack.append(Start(made + bytes((number,)), used + cost))
        return first
