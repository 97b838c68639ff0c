"""Calls for a TD's memory: the Secure EPT, pages in and out of it, and what the guest and the machine do with them.

A page may leave only when no vCPU can hold a translation of it any more: RANGE.BLOCK notes the TD's epoch with the
page, MEM.TRACK begins the next epoch, and when no vCPU is inside that entered in the old one, the page is tracked.
Before the TD is finalized nothing runs, and neither is asked for.

Source: TDX module ABI specification; intel/tdx-module tdh_mem_*.c, tdh_mr_*.c, tdg_mem_page_accept.c; which call is
allowed in which state of the TD: include/auto_gen_2_0/op_state_lookup.c.
"""

from __future__ import annotations

from guestmem.arch.tdx.manage import ManagementCalls
from guestmem.arch.tdx.pamt import PageType, PamtEntry
from guestmem.arch.tdx.status import Operand, Status, TdxError
from guestmem.arch.tdx.td import (
    BLOCKED_FROM,
    LEVEL_1G,
    LEVEL_2M,
    LEVEL_4K,
    LEVEL_ROOT,
    UNBLOCKED,
    OpState,
    Sept,
    SeptEntry,
    Td,
)
from guestmem.memory import PAGE_SHIFT, PAGE_SIZE, Pfn, read_host, write_host

_CHUNK = 256
_BUILT = (OpState.INITIALIZED, OpState.RUNNABLE)


class MachineCheck(Exception):
    """What the CPU does when a TD reads a line that was written with another key; the TD does not run again."""


