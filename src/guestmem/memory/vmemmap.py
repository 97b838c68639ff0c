"""Vmemmap: the books of HVO, the optimisation that gives back most struct pages of a huge page.

Every 4K page of memory has a struct page of 64 bytes, so a 1G page has 16 MiB of them, in 4096 pages of vmemmap, and a
2M page has 8. As long as nobody looks at the parts of a huge page one by one, the first of these pages can stand for
all of them and the others serve as memory. Who splits the huge page needs struct pages for its parts, and must get
that memory back first: 511 pages for one 1G page that becomes 2M pages, 7 for each 2M page that becomes 4K pages.

Nothing is stored here but counts: what is saved makes the pool larger by as much.

Source: mm/hugetlb_vmemmap.c; spec/semantics.md section 10. HVO between 1G and 2M is ours: the posted series splits to
4K at once.
"""

from __future__ import annotations

import errno

from guestmem.memory.pages import PAGE_SIZE
from guestmem.memory.pool import Pool
from guestmem.trace import Refusal

STRUCT_PAGE_SIZE = 64


def vmemmap_pages(order: int, optimised: bool = True) -> int:
    """Pages of vmemmap that a folio of `order` keeps; 0 if its struct pages fill no page of their own."""
    pages = (STRUCT_PAGE_SIZE << order) // PAGE_SIZE
    return min(pages, 1) if optimised else pages


def split_cost(order: int, part: int) -> int:
    """Pages of vmemmap that must be given back before a folio of `order` becomes folios of order `part`."""
    if not part:
        return vmemmap_pages(order, optimised=False) - vmemmap_pages(order)
    return (vmemmap_pages(part) << (order - part)) - vmemmap_pages(order)


class Vmemmap:
    """`saved` pages serve as memory now; `restored` and `optimised` count what went either way since the start."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.saved = 0
        self.restored = 0
        self.optimised = 0

    def optimise(self, pages: int) -> None:
        """Struct pages are needed no more: their memory is the pool's."""
        self._pool.capacity += pages
        self.saved += pages
        self.optimised += pages

    def restore(self, pages: int) -> None:
        """Struct pages are needed again. Raises: Refusal ENOMEM `split.vmemmap`, with nothing taken."""
        free = self._pool.available
        if pages > free:
            raise Refusal(errno.ENOMEM, "split.vmemmap", wanted=pages, free=free)
        self._pool.capacity -= pages
        self.saved -= pages
        self.restored += pages
