"""DMA under pKVM's hypervisor, which has the IOMMU's tables: they follow the states of pages.

Source: spec/semantics.md section 16. From memory: "KVM: Arm SMMUv3 driver for pKVM", where a page that the host gives
away leaves the table of its devices.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from guestmem.arch.dma import Block, Followers
from guestmem.arch.pkvm.hypervisor import PageState
from guestmem.memory import Pfn
from guestmem.trace import Refusal

if TYPE_CHECKING:
    from guestmem.arch.pkvm.platform import PkvmPlatform


class PkvmDma:
    """Of the protected VM with a handle."""

    def __init__(self, handle: int, platform: PkvmPlatform) -> None:
        self.followers = Followers()
        self._handle = handle
        self._platform = platform

    def fits(self, block: Block) -> bool:
        return all(self._has(Pfn(pfn)) for pfn in range(block.pfn, block.pfn + block.pages))

    def cut(self, pfn: Pfn, pages: int) -> None:
        """States are of single pages."""

    def check(self, block: Block, pfn: Pfn, *, trusted: bool, write: bool) -> bool:
        """What the table does not have is a fault."""
        if self._has(pfn) if trusted else self._platform.hypervisor.host.get(pfn) is not PageState.NOPAGE:
            return True
        raise Refusal(errno.EFAULT, "dma.hypervisor", architecture="pKVM", pfn=pfn)

    def _has(self, pfn: Pfn) -> bool:
        owner = self._platform.owner(pfn)
        return owner is not None and owner.number == self._handle
