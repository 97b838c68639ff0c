"""DMA on a machine with TDX. A trusted device goes through the Secure EPT itself (TDX Connect). To any other a TD's
page is memory of another key: a read is of zeros; a write poisons the line, and who reads it next stops the machine.

Source: Documentation/arch/x86/tdx.rst, "Erratum": devices poison by DMA; spec/seed.md Q9. From memory: that a device
reads zeros.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from guestmem.arch.dma import Block, Followers
from guestmem.arch.tdx.pamt import PageType
from guestmem.arch.tdx.td import Sept
from guestmem.memory import Pfn
from guestmem.trace import EHWPOISON, Refusal

if TYPE_CHECKING:
    from guestmem.arch.tdx.leaves import TdLeaves
    from guestmem.arch.tdx.memory_calls import MemoryCalls


class TdxDma:
    """Of one TD."""

    def __init__(self, guest: TdLeaves, module: MemoryCalls) -> None:
        self.followers = Followers()
        self._guest = guest
        self._module = module

    def fits(self, block: Block) -> bool:
        """A leaf of the Secure EPT is the only one there is."""
        return self._entry(block.pfn) == (block.pfn, block.order)

    def cut(self, pfn: Pfn, pages: int) -> None:
        """TDH.MEM.PAGE.DEMOTE, down to leaves that lie inside."""
        for end in (pfn, Pfn(pfn + pages - 1)):
            while (found := self._entry(end)) is not None:
                start, order = found
                if pfn <= start <= start + (1 << order) <= pfn + pages:
                    break
                self._guest.split(self._guest.gfns[start], order)

    def check(self, block: Block, pfn: Pfn, *, trusted: bool, write: bool) -> bool:
        if trusted:
            if not self._mapped(pfn):
                raise Refusal(errno.EFAULT, "dma.sept", architecture="TDX", pfn=pfn)
            return True
        if self._module.pamt.find(pfn) is None:
            return True
        if not write:
            return False
        self._module.host_write(pfn)
        raise Refusal(EHWPOISON, "dma.machine_check", architecture="TDX", pfn=pfn)

    def _entry(self, pfn: Pfn) -> tuple[Pfn, int] | None:
        """First page and order of the TD's entry over a page."""
        found = self._module.pamt.find(pfn)
        if found is None or found[1].type is not PageType.REG or found[1].owner != self._guest.tdr:
            return None
        return found[0], found[1].order

    def _mapped(self, pfn: Pfn) -> bool:
        """Whether the TD has accepted the page, and nobody has blocked it."""
        found = self._entry(pfn)
        leaf = self._guest.td.sept.leaf(self._guest.gfns[found[0]]) if found is not None else None
        return leaf is not None and leaf[1].state is Sept.MAPPED
