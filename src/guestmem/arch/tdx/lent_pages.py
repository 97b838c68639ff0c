"""Pages that the host lends to the TDX module for its own tables, and dynamic PAMT pairs beside every 2M in use.

They come from memory that no guest_memfd has, numbered from 2**40 up, so that a run with TDX allocates a guest's pages
exactly as one without; the last one given back is the next one taken.

Source: arch/x86/virt/vmx/tdx/tdx.c tdx_pamt_get, tdx_pamt_put (dynamic PAMT v2).
"""

from __future__ import annotations

from collections.abc import Callable

from guestmem.arch.architecture import FirmwareError
from guestmem.arch.tdx.memory_calls import MemoryCalls
from guestmem.memory import ORDER_2M, Pfn

_FIRST = 1 << 40


class LentPages:
    """What is with the module; `count` is how many pages."""

    def __init__(self, module: MemoryCalls) -> None:
        self._module = module
        self._next = _FIRST
        self._free: list[Pfn] = []

    @property
    def count(self) -> int:
        return self._next - _FIRST - len(self._free)

    def take(self) -> Pfn:
        """A page for a control structure or an S-EPT table, with the PAMT entry that it needs."""
        pfn = self._take()
        self.cover(pfn)
        return pfn

    def lend(self, call: Callable[[Pfn], object]) -> None:
        """A page for `call`; it comes back if the module refuses it."""
        page = self.take()
        try:
            call(page)
        except FirmwareError:
            if self._module.pamt.find(page) is None:
                self.give_back(page)
            raise

    def give_back(self, pfn: Pfn) -> None:
        """A page that the module has given back."""
        self._free.append(pfn)
        self.uncover(pfn)

    def cover(self, pfn: Pfn) -> None:
        """Have 4K entries for a page that the module is about to get."""
        pamt = self._module.pamt
        region = pfn >> ORDER_2M
        if pamt.dynamic and region not in pamt.pairs:
            pair = (self._take(), self._take())
            pamt.add_pair("TDH.PHYMEM.PAMT.ADD", Pfn(region << ORDER_2M), pair)

    def uncover(self, pfn: Pfn) -> None:
        """Have no 4K entries where the module has no page left."""
        pamt = self._module.pamt
        region = pfn >> ORDER_2M
        if region in pamt.pairs and not pamt.used(region):
            self.take_back(pamt.remove_pair("TDH.PHYMEM.PAMT.REMOVE", Pfn(region << ORDER_2M)))

    def pair(self) -> tuple[Pfn, Pfn] | None:
        """A pair for TDH.MEM.PAGE.DEMOTE; None with static PAMT."""
        return (self._take(), self._take()) if self._module.pamt.dynamic else None

    def take_back(self, pair: tuple[Pfn, Pfn] | None) -> None:
        self._free.extend(pair or ())

    def _take(self) -> Pfn:
        if self._free:
            return self._free.pop()
        self._next += 1
        return Pfn(self._next - 1)
