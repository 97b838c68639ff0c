"""Pool: where folios come from, and where they go back to.

Hands out host page numbers, the most recently freed first, as the kernel's per-CPU lists do: reuse then comes at once
and a stale mapping meets the next owner instead of nobody. A page that was poisoned is retired: it never comes out
again. A folio that left its file while somebody still held a reference is `Detached`; it comes back with the last put,
and if it was a part of a huge page, with the last put of any part.

Numbers are identity only; the bytes are in the `Backing` of whoever the page was given to. Huge pages that are free
(hugetlb.py) are a count here, `aside`, and get numbers when they are used.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
from typing import Protocol

from pyroaring import BitMap64

from guestmem.memory.pages import Pfn, Range
from guestmem.trace import Refusal


@dataclasses.dataclass(frozen=True, slots=True)
class PoolStatistics:
    """Pages of 4 KiB. `aside` is free memory that only huge pages are made of."""

    capacity: int
    allocated: int
    detached: int
    retired: int
    aside: int


class FolioSource(Protocol):
    """Where the folios of one file come from: the pool, or a reservation of huge pages."""

    @property
    def pool(self) -> Pool: ...

    def allocate(self, pages: int, order: int) -> list[Range[Pfn]]:
        """`pages` pages in naturally aligned blocks of 2**order. Raises: Refusal ENOMEM, with nothing taken."""
        ...

    def free(self, pfns: Range[Pfn]) -> None: ...

    def retire(self, pfns: Range[Pfn]) -> None:
        """Never give these pages out again (poison, or a mapping that could not be removed: S19)."""
        ...

    def restore(self, vmemmap: int) -> None:
        """Huge pages are about to be split, which needs this many pages of struct pages. Raises: Refusal ENOMEM."""
        ...

    def optimise(self, vmemmap: int) -> None:
        """Huge pages were merged."""
        ...

    def close(self) -> None:
        """The file is gone. What is still held of it comes back later."""
        ...


class Unit:
    """Memory that left its file while `held` folios in it were referenced; it goes back to `source` as a whole.

    `vmemmap` are the pages of struct pages that a split huge page needed, free when it is merged by its last put.
    """

    __slots__ = ("held", "pfns", "source", "vmemmap")

    def __init__(self, pfns: Range[Pfn], source: FolioSource, vmemmap: int) -> None:
        self.pfns = pfns
        self.source = source
        self.vmemmap = vmemmap
        self.held = 0


class Detached:
    """A folio without a file: its bytes as they were when it left, and how many still hold it."""

    __slots__ = ("_bytes", "hva", "pfns", "references", "unit")

    def __init__(self, pfns: Range[Pfn], content: bytes, references: int, unit: Unit) -> None:
        self.pfns = pfns
        self._bytes = ctypes.create_string_buffer(content, len(content))
        self.hva = ctypes.addressof(self._bytes)
        self.references = references
        self.unit = unit
        unit.held += 1


class Pool:
    """`capacity` pages of host memory."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.aside = 0
        self.allocated = BitMap64()
        self._in_use = 0  # how many those are: counting the bits of a terabyte takes 30 us
        self.detached: dict[Pfn, Detached] = {}
        self.retired = BitMap64()
        self._free: list[Range[Pfn]] = []  # a stack: the last freed is on top
        self._untouched = Pfn(1)  # page 0 is nobody's, so that a zeroed field never names a page

    @property
    def pool(self) -> Pool:
        return self

    @property
    def available(self) -> int:
        """Pages that can be had now."""
        return self.capacity - self.aside - self._in_use

    def set_aside(self, pages: int) -> None:
        """Keep free pages for huge pages, or stop keeping them (negative). Raises: Refusal ENOMEM `pool.empty`."""
        if pages > self.available:
            raise Refusal(errno.ENOMEM, "pool.empty", wanted=pages, free=self.available)
        self.aside += pages
        assert self.aside >= 0, "S14: more huge pages are taken than were set aside"

    def allocate(self, pages: int, order: int = 0) -> list[Range[Pfn]]:
        """`pages` pages in naturally aligned blocks of 2**order, as few ranges as there are.

        Raises: Refusal(ENOMEM, "pool.empty"), with nothing taken.
        """
        if pages > self.available:
            raise Refusal(errno.ENOMEM, "pool.empty", wanted=pages, free=self.available, order=order)
        taken: list[Range[Pfn]] = []
        while pages:
            got = self._take(pages, order)
            taken.append(got)
            pages -= got.pages
            self.allocated.add_range(got.start, got.end)
            self._in_use += got.pages
        return taken

    def free(self, pfns: Range[Pfn]) -> None:
        """Back to the pool. Every page must be allocated: a double free stops here."""
        assert self.allocated.contains_range(pfns.start, pfns.end), f"S10: {pfns} freed twice"
        self.allocated.remove_range(pfns.start, pfns.end)
        self._in_use -= pfns.pages
        self._free.append(pfns)

    def retire(self, pfns: Range[Pfn]) -> None:
        """Never give these pages out again (poison, or a mapping that could not be removed: S19)."""
        self.retired.add_range(pfns.start, pfns.end)

    def restore(self, vmemmap: int) -> None:
        """Single pages have their struct pages."""

    def optimise(self, vmemmap: int) -> None:
        """Single pages keep their struct pages."""

    def close(self) -> None:
        """A file that took single pages has nothing reserved."""

    def put_detached(self, pfn: Pfn) -> None:
        """One reference less to the detached folio that begins at `pfn`; the last one of its unit frees that."""
        folio = self.detached[pfn]
        folio.references -= 1
        if folio.references:
            return
        del self.detached[pfn]
        folio.unit.held -= 1
        if not folio.unit.held and folio.unit.pfns.start not in self.retired:
            folio.unit.source.optimise(folio.unit.vmemmap)
            folio.unit.source.free(folio.unit.pfns)

    def detached_pages(self) -> int:
        """Pages of all units that are still held, those that will never come back left out."""
        units = {id(folio.unit): folio.unit for folio in self.detached.values()}
        return sum(unit.pfns.pages for unit in units.values() if unit.pfns.start not in self.retired)

    def statistics(self) -> PoolStatistics:
        return PoolStatistics(self.capacity, len(self.allocated), self.detached_pages(), len(self.retired), self.aside)

    def check(self) -> None:
        """S10, S14: the books agree."""
        free = BitMap64()
        for pfns in self._free:
            assert not free.range_cardinality(pfns.start, pfns.end), f"S14: {pfns} is free twice"
            free.add_range(pfns.start, pfns.end)
        assert not free & self.allocated, "S10: a page is free and allocated"
        assert len(free) + len(self.allocated) == self._untouched - 1, "S14: a page is neither free nor allocated"
        assert self.retired <= self.allocated, "S19: a retired page was freed"
        assert all(pfn in self.allocated for pfn in self.detached), "S10: a detached page was freed"
        assert len(self.allocated) == self._in_use, "S14: a page was given out or back beside the books"
        assert self.available >= 0, "S14: more pages are in use than there are"

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
