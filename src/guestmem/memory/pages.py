"""Address spaces of the provider: byte offsets, page indices, host page numbers; and half-open ranges of them.

Each space has its type, and only a named function goes from one to another; outside its domain it returns None.
"""

from __future__ import annotations

from typing import Generic, NamedTuple, NewType, TypeAlias, TypeVar

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT

ORDER_4K = 0
ORDER_2M = 9
ORDER_1G = 18
ORDERS = (ORDER_1G, ORDER_2M, ORDER_4K)
"""Orders that a leaf of a page table can have, largest first; order n is 2**n pages of 4 KiB."""

Offset = NewType("Offset", int)
"""A byte in a file."""
PageIndex = NewType("PageIndex", int)
"""A page of a file: offset >> 12."""
Pfn = NewType("Pfn", int)
"""A page of the host's memory, as the pool numbers it. Identity, not place: `Backing` knows where the bytes are."""

N = TypeVar("N", bound=int)


class Range(NamedTuple, Generic[N]):
    """The numbers from `start` up to, not including, `end`."""

    start: N
    end: N

    @property
    def pages(self) -> int:
        return self.end - self.start

    def contains(self, number: int) -> bool:
        return self.start <= number < self.end

    def covers(self, other: Range[N]) -> bool:
        return self.start <= other.start and other.end <= self.end

    def overlaps(self, other: Range[N]) -> bool:
        return self.start < other.end and other.start < self.end

    def intersection(self, other: Range[N]) -> Range[N] | None:
        start, end = self
        if start < other.start:  # comparisons: this is in the way of every fault and conversion
            start = other.start
        if end > other.end:
            end = other.end
        return Range(start, end) if start < end else None


PageRange: TypeAlias = Range[PageIndex]


def page_range(offset: int, size: int) -> PageRange | None:
    """The pages of `size` bytes from `offset`; None unless both are page aligned and the range is not empty."""
    if offset < 0 or size <= 0 or (offset | size) & (PAGE_SIZE - 1):
        return None
    return Range(PageIndex(offset >> PAGE_SHIFT), PageIndex((offset + size) >> PAGE_SHIFT))


def block(number: N, order: int) -> Range[N]:
    """The naturally aligned block of 2**order numbers that holds `number`."""
    start = number & ~((1 << order) - 1)
    return Range(start, start + (1 << order))  # type: ignore[arg-type]


def whole_blocks(numbers: Range[N], order: int) -> tuple[Range[N] | None, list[Range[N]]]:
    """The whole blocks of 2**order in a range, None if there are none, and what is left at its ends."""
    first = -(-numbers.start >> order) << order
    last = numbers.end >> order << order
    if first >= last:
        return None, [numbers]
    inner: Range[N] = Range(first, last)  # type: ignore[arg-type]
    ends = [Range(numbers.start, inner.start), Range(inner.end, numbers.end)]
    return inner, [end for end in ends if end.pages]


def offset_of(index: PageIndex) -> Offset:
    """The first byte of a page."""
    return Offset(index << PAGE_SHIFT)
