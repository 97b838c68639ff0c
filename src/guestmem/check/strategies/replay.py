"""Replay: one schedule, and after its last choice nothing."""

from __future__ import annotations

from collections.abc import Sequence

from guestmem.check.choices import MAX_ACTORS
from guestmem.check.run import Nondeterminism, Run
from guestmem.check.strategies.strategy import STOP, Start, Stateless


class Replay(Stateless):
    """Make `choices` again, step by step, looking at each state."""

    name = "replay"

    def __init__(self, choices: bytes) -> None:
        self._choices = choices
        self._started = False

    def start(self) -> Start | None:
        started, self._started = self._started, True
        return None if started else Start()

    def choose(self, run: Run, ready: Sequence[int]) -> int:
        place = len(run.choices)
        if place >= len(self._choices):
            return STOP
        choice = self._choices[place]
        if choice not in ready:
            who = run.tasks[choice].name if choice < len(run.tasks) else f"task {choice}"
            raise Nondeterminism(f"the schedule does not fit: at choice {place} {who} is not ready")
        return choice

    def fails(self, run: Run, step: str) -> bool:
        place = len(run.choices)
        if place >= len(self._choices):
            return False
        if self._choices[place] < MAX_ACTORS:
            raise Nondeterminism(f"the schedule does not fit: {step!r} may fail at choice {place}")
        return self._choices[place] == 0xFF
