"""Conversion: pages become private or shared, in place.

    already there? -> room -> to shared: what a split needs -> to private: users that take references first, then look
    for references -> the other users -> did all unmap? -> who gives pages back -> could they? -> STORE: split, new
    access, merge -> end

Everything that may fail comes before STORE, and a failure ends the window with nothing changed (S15).

Source: in-place conversion v8, kvm_gmem_set_attributes; huge pages: the 1G series and what followed it;
spec/semantics.md sections 3 and 10.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from guestmem.memory.attributes import other
from guestmem.memory.interface import Conversion
from guestmem.memory.notifier import Access, Invalidation, Reason
from guestmem.memory.pages import PageIndex, PageRange, Range, offset_of
from guestmem.memory.restructure import PreparedSplit, merge, prepare_split, present_parts
from guestmem.memory.splits import hull
from guestmem.trace import EHWPOISON, Refusal
from guestmem.trace import events as event

if TYPE_CHECKING:
    from guestmem.memory.guest_memfd import Inode

REASON = {Access.PRIVATE: Reason.CONVERT_TO_PRIVATE, Access.SHARED: Reason.CONVERT_TO_SHARED}


async def convert(inode: Inode, pages: PageRange, to: Access) -> None:
    """Give every page of `pages` the access `to`. Bytes stay where they are.

    All of them or none, unless the inode's policy is to go one huge page at a time: then what a refusal's
    `error_offset` (bytes) lies beyond is done, and nothing from there on.

    Nothing happens, and nobody is told, if all have it. To private: the users through whose mappings references can be
    taken drop theirs first, then a folio that is still referenced is busy; the entries that were dropped fault in
    again. To shared needs no such look: a private page has no foreign references (S1), but a huge page that must be
    split is looked at like any folio.

    Raises: Refusal, with `error_offset` among its facts: ENOMEM `convert.nomem`, `split.vmemmap`; EAGAIN
    `convert.busy`, `split.busy`, the first busy folio; EHWPOISON `convert.bad_page`, a user could not unmap; EPERM
    `frozen.convert`.
    """
    if not inode.order or inode.policy.conversion is Conversion.ATOMIC:
        await convert_range(inode, pages, to)
        return
    size = 1 << inode.order
    start = pages.start
    while start < pages.end:
        end = min(PageIndex((start // size + 1) * size), pages.end)
        try:
            await convert_range(inode, Range(start, end), to)
        except Refusal as refusal:
            raise refusal.adding(error_offset=offset_of(start), at=refusal.facts.get("error_offset")) from None
        start = end
        await inode.scheduler.cond_resched("converted a huge page")


async def convert_range(inode: Inode, pages: PageRange, to: Access) -> None:
    """Convert all of `pages` or none. Raises: as convert."""
    async with inode.invalidate_lock.exclusive:
        if inode.attributes.is_all(pages, to):
            return
        if inode.frozen:
            raise Refusal(errno.EPERM, "frozen.convert", error_offset=offset_of(pages.start))
        if inode.scheduler.fails("convert: preallocate"):
            raise Refusal(errno.ENOMEM, "convert.nomem", error_offset=offset_of(pages.start))
        to_be_split = present_parts(inode.folios, pages) if inode.order and to is Access.SHARED else ()
        with prepare_split(inode.scheduler, inode.folios, to_be_split, pages.start) as split:
            around = hull(pages, inode.order) if inode.order else None
            invalidation = Invalidation(pages, REASON[to], (other(to),), around)
            async with inode.users.tell(invalidation) as telling:
                if to is Access.PRIVATE:
                    await telling.begin(through_references=True)
                    await inode.scheduler.preempt("unmapped, references not looked at yet")
                    check_no_references(inode, pages)
                await telling.begin(last=False)
                check_all_unmapped(inode, pages)  # before pages are given back, and lose their bytes with it
                await telling.begin()
                check_all_unmapped(inode, pages)
                # The point of no return: nothing below may fail.
                store(inode, pages, to, split)


def store(inode: Inode, pages: PageRange, to: Access, split: PreparedSplit) -> None:
    """Split what becomes shared, note the new access, merge what is private again."""
    inode.note_split(split.commit())
    inode.attributes.set(pages, to)
    inode.conversions += 1
    if inode.tracer.enabled:
        inode.tracer.emit(event.GmemConvert(inode.number, pages.start, pages.end, to.value))
    if inode.order and to is Access.PRIVATE:
        inode.note_merged(merge(inode.folios, pages, lambda part: inode.attributes.is_all(part, Access.PRIVATE)))


def check_no_references(inode: Inode, pages: PageRange) -> None:
    """Raises: Refusal EAGAIN `convert.busy`, the first folio in `pages` that somebody besides the file holds."""
    busy = inode.folios.first_referenced(pages)
    if busy is not None:
        offset = offset_of(max(pages.start, busy))
        raise Refusal(errno.EAGAIN, "convert.busy", error_offset=offset, references=inode.folios.references[busy])


def check_all_unmapped(inode: Inode, pages: PageRange) -> None:
    """Look again after the users were told: a page that stayed mapped must not change hands (B53, S19)."""
    if inode.unmap_failed.range_cardinality(pages.start, pages.end):
        bad = PageIndex(inode.unmap_failed.next_set_bit(pages.start))
        raise Refusal(EHWPOISON, "convert.bad_page", error_offset=offset_of(bad))
