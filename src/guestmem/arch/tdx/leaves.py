"""The leaves of a TD's Secure EPT as KVM changes them: block, track, then remove, demote or promote.

Source: arch/x86/kvm/vmx/tdx.c tdx_sept_remove_private_spte, tdx_track, tdx_sept_split_private_spte;
spec/semantics.md section 14.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from guestmem.arch.architecture import FirmwareError
from guestmem.arch.tdx.dma import TdxDma
from guestmem.arch.tdx.lent_pages import LentPages
from guestmem.arch.tdx.memory_calls import MemoryCalls
from guestmem.arch.tdx.td import LEVEL_2M, LEVEL_ROOT, OpState, Td
from guestmem.arch.tdx.vcpus import TdxVcpus
from guestmem.memory import PAGE_SIZE, Pfn, write_host


class TdLeaves:
    """`gfns` has where each leaf is, by its first page. A leaf is named by its first frame and its level. `vcpus` are
    those that may have cached it."""

    def __init__(self, module: MemoryCalls, lent: LentPages) -> None:
        self.gfns: dict[Pfn, int] = {}
        self.tdr = Pfn(0)
        self.vcpus = TdxVcpus(module, lent)
        self.dma = TdxDma(self, module)
        self._module = module
        self._lent = lent

    @property
    def td(self) -> Td:
        """What the module knows of it, once it exists."""
        return self._module.tds[self.tdr]

    def invalidate(self, gfn: int, pages: int) -> None:
        """TDH.MEM.RANGE.BLOCK, TDH.MEM.TRACK, TDH.MEM.PAGE.REMOVE of each leaf. One that sticks out is demoted first. A
        leaf whose removal fails stays blocked, and its page the TD's; the others go."""
        failed: FirmwareError | None = None
        self._demote_what_sticks_out(gfn, pages)
        for at, level in list(self._leaves(gfn, pages)):
            try:
                self._block(at, level)
                self._page_remove(at, level)
            except FirmwareError as error:
                error.facts.setdefault("gfn", at)
                failed = failed or error
        if failed is not None:
            raise failed

    def split(self, gfn: int, order: int) -> None:
        """TDH.MEM.PAGE.DEMOTE of the blocked and tracked leaf."""
        level = order // 9
        self._block(gfn, level)
        pair = self._lent.pair() if level == LEVEL_2M else None
        page = self._lent.take()
        entry = self._module.tds[self.tdr].sept.get(gfn, level)
        try:
            self._module.mem_page_demote(self.tdr, gfn, level, page, pair)
        except FirmwareError:
            self._lent.give_back(page)
            self._lent.take_back(pair)
            raise
        assert entry is not None
        del self.gfns[entry.pfn]
        for part in range(512):
            step = part << order - 9
            self.gfns[Pfn(entry.pfn + step)] = gfn + step
        self.dma.followers.tell(entry.pfn, 1 << order)

    def merge(self, gfn: int, order: int) -> None:
        """TDH.MEM.PAGE.PROMOTE of the blocked and tracked table."""
        level = order // 9
        parts = self._module.tds[self.tdr].sept.children(gfn, level)
        self._block(gfn, level)
        try:
            page, pair = self._module.mem_page_promote(self.tdr, gfn, level)
        except FirmwareError:
            self._module.mem_range_unblock(self.tdr, gfn, level)
            raise
        self._lent.give_back(page)
        self._lent.take_back(pair)
        for part in parts.values():
            del self.gfns[part.pfn]
        self.gfns[parts[min(parts)].pfn] = gfn

    # Parts

    def _leaves(self, gfn: int, pages: int) -> Iterable[tuple[int, int]]:
        """The leaves over some frames: first frame and level. Looks at the fewer: frames, or what the TD has."""
        td = self._module.tds.get(self.tdr)
        if td is None:
            return
        for level in range(LEVEL_ROOT):
            first, last = gfn >> 9 * level, gfn + pages - 1 >> 9 * level
            entries = td.sept.levels[level]
            few = range(first, last + 1) if last - first < len(entries) else sorted(entries)
            for index in few:
                entry = entries.get(index)
                if entry is not None and first <= index <= last and entry.state.leaf:
                    yield index << 9 * level, level

    def _demote_what_sticks_out(self, gfn: int, pages: int) -> None:
        for at, level in list(self._leaves(gfn, pages)):
            if level and not gfn <= at <= at + (1 << 9 * level) <= gfn + pages:
                self.split(at, 9 * level)

    def _block(self, gfn: int, level: int) -> None:
        """Block and track an entry, if vCPUs may run."""
        self._range_block(gfn, level)
        self._track()

    def _range_block(self, gfn: int, level: int) -> None:
        entry = self.td.sept.get(gfn, level)
        if self.td.op_state is OpState.RUNNABLE and (entry is None or not entry.state.blocked):
            self._module.mem_range_block(self.tdr, gfn, level)

    def _track(self) -> None:
        if self.td.op_state is OpState.RUNNABLE:
            self.vcpus.track(self.tdr)

    def _unblock(self, leaves: Iterable[tuple[int, int]]) -> None:
        """The entries are as they were before they were blocked. One that cannot be is when the guest next needs it."""
        blocked = [leaf for leaf in leaves if (entry := self.td.sept.get(*leaf)) is not None and entry.state.blocked]
        with suppress(FirmwareError):
            self._track() if blocked else None
            for gfn, level in blocked:
                self._module.mem_range_unblock(self.tdr, gfn, level)

    def _page_remove(self, gfn: int, level: int) -> None:
        entry = self.td.sept.get(gfn, level)
        assert entry is not None
        self._module.mem_page_remove(self.tdr, gfn, level)
        write_host(entry.hva, bytes(PAGE_SIZE << 9 * level))  # tdx_quirk_reset_page: written whole, with key 0
        del self.gfns[entry.pfn]
        self._lent.uncover(entry.pfn)
        self.dma.followers.tell(entry.pfn, 1 << 9 * level)
