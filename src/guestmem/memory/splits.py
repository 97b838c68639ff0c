"""Splits: which huge pages of a file are split, and into what.

A file has huge pages of one order, and a page of it is there if its huge page is. A huge page is one folio, or split
into folios of the next smaller order, each of which may be split in turn: 1G, 2M, 4K. Only private memory may be in a
folio larger than 4K: userspace maps and pins shared pages one by one, and a reference to a part of a folio would be one
to all of it.

Only what is split is kept: one bit for each folio that is not whole.

Source: "[RFC PATCH v2 00/51] 1G page support for guest_memfd", kvm_gmem_restructure_folios_in_range, which splits to 4K
at once (`whole`); splitting by steps is named there as later work.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from pyroaring import BitMap64

from guestmem.memory.bitmaps import members
from guestmem.memory.pages import PageIndex, PageRange, Range, block
from guestmem.memory.vmemmap import split_cost

Blocks = tuple[int, BitMap64]
"""An order, and numbers of naturally aligned blocks of that order."""


class Splits:
    """`orders` are those that a folio of the file can have, largest first, 0 last. `whole`: a huge page is split into
    folios of order 0 at once, and merged only at once."""

    def __init__(self, orders: tuple[int, ...], whole: bool) -> None:
        self.orders = orders
        self.whole = whole
        self.split = {order: BitMap64() for order in orders[:-1]}
        self._parts = dict(itertools.pairwise(orders))

    def order_of(self, index: PageIndex) -> int:
        """The order of the folio that `index` is in, if it is in one."""
        for order, blocks in self.split.items():
            if index >> order not in blocks:
                return order
        return 0

    def cost(self, plan: list[Blocks]) -> int:
        """Pages of vmemmap that carrying out a plan takes, or its reverse frees."""
        return sum(len(blocks) * split_cost(order, self._parts[order]) for order, blocks in plan)

    def missing(self, pages: PageRange) -> list[Blocks]:
        """What must be split so that each of `pages` is in a folio of order 0."""
        if self.whole:
            pages = hull(pages, self.orders[0])
        plan = []
        for order, split in self.split.items():
            first, last = pages.start >> order, -(-pages.end >> order)
            if last - first == 1:  # what most conversions are
                if first not in split:
                    plan.append((order, BitMap64((first,))))
            elif last - first != split.range_cardinality(first, last):
                plan.append((order, BitMap64(range(first, last)) - split))
        return plan

    def apply(self, plan: list[Blocks]) -> None:
        for order, blocks in plan:
            self.split[order] |= blocks

    def merge(
        self, pages: PageRange, is_private: Callable[[PageRange], bool], is_held: Callable[[PageRange], bool]
    ) -> list[Blocks]:
        """Merge what can be, now that `pages` are private: folios all of whose parts are private and not held.

        Returns what was merged, smallest order first.
        """
        if self.whole:
            return self._merge_wholly(pages, is_private, is_held)
        merged = []
        for order in reversed(self.orders[:-1]):
            blocks = self._mergeable(order, pages, is_private, is_held)
            if blocks:
                self.split[order] -= blocks
                merged.append((order, blocks))
        return merged

    def forget(self, pages: PageRange) -> list[Blocks]:
        """Whole huge pages leave the file; what of them was split is forgotten and returned."""
        plan = []
        for order, split in self.split.items():
            blocks = split & BitMap64(range(pages.start >> order, pages.end >> order)) if split else split
            if blocks:
                self.split[order] -= blocks
                plan.append((order, blocks))
        return plan

    def folios(self, present: int) -> dict[int, int]:
        """How many folios of each order there are, if `present` pages are."""
        counts = {}
        above = present >> self.orders[0]
        for order, split in self.split.items():
            counts[order] = above - len(split)
            above = len(split) << (order - self._parts[order])
        counts[0] = above
        return counts

    def _mergeable(
        self,
        order: int,
        pages: PageRange,
        is_private: Callable[[PageRange], bool],
        is_held: Callable[[PageRange], bool],
    ) -> BitMap64:
        split, part = self.split[order], self._parts[order]
        first, last = pages.start >> order, -(-pages.end >> order)
        found = BitMap64()
        if last - first == 1:  # what most conversions are
            edges = [first] if first in split else []
        elif last - first > 2 and not is_held(hull(pages, order)):  # the inner ones are private throughout
            inner = BitMap64(range(-(-pages.start >> order), pages.end >> order))
            found = split & inner
            edges = [number for number in {first, last - 1} if number in split and number not in inner]
        else:
            edges = list(members(split, first, last))
        for number in edges:
            folio = block(PageIndex(number << order), order)
            if is_held(folio):
                continue
            if part:
                parts_are_whole = not self.split[part].range_cardinality(folio.start >> part, folio.end >> part)
            else:
                parts_are_whole = is_private(folio)
            if parts_are_whole:
                found.add(number)
        return found

    def _merge_wholly(
        self, pages: PageRange, is_private: Callable[[PageRange], bool], is_held: Callable[[PageRange], bool]
    ) -> list[Blocks]:
        top = self.orders[0]
        merged: dict[int, BitMap64] = {}
        for number in list(members(self.split[top], pages.start >> top, -(-pages.end >> top))):
            page = block(PageIndex(number << top), top)
            if is_private(page) and not is_held(page):
                for order, blocks in self.forget(page):
                    merged[order] = merged.get(order, BitMap64()) | blocks
        return sorted(merged.items())


def hull(pages: PageRange, order: int) -> PageRange:
    """`pages`, rounded out to whole blocks of `order`."""
    return Range(PageIndex(pages.start >> order << order), PageIndex(-(-pages.end >> order) << order))
