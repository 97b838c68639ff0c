"""Folios of one file: which pages are present, what is known of each, and who holds references.

The kernel has a struct for each page. Here most pages have nothing to say, so what they all have (present, up to date,
poisoned) is kept in bitmaps, their page numbers in runs, and only references and locks, which few have at a time, are
kept one by one. A gigabyte of populated file costs some ten kilobytes, and populating it is a handful of range
operations.

Rules. A page is zeroed at most once in its life in the file, under its folio lock, before `uptodate` is set (S12).
Removing a folio that has references detaches it: its holders keep the bytes, the file gets a new page next time.

In a file of huge pages memory comes and goes by whole huge pages, and which of them are split is in `Splits`. What is
known of pages (up to date, poisoned) is known page by page, so splitting and merging change neither; references are
counted by folio, and a folio that has any is neither split nor merged.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType

from pyroaring import BitMap64

from guestmem.memory.backing import Backing, read_host, write_host
from guestmem.memory.bitmaps import members, next_member
from guestmem.memory.pages import ORDER_2M, PAGE_SIZE, PageIndex, PageRange, Pfn, Range, block
from guestmem.memory.pool import Detached, FolioSource, Unit
from guestmem.memory.splits import Splits
from guestmem.sched import Lock, LockClass, Scheduler

_CHUNK = 512


class PfnMap:
    """File index to page number, as a radix tree of two levels.

    A chunk of 2**`shift` pages whose numbers are consecutive is one integer, any other chunk a dict.
    """

    def __init__(self, shift: int) -> None:
        self._chunks: dict[int, int | dict[int, int]] = {}
        self._shift = shift
        self._size = 1 << shift

    def get(self, index: int) -> Pfn | None:
        chunk = self._chunks.get(index >> self._shift)
        if chunk is None:
            return None
        place = index & (self._size - 1)
        if isinstance(chunk, int):
            return Pfn(chunk + place)
        pfn = chunk.get(place)
        return None if pfn is None else Pfn(pfn)

    def set_run(self, index: int, pfns: Range[Pfn]) -> None:
        """Pages from `index` on get the numbers `pfns`; they had none."""
        pfn = int(pfns.start)
        while pfn < pfns.end:
            number, first = divmod(index, self._size)
            count = min(self._size - first, pfns.end - pfn)
            if count == self._size:
                self._chunks[number] = pfn
            else:
                chunk = self._chunks.setdefault(number, {})
                assert isinstance(chunk, dict), "page has a number already"
                for place in range(first, first + count):
                    chunk[place] = pfn + place - first
            index += count
            pfn += count

    def remove(self, pages: PageRange) -> Iterator[Range[Pfn]]:
        """Take the numbers of `pages` out, in runs; pages without one are passed over."""
        first, last = pages.start // self._size, (pages.end - 1) // self._size
        if last - first > len(self._chunks):
            numbers = sorted(number for number in self._chunks if first <= number <= last)
        else:
            numbers = [number for number in range(first, last + 1) if number in self._chunks]
        for number in numbers:
            low = max(0, pages.start - number * self._size)
            high = min(self._size, pages.end - number * self._size)
            yield from self._remove_from(number, low, high)

    def _remove_from(self, number: int, low: int, high: int) -> Iterator[Range[Pfn]]:
        chunk = self._chunks[number]
        if isinstance(chunk, int):
            if high - low == self._size:
                del self._chunks[number]
            else:
                self._chunks[number] = {place: chunk + place for place in range(self._size) if not low <= place < high}
            yield Range(Pfn(chunk + low), Pfn(chunk + high))
            return
        taken = [chunk.pop(place) for place in sorted(place for place in chunk if low <= place < high)]
        if not chunk:
            del self._chunks[number]
        yield from _runs(taken)


class FolioReference:
    """A counted reference to the folio of one page, as get_user_pages takes it. Survives its removal from the file.

    `head` is the first page of the folio, which stays as it is while it is referenced.
    """

    __slots__ = ("_put", "folios", "head", "index", "pfn")

    def __init__(self, folios: Folios, index: PageIndex, head: PageIndex, pfn: Pfn) -> None:
        self.folios = folios
        self._put = False
        self.index = index
        self.head = head
        self.pfn = pfn

    @property
    def head_pfn(self) -> Pfn:
        """The page number that the folio begins at."""
        return Pfn(self.pfn - (self.index - self.head))

    @property
    def hva(self) -> int:
        """Where the page's bytes are now: in the file, or with the pool if it was detached."""
        assert not self._put, "the reference was put"
        detached = self.folios.source.pool.detached.get(self.head_pfn)
        if detached:
            return detached.hva + (self.index - self.head) * PAGE_SIZE
        return self.folios.backing.hva(self.index)

    async def read(self, offset: int, size: int) -> bytes:
        """Bytes of the page."""
        return read_host(self.hva + offset, size)

    async def write(self, offset: int, data: bytes) -> None:
        """Bytes into the page."""
        write_host(self.hva + offset, data)

    def set_dirty(self) -> None:
        """For who wrote through the reference, which no page table saw. Source: set_page_dirty_lock."""
        if self.folios.pfn(self.index) == self.pfn:
            self.folios.set_dirty(self.index)

    def put(self) -> None:
        """Give the reference back; once."""
        assert not self._put, "S14: reference put twice"
        self._put = True
        self.folios.put(self)


