"""Where the events of a replay come from: a recorded trace, or a generator. Read anew for each row, never kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol, TypeAlias

from guestmem.memory.pages import ORDERS, PAGE_SIZE
from guestmem.trace import events as event

Replayable: TypeAlias = (
    event.GmemCreate
    | event.GmemDestroy
    | event.GmemFault
    | event.GmemFolioAlloc
    | event.GmemFolioFree
    | event.GmemZeroRange
    | event.GmemConvert
    | event.KvmUnbind
)
"""The causes among the events. All others are consequences, or concern no guest_memfd."""


class Source(Protocol):
    """Can be read again and again, and pickled."""

    @property
    def name(self) -> str: ...

    def events(self) -> Iterator[Replayable]:
        """Raises: Refusal EINVAL `trace.*`, at the damaged line."""
        ...


class Survey(NamedTuple):
    """What must be known of a trace before it is replayed.

    `events` is how many there are, `conversions` how many of them convert; `most` is, by order, how many folios of that
    order hold the files that are there at the same time.
    """

    events: int
    conversions: int
    most: dict[int, int]


def survey(source: Source) -> Survey:
    """Read the trace once, to its end. Raises: as Source.events."""
    events = conversions = 0
    sizes: dict[int, int] = {}
    now = dict.fromkeys(ORDERS, 0)
    most = dict.fromkeys(ORDERS, 0)
    for each in source.events():
        events += 1
        match each:
            case event.GmemConvert():
                conversions += 1
            case event.GmemCreate():
                sizes[each.inode] = each.size
                for order in ORDERS:
                    now[order] += folios_for(each.size, order)
                    most[order] = max(most[order], now[order])
            case event.GmemDestroy():
                size = sizes.pop(each.inode)
                for order in ORDERS:
                    now[order] -= folios_for(size, order)
    return Survey(events, conversions, most)


def folios_for(size: int, order: int) -> int:
    """How many folios of `order` a file of `size` bytes has, rounded up."""
    return -(-size // (PAGE_SIZE << order))
