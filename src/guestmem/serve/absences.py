"""Absences: what clients were told is not there, so that a program that gives up can be told why.

A program that finds a capability missing, or has a call refused, mostly says so in words of its own and ends. What it
asked last is then the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from guestmem.uapi.capability_names import capability_name

_SHORTLY = 12
"""Calls after an answer within which an end is taken to follow from it: what programs do when they clean up."""
_KEPT = 64


class Absence(NamedTuple):
    """`what` was answered, last to call number `when` of the run."""

    what: str
    when: int


class Absences:
    """The last of them, oldest first, each once; `calls` is how many calls there have been."""

    def __init__(self) -> None:
        self.calls = 0
        self._last: dict[str, int] = {}

    def capability(self, number: int) -> None:
        """KVM_CHECK_EXTENSION has answered 0."""
        self._note(f"{capability_name(number)} is not there")

    def refused(self, call: str, why: str) -> None:
        """A call was refused, or is one that there is not."""
        self._note(f"{call}: {why}")

    def _note(self, what: str) -> None:
        self._last.pop(what, None)
        self._last[what] = self.calls
        if len(self._last) > _KEPT:
            del self._last[next(iter(self._last))]

    def __iter__(self) -> Iterator[Absence]:
        return (Absence(what, when) for what, when in self._last.items())

    def at_the_end(self) -> list[str]:
        """What was asked shortly before the last call, the last first."""
        return [what for what, when in reversed(self._last.items()) if self.calls - when < _SHORTLY]
