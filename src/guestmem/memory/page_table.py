"""A radix table of leaves of 4K, 2M and 1G: what a user of the provider keeps its mappings in.

Stage-2 tables, host page tables and IO page tables are this, each with leaves of its own kind. Zapping a range costs
what is mapped there, not what the range could hold, so one guest gigabyte with three pages in it goes at once.

The lock is the owner's (mmu_lock, page_table_lock).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from guestmem.memory.pages import ORDER_4K, N, Range

L = TypeVar("L")
_TABLE_SHIFT = 9


class PageTable(Generic[N, L]):
    """Numbers of one address space (frames, virtual page numbers) to leaves."""

    __slots__ = ("_huge", "_tables")

    def __init__(self) -> None:
        self._tables: dict[int, dict[int, L]] = {}  # number >> 9 -> number -> 4K leaf
        self._huge: dict[int, dict[int, L]] = {}  # order -> number >> order -> leaf

    def lookup(self, number: N) -> L | None:
        """The leaf that maps `number`."""
        table = self._tables.get(number >> _TABLE_SHIFT)
        if table is not None and number in table:
            return table[number]
        for order, leaves in self._huge.items():
            if leaves and number >> order in leaves:
                return leaves[number >> order]
        return None

    def map(self, number: N, order: int, leaf: L) -> None:
        """Install a leaf over the block of 2**order that holds `number`; whatever was mapped inside goes first."""
        start = number >> order << order
        self.zap(Range(start, start + (1 << order)))  # type: ignore[arg-type]
        if order == ORDER_4K:
            self._tables.setdefault(number >> _TABLE_SHIFT, {})[number] = leaf
        else:
            self._huge.setdefault(order, {})[number >> order] = leaf

    def zap(self, numbers: Range[N]) -> int:
        """Remove every leaf that maps any of `numbers`, a larger leaf wholly; how many leaves went."""
        zapped = 0
        for order, leaves in self._huge.items():
            for block in _keys_between(leaves, numbers.start >> order, (numbers.end - 1) >> order):
                del leaves[block]
                zapped += 1
        for block in _keys_between(self._tables, numbers.start >> _TABLE_SHIFT, (numbers.end - 1) >> _TABLE_SHIFT):
            zapped += self._zap_table(block, numbers)
        return zapped

    def leaves(self) -> Iterator[tuple[int, int, L]]:
        """(first number, order, leaf) of every leaf, in no particular order."""
        for table in self._tables.values():
            for number, leaf in table.items():
                yield number, ORDER_4K, leaf
        for order, leaves in self._huge.items():
            for block, leaf in leaves.items():
                yield block << order, order, leaf

    def __len__(self) -> int:
        """How many leaves there are."""
        return sum(map(len, self._tables.values())) + sum(map(len, self._huge.values()))

    def _zap_table(self, block: int, numbers: Range[N]) -> int:
        table = self._tables[block]
        first = block << _TABLE_SHIFT
        if numbers.start <= first and first + (1 << _TABLE_SHIFT) <= numbers.end:
            del self._tables[block]
            return len(table)
        inside = _keys_between(table, numbers.start, numbers.end - 1)
        for number in inside:
            del table[number]
        if not table:
            del self._tables[block]
        return len(inside)


def _keys_between(keys: Mapping[int, object], first: int, last: int) -> list[int]:
    """The keys from `first` to `last`, by whichever way is shorter."""
    if not keys:
        return []
    if last - first < len(keys):
        return [key for key in range(first, last + 1) if key in keys]
    return [key for key in keys if first <= key <= last]
