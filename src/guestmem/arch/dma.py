"""What the IOMMU asks of the hardware and firmware that protect a guest's memory: `GuestArchitecture.dma`.

A device does DMA of one of two kinds: trusted (T=1), with the identity of the guest that has accepted it, or anybody's
(T=0). The hardware lets the first reach its guest's private pages, the second pages of the host.

An entry of the ownership tables that is split or taken away must not be under a larger or a stale leaf for one step
(seed.md Q13: in all tables or none). KVM makes such changes for its own reasons and does not know an IOMMU, so the
architecture passes them on, to whoever *follows*. In a kernel it would be a call under the lock of the change itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias

from guestmem.memory import Pfn


class Block(NamedTuple):
    """2**order pages of host memory, naturally aligned: number of the first, server's address of its first byte."""

    pfn: Pfn
    order: int
    hva: int

    @property
    def pages(self) -> int:
        return 1 << self.order


Follow: TypeAlias = Callable[[Pfn, int], None]
"""Called with the first page and the number of pages whose entry is another one now. It cannot fail."""


class Followers:
    """Those who keep leaves of their own over one guest's pages."""

    def __init__(self) -> None:
        self._calls: list[Follow] = []

    def __fingerprint__(self) -> None:
        """Who follows is said by who maps the guest's pages."""

    def add(self, follow: Follow) -> None:
        self._calls.append(follow)

    def remove(self, follow: Follow) -> None:
        self._calls.remove(follow)

    def tell(self, pfn: Pfn, pages: int) -> None:
        """The entry over these pages was split, or is gone."""
        for follow in self._calls:
            follow(pfn, pages)


class DmaRules(Protocol):
    """Of one virtual machine. `followers` are told of each entry that is split or taken away, in the same step."""

    followers: Followers

    def fits(self, block: Block) -> bool:
        """Whether a leaf of a trusted device's page table may show the block: all of it is this guest's, by entries of
        the size that the hardware wants under such a leaf (Q13)."""
        ...

    def cut(self, pfn: Pfn, pages: int) -> None:
        """Split this guest's entries that stick out of a range of pages. Raises: FirmwareError, and that one is
        whole."""
        ...

    def check(self, block: Block, pfn: Pfn, *, trusted: bool, write: bool) -> bool:
        """A device reaches a page through an IOMMU leaf over `block`: this guest's own, if `trusted`, else anybody's.
        Whether the access moves the bytes of the page; if not, it reads zeros.

        Raises: Refusal `dma.*`, what the machine does in place of the access.
        """
        ...
