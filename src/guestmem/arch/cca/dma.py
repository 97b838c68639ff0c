"""DMA on a machine with CCA: the SMMU checks the granule protection table as CPUs do.

Source: spec/semantics.md section 11; Arm ARM, granule protection checks: they follow the translation, by granule.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from guestmem.arch.cca.realm import GranuleState
from guestmem.arch.dma import Block, Followers
from guestmem.memory import Pfn
from guestmem.trace import Refusal

if TYPE_CHECKING:
    from guestmem.arch.cca.platform import CcaGuest, CcaPlatform


class CcaDma:
    """Of one realm."""

    def __init__(self, guest: CcaGuest, platform: CcaPlatform) -> None:
        self.followers = Followers()
        self._guest = guest
        self._platform = platform

    def fits(self, block: Block) -> bool:
        return all(self._has(Pfn(pfn)) for pfn in range(block.pfn, block.pfn + block.pages))

    def cut(self, pfn: Pfn, pages: int) -> None:
        """The table is of granules."""

    def check(self, block: Block, pfn: Pfn, *, trusted: bool, write: bool) -> bool:
        """A granule of the other world is a granule protection fault."""
        delegated = self._platform.monitor.state(pfn) is not GranuleState.UNDELEGATED
        if self._has(pfn) if trusted else not delegated:
            return True
        raise Refusal(errno.EFAULT, "dma.gpt", architecture="CCA", pfn=pfn)

    def _has(self, pfn: Pfn) -> bool:
        found = self._platform.data.get(pfn)
        return found is not None and found[0] is self._guest and self._platform.monitor.state(pfn) is GranuleState.DATA
