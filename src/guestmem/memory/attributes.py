"""Attributes: which pages are private, for files of any size.

Only what differs from the access that all pages were born with is kept. A new file of 8 EiB costs nothing, a fragment
about two bytes, and the worst case (every second page of 1 TiB) 32 MiB; seven other structures were measured and were
slower or larger (design/feasibility.md section 6). A single bitmap would do for real machines, but one conversion of a
sparse 8 EiB file would fill it with a terabyte of runs: so regions of 2**32 pages (16 TiB) that are wholly changed are
one bit each, and only a mixed region has a bitmap.

The lock is the owner's: writers hold the inode's invalidate_lock exclusively; the fault path reads without it and is
made consistent by the retry under its own lock (spec/invariants.md section 2).

Source: spec/semantics.md 3.1. The kernel keeps a maple tree of ranges; what can be seen from outside is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic

from pyroaring import BitMap, BitMap64

from guestmem.memory.notifier import Access
from guestmem.memory.pages import N, Range

REGION_SHIFT = 32
REGION = 1 << REGION_SHIFT
_MASK = REGION - 1


class Attributes(Generic[N]):
    """The access of each number (file page or guest frame) below `count`."""

    __slots__ = ("_flipped", "_mixed", "birth", "count")

    def __init__(self, count: int, birth: Access) -> None:
        self.count = count
        self.birth = birth
        self._flipped = BitMap64()  # regions that have the other access throughout
        self._mixed: dict[int, BitMap] = {}  # region -> its pages (low 32 bits) that have the other access

    def get(self, number: N) -> Access:
        mixed = self._mixed.get(number >> REGION_SHIFT)
        if mixed is not None:
            changed = (number & _MASK) in mixed
        else:
            changed = bool(self._flipped) and (number >> REGION_SHIFT) in self._flipped
        return other(self.birth) if changed else self.birth

    def set(self, numbers: Range[N], access: Access) -> None:
        change = access is not self.birth
        first, low = divmod(numbers.start, REGION)
        last, high = divmod(numbers.end, REGION)
        if first == last:
            self._set_part(first, low, high, change)
            return
        if low:
            self._set_part(first, low, REGION, change)
            first += 1
        if high:
            self._set_part(last, 0, high, change)
        for region in [r for r in self._mixed if first <= r < last]:
            del self._mixed[region]
        if change:
            self._flipped.add_range(first, last)
        else:
            self._flipped.remove_range(first, last)

    def is_all(self, numbers: Range[N], access: Access) -> bool:
        """Whether every number of the range has `access`."""
        wanted = 0 if access is self.birth else numbers.pages
        return self._changed_in(numbers.start, numbers.end) == wanted

    def is_uniform(self, numbers: Range[N]) -> bool:
        """Whether the range has one access throughout."""
        return self.is_all(numbers, self.get(numbers.start))

    def runs(self, numbers: Range[N]) -> Iterator[tuple[Range[N], Access]]:
        """The maximal stretches of one access inside the range, in order; they cover it."""
        start = numbers.start
        while start < numbers.end:
            access = self.get(start)
            end = self._run_end(start, numbers.end, access)
            yield Range(start, end), access
            start = end

    def private_count(self) -> int:
        changed = self._changed_in(0, self.count)
        return changed if self.birth is Access.SHARED else self.count - changed

    def size_bytes(self) -> int:
        """Bytes that the bitmaps take, serialised: close to what they take in memory."""
        return len(self._flipped.serialize()) + sum(len(mixed.serialize()) for mixed in self._mixed.values())

    def _set_part(self, region: int, low: int, high: int, change: bool) -> None:
        """Set the pages low..high of one region; `change` is whether they get the access they were not born with."""
        mixed = self._mixed.get(region)
        if mixed is None:
            flipped = region in self._flipped
            if flipped == change:
                return
            mixed = self._mixed[region] = BitMap()
            if flipped:
                self._flipped.remove(region)
                mixed.add_range(0, min(REGION, self.count - (region << REGION_SHIFT)))
        if change:
            mixed.add_range(low, high)
        else:
            mixed.remove_range(low, high)
            if not mixed:
                del self._mixed[region]

    def _changed_in(self, start: int, end: int) -> int:
        """How many of start..end do not have the access they were born with."""
        first, low = divmod(start, REGION)
        last, high = divmod(end, REGION)
        if first == last:
            return self._changed_in_part(first, low, high)
        changed = 0
        if low:
            changed += self._changed_in_part(first, low, REGION)
            first += 1
        if high:
            changed += self._changed_in_part(last, 0, high)
        changed += self._flipped.range_cardinality(first, last) * REGION
        return changed + sum(len(mixed) for region, mixed in self._mixed.items() if first <= region < last)

    def _changed_in_part(self, region: int, low: int, high: int) -> int:
        mixed = self._mixed.get(region)
        if mixed is not None:
            return int(mixed.range_cardinality(low, high))
        return high - low if region in self._flipped else 0

    def _run_end(self, start: N, limit: N, access: Access) -> N:
        """Where the stretch of `access` that holds `start` ends, at most `limit`: gallop, then halve."""
        step = 1
        while start + step < limit and self.is_all(Range(start, start + step + 1), access):  # type: ignore[arg-type]
            step *= 2
        low = int(start) + step // 2 + (step > 1)
        high = min(int(start) + step, int(limit))
        while low < high:  # start..low has the access throughout, start..high + 1 has not
            middle = (low + high + 1) // 2
            if self.is_all(Range(start, middle), access):  # type: ignore[arg-type]
                low = middle
            else:
                high = middle - 1
        return low  # type: ignore[return-value]


def other(access: Access) -> Access:
    return Access.PRIVATE if access is Access.SHARED else Access.SHARED