class _FolioLock:
    """`async with folios.lock(index):`; the lock exists while somebody holds or wants it."""

    __slots__ = ("_folios", "_index", "_lock")

    def __init__(self, folios: Folios, index: PageIndex) -> None:
        self._folios = folios
        self._index = index

    async def __aenter__(self) -> None:
        self._lock, users = self._folios.locks.get(self._index) or (self._folios.new_lock(self._index), 0)
        self._folios.locks[self._index] = (self._lock, users + 1)
        try:
            await self._lock.__aenter__()
        except BaseException:
            self._leave()
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._lock.__aexit__(kind, error, trace)
        self._leave()

    def _leave(self) -> None:
        lock, users = self._folios.locks[self._index]
        if users == 1:
            del self._folios.locks[self._index]
        else:
            self._folios.locks[self._index] = (lock, users - 1)


class Folios:
    """The pages of one file. An index may be any page of its folio.

    `orders` are those that a folio can have, largest first, 0 last; huge pages are of the first.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        source: FolioSource,
        backing: Backing,
        name: str,
        orders: tuple[int, ...] = (0,),
        split_whole: bool = False,
    ) -> None:
        self.source = source
        self.backing = backing
        self.order = orders[0]
        self.splits = Splits(orders, split_whole)
        self.present = BitMap64()
        self.uptodate = BitMap64()
        self.poisoned = BitMap64()
        self.references: dict[PageIndex, int] = {}  # head of folio -> references besides the file's own
        self.locks: dict[PageIndex, tuple[Lock, int]] = {}
        self.dirty: set[PageIndex] | None = None  # pages that a reclaim must save; None where there is none
        self._pfns = PfnMap(max(self.order, ORDER_2M))
        self._scheduler = scheduler
        self._name = name

    def order_of(self, index: PageIndex) -> int:
        """The order of the folio that `index` belongs to, or would if its huge page were there."""
        return self.splits.order_of(index) if self.order else 0

    def head(self, index: PageIndex) -> PageIndex:
        order = self.order_of(index)
        return PageIndex(index >> order << order)

    def folio(self, index: PageIndex) -> PageRange:
        """The pages of the folio that `index` belongs to."""
        return block(index, self.order_of(index))

    def huge_page(self, index: PageIndex) -> PageRange:
        """The pages that come and go together with `index`: its huge page, whether it is split or not."""
        return block(index, self.order)

    def pfn(self, index: PageIndex) -> Pfn | None:
        return self._pfns.get(index)

    def lock(self, index: PageIndex) -> _FolioLock:
        return _FolioLock(self, self.head(index))

    def new_lock(self, head: PageIndex) -> Lock:
        return Lock(self._scheduler, LockClass.FOLIO_LOCK, f"folio lock {self._name}[{head:#x}]")

    def insert(self, pages: PageRange, pfns: list[Range[Pfn]]) -> None:
        """Put new pages into the file where it has none."""
        assert not self.present.range_cardinality(pages.start, pages.end), "a page is there already"
        index = int(pages.start)
        for run in pfns:
            self._pfns.set_run(index, run)
            index += run.pages
        assert index == pages.end
        self.present.add_range(pages.start, pages.end)

    def absent(self, pages: PageRange) -> Iterator[PageRange]:
        """The stretches of `pages` that the file has no page for."""
        start = int(pages.start)
        while start < pages.end:
            if start in self.present:
                start = (start >> self.order) + 1 << self.order
                step = max(_CHUNK, 1 << self.order)
                while start < pages.end and self.present.contains_range(start, min(start + step, pages.end)):
                    start = min(start + step, pages.end)
                continue
            end = next_member(self.present, start, pages.end)
            yield Range(PageIndex(start), PageIndex(end))
            start = end

    def present_in(self, pages: PageRange) -> Iterator[PageRange]:
        """The stretches of `pages` that the file has pages for."""
        if self.present.contains_range(pages.start, pages.end):
            yield pages
            return
        start = int(pages.start)
        for gap in self.absent(pages):
            if start < gap.start:
                yield Range(PageIndex(start), gap.start)
            start = gap.end
        if start < pages.end:
            yield Range(PageIndex(start), pages.end)

    def never_zeroed(self, pages: PageRange) -> list[PageRange]:
        """The stretches of present `pages` that are not up to date."""
        if not self.uptodate.range_cardinality(pages.start, pages.end):
            return [pages]
        stale = [index for index in range(pages.start, pages.end) if index not in self.uptodate]
        return [Range(PageIndex(run.start), PageIndex(run.end)) for run in _runs(stale)]

    def set_uptodate(self, pages: PageRange) -> None:
        self.uptodate.add_range(pages.start, pages.end)

    def set_dirty(self, index: PageIndex) -> None:
        """The page was written to. Nothing to note in a guest_memfd, whose pages are never reclaimed."""
        if self.dirty is not None:
            self.dirty.add(index)

    def get(self, index: PageIndex) -> FolioReference:
        """Take a reference to a present page."""
        pfn = self._pfns.get(index)
        assert pfn is not None, "reference to a page that is not there"
        head = self.head(index)
        self.references[head] = self.references.get(head, 0) + 1
        return FolioReference(self, index, head, pfn)

    def put(self, reference: FolioReference) -> None:
        """Give one reference back; the page may have left the file since."""
        if reference.head_pfn in self.source.pool.detached:
            self.source.pool.put_detached(reference.head_pfn)
            return
        left = self.references[reference.head] - 1
        if left:
            self.references[reference.head] = left
        else:
            del self.references[reference.head]

    def first_referenced(self, pages: PageRange) -> PageIndex | None:
        """The lowest folio in `pages` that somebody besides the file holds."""
        return min((head for head in self.references if self.folio(head).overlaps(pages)), default=None)

    def is_held(self, pages: PageRange) -> bool:
        """Whether a folio in `pages` must stay as it is: somebody holds it, or its memory is bad."""
        if self.poisoned.range_cardinality(pages.start, pages.end):
            return True
        return bool(self.references) and self.first_referenced(pages) is not None

    def remove(self, pages: PageRange) -> int:
        """Take whole huge pages out of the file and give them back; returns how many pages were detached instead.

        What is split of them is merged, at the last put if somebody holds a part. Huge pages with a poisoned part go to
        nobody: they are retired.
        """
        detached = 0
        for start in sorted({self.huge_page(head).start for head in self.references if pages.contains(head)}):
            detached += self._detach(self.huge_page(start))
        for bad in members(self.poisoned, pages.start, pages.end):
            self._retire(self.huge_page(PageIndex(bad)))
        self.source.optimise(self.splits.cost(self.splits.forget(pages)))
        for pfns in self._pfns.remove(pages):
            self.source.free(pfns)
        for run in list(self.present_in(pages)):
            self.backing.free(run)
        for bitmap in (self.present, self.uptodate, self.poisoned):
            bitmap.remove_range(pages.start, pages.end)
        return detached

    def _detach(self, huge_page: PageRange) -> int:
        """Let the holders keep their folios of a huge page, which stays together until the last of them puts."""
        held = [self.folio(head) for head in self.references if huge_page.contains(head)]
        vmemmap = self.splits.cost(self.splits.forget(huge_page))
        unit = Unit(self._take_out(huge_page), self.source, vmemmap)
        for folio in held:
            content = read_host(self.backing.hva(folio.start), folio.pages * PAGE_SIZE)
            start = Pfn(unit.pfns.start + folio.start - huge_page.start)
            pfns = Range(start, Pfn(start + folio.pages))
            self.source.pool.detached[start] = Detached(pfns, content, self.references.pop(folio.start), unit)
        if self.poisoned.range_cardinality(huge_page.start, huge_page.end):
            self.source.retire(unit.pfns)
        return huge_page.pages

    def _retire(self, huge_page: PageRange) -> None:
        """Bad memory goes to nobody, and what it was split into stays with it."""
        if self._pfns.get(huge_page.start) is not None:
            self.splits.forget(huge_page)
            self.source.retire(self._take_out(huge_page))

    def _take_out(self, huge_page: PageRange) -> Range[Pfn]:
        first = self._pfns.get(huge_page.start)
        assert first is not None, "a huge page that is not there leaves the file"
        removed = sum(pfns.pages for pfns in self._pfns.remove(huge_page))
        assert removed == huge_page.pages, "S14: a part of a huge page was not there"
        return Range(first, Pfn(first + huge_page.pages))

    def check(self) -> None:
        """S12, S14: what is known of pages is known of present pages only, each of which has one page number."""
        assert self.uptodate <= self.present, "S12: an absent page is up to date"
        assert self.poisoned <= self.present, "S19: an absent page is poisoned"
        assert all(head in self.present for head in self.references), "S14: reference to an absent page"
        assert all(self.head(head) == head for head in self.references), "S14: a referenced folio was split or merged"
        assert all(count > 0 for count in self.references.values()), "S14: reference count below one"
        pfns = [pfn for index in self.present if (pfn := self._pfns.get(index)) is not None]
        assert len(pfns) == len(self.present), "S14: a present page without a page number"
        assert len(set(pfns)) == len(pfns), "S10: a page is in the file twice"
        assert all(pfn in self.source.pool.allocated for pfn in pfns), "S10: a page of the file is free"


def _runs(pfns: list[int]) -> Iterator[Range[Pfn]]:
    """Consecutive numbers as ranges."""
    start = 0
    for place in range(1, len(pfns) + 1):
        if place == len(pfns) or pfns[place] != pfns[place - 1] + 1:
            yield Range(Pfn(pfns[start]), Pfn(pfns[place - 1] + 1))
            start = place
