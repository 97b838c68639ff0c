"""Leaves of an IO page table, and the cache of them that a device's accesses go through."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol, TypeAlias

from guestmem.arch import Block, DmaRules
from guestmem.iommu.addresses import IoPage
from guestmem.memory import PAGE_SHIFT, Inode, PageIndex, Pfn, Range, read_host, write_host
from guestmem.memory.pages import ORDER_4K


class PinnedPage(Protocol):
    """A page of a host address space or of a file that stays where it is until it is put."""

    async def read(self, offset: int, size: int) -> bytes:
        """Bytes of it. Raises: Refusal EFAULT `user.page`, where it cannot be touched any more."""
        ...

    async def write(self, offset: int, data: bytes) -> None:
        """Raises: as `read`."""
        ...

    def put(self) -> None: ...


class GmemLeaf(NamedTuple):
    """2**order pages from `page` on are the pages of a guest_memfd from `first` on. It holds none of them.

    `hva` is the server's address of the first byte. `rules` are what the hardware looks at besides, None where the
    memory's virtual machine has no ownership tables.
    """

    page: IoPage
    order: int
    pfn: Pfn
    hva: int
    readable: bool
    writable: bool
    inode: Inode
    first: PageIndex
    rules: DmaRules | None = None

    @property
    def block(self) -> Block:
        return Block(self.pfn, self.order, self.hva)

    @property
    def end(self) -> IoPage:
        return IoPage(self.page + (1 << self.order))

    def __fingerprint__(self) -> tuple[object, ...]:
        """Without addresses: where the host put the file is not state."""
        return self.page, self.order, self.pfn, self.readable, self.writable, self.inode.number, self.first

    def hva_at(self, page: IoPage) -> int:
        return self.hva + ((page - self.page) << PAGE_SHIFT)

    def place_at(self, page: IoPage) -> int:
        """The same for two leaves that show the same memory at `page`."""
        return self.hva_at(page)

    async def read(self, page: IoPage, offset: int, size: int) -> bytes:
        return read_host(self.hva_at(page) + offset, size)

    async def write(self, page: IoPage, offset: int, data: bytes) -> None:
        write_host(self.hva_at(page) + offset, data)

    def part(self, page: IoPage, order: int) -> GmemLeaf:
        """The leaf over a block inside this one."""
        inside = page - self.page
        return self._replace(
            page=page,
            order=order,
            pfn=Pfn(self.pfn + inside),
            hva=self.hva_at(page),
            first=PageIndex(self.first + inside),
        )


class PinnedLeaf(NamedTuple):
    """One page that the IOMMU holds a long-term pin on. Where it is may change while it is pinned: a hole detaches
    it."""

    page: IoPage
    pinned: PinnedPage
    readable: bool
    writable: bool
    rules: None = None  # nobody's private page is pinned

    @property
    def order(self) -> int:
        return ORDER_4K

    def place_at(self, page: IoPage) -> int:
        return id(self.pinned)

    async def read(self, page: IoPage, offset: int, size: int) -> bytes:
        return await self.pinned.read(offset, size)

    async def write(self, page: IoPage, offset: int, data: bytes) -> None:
        await self.pinned.write(offset, data)


IoLeaf: TypeAlias = GmemLeaf | PinnedLeaf


class Iotlb:
    """Translations that the hardware has cached. Nothing leaves it but by `flush`, or when it is full, the oldest.

    Changing the page table does not change what is cached: that is what makes a forgotten flush a bug.
    """

    capacity = 256
    """Entries of each order."""

    def __init__(self) -> None:
        self.entries: dict[int, dict[int, IoLeaf]] = {}  # order -> page >> order -> leaf

    def lookup(self, page: IoPage) -> IoLeaf | None:
        for order, leaves in self.entries.items():
            leaf = leaves.get(page >> order)
            if leaf is not None:
                return leaf
        return None

    def insert(self, leaf: IoLeaf) -> None:
        leaves = self.entries.setdefault(leaf.order, {})
        if len(leaves) >= self.capacity:
            del leaves[next(iter(leaves))]
        leaves[leaf.page >> leaf.order] = leaf

    def leaves(self) -> Iterator[IoLeaf]:
        """All that is cached."""
        for leaves in self.entries.values():
            yield from leaves.values()

    def flush(self, pages: Range[IoPage]) -> None:
        """Forget every translation of any of `pages`."""
        for order, leaves in self.entries.items():
            first, last = pages.start >> order, (pages.end - 1) >> order
            for block in [block for block in leaves if first <= block <= last]:
                del leaves[block]
