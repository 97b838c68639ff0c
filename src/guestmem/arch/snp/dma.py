"""DMA on a machine with SNP: the IOMMU looks into the RMP at the end of each walk.

An RMPUPDATE flushes the IOTLB, so looking at every access is the same as looking at every walk.

Source: Alexey Kardashevskiy, 28 January 2026 (linux-iommu): the end of a walk is rounded down to the nearest size that
RMP entries have, and the entry must be of that size; no other is tried. Ashish Kalra, AMDESE/AMDSEV issue 109: all DMA
of untrusted devices, to and from, is checked to be with shared memory; 20 January 2023: large leaves over mixed pages
fault. spec/semantics.md section 11.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from guestmem.arch.dma import Block, Followers
from guestmem.arch.snp.rmp import Rmp
from guestmem.memory import Pfn
from guestmem.trace import Refusal


class SnpDma:
    """Of the guest with an ASID. `smash` is its PSMASH, which raises FirmwareError."""

    def __init__(self, rmp: Rmp, asid: int, smash: Callable[[Pfn], None]) -> None:
        self.followers = Followers()
        self._rmp = rmp
        self._asid = asid
        self._smash = smash

    def fits(self, block: Block) -> bool:
        """Large entries under a leaf that is as large or larger, small ones under a smaller."""
        large = self._wants_large(block)
        step = 1 << self._rmp.large_order if large else 1
        return all(self._has(Pfn(pfn), large) for pfn in range(block.pfn, block.pfn + block.pages, step))

    def cut(self, pfn: Pfn, pages: int) -> None:
        """PSMASH of the entries at either end."""
        size = 1 << self._rmp.large_order
        for end in (pfn, Pfn(pfn + pages - 1)):
            found = self._rmp.lookup(end)
            if found is None or found[1].asid != self._asid or not found[1].large:
                continue
            if not pfn <= found[0] <= found[0] + size <= pfn + pages:
                self._smash(found[0])

    def check(self, block: Block, pfn: Pfn, *, trusted: bool, write: bool) -> bool:
        """A shared leaf shows pages of the host only; a private one pages that are the guest's, validated, and in an
        entry of the leaf's size. Anything else is a fault of the IOMMU, for reads as for writes."""
        if trusted:
            found = self._rmp.lookup(pfn)
            if found is not None and self._has(pfn, self._wants_large(block)) and found[1].validated:
                return True
        elif all(self._rmp.lookup(Pfn(each)) is None for each in range(block.pfn, block.pfn + block.pages)):
            return True
        raise Refusal(errno.EFAULT, "dma.rmp", architecture="snp", pfn=pfn, order=block.order)

    def _wants_large(self, block: Block) -> bool:
        return bool(self._rmp.large_order) and block.order >= self._rmp.large_order

    def _has(self, pfn: Pfn, large: bool) -> bool:
        found = self._rmp.lookup(pfn)
        return found is not None and found[1].asid == self._asid and found[1].large is large and not found[1].immutable
