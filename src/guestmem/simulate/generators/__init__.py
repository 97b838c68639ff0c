"""Traces that are made up: what a guest of a given size and kind does with its memory, one file for each kind.

Each is a model with assumptions, which its file states. The same seed makes the same trace.
"""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable, Iterator

from guestmem.memory.pages import PAGE_SHIFT
from guestmem.simulate.generators import balloon, boot, random_pages, swiotlb
from guestmem.simulate.machine import MAX_BYTES
from guestmem.simulate.source import Replayable
from guestmem.trace import Refusal

Generator = Callable[[int, int, int], Iterator[Replayable]]
"""Of a memory in pages, a seed, and a count of what it does most."""

GENERATORS: dict[str, Generator] = {
    "swiotlb": swiotlb.events,
    "balloon": balloon.events,
    "boot": boot.events,
    "random": random_pages.events,
}

MIN_MEMORY = 1 << 30
_UNIT = 2 << 20


@dataclasses.dataclass(frozen=True)
class Generated:
    """A source: `memory` in bytes, `count` of what the kind does most.

    Raises where its events are asked for: Refusal EINVAL `generate.memory`.
    """

    kind: str
    memory: int
    seed: int
    count: int

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.memory >> 20:,} MiB, seed {self.seed}, count {self.count:,}"

    def events(self) -> Iterator[Replayable]:
        if not MIN_MEMORY <= self.memory <= MAX_BYTES or self.memory % _UNIT:
            raise Refusal(errno.EINVAL, "generate.memory", memory=self.memory, least=MIN_MEMORY, most=MAX_BYTES)
        return GENERATORS[self.kind](self.memory >> PAGE_SHIFT, self.seed, self.count)
