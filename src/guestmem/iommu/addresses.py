"""Addresses of a device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NewType

from guestmem.memory import PAGE_SHIFT, PAGE_SIZE, Range

Iova = NewType("Iova", int)
"""A byte as a device addresses it."""
IoPage = NewType("IoPage", int)
"""A page of an IO address space: iova >> 12."""


def io_page_of(iova: int) -> IoPage:
    """The page that holds an IOVA."""
    return IoPage(iova >> PAGE_SHIFT)


def iova_of(page: int) -> Iova:
    """The first byte of a page."""
    return Iova(page << PAGE_SHIFT)


def io_pages(iova: int, length: int) -> Range[IoPage] | None:
    """The pages of `length` bytes from `iova` on; None unless both are page aligned and the range is not empty."""
    if length <= 0 or (iova | length) & (PAGE_SIZE - 1):
        return None
    return Range(io_page_of(iova), io_page_of(iova + length))


def blocks(pages: Range[IoPage], orders: Sequence[int]) -> Iterator[tuple[IoPage, int]]:
    """(first page, order) of the largest naturally aligned blocks that make up `pages`. `orders`: largest first, 0
    last."""
    page = int(pages.start)
    while page < pages.end:
        for order in orders:
            if not page & ((1 << order) - 1) and page + (1 << order) <= pages.end:
                break
        yield IoPage(page), order
        page += 1 << order