class MemoryCalls(ManagementCalls):
    """Frames are `gfn`, sizes are levels: 0 is 4K, 1 is 2M, 2 is 1G."""

    # The Secure EPT

    def mem_sept_add(self, tdr: Pfn, gfn: int, level: int, sept_page: Pfn) -> None:
        """TDH.MEM.SEPT.ADD: a page becomes the table under the entry of `level` over `gfn`."""
        call = "TDH.MEM.SEPT.ADD"
        td = self._memory(call, tdr, gfn, level, LEVEL_2M, LEVEL_ROOT, *_BUILT)
        entry = td.sept.get(gfn, level)
        if entry is not None:
            raise self._wrong_state(call, entry, level)
        self.pamt.check_free(call, sept_page, 0, Operand.R8)
        self._give(td, sept_page, PageType.EPT)
        td.sept.set(gfn, level, SeptEntry(Sept.NL_MAPPED, sept_page))

    def mem_sept_remove(self, tdr: Pfn, gfn: int, level: int) -> Pfn:
        """TDH.MEM.SEPT.REMOVE: a table without entries is the host's page again."""
        call = "TDH.MEM.SEPT.REMOVE"
        td = self._memory(call, tdr, gfn, level, LEVEL_2M, LEVEL_ROOT, *_BUILT)
        entry = td.sept.get(gfn, level)
        if entry is None or entry.state.leaf:
            raise self._wrong_state(call, entry, level)
        self._check_tracked(call, td, entry, entry.pfn)
        if td.sept.children(gfn, level):
            raise TdxError(call, Status.EPT_PAGE_NOT_FREE, Operand.RCX, gfn=gfn)
        td.sept.set(gfn, level, None)
        self._take(td, entry.pfn)
        return entry.pfn

    # Pages in

    def mem_page_add(self, tdr: Pfn, gfn: int, page: Pfn, hva: int, source: bytes | None) -> None:
        """TDH.MEM.PAGE.ADD: a page with the bytes of `source`, or with its own, and a record that it was added."""
        call = "TDH.MEM.PAGE.ADD"
        td = self._memory(call, tdr, gfn, LEVEL_4K, LEVEL_4K, LEVEL_4K, OpState.INITIALIZED)
        entry = td.sept.get(gfn, LEVEL_4K)
        if entry is not None:
            raise self._wrong_state(call, entry, LEVEL_4K)
        self.pamt.check_free(call, page, 0, Operand.R8)
        if source is not None:
            write_host(hva, source)
        self._give(td, page, PageType.REG)
        td.sept.set(gfn, LEVEL_4K, SeptEntry(Sept.MAPPED, page, hva))
        td.measurement.update(_record(b"MEM.PAGE.ADD", gfn << PAGE_SHIFT))
        td.extended[gfn] = 0

    def mem_page_aug(self, tdr: Pfn, gfn: int, level: int, page: Pfn, hva: int) -> None:
        """TDH.MEM.PAGE.AUG: a page or 2M that the guest has to accept."""
        call = "TDH.MEM.PAGE.AUG"
        td = self._memory(call, tdr, gfn, level, LEVEL_4K, LEVEL_2M, *_BUILT)
        entry = td.sept.get(gfn, level)
        if entry is not None:
            raise self._wrong_state(call, entry, level)
        self.pamt.check_free(call, page, 9 * level, Operand.R8)
        self._give(td, page, PageType.REG, 9 * level)
        td.sept.set(gfn, level, SeptEntry(Sept.PENDING, page, hva))

    def page_accept(self, tdr: Pfn, gfn: int, level: int) -> None:
        """TDG.MEM.PAGE.ACCEPT, by the guest: the page is zeroed and mapped."""
        call = "TDG.MEM.PAGE.ACCEPT"
        td = self.tds[tdr]
        if level not in (LEVEL_4K, LEVEL_2M) or gfn % (1 << 9 * level):
            raise TdxError(call, Status.OPERAND_INVALID, Operand.RCX, gfn=gfn, level=level)
        entry = td.sept.get(gfn, level)
        if entry is None or not entry.state.leaf:
            found = td.sept.leaf(gfn) if entry is None else None
            if entry is not None or (found is not None and found[0] != level):
                ended = level if found is None else found[0]
                raise TdxError(call, Status.PAGE_SIZE_MISMATCH, detail=ended, gfn=gfn, level=level)
            raise self._wrong_state(call, entry, level)  # on the machine an EPT violation: KVM is to AUG the page
        if entry.state is Sept.MAPPED:
            raise TdxError(call, Status.PAGE_ALREADY_ACCEPTED, detail=level, gfn=gfn)
        if entry.state is not Sept.PENDING:
            raise self._wrong_state(call, entry, level)
        write_host(entry.hva, bytes(PAGE_SIZE << 9 * level))
        td.sept.set(gfn, level, entry._replace(state=Sept.MAPPED))

    # Pages out

    def mem_range_block(self, tdr: Pfn, gfn: int, level: int) -> None:
        """TDH.MEM.RANGE.BLOCK: no new translation of what the entry maps."""
        call = "TDH.MEM.RANGE.BLOCK"
        td = self._memory(call, tdr, gfn, level, LEVEL_4K, LEVEL_ROOT, *_BUILT)
        entry = td.sept.get(gfn, level)
        if entry is None or entry.state.blocked:
            if entry is not None:
                raise TdxError(call, Status.GPA_RANGE_ALREADY_BLOCKED, Operand.RCX, gfn=gfn)
            raise self._wrong_state(call, entry, level)
        td.sept.set(gfn, level, entry._replace(state=BLOCKED_FROM[entry.state]))
        self.pamt.entries[entry.pfn].bepoch = td.epoch

    def mem_range_unblock(self, tdr: Pfn, gfn: int, level: int) -> None:
        """TDH.MEM.RANGE.UNBLOCK: as it was before."""
        call = "TDH.MEM.RANGE.UNBLOCK"
        td = self._memory(call, tdr, gfn, level, LEVEL_4K, LEVEL_ROOT, *_BUILT)
        entry = td.sept.get(gfn, level)
        if entry is None or not entry.state.blocked:
            raise self._wrong_state(call, entry, level)
        self._check_tracked(call, td, entry, entry.pfn)
        td.sept.set(gfn, level, entry._replace(state=UNBLOCKED[entry.state]))

    def mem_track(self, tdr: Pfn) -> None:
        """TDH.MEM.TRACK: the next epoch. Busy while a vCPU is inside that entered in the one before this."""
        call = "TDH.MEM.TRACK"
        td = self._td(call, tdr, Operand.RCX)
        self._keys(call, td)
        self._op_state(call, td, *_BUILT)
        if td.epoch_users[1 - (td.epoch & 1)]:
            raise TdxError(call, Status.PREVIOUS_TLB_EPOCH_BUSY, epoch=td.epoch)
        td.epoch += 1

    def mem_page_remove(self, tdr: Pfn, gfn: int, level: int) -> Pfn:
        """TDH.MEM.PAGE.REMOVE: the page is the host's; blocked and tracked before, if the TD may run."""
        call = "TDH.MEM.PAGE.REMOVE"
        td = self._memory(call, tdr, gfn, level, LEVEL_4K, LEVEL_1G, *_BUILT)
        entry = td.sept.get(gfn, level)
        if entry is None or not entry.state.leaf:
            raise self._wrong_state(call, entry, level)
        self._check_tracked(call, td, entry, entry.pfn)
        td.sept.set(gfn, level, None)
        self._take(td, entry.pfn)
        return entry.pfn

    # Sizes

    def mem_page_demote(
        self, tdr: Pfn, gfn: int, level: int, sept_page: Pfn, pamt_pair: tuple[Pfn, Pfn] | None = None
    ) -> None:
        """TDH.MEM.PAGE.DEMOTE: one leaf becomes 512, in the state it had before it was blocked.

        With dynamic PAMT a 2M leaf needs the pair for its new 4K entries.
        """
        call = "TDH.MEM.PAGE.DEMOTE"
        td = self._memory(call, tdr, gfn, level, LEVEL_2M, LEVEL_1G, *_BUILT)
        entry = td.sept.get(gfn, level)
        if entry is None or not entry.state.leaf:
            raise self._wrong_state(call, entry, level)
        self._check_tracked(call, td, entry, entry.pfn)
        self.pamt.check_free(call, sept_page, 0, Operand.R8)
        if self.pamt.dynamic and level == LEVEL_2M and pamt_pair is None:
            raise TdxError(call, Status.MISSING_PAMT_PAGE_PAIR, gfn=gfn)
        self.pamt.clear(entry.pfn)
        if pamt_pair is not None:
            self.pamt.add_pair(call, entry.pfn, pamt_pair)
        self._give(td, sept_page, PageType.EPT)
        td.sept.set(gfn, level, SeptEntry(Sept.NL_MAPPED, sept_page))
        state = UNBLOCKED.get(entry.state, entry.state)
        for part in range(512):
            step = part << 9 * (level - 1)
            pfn = Pfn(entry.pfn + step)
            self.pamt.set(pfn, PamtEntry(PageType.REG, tdr, 9 * (level - 1)))
            td.sept.set(gfn + step, level - 1, SeptEntry(state, pfn, entry.hva + (step << PAGE_SHIFT)))

    def mem_page_promote(self, tdr: Pfn, gfn: int, level: int) -> tuple[Pfn, tuple[Pfn, Pfn] | None]:
        """TDH.MEM.PAGE.PROMOTE: 512 leaves of one state, whose pages follow each other, become one. Gives back the
        S-EPT page, and with dynamic PAMT the pair."""
        call = "TDH.MEM.PAGE.PROMOTE"
        td = self._memory(call, tdr, gfn, level, LEVEL_2M, LEVEL_1G, *_BUILT)
        entry = td.sept.get(gfn, level)
        if entry is None or entry.state.leaf:
            raise self._wrong_state(call, entry, level)
        self._check_tracked(call, td, entry, entry.pfn)
        parts = td.sept.children(gfn, level)
        first = parts.get(min(parts)) if len(parts) == 512 else None
        step = 1 << 9 * (level - 1)
        if (
            first is None
            or first.state not in (Sept.MAPPED, Sept.PENDING)
            or first.pfn % (512 * step)
            or any(
                p.pfn != first.pfn + n * step or p.state is not first.state
                for n, (_, p) in enumerate(sorted(parts.items()))
            )
        ):
            raise TdxError(call, Status.EPT_INVALID_PROMOTE_CONDITIONS, Operand.RCX, gfn=gfn, leaves=len(parts))
        for index, part in parts.items():
            self.pamt.clear(part.pfn)
            td.sept.levels[level - 1].pop(index)
        self._take(td, entry.pfn)
        pair = self.pamt.remove_pair(call, first.pfn) if self.pamt.dynamic and level == LEVEL_2M else None
        self.pamt.set(first.pfn, PamtEntry(PageType.REG, tdr, 9 * level))
        td.sept.set(gfn, level, first)
        return entry.pfn, pair

    # Measurement

    def mr_extend(self, tdr: Pfn, gpa: int) -> None:
        """TDH.MR.EXTEND: 256 bytes of a page that was added go into the measurement."""
        call = "TDH.MR.EXTEND"
        td = self._td(call, tdr, Operand.RDX)
        self._keys(call, td)
        self._op_state(call, td, OpState.INITIALIZED)
        if gpa % _CHUNK:
            raise TdxError(call, Status.OPERAND_INVALID, Operand.RCX, gpa=gpa)
        entry = td.sept.get(gpa >> PAGE_SHIFT, LEVEL_4K)
        if entry is None or entry.state is not Sept.MAPPED:
            raise TdxError(call, Status.EPT_ENTRY_NOT_PRESENT, Operand.RCX, gpa=gpa)
        td.measurement.update(_record(b"MR.EXTEND", gpa))
        td.measurement.update(read_host(entry.hva + gpa % PAGE_SIZE, _CHUNK))
        td.extended[gpa >> PAGE_SHIFT] += 1

    def mr_finalize(self, tdr: Pfn) -> bytes:
        """TDH.MR.FINALIZE: MRTD, the SHA-384 of what was recorded; the TD may run."""
        call = "TDH.MR.FINALIZE"
        td = self._td(call, tdr, Operand.RCX)
        self._keys(call, td)
        self._op_state(call, td, OpState.INITIALIZED)
        if not td.vcpus:
            raise TdxError(call, Status.NO_VCPUS)
        td.mrtd = td.measurement.digest()
        td.op_state = OpState.RUNNABLE
        return td.mrtd

    # The memory controller

    def host_write(self, pfn: Pfn) -> None:
        """The host, or a device, writes to a page with key 0. If it is a TD's, its lines are poisoned."""
        if self.pamt.find(pfn) is not None:
            self.poisoned.add(pfn)

    def td_read(self, tdr: Pfn, gfn: int) -> None:
        """The guest reads a page. Raises: MachineCheck, if it was written with another key."""
        found = self.tds[tdr].sept.leaf(gfn)
        if found is not None:
            level, entry = found
            pfn = entry.pfn + gfn % (1 << 9 * level)
            if pfn in self.poisoned:
                raise MachineCheck(f"page {pfn:#x} of the TD {tdr:#x} was written with another key")

    # Parts

    def _memory(self, call: str, tdr: Pfn, gfn: int, level: int, low: int, high: int, *states: OpState) -> Td:
        """The TD, after the checks that all these calls begin with; the walk reaches the entry of `level`."""
        td = self._td(call, tdr, Operand.RDX)
        self._keys(call, td)
        self._op_state(call, td, *states)
        if not low <= level <= high or gfn % (1 << 9 * level):
            raise TdxError(call, Status.OPERAND_INVALID, Operand.RCX, gfn=gfn, level=level)
        reached = td.sept.reached(gfn, level)
        if reached != level:
            raise TdxError(call, Status.EPT_WALK_FAILED, Operand.RCX, gfn=gfn, level=reached)
        return td

    def _check_tracked(self, call: str, td: Td, entry: SeptEntry, pfn: Pfn) -> None:
        """Raises: TdxError if a vCPU may still have a translation through the entry."""
        if td.op_state is not OpState.RUNNABLE:
            return
        if not entry.state.blocked:
            raise TdxError(call, Status.GPA_RANGE_NOT_BLOCKED, Operand.RCX, state=entry.state.value)
        bepoch = self.pamt.entries[pfn].bepoch
        old_users = td.epoch_users[1 - (td.epoch & 1)]
        if bepoch == td.epoch or (bepoch == td.epoch - 1 and old_users):
            raise TdxError(call, Status.TLB_TRACKING_NOT_DONE, Operand.RCX, epoch=td.epoch, blocked_in=bepoch)

    def _take(self, td: Td, pfn: Pfn) -> None:
        order = self.pamt.entries[pfn].order
        self.pamt.clear(pfn)
        td.children -= 1 << order
        self.poisoned.difference_update(range(pfn, pfn + (1 << order)) if order else (pfn,))

    def _wrong_state(self, call: str, entry: SeptEntry | None, level: int) -> TdxError:
        state = entry.state.value if entry is not None else "FREE"
        return TdxError(call, Status.EPT_ENTRY_STATE_INCORRECT, Operand.RCX, state=state, level=level)


def _record(name: bytes, gpa: int) -> bytes:
    """The 128 bytes by which the module records a call in the measurement: its name, and where."""
    return (name.ljust(16, b"\0") + gpa.to_bytes(8, "little")).ljust(128, b"\0")
