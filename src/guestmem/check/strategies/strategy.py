"""Strategy: the interface of everything that picks schedules, after Shuttle's Scheduler.

An execution begins with `start`, asks `choose` before every step beyond what is replayed and `fails` at every fallible
step; one that ran to its end is shown to `end`. A strategy sees the run and changes nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from guestmem.check.run import Run

STOP = -1
"""Answer of `choose`: leave the execution here, what follows has been seen or is out of bounds."""


class Start(NamedTuple):
    """How an execution begins: the choices to make again, and how many preemptions they have.

    `checkpoint` is a state that the replay must pass through, and after how many choices.
    """

    choices: bytes = b""
    preemptions: int = 0
    checkpoint: tuple[int, bytes] | None = None


class Strategy(Protocol):
    """`exhaustive` says that once `start` has nothing left, every schedule within the bound is accounted for."""

    name: str
    exhaustive: bool

    def start(self) -> Start | None:
        """Begin an execution; None when nothing is left to try."""
        ...

    def choose(self, run: Run, ready: Sequence[int]) -> int:
        """One of `ready`, which is not empty, or STOP."""
        ...

    def fails(self, run: Run, step: str) -> bool:
        """Whether a fallible step of the running task fails."""
        ...

    def end(self, run: Run) -> bool:
        """Every task is done; whether this end is worth looking at, as it was not seen before."""
        ...
