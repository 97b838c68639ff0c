"""Small traces as sources, and replays of them in this process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from guestmem.memory import Conversion, HugePolicy, Split
from guestmem.simulate.costs import default_costs
from guestmem.simulate.replay import Replay
from guestmem.simulate.row import Combination, Row
from guestmem.simulate.source import Replayable, Source, survey

G1 = 1 << 18
M2 = 512


@dataclass(frozen=True)
class Listed:
    """A source of events that a test wrote down."""

    listed: tuple[Replayable, ...]
    name: str = "listed"

    def events(self) -> Iterator[Replayable]:
        return iter(self.listed)


def replay(
    source: Source,
    order: int,
    split: Split = Split.LAZY,
    conversion: Conversion = Conversion.ATOMIC,
    *,
    spare: int | None = None,
    verify: bool = False,
    samples: int = 10,
) -> Row:
    combination = Combination(order, HugePolicy(split, conversion))
    surveyed = survey(source)
    return Replay(source, surveyed, combination, default_costs(), samples=samples, spare=spare, verify=verify).run()
