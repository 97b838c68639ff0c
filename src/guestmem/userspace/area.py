"""Area: a stretch of an address space that shows a source of pages (vm_area_struct), and what a source must do."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from guestmem.memory import FolioReference, Folios, PageIndex, PageRange, Pfn, Range
from guestmem.userspace.addresses import Vpn

if TYPE_CHECKING:
    from guestmem.userspace.address_space import AddressSpace


class Pte(NamedTuple):
    """A page-table entry: which page of which file, where its bytes are for the server, whether it may be written."""

    pfn: Pfn
    hva: int
    window: tuple[int, int]
    writable: bool
    folios: Folios
    page_index: PageIndex

    @property
    def order(self) -> int:
        """One page: its neighbours may be anywhere."""
        return 0

    def __fingerprint__(self) -> tuple[int, int, bool]:
        """Without addresses: where the host put the file is not state."""
        return self.pfn, self.page_index, self.writable

    def get_reference(self) -> FolioReference:
        """A counted reference to the page, as GUP takes it from an entry it has found present."""
        return self.folios.get(self.page_index)


class PageSource(Protocol):
    """What an area shows: a guest_memfd file, or anonymous memory."""

    def attach(self, area: Area) -> None:
        """A new area shows this source; it holds the source open."""
        ...

    def detach(self, area: Area) -> None:
        """The area, whose entries are gone, stops showing this source. Called with mmap_lock held."""
        ...

    async def put(self) -> None:
        """Give back what `attach` took; after mmap_lock was released, since a last put takes outer locks."""
        ...

    async def fault(self, area: Area, vpn: Vpn, write: bool) -> None:
        """Install the page of `vpn` into the area's page table. Raises: SigBus. Called with mmap_lock held shared."""
        ...

    async def discard(self, area: Area, pages: PageRange) -> None:
        """madvise(MADV_DONTNEED), after the entries are gone."""
        ...

    async def remove(self, pages: PageRange) -> None:
        """madvise(MADV_REMOVE): free the pages behind the area."""
        ...

    async def reclaim(self, area: Area, vpn: Vpn) -> bool:
        """Free the page of `vpn`, so that it comes back as it was; whether that could be done."""
        ...

    def copy_for_fork(self, area: Area) -> PageSource:
        """What the child's area shows."""
        ...


class Area:
    """The pages `vpns` of `mm` show `source` from its page `first` on."""

    __slots__ = ("first", "mm", "source", "vpns", "writable")

    def __init__(
        self, mm: AddressSpace, vpns: Range[Vpn], source: PageSource, first: PageIndex, writable: bool
    ) -> None:
        self.mm = mm
        self.vpns = vpns
        self.source = source
        self.first = first
        self.writable = writable

    def index_of(self, vpn: Vpn) -> PageIndex:
        return PageIndex(self.first + vpn - self.vpns.start)

    def indices_of(self, vpns: Range[Vpn]) -> PageRange:
        return Range(self.index_of(vpns.start), PageIndex(self.first + vpns.end - self.vpns.start))

    def vpns_of(self, pages: PageRange) -> Range[Vpn] | None:
        """Where the area shows any of `pages`; None if nowhere."""
        shift = self.vpns.start - self.first
        return self.vpns.intersection(Range(Vpn(pages.start + shift), Vpn(pages.end + shift)))
