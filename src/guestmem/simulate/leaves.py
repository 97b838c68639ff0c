"""Leaves: which entries map what a user has touched, without an object for each.

What was touched stays in the working set until it changes hands or leaves the file: whatever an invalidation removes
besides is touched again at once. Each leaf is as large as its folio. So the entries follow from two things that are
kept as bitmaps, the pages touched and the folios split, and a terabyte of 4K entries costs no more than its borders.
"""

from __future__ import annotations

from typing import NamedTuple

from pyroaring import BitMap64

from guestmem.memory import Folios, PageRange
from guestmem.memory.bitmaps import members
from guestmem.memory.pages import ORDER_1G, ORDER_2M, ORDER_4K, ORDERS

_4K, _2M, _1G, _TABLES, _LARGE_RMP = range(5)
_PLACE = {ORDER_4K: _4K, ORDER_2M: _2M, ORDER_1G: _1G}


class Entries(NamedTuple):
    """Leaves by size, the tables of 512 entries that hold those below 1G, and RMP entries.

    The RMP knows 2M and 4K: a 1G leaf has one of 2M for each 2M of it that was touched. Shared pages have none.
    """

    leaves_4k: int
    leaves_2m: int
    leaves_1g: int
    tables: int
    rmp_2m: int
    rmp_4k: int

    @property
    def leaves(self) -> int:
        return self.leaves_4k + self.leaves_2m + self.leaves_1g

    @property
    def mapped_pages(self) -> int:
        return self.leaves_4k + (self.leaves_2m << ORDER_2M) + (self.leaves_1g << ORDER_1G)

    @property
    def rmp(self) -> int:
        return self.rmp_2m + self.rmp_4k

    def plus(self, other: Entries, sign: int = 1) -> Entries:
        return Entries(*(ours + sign * theirs for ours, theirs in zip(self, other, strict=True)))


NONE = Entries(0, 0, 0, 0, 0, 0)


class Leaves:
    """One user's entries for one file."""

    def __init__(self, folios: Folios) -> None:
        self.touched = {order: BitMap64() for order in ORDERS}  # blocks of an order of which a page was touched
        self.shared = BitMap64()
        self._split = folios.splits.split

    def add(self, pages: PageRange, shared: bool) -> None:
        """The user touches them."""
        for order, blocks in self.touched.items():
            blocks.add_range(pages.start >> order, ((pages.end - 1) >> order) + 1)
        if shared:
            self.shared.add_range(pages.start, pages.end)

    def remove(self, pages: PageRange) -> None:
        """They are not what was touched any more."""
        self.touched[ORDER_4K].remove_range(pages.start, pages.end)
        self.shared.remove_range(pages.start, pages.end)
        below = ORDER_4K
        for order in (ORDER_2M, ORDER_1G):
            for number in {pages.start >> order, (pages.end - 1) >> order}:
                first = number << (order - below)
                if not self.touched[below].range_cardinality(first, first + (1 << (order - below))):
                    self.touched[order].discard(number)
            self.touched[order].remove_range(-(-pages.start >> order), pages.end >> order)
            below = order

    def count(self, pages: PageRange) -> Entries:
        """The entries that map any of `pages`, and the tables of the blocks that they are in."""
        counts = [0, 0, 0, 0, 0]
        self._count(0, pages.start, pages.end, counts)
        shared = self.shared.range_cardinality(pages.start, pages.end)
        return Entries(counts[_4K], counts[_2M], counts[_1G], counts[_TABLES], counts[_LARGE_RMP], counts[_4K] - shared)

    def split_blocks(self, pages: PageRange) -> int:
        """How many 2M blocks of `pages` are in 4K folios and were touched: as many RMP entries of 2M are smashed."""
        split = self._split.get(ORDER_2M)
        if split is None:
            return 0
        first, last = pages.start >> ORDER_2M, -(-pages.end >> ORDER_2M)
        count = split.range_cardinality(first, last)
        return min(count, self.touched[ORDER_2M].range_cardinality(first, last))

    def _count(self, level: int, start: int, end: int, counts: list[int]) -> None:
        order = ORDERS[level]
        blocks = self.touched[order]
        if order == ORDER_4K:
            counts[_4K] += blocks.range_cardinality(start, end)
            return
        first, last = start >> order, -(-end >> order)
        touched = blocks.range_cardinality(first, last)
        if not touched:
            return
        split = self._split.get(order)  # none for orders that are larger than the file's
        if split is None or split.range_cardinality(first, last) == last - first:
            counts[_TABLES] += touched
            self._count(level + 1, start, end, counts)
            return
        large = self.touched[ORDER_2M].range_cardinality(start >> ORDER_2M, -(-end >> ORDER_2M))
        for number in members(split, first, last):
            if number in blocks:
                touched -= 1
                counts[_TABLES] += 1
                part = max(start, number << order), min(end, (number + 1) << order)
                large -= self.touched[ORDER_2M].range_cardinality(part[0] >> ORDER_2M, -(-part[1] >> ORDER_2M))
                self._count(level + 1, *part, counts)
        counts[_PLACE[order]] += touched
        counts[_LARGE_RMP] += large
