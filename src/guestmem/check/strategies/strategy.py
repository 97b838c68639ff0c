"""Strategy: the interface of everything that picks schedules, after Shuttle's Scheduler.

An execution begins with `start`, asks `choose` before every step beyond what is replayed and `fails` at every fallible
step; one that ran to its end is shown to `end`. A strategy sees the run and changes nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from guestmem.check.run import Run

if TYPE_CHECKING:
    from guestmem.check.strategies.states import States

STOP = -1
"""Answer of `choose`: leave the execution here; its state is new and is looked at."""
SEEN = -2
"""Answer of `choose`: leave the execution here; this state, and so all that follows, was seen before."""


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

    @property
    def exhaustive(self) -> bool: ...

    @property
    def graph(self) -> States | None:
        """What was visited, if that is kept: for liveness, and for the reader."""
        ...

    @property
    def fraction(self) -> float | None:
        """How much of the search is done, from 0 to 1, if the strategy can tell."""
        ...

    def start(self) -> Start | None:
        """Begin an execution; None when nothing is left to try."""
        ...

    def choose(self, run: Run, ready: Sequence[int]) -> int:
        """One of `ready`, which is not empty, or STOP or SEEN."""
        ...

    def fails(self, run: Run, step: str) -> bool:
        """Whether a fallible step of the running task fails."""
        ...

    def end(self, run: Run) -> bool:
        """Every task is done; whether this end is worth looking at, as it was not seen before."""
        ...

    def close(self) -> None:
        """The search is over."""
        ...


class Stateless:
    """What the strategies have in common that keep nothing of what they saw."""

    exhaustive = False
    graph = None
    fraction: float | None = None

    def end(self, run: Run) -> bool:
        return True

    def close(self) -> None:
        """Nothing is held."""
