"""Memory for machines that live a millisecond: one mapping, given out page after page and taken back all at once.

An explorer builds a machine for every execution. A memfd and its mapping for each file of each machine would be most of
what that costs. Addresses also come out the same in every execution, so a place in the arena may be part of a state.

Freed pages are filled with junk and zeroed when they are used again, as `MemfdBacking` does with `junk`.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator

from guestmem.memory import PAGE_SIZE, PageIndex, PageRange
from guestmem.memory.backing import JUNK

PAGES = 256
ARENA_SIZE = PAGES * PAGE_SIZE
_ZERO_PAGE = bytes(PAGE_SIZE)
_JUNK_PAGE = bytes([JUNK]) * PAGE_SIZE


class Arena:
    """`PAGES` pages of the server's memory, for one machine after another."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 2 * ARENA_SIZE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self.base = -(-start // ARENA_SIZE) * ARENA_SIZE  # so that a place is an address modulo the size
        self._taken = 0

    def take(self, pages: int) -> ArenaBacking:
        """Zeroed pages, until `reset`. Raises: MemoryError."""
        if self._taken + pages > PAGES:
            raise MemoryError(f"a scenario of more than {PAGES} pages")
        backing = ArenaBacking(self.base + self._taken * PAGE_SIZE, pages)
        self._taken += pages
        return backing

    def reset(self) -> None:
        """Take everything back."""
        ctypes.memset(self.base, 0, self._taken * PAGE_SIZE)
        self._taken = 0


class ArenaBacking:
    """`pages` pages from `base` on."""

    kind = "arena"
    __slots__ = ("_base", "_dirty", "_pages")

    def __init__(self, base: int, pages: int) -> None:
        self._base = base
        self._pages = pages
        self._dirty: set[int] = set()  # freed pages that hold junk

    def __fingerprint__(self) -> tuple[int | bytes, ...]:
        """The bytes are state; what is all zero or all junk is said in short."""
        return tuple(page_digest(self._base + index * PAGE_SIZE) for index in range(self._pages))

    def hva(self, index: PageIndex) -> int:
        return self._base + index * PAGE_SIZE

    def window(self, index: PageIndex) -> tuple[int, int]:
        return self._base, self._pages * PAGE_SIZE

    def populate(self, pages: PageRange) -> None:
        """The arena's memory is there."""

    def existing(self, pages: PageRange) -> Iterator[PageRange]:
        """Nobody maps the arena behind the provider's back."""
        return iter(())

    def free(self, pages: PageRange) -> None:
        ctypes.memset(self.hva(pages.start), JUNK, pages.pages * PAGE_SIZE)
        self._dirty.update(range(pages.start, pages.end))

    def zero(self, pages: PageRange) -> None:
        for index in range(pages.start, pages.end):
            if index in self._dirty:
                ctypes.memset(self._base + index * PAGE_SIZE, 0, PAGE_SIZE)
                self._dirty.remove(index)

    def clear(self, pages: PageRange) -> None:
        ctypes.memset(self.hva(pages.start), 0, pages.pages * PAGE_SIZE)
        self._dirty.difference_update(range(pages.start, pages.end))

    def close(self) -> None:
        """The arena takes its pages back when the machine is gone."""


def page_digest(hva: int) -> int | bytes:
    """What stands for the bytes of a page: 0 for zeros, 1 for junk, else what it begins and ends with, or all of it."""
    content = ctypes.string_at(hva, PAGE_SIZE)
    if content == _ZERO_PAGE:
        return 0
    if content == _JUNK_PAGE:
        return 1
    return content.rstrip(b"\0")
