"""Strategies: in which order the schedules of a scenario are tried, and which of them can be left out. A file each."""

from __future__ import annotations

from collections.abc import Callable

from guestmem.check.strategies.dfs import Dfs
from guestmem.check.strategies.dpor import Dpor
from guestmem.check.strategies.pct import Pct
from guestmem.check.strategies.portfolio import Portfolio
from guestmem.check.strategies.random_walk import RandomWalk
from guestmem.check.strategies.states import States
from guestmem.check.strategies.strategy import Strategy

STRATEGIES: dict[str, Callable[[int | None, int], Strategy]] = {
    "states": lambda preemptions, seed: States(preemptions),
    "dfs": lambda preemptions, seed: Dfs(preemptions),
    "dpor": lambda preemptions, seed: Dpor(),
    "random": lambda preemptions, seed: RandomWalk(seed),
    "pct": lambda preemptions, seed: Pct(seed),
    "portfolio": Portfolio,
}
"""By name: made from a bound on preemptions and a seed, as far as a strategy has use for them."""
