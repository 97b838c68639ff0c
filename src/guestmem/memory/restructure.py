"""Splitting and merging the huge pages of a file: what may fail first, then what may not.

A split needs struct pages, so memory, and nobody who holds the folio. Both are looked at and taken by `prepare`, before
any user is told anything; `commit` cannot fail. A merge needs nothing: what cannot be merged now stays split, and is
tried again when its pages next become private.

Source: kvm_gmem_restructure_folios_in_range of "[RFC PATCH v2 00/51] 1G page support for guest_memfd";
spec/semantics.md section 10.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator

from guestmem.memory.folio import Folios
from guestmem.memory.pages import PageIndex, PageRange, offset_of
from guestmem.memory.splits import Blocks, hull
from guestmem.sched import Scheduler
from guestmem.trace import Refusal


class PreparedSplit:
    """A split that has all it needs: `with prepare_split(...) as split:`, then `split.commit()`.

    Left without a commit, everything is given back.
    """

    __slots__ = ("_committed", "_folios", "_plan", "_vmemmap")

    def __init__(self, folios: Folios, plan: list[Blocks], vmemmap: int) -> None:
        self._folios = folios
        self._plan = plan
        self._vmemmap = vmemmap
        self._committed = False

    def __enter__(self) -> PreparedSplit:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._committed:
            self._folios.source.optimise(self._vmemmap)

    def commit(self) -> list[Blocks]:
        """Split; what was. Cannot fail."""
        self._folios.splits.apply(self._plan)
        self._committed = True
        return self._plan


def prepare_split(scheduler: Scheduler, folios: Folios, shared: Iterable[PageRange], start: PageIndex) -> PreparedSplit:
    """Have what it takes to make folios of order 0 of the pages `shared`, which are there or about to be.

    `start` is where the request begins.

    Raises: Refusal, with `error_offset` in bytes: EAGAIN `split.busy`, somebody holds a folio that must be split;
    ENOMEM `split.vmemmap`.
    """
    plan = [blocks for pages in shared for blocks in folios.splits.missing(pages)]
    if not plan:
        return PreparedSplit(folios, plan, 0)
    _check_not_held(folios, plan, start)
    vmemmap = folios.splits.cost(plan)
    if scheduler.fails("split: restore vmemmap"):
        raise Refusal(errno.ENOMEM, "split.vmemmap", wanted=vmemmap, error_offset=offset_of(start))
    try:
        folios.source.restore(vmemmap)
    except Refusal as refusal:
        raise refusal.adding(error_offset=offset_of(start)) from None
    return PreparedSplit(folios, plan, vmemmap)


def present_parts(folios: Folios, pages: PageRange) -> Iterator[PageRange]:
    """The parts of `pages` that lie in huge pages which are there."""
    for run in folios.present_in(hull(pages, folios.order)):
        if part := run.intersection(pages):
            yield part


def merge(folios: Folios, pages: PageRange, is_private: Callable[[PageRange], bool]) -> list[Blocks]:
    """Merge what `pages`, private now, are a part of, as far as nobody holds it; what was merged."""
    merged = folios.splits.merge(pages, is_private, folios.is_held)
    folios.source.optimise(folios.splits.cost(merged))
    return merged


def _check_not_held(folios: Folios, plan: list[Blocks], start: PageIndex) -> None:
    for order, blocks in plan:
        held = [head for head in folios.references if head >> order in blocks and folios.order_of(head) == order]
        if held:
            busy = min(held)
            raise Refusal(
                errno.EAGAIN,
                "split.busy",
                error_offset=offset_of(max(start, busy)),
                references=folios.references[busy],
                order=order,
            )
