"""Portfolio: several strategies in turns. What one of them finds first is found; what one exhausts is exhausted.

The mix is depth-first over states, which proves, with PCT and random walks, which look at late interleavings early.
"""

from __future__ import annotations

from collections.abc import Sequence

from guestmem.check.run import Run
from guestmem.check.strategies.pct import Pct
from guestmem.check.strategies.random_walk import RandomWalk
from guestmem.check.strategies.states import States
from guestmem.check.strategies.strategy import Start, Strategy


class Portfolio:
    """States twice, PCT once, a random walk once, and again."""

    name = "portfolio"

    def __init__(self, preemptions: int | None = None, seed: int = 0) -> None:
        self.graph = States(preemptions)
        self._turns: list[Strategy] = [self.graph, self.graph, Pct(seed), RandomWalk(seed)]
        self._turn = 0
        self._present: Strategy = self.graph

    @property
    def exhaustive(self) -> bool:
        return self.graph.exhaustive

    @property
    def fraction(self) -> float:
        return self.graph.fraction

    def start(self) -> Start | None:
        if not self.graph.frontier or self.graph.full:
            return None
        self._present = self._turns[self._turn]
        self._turn = (self._turn + 1) % len(self._turns)
        return self._present.start()

    def choose(self, run: Run, ready: Sequence[int]) -> int:
        return self._present.choose(run, ready)

    def fails(self, run: Run, step: str) -> bool:
        return self._present.fails(run, step)

    def end(self, run: Run) -> bool:
        return self._present.end(run)

    def close(self) -> None:
        for strategy in self._turns:
            strategy.close()
