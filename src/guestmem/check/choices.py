"""Schedules: what was chosen, as bytes while exploring and as a token that fits on a command line.

A schedule is one byte for each choice: the number of the task that runs on, in the order in which the scenario named
its actors, or, after a task, FAIL or PASS for each fallible step on its way. Everything else in an execution follows
from these, so a schedule is a replay.

A token writes tasks as letters with how often they ran in a row, FAIL as `!` and PASS as `.`; what is in brackets at
the end repeats for ever: `a4b2a!(bc)`.
"""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple

PASS = 0xFE
FAIL = 0xFF
MAX_ACTORS = 26
ONE = tuple(bytes((choice,)) for choice in range(256))
"""Each choice as bytes."""

_PART = re.compile(r"([a-z])(\d*)|([!.])")
_TOKEN = re.compile(r"(?P<path>[a-z0-9!.]*)(?:\((?P<cycle>[a-z0-9!.]+)\))?")


class Schedule(NamedTuple):
    """`choices` in order; `cycle`, if there is one, comes after them and repeats for ever."""

    choices: bytes
    cycle: bytes = b""

    @property
    def steps(self) -> int:
        """How many times some task was resumed."""
        return sum(choice < MAX_ACTORS for choice in self.choices + self.cycle)

    def token(self) -> str:
        """The schedule in letters; `parse` is its inverse."""
        return _letters(self.choices) + (f"({_letters(self.cycle)})" if self.cycle else "")


def parse(token: str) -> Schedule:
    """The schedule that a token stands for. Raises: ValueError."""
    matched = _TOKEN.fullmatch(token)
    if matched is None:
        raise ValueError(f"no schedule: {token!r}")
    return Schedule(_bytes(matched["path"]), _bytes(matched["cycle"] or ""))


def _letters(choices: bytes) -> str:
    parts = []
    for choice, group in itertools.groupby(choices):
        count = len(list(group))
        if choice >= MAX_ACTORS:
            parts.append(("!" if choice == FAIL else ".") * count)
        else:
            parts.append(chr(ord("a") + choice) + (str(count) if count > 1 else ""))
    return "".join(parts)


def _bytes(text: str) -> bytes:
    out = bytearray()
    place = 0
    while place < len(text):
        part = _PART.match(text, place)
        if part is None:
            raise ValueError(f"no schedule: {text!r} at {place}")
        letter, count, fate = part.groups()
        if letter:
            out += bytes([ord(letter) - ord("a")]) * int(count or 1)
        else:
            out.append(FAIL if fate == "!" else PASS)
        place = part.end()
    return bytes(out)
