"""Areas of an IO address space: stretches of IOVA, and what they show. Two kinds, for the two designs:

- a `GmemArea` names pages of a guest_memfd and holds none of them: the provider says when they must go;
- a `PinnedArea` holds long-term pins on host memory or pages of a file, as iommufd does today: nobody can take them
away,
  and a conversion of a pinned page is refused for as long as the area lasts.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, TypeAlias

from guestmem.iommu.addresses import IoPage
from guestmem.iommu.leaves import PinnedPage
from guestmem.memory import Inode, PageIndex, PageRange, Range
from guestmem.memory.pages import block

if TYPE_CHECKING:
    from guestmem.iommu.context import IommuGmemContext

PinOne: TypeAlias = Callable[[int, bool], Awaitable[PinnedPage]]
"""Pins the n-th page of some memory, for writing or not. Raises: Refusal."""


class GmemArea:
    """`pages` show `context`'s inode from its page `first` on. `follow`: filled by page requests alone, so that pages
    of either access may lie in it. A `revoked` area maps nothing any more."""

    def __init__(
        self,
        pages: Range[IoPage],
        context: IommuGmemContext,
        first: PageIndex,
        readable: bool,
        writable: bool,
        follow: bool,
    ) -> None:
        self.pages = pages
        self.context = context
        self.first = first
        self.readable = readable
        self.writable = writable
        self.follow = follow
        self.revoked = False

    @property
    def inode(self) -> Inode:
        return self.context.inode

    def index_of(self, page: IoPage) -> PageIndex:
        return PageIndex(self.first + page - self.pages.start)

    @property
    def indices(self) -> PageRange:
        return Range(self.first, PageIndex(self.first + self.pages.pages))

    def io_pages_of(self, pages: PageRange) -> Range[IoPage] | None:
        """Where the area shows any of `pages` of its inode; None if nowhere."""
        shift = self.pages.start - self.first
        return self.pages.intersection(Range(IoPage(pages.start + shift), IoPage(pages.end + shift)))

    def leaf_order(self, page: IoPage, orders: Iterable[int]) -> int:
        """The first of `orders` whose block lies in the area, with IOVA and file page congruent (S13); 0 if none."""
        for order in orders:
            congruent = not (self.pages.start - self.first) & ((1 << order) - 1)
            if congruent and self.pages.covers(block(page, order)):
                return order
        return 0

    def cut(self, pages: Range[IoPage]) -> GmemArea:
        """The part of the area over `pages`, as one of its own."""
        part = GmemArea(pages, self.context, self.index_of(pages.start), self.readable, self.writable, self.follow)
        part.revoked = self.revoked
        return part


class PinnedPages:
    """Memory that areas show slices of, each page pinned once however many do. Source: struct iopt_pages."""

    def __init__(self, pin_one: PinOne, pages: int, writable: bool) -> None:
        self.held: dict[int, PinnedPage] = {}
        self.users: dict[int, int] = {}  # page -> areas that have it pinned
        self.pages = pages
        self.writable = writable
        self._pin_one = pin_one

    async def pin(self, pages: range) -> None:
        """Hold `pages`, all or none. Raises: Refusal EFAULT `user.page`."""
        done = pages[:0]
        try:
            for done_to, page in enumerate(pages, 1):
                if page not in self.held:
                    pinned = await self._pin_one(page, self.writable)
                    if page in self.held:  # somebody else did, while we waited
                        pinned.put()
                    else:
                        self.held[page] = pinned
                self.users[page] = self.users.get(page, 0) + 1
                done = pages[:done_to]
        except OSError:
            self.unpin(done)
            raise

    def unpin(self, pages: range) -> None:
        """One user less of each; pages without users are put."""
        for page in pages:
            self.users[page] -= 1
            if not self.users[page]:
                del self.users[page]
                self.held.pop(page).put()


class PinnedArea:
    """`pages` show `source` from its page `first` on. `pinned` while a domain maps it."""

    def __init__(self, pages: Range[IoPage], source: PinnedPages, first: int, readable: bool, writable: bool) -> None:
        self.pages = pages
        self.source = source
        self.first = first
        self.readable = readable
        self.writable = writable
        self.pinned = False

    @property
    def slice(self) -> range:
        return range(self.first, self.first + self.pages.pages)

    def pinned_at(self, page: IoPage) -> PinnedPage:
        return self.source.held[self.first + page - self.pages.start]

    async def pin(self) -> None:
        """Idempotent. Raises: Refusal."""
        if not self.pinned:
            await self.source.pin(self.slice)
            self.pinned = True

    def unpin(self) -> None:
        """Idempotent."""
        if self.pinned:
            self.pinned = False
            self.source.unpin(self.slice)


Area: TypeAlias = GmemArea | PinnedArea
