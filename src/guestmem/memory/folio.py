"""Folios of one file: which pages are present, what is known of each, and who holds references.

The kernel has a struct for each page. Here most pages have nothing to say, so what they all have (present, up to date,
poisoned) is kept in bitmaps, their page numbers in runs, and only references and locks, which few have at a time, are
kept one by one. A gigabyte of populated file costs some ten kilobytes, and populating it is a handful of range
operations.

Rules. A page is zeroed at most once in its life in the file, under its folio lock, before `uptodate` is set (S12).
Removing a page that has references detaches it: its holders keep the bytes, the file gets a new page next time.

All folios have the file's `order`; splitting and merging arrive with huge pages.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType

from pyroaring import BitMap64

from guestmem.memory.backing import Backing, read_host
from guestmem.memory.pages import PAGE_SIZE, PageIndex, PageRange, Pfn, Range, block
from guestmem.memory.pool import Detached, Pool
from guestmem.sched import Lock, LockClass, Scheduler

_CHUNK = 512


class PfnMap:
    """File index to page number, as a radix tree of two levels.

    A chunk of 512 pages whose numbers are consecutive is one integer, any other chunk a dict.
    """

    def __init__(self) -> None:
        self._chunks: dict[int, int | dict[int, int]] = {}

    def get(self, index: int) -> Pfn | None:
        chunk = self._chunks.get(index // _CHUNK)
        if chunk is None:
            return None
        if isinstance(chunk, int):
            return Pfn(chunk + index % _CHUNK)
        pfn = chunk.get(index % _CHUNK)
        return None if pfn is None else Pfn(pfn)

    def set_run(self, index: int, pfns: Range[Pfn]) -> None:
        """Pages from `index` on get the numbers `pfns`; they had none."""
        pfn = int(pfns.start)
        while pfn < pfns.end:
            number, first = divmod(index, _CHUNK)
            count = min(_CHUNK - first, pfns.end - pfn)
            if count == _CHUNK:
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
        first, last = pages.start // _CHUNK, (pages.end - 1) // _CHUNK
        if last - first > len(self._chunks):
            numbers = sorted(number for number in self._chunks if first <= number <= last)
        else:
            numbers = [number for number in range(first, last + 1) if number in self._chunks]
        for number in numbers:
            low = max(0, pages.start - number * _CHUNK)
            high = min(_CHUNK, pages.end - number * _CHUNK)
            yield from self._remove_from(number, low, high)

    def _remove_from(self, number: int, low: int, high: int) -> Iterator[Range[Pfn]]:
        chunk = self._chunks[number]
        if isinstance(chunk, int):
            if high - low == _CHUNK:
                del self._chunks[number]
            else:
                self._chunks[number] = {place: chunk + place for place in range(_CHUNK) if not low <= place < high}
            yield Range(Pfn(chunk + low), Pfn(chunk + high))
            return
        taken = [chunk.pop(place) for place in sorted(place for place in chunk if low <= place < high)]
        if not chunk:
            del self._chunks[number]
        yield from _runs(taken)


class FolioReference:
    """A counted reference to one page, as get_user_pages takes it. Survives the page's removal from the file."""

    __slots__ = ("_put", "folios", "index", "pfn")

    def __init__(self, folios: Folios, index: PageIndex, pfn: Pfn) -> None:
        self.folios = folios
        self._put = False
        self.index = index
        self.pfn = pfn

    @property
    def hva(self) -> int:
        """Where the page's bytes are now: in the file, or with the pool if it was detached."""
        assert not self._put, "the reference was put"
        inside = self.index - self.folios.head(self.index)
        detached = self.folios.pool.detached.get(Pfn(self.pfn - inside))
        return detached.hva + inside * PAGE_SIZE if detached else self.folios.backing.hva(self.index)

    def put(self) -> None:
        """Give the reference back; once."""
        assert not self._put, "S14: reference put twice"
        self._put = True
        self.folios.put(self.index, self.pfn)


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
    """The pages of one file. Ranges are whole folios; an index may be any page of its folio."""

    def __init__(self, scheduler: Scheduler, pool: Pool, backing: Backing, order: int, name: str) -> None:
        self.pool = pool
        self.backing = backing
        self.order = order
        self.present = BitMap64()
        self.uptodate = BitMap64()
        self.poisoned = BitMap64()
        self.references: dict[PageIndex, int] = {}  # head of folio -> references besides the file's own
        self.locks: dict[PageIndex, tuple[Lock, int]] = {}
        self._pfns = PfnMap()
        self._scheduler = scheduler
        self._name = name

    def head(self, index: PageIndex) -> PageIndex:
        return PageIndex(index >> self.order << self.order)

    def folio(self, index: PageIndex) -> PageRange:
        """The pages of the folio that `index` belongs to."""
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
                start += 1
                while start < pages.end and self.present.contains_range(start, min(start + _CHUNK, pages.end)):
                    start = min(start + _CHUNK, pages.end)
                continue
            end = min(_next(self.present, start, pages.end), pages.end)
            yield Range(PageIndex(start), PageIndex(end))
            start = end

    def present_in(self, pages: PageRange) -> Iterator[PageRange]:
        """The stretches of `pages` that the file has pages for."""
        start = int(pages.start)
        for gap in self.absent(pages):
            if start < gap.start:
                yield Range(PageIndex(start), gap.start)
            start = gap.end
        if start < pages.end:
            yield Range(PageIndex(start), pages.end)

    def set_uptodate(self, pages: PageRange) -> None:
        self.uptodate.add_range(pages.start, pages.end)

    def get(self, index: PageIndex) -> FolioReference:
        """Take a reference to a present page."""
        pfn = self._pfns.get(index)
        assert pfn is not None, "reference to a page that is not there"
        head = self.head(index)
        self.references[head] = self.references.get(head, 0) + 1
        return FolioReference(self, index, pfn)

    def put(self, index: PageIndex, pfn: Pfn) -> None:
        """Give one reference back; the page may have left the file since."""
        head = self.head(index)
        head_pfn = Pfn(pfn - (index - head))
        if head_pfn in self.pool.detached:
            self.pool.put_detached(head_pfn)
            return
        left = self.references[head] - 1
        if left:
            self.references[head] = left
        else:
            del self.references[head]

    def first_referenced(self, pages: PageRange) -> PageIndex | None:
        """The lowest folio in `pages` that somebody besides the file holds."""
        return min((head for head in self.references if self.folio(head).overlaps(pages)), default=None)

    def remove(self, pages: PageRange) -> int:
        """Take the pages out of the file and give them back; returns how many were detached instead.

        Poisoned pages go to nobody: they are retired.
        """
        detached = 0
        for head in [head for head in self.references if pages.contains(head)]:
            self._detach(head)
            detached += 1 << self.order
        for index in list(_members(self.poisoned, pages)):
            self._retire(index)
        for pfns in self._pfns.remove(pages):
            self.pool.free(pfns)
        for run in list(self.present_in(pages)):
            self.backing.free(run)
        for bitmap in (self.present, self.uptodate, self.poisoned):
            bitmap.remove_range(pages.start, pages.end)
        return detached

    def _detach(self, head: PageIndex) -> None:
        """Let the holders keep the folio."""
        folio = self.folio(head)
        content = read_host(self.backing.hva(head), folio.pages * PAGE_SIZE)
        (pfns,) = _runs([pfn for run in self._pfns.remove(folio) for pfn in range(run.start, run.end)])
        self.pool.detached[pfns.start] = Detached(pfns, content, self.references.pop(head))
        if self.poisoned.range_cardinality(folio.start, folio.end):
            self.pool.retire(pfns.start)

    def _retire(self, index: PageIndex) -> None:
        for pfns in self._pfns.remove(Range(index, PageIndex(index + 1))):
            self.pool.retire(pfns.start)

    def check(self) -> None:
        """S12, S14: what is known of pages is known of present pages only, each of which has one page number."""
        assert self.uptodate <= self.present, "S12: an absent page is up to date"
        assert self.poisoned <= self.present, "S19: an absent page is poisoned"
        assert all(head in self.present for head in self.references), "S14: reference to an absent page"
        assert all(count > 0 for count in self.references.values()), "S14: reference count below one"
        pfns = [pfn for index in self.present if (pfn := self._pfns.get(index)) is not None]
        assert len(pfns) == len(self.present), "S14: a present page without a page number"
        assert len(set(pfns)) == len(pfns), "S10: a page is in the file twice"
        assert all(pfn in self.pool.allocated for pfn in pfns), "S10: a page of the file is free"


def _runs(pfns: list[int]) -> Iterator[Range[Pfn]]:
    """Consecutive numbers as ranges."""
    start = 0
    for place in range(1, len(pfns) + 1):
        if place == len(pfns) or pfns[place] != pfns[place - 1] + 1:
            yield Range(Pfn(pfns[start]), Pfn(pfns[place - 1] + 1))
            start = place


def _next(bitmap: BitMap64, start: int, limit: int) -> int:
    """The first member from `start` on, `limit` if there is none."""
    if not bitmap or start > bitmap.max():
        return limit
    return int(bitmap.next_set_bit(start))


def _members(bitmap: BitMap64, pages: PageRange) -> Iterator[PageIndex]:
    member = _next(bitmap, pages.start, pages.end)
    while member < pages.end:
        yield PageIndex(member)
        member = _next(bitmap, member + 1, pages.end)
