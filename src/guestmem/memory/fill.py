"""Pages come into a file: allocated, split where they are shared already, zeroed once."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import TYPE_CHECKING

from guestmem.memory.notifier import Access
from guestmem.memory.pages import PageIndex, PageRange, Pfn, Range
from guestmem.memory.restructure import prepare_split
from guestmem.trace import Refusal
from guestmem.trace import events as event

if TYPE_CHECKING:
    from guestmem.memory.guest_memfd import Inode


async def fill(inode: Inode, pages: PageRange, populate: bool = False) -> None:
    """Give every absent page of the range, which is whole huge pages, a folio. invalidate_lock held, shared will do.

    Two tasks may do so at once; of single pages, who inserts second gives back. With `populate` the host's memory is
    there when it returns.

    Raises: Refusal ENOMEM `pool.empty`, `pool.no_huge_page`, `pool.cgroup`, `backing.full`, `split.vmemmap`.
    """
    if inode.order:
        for start in range(pages.start, pages.end, 1 << inode.order):
            await _fill_huge_page(inode, inode.folios.huge_page(PageIndex(start)), populate)
        return
    while gap := next(inode.folios.absent(pages), None):
        if inode.scheduler.fails("folio: allocate"):
            raise Refusal(errno.ENOMEM, "pool.empty", wanted=gap.pages)
        pfns = inode.source.allocate(gap.pages, 0)
        await inode.scheduler.preempt("allocated, not in the file yet")
        if inode.folios.present.range_cardinality(gap.start, gap.end):
            _give_back(inode, pfns)
            continue
        _insert(inode, gap, pfns, populate)


async def _fill_huge_page(inode: Inode, huge_page: PageRange, populate: bool) -> None:
    """Have one huge page, split where its pages are shared already.

    Under its folio lock, as hugetlb has a mutex for each: of two tasks that take one each, the second could find that
    the reservation has no other, and fail for nothing.
    """
    async with inode.folios.lock(huge_page.start):
        if huge_page.start in inode.folios.present:
            return
        if inode.scheduler.fails("huge page: allocate"):
            raise Refusal(errno.ENOMEM, "pool.no_huge_page", order=inode.order)
        shared: Iterable[PageRange] = ()
        if not inode.attributes.is_all(huge_page, Access.PRIVATE):
            shared = (run for run, access in inode.attributes.runs(huge_page) if access is Access.SHARED)
        with prepare_split(inode.scheduler, inode.folios, shared, huge_page.start) as split:
            pfns = inode.source.allocate(huge_page.pages, inode.order)
            await inode.scheduler.preempt("huge page allocated, not in the file yet")
            _insert(inode, huge_page, pfns, populate)
            inode.note_split(split.commit())


def _insert(inode: Inode, pages: PageRange, pfns: list[Range[Pfn]], populate: bool) -> None:
    if populate:
        try:
            inode.backing.populate(pages)
        except OSError as error:
            _give_back(inode, pfns)
            raise Refusal(errno.ENOMEM, "backing.full", start=pages.start, pages=pages.pages) from error
    inode.folios.insert(pages, pfns)
    if inode.tracer.enabled:
        inode.tracer.emit(event.GmemFolioAlloc(inode.number, pages.start, pages.end))


def _give_back(inode: Inode, pfns: list[Range[Pfn]]) -> None:
    for run in reversed(pfns):
        inode.source.free(run)


async def zero(inode: Inode, index: PageIndex) -> None:
    """Zero the folio of a page once, under its lock; whoever waited for the lock finds it done (S12)."""
    async with inode.folios.lock(index):
        if index in inode.folios.uptodate:
            return
        folio = inode.folios.folio(index)
        for run in inode.folios.never_zeroed(folio):  # parts may have been, before they were merged
            inode.backing.zero(run)
            if inode.tracer.enabled:
                inode.tracer.emit(event.GmemFolioZero(inode.number, run.start, run.end))
        await inode.scheduler.preempt("zeroed, not up to date yet")
        inode.folios.set_uptodate(folio)
