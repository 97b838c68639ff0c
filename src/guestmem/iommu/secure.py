"""Leaves of a trusted device's page table over pages of a guest with ownership tables: which of them agree with
those."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from guestmem.arch import DmaRules
from guestmem.iommu.addresses import IoPage
from guestmem.iommu.leaves import GmemLeaf, IoLeaf
from guestmem.memory import PageTable, Pfn

_SLACK = 64


def fitting(leaf: GmemLeaf, orders: Sequence[int]) -> Iterator[GmemLeaf]:
    """The largest leaves for what `leaf` maps that agree with the tables; nothing for pages that they have not."""
    assert leaf.rules is not None
    if leaf.rules.fits(leaf.block):
        yield leaf
        return
    smaller = next((order for order in orders if order < leaf.order), None)
    if smaller is not None:
        for page in range(leaf.page, leaf.end, 1 << smaller):
            yield from fitting(leaf.part(IoPage(page), smaller), orders)


def largest_fitting(leaf: GmemLeaf, page: IoPage, orders: Iterable[int]) -> GmemLeaf | None:
    """The largest part of `leaf` over `page` that agrees with the tables."""
    rules: DmaRules | None = leaf.rules
    assert rules is not None
    for order in orders:
        if order <= leaf.order:
            part = leaf.part(IoPage(page >> order << order), order)
            if rules.fits(part.block):
                return part
    return None


class Frames:
    """Where leaves are, by the number of their first page of memory. Leaves that have gone stay in it for a while: it
    is for looking up who may be concerned, and the table says who is."""

    def __init__(self) -> None:
        self._pages: dict[Pfn, set[IoPage]] = {}
        self._noted = 0

    def __fingerprint__(self) -> None:
        """The table says it."""

    def note(self, leaf: IoLeaf, table: PageTable[IoPage, IoLeaf]) -> None:
        """`leaf` is in the table now."""
        assert isinstance(leaf, GmemLeaf)
        self._add(leaf)
        if self._noted > 2 * len(table) + _SLACK:
            self._pages, self._noted = {}, 0
            for _, _, present in table.leaves():
                if isinstance(present, GmemLeaf):
                    self._add(present)

    def _add(self, leaf: GmemLeaf) -> None:
        self._pages.setdefault(leaf.pfn, set()).add(leaf.page)
        self._noted += 1

    def near(self, pfn: Pfn, pages: int, orders: Sequence[int]) -> list[IoPage]:
        """Of all leaves that map any of these pages, and maybe of others. `orders` are those that leaves have."""
        if pages > len(self._pages):
            return [page for found in self._pages.values() for page in found]
        starts = {Pfn(first) for order in orders for first in range(pfn >> order << order, pfn + pages, 1 << order)}
        return [page for first in sorted(starts & self._pages.keys()) for page in self._pages[first]]
