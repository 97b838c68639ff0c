"""PAMT: for each page of the machine, whether the TDX module has it, as what, and for which TD.

An entry is of 4K, 2M or 1G. With dynamic PAMT the 4K entries of a 2M block exist only while the host lends the module a
pair of pages to hold them (TDH.PHYMEM.PAMT.ADD); a block without the pair can be one page of 2M, or nothing.

Source: TDX module base specification, "Physical memory management"; intel/tdx-module pamt_manager.c,
tdh_phymem_pamt_add.c, tdh_phymem_pamt_remove.c, helpers.c check_and_lock_free_range_hpa,
non_shared_hpa_metadata_check_and_lock; "[PATCH v2] TDX: Enable Dynamic PAMT".
"""

from __future__ import annotations

import dataclasses
import enum
from collections import Counter

from guestmem.arch.tdx.status import Operand, Status, TdxError
from guestmem.memory import ORDER_1G, ORDER_2M, ORDER_4K, Pfn
from guestmem.memory.pages import block


class PageType(enum.Enum):
    """What the module has a page for; a page without an entry is PT_NDA, the host's."""

    REG = "TD private"
    TDR = "TDR"
    TDCX = "TDCX"
    TDVPR = "TDVPR"
    EPT = "S-EPT"


@dataclasses.dataclass(slots=True)
class PamtEntry:
    """`owner` is the TDR page; `bepoch` the TD epoch in which the page was last blocked."""

    type: PageType
    owner: Pfn
    order: int = ORDER_4K
    bepoch: int = 0


class Pamt:
    """`dynamic`: the host must lend pages for the 4K entries."""

    def __init__(self, dynamic: bool) -> None:
        self.dynamic = dynamic
        self.entries: dict[Pfn, PamtEntry] = {}
        self.pairs: dict[int, tuple[Pfn, Pfn]] = {}  # by number of the 2M block
        self.lent: set[Pfn] = set()
        self._small: Counter[int] = Counter()  # 4K entries in a 2M block

    def find(self, pfn: Pfn) -> tuple[Pfn, PamtEntry] | None:
        """The entry over a page, with its first page; None if it is the host's."""
        for order in (ORDER_4K, ORDER_2M, ORDER_1G):
            start = block(pfn, order).start
            entry = self.entries.get(start)
            if entry is not None and entry.order >= order:
                return start, entry
        return None

    def check_free(self, call: str, pfn: Pfn, order: int, operand: Operand) -> None:
        """Raises: TdxError unless the host could hand the 2**order pages over as one page now."""
        if pfn % (1 << order):
            raise TdxError(call, Status.OPERAND_INVALID, operand, pfn=pfn, order=order)
        found = self.find(pfn)
        if found is not None:
            raise TdxError(call, Status.PAGE_METADATA_INCORRECT, operand, pfn=pfn, type=found[1].type.value)
        if pfn in self.lent:
            raise TdxError(call, Status.PAGE_METADATA_INCORRECT, operand, pfn=pfn, type="PAMT")
        if order:
            first = pfn >> ORDER_2M
            for number in range(first, first + (1 << (order - ORDER_2M))):
                if self._small[number] or number in self.pairs or (number << ORDER_2M) in self.entries:
                    raise TdxError(call, Status.PAGE_METADATA_INCORRECT, operand, pfn=pfn, order=order)
        elif self.dynamic and pfn >> ORDER_2M not in self.pairs:
            raise TdxError(call, Status.MISSING_PAMT_PAGE_PAIR, operand, pfn=pfn)

    def set(self, pfn: Pfn, entry: PamtEntry) -> None:
        self.entries[pfn] = entry
        if entry.order == ORDER_4K:
            self._small[pfn >> ORDER_2M] += 1

    def clear(self, pfn: Pfn) -> None:
        """The page is the host's again."""
        if self.entries.pop(pfn).order == ORDER_4K:
            self._small[pfn >> ORDER_2M] -= 1

    def add_pair(self, call: str, region: Pfn, pair: tuple[Pfn, Pfn]) -> None:
        """TDH.PHYMEM.PAMT.ADD for the 2M block that begins at `region`."""
        if not self.dynamic:
            raise TdxError(call, Status.OPERAND_INVALID, Operand.RAX, pamt="static")
        if region % (1 << ORDER_2M):
            raise TdxError(call, Status.OPERAND_INVALID, Operand.RCX, pfn=region)
        if region >> ORDER_2M in self.pairs or self.find(region) is not None:
            raise TdxError(call, Status.HPA_RANGE_NOT_FREE, Operand.RCX, pfn=region)
        for page, operand in zip(pair, (Operand.RDX, Operand.R8), strict=True):
            if self.find(page) is not None or page in self.lent:
                raise TdxError(call, Status.PAGE_NOT_FREE, operand, pfn=page)
        self.pairs[region >> ORDER_2M] = pair
        self.lent.update(pair)

    def remove_pair(self, call: str, region: Pfn) -> tuple[Pfn, Pfn]:
        """TDH.PHYMEM.PAMT.REMOVE: the host has its pair back, if no 4K entry is left in the block."""
        number = region >> ORDER_2M
        if number not in self.pairs:
            raise TdxError(call, Status.NO_PAMT_PAGE_PAIR, Operand.RCX, pfn=region)
        if self._small[number]:
            used = min(pfn for pfn in self.entries if pfn >> ORDER_2M == number)
            half = used % (1 << ORDER_2M) >> ORDER_2M - 1
            raise TdxError(call, Status.PAMT_PAGE_NOT_EMPTY, detail=half, pfn=region, used=self._small[number])
        pair = self.pairs.pop(number)
        self.lent.difference_update(pair)
        return pair

    def used(self, region: int) -> int:
        """4K entries in the 2M block of this number."""
        return self._small[region]

    def __fingerprint__(self) -> object:
        entries = sorted((pfn, e.type.value, e.owner, e.order, e.bepoch) for pfn, e in self.entries.items())
        return entries, sorted(self.pairs.items())
