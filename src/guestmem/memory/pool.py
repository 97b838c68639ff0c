"""Pool: where folios come from, and where they go back to.

Hands out host page numbers, the most recently freed first, as the kernel's per-CPU lists do: reuse then comes at once
and a stale mapping meets the next owner instead of nobody. A page that was poisoned is retired: it never comes out
again. A page that left its file while somebody still held a reference is `Detached`; it comes back with the last put.

Numbers are identity only; the bytes are in the `Backing` of whoever the page was given to.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno

from pyroaring import BitMap64

from guestmem.memory.pages import Pfn, Range
from guestmem.trace import Refusal


@dataclasses.dataclass(frozen=True, slots=True)
class PoolStatistics:
    """Pages of 4 KiB."""

    capacity: int
    allocated: int
    detached: int
    retired: int


class Detached:
    """A folio without a file: its bytes as they were when it left, and how many still hold it."""

    __slots__ = ("_bytes", "hva", "pfns", "references")

    def __init__(self, pfns: Range[Pfn], content: bytes, references: int) -> None:
        self.pfns = pfns
        self._bytes = ctypes.create_string_buffer(content, len(content))
        self.hva = ctypes.addressof(self._bytes)
        self.references = references


class Pool:
    """`capacity` pages of host memory."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.allocated = BitMap64()
        self.detached: dict[Pfn, Detached] = {}
        self.retired: set[Pfn] = set()
        self._free: list[Range[Pfn]] = []  # a stack: the last freed is on top
        self._untouched = Pfn(1)  # page 0 is nobody's, so that a zeroed field never names a page

    def allocate(self, pages: int, order: int = 0) -> list[Range[Pfn]]:
        """`pages` pages in naturally aligned blocks of 2**order, as few ranges as there are.

        Raises: Refusal(ENOMEM, "pool.empty"), with nothing taken.
        """
        if len(self.allocated) + pages > self.capacity:
            raise Refusal(
                errno.ENOMEM, "pool.empty", wanted=pages, free=self.capacity - len(self.allocated), order=order
            )
        taken: list[Range[Pfn]] = []
        while pages:
            got = self._take(pages, order)
            taken.append(got)
            pages -= got.pages
            self.allocated.add_range(got.start, got.end)
        return taken

    def free(self, pfns: Range[Pfn]) -> None:
        """Back to the pool. Every page must be allocated: a double free stops here."""
        assert self.allocated.contains_range(pfns.start, pfns.end), f"S10: {pfns} freed twice"
        self.allocated.remove_range(pfns.start, pfns.end)
        self._free.append(pfns)

    def retire(self, pfn: Pfn) -> None:
        """Never give this page out again (poison, or a mapping that could not be removed: S19)."""
        self.retired.add(pfn)

    def put_detached(self, pfn: Pfn) -> None:
        """One reference less to the detached folio that begins at `pfn`; the last one frees it."""
        folio = self.detached[pfn]
        folio.references -= 1
        if not folio.references:
            del self.detached[pfn]
            if pfn not in self.retired:
                self.free(folio.pfns)

    def statistics(self) -> PoolStatistics:
        detached = sum(folio.pfns.pages for folio in self.detached.values())
        return PoolStatistics(self.capacity, len(self.allocated), detached, len(self.retired))

    def check(self) -> None:
        """S10, S14: the books agree."""
        free = BitMap64()
        for pfns in self._free:
            assert not free.range_cardinality(pfns.start, pfns.end), f"S14: {pfns} is free twice"
            free.add_range(pfns.start, pfns.end)
        assert not free & self.allocated, "S10: a page is free and allocated"
        assert len(free) + len(self.allocated) == self._untouched - 1, "S14: a page is neither free nor allocated"
        assert all(pfn in self.allocated for pfn in self.retired), "S19: a retired page was freed"
        assert all(pfn in self.allocated for pfn in self.detached), "S10: a detached page was freed"

    def _take(self, pages: int, order: int) -> Range[Pfn]:
        size = 1 << order
        for place in range(len(self._free) - 1, -1, -1):
            free = self._free[place]
            start = -(-free.start // size) * size
            whole = (free.end - start) // size * size
            if whole <= 0:
                continue
            end = start + min(pages, whole)
            rest = [Range(free.start, Pfn(start)), Range(Pfn(end), free.end)]
            self._free[place : place + 1] = [part for part in rest if part.pages]
            return Range(Pfn(start), Pfn(end))
        start = -(-self._untouched // size) * size
        if start > self._untouched:
            self._free.insert(0, Range(self._untouched, Pfn(start)))
        self._untouched = Pfn(start + pages)
        return Range(Pfn(start), self._untouched)
