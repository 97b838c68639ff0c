"""What is done to the file: conversions, allocation, holes, poison, close."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from guestmem.check.invariants import snapshot
from guestmem.memory import Access, PageIndex
from guestmem.trace import Refusal
from tests.model.pages import Page
from tests.model.world import (
    PAGES,
    PRIVATE,
    SHARED,
    K,
    World,
    accesses,
    page_numbers,
    ranges,
)


class FileCalls(World):
    """What is done to the file: conversions, allocation, holes, poison, close."""

    @precondition(lambda self: self.fd_open)
    @rule(pages=ranges, to=accesses)
    def convert(self, pages: tuple[int, int], to: Access) -> None:
        start, end = pages
        busy = None
        if to is PRIVATE and any(self.pages[page].access is not to for page in range(start, end)):
            busy = next((page for page in range(start, end) if self._is_pinned(page)), None)
        before = snapshot(self.host)
        refusal = self._answer(
            lambda: self.gmem.convert(start * K, (end - start) * K, to), "convert.busy" if busy is not None else None
        )
        if isinstance(refusal, Refusal):
            assert refusal.facts["error_offset"] == (busy or 0) * K
            assert snapshot(self.host) == before, "S15"
            return
        for page in range(start, end):
            self.pages[page].access = to

    @precondition(lambda self: self.fd_open)
    @rule(pages=ranges)
    def allocate(self, pages: tuple[int, int]) -> None:
        whole = all(edge % (1 << self.order) == 0 for edge in pages)
        rule_expected = None if whole else "fallocate.unaligned"
        self._answer(lambda: self.gmem.allocate(pages[0] * K, (pages[1] - pages[0]) * K), rule_expected)
        for page in range(*pages) if whole else ():
            self._allocated(page)

    @precondition(lambda self: self.fd_open)
    @rule(pages=ranges, beyond=st.integers(0, 2))
    def punch_hole(self, pages: tuple[int, int], beyond: int) -> None:
        inside = range(pages[0], min(pages[1] + beyond, PAGES))
        whole = [page for page in inside if all(other in inside for other in self._huge_page(page))]
        if self.order and any(self.pages[page].poisoned for page in whole):
            return  # the file would have fewer huge pages than its size from then on: test_huge_pages.py
        busy = bool(self.order) and any(self._is_pinned(page) for page in whole)
        before = snapshot(self.host)
        call = self._answer(
            lambda: self.gmem.punch_hole(pages[0] * K, (pages[1] - pages[0] + beyond) * K),
            "punch.busy" if busy else None,
        )
        if isinstance(call, Refusal):
            assert snapshot(self.host) == before, "S15"
            return
        for page in inside:
            if page in whole:
                self.retired += self.pages[page].poisoned
                self.pages[page] = Page(self.pages[page].access)
            else:  # a part of a huge page: zeroed where it is, for those who hold it too
                self.pages[page].cell.byte = 0

    @precondition(lambda self: not self.released and self.retired < 20)
    @rule(page=page_numbers)
    def memory_failure(self, page: int) -> None:
        folio = self.gmem.inode.folios.folio(PageIndex(page))
        done = self.host.run(self.gmem.inode.memory_failure(PageIndex(page)))
        assert done == self.pages[page].allocated
        for number in range(folio.start, folio.end) if done else ():
            self.pages[number].poisoned = True

    @precondition(lambda self: self.fd_open)
    @rule()
    def close(self) -> None:
        self.gmem.close()
        self.fd_open = False
        self._maybe_released()

    @precondition(lambda self: self.released)
    @rule(init_shared=st.booleans(), order=st.sampled_from((0, 0, 1, 2)))
    def create_another(self, init_shared: bool, order: int) -> None:
        for slot in list(self.slots):
            self.delete_slot(slot)
        for pinned in self.pins:
            pinned.pages = [Page(SHARED) for _ in pinned.pages]
        self.create(init_shared, order)
