"""NoBacking: files of any size without a byte of host memory behind them.

Nobody reads through the addresses that it gives. What would have been zeroed is counted.
"""

from __future__ import annotations

from collections.abc import Iterator

from guestmem.memory import PAGE_SHIFT, PageIndex, PageRange


class NoBacking:
    """`zeroed` counts the pages that the provider had zeroed; `existing` says that every page is there, as it is for a
    user who has touched the whole range."""

    kind = "none"

    def __init__(self, pages: int) -> None:
        self.zeroed = 0
        self._size = pages << PAGE_SHIFT

    def hva(self, index: PageIndex) -> int:
        return index << PAGE_SHIFT

    def window(self, index: PageIndex) -> tuple[int, int]:
        return 0, self._size

    def populate(self, pages: PageRange) -> None:
        """There is nothing to populate, so there is always room."""

    def free(self, pages: PageRange) -> None:
        """There is nothing to give back."""

    def zero(self, pages: PageRange) -> None:
        self.zeroed += pages.pages

    def clear(self, pages: PageRange) -> None:
        self.zeroed += pages.pages

    def existing(self, pages: PageRange) -> Iterator[PageRange]:
        yield pages

    def close(self) -> None:
        """There is nothing to close."""
