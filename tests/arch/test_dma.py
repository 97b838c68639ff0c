"""What a device's access meets, row by row. T=1 is the guest's own device, T=0 anybody's."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from guestmem.arch import Block, DmaRules
from guestmem.arch.cca import CcaPlatform
from guestmem.arch.pkvm import PkvmPlatform
from guestmem.arch.snp import SnpPlatform
from guestmem.arch.snp.rmp import State, Status
from guestmem.arch.tdx import TdxPlatform
from guestmem.arch.tdx.memory_calls import MachineCheck
from guestmem.memory import Pfn
from guestmem.trace import Refusal
from tests.arch.memory import Pages

GFN = 0x200
LARGE, HUGE = 9, 18
KALRA = "Ashish Kalra, AMDESE/AMDSEV issue 109"
KARDASHEVSKIY = "Alexey Kardashevskiy, 28 January 2026"


def outcome(rules: DmaRules, block: Block, page: int = 0, *, trusted: bool, write: bool = True) -> str:
    """ "ok", "zeros" or the rule."""
    try:
        return "ok" if rules.check(block, Pfn(block.pfn + page), trusted=trusted, write=write) else "zeros"
    except Refusal as refusal:
        return refusal.rule


class Row(NamedTuple):
    """An SNP guest of ASID 1 and its RMP: the order of the entries over the page, None for the host's, and whose they
    are; then the IOMMU's leaf."""

    entry: int | None
    asid: int
    validated: bool
    leaf: int
    trusted: bool
    expected: str
    source: str


ROWS = [
    Row(None, 0, False, 0, False, "ok", KALRA),
    Row(0, 1, True, 0, False, "dma.rmp", KALRA),
    Row(LARGE, 1, True, 0, False, "dma.rmp", KALRA),
    Row(None, 0, False, LARGE, False, "ok", KALRA),
    Row(None, 0, False, 0, True, "dma.rmp", "APM volume 2, table 15-39: a private access to the host's page"),
    Row(0, 1, True, 0, True, "ok", KARDASHEVSKIY),
    Row(0, 1, False, 0, True, "dma.rmp", "APM volume 2, table 15-39: not validated"),
    Row(0, 2, True, 0, True, "dma.rmp", "APM volume 2, table 15-39: another ASID"),
    Row(LARGE, 1, True, LARGE, True, "ok", KARDASHEVSKIY),
    Row(LARGE, 1, True, 0, True, "dma.rmp", KARDASHEVSKIY + ": 4K in the table, 2M in the RMP"),
    Row(0, 1, True, LARGE, True, "dma.rmp", KARDASHEVSKIY + ": no second check"),
    Row(LARGE, 1, True, HUGE, True, "ok", KARDASHEVSKIY + ": rounded down to 2M"),
    Row(0, 1, True, HUGE, True, "dma.rmp", KARDASHEVSKIY),
]


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("write", [False, True])
def test_snp(row: Row, write: bool) -> None:
    platform = SnpPlatform(1 << HUGE)
    one, _ = platform.new_guest(1, 101), platform.new_guest(2, 102)
    if row.entry is not None:
        large = row.entry == LARGE
        assert platform.rmp.rmpupdate(Pfn(0), State(True, row.asid, GFN, large)) is Status.SUCCESS
        if row.validated:
            platform.rmp.pvalidate(row.asid, GFN, Pfn(0), large=large, validate=True)
    assert outcome(one.dma, Block(Pfn(0), row.leaf, 0), trusted=row.trusted, write=write) == row.expected


def test_snp_a_shared_leaf_over_one_page_of_a_guest_shows_none() -> None:
    """Source: Ashish Kalra, 20 January 2023: large leaves over mixed pages fault."""
    platform = SnpPlatform(1 << HUGE)
    guest = platform.new_guest(1, 101)
    platform.rmp.rmpupdate(Pfn(7), State(True, 1, GFN))
    assert outcome(guest.dma, Block(Pfn(0), LARGE, 0), page=3, trusted=False) == "dma.rmp"


def test_snp_entries_are_cut_at_both_ends_and_followers_are_told() -> None:
    platform = SnpPlatform(1 << HUGE)
    guest = platform.new_guest(1, 101)
    for base in (0, 512, 1024):
        platform.rmp.rmpupdate(Pfn(base), State(True, 1, GFN + base, True))
    told: list[tuple[int, int]] = []
    guest.dma.followers.add(lambda pfn, pages: told.append((pfn, pages)))
    guest.dma.cut(Pfn(100), 1024)
    assert told == [(0, 512), (1024, 512)]
    assert [guest.dma.fits(Block(Pfn(base), LARGE, 0)) for base in (0, 512, 1024)] == [False, True, False]
    guest.dma.cut(Pfn(512), 512)
    assert len(told) == 2


def _td() -> tuple[TdxPlatform, Pages, DmaRules]:
    platform, pages = TdxPlatform(), Pages(2)
    guest = platform.new_guest(1, 101)
    guest.start()
    guest.finalize({0: b""})
    guest.make_private(GFN, pages.block())
    assert guest.check_access(GFN, pages.block().pfn, 0, True), "it accepts the page"
    return platform, pages, guest.dma


def test_tdx() -> None:
    """Source: Documentation/arch/x86/tdx.rst, Erratum; TDX module base specification, states of S-EPT entries."""
    platform, pages, rules = _td()
    private, free = pages.block(), pages.block(1)
    assert [outcome(rules, private, trusted=True), outcome(rules, free, trusted=True)] == ["ok", "dma.sept"]
    assert [outcome(rules, free, trusted=False, write=write) for write in (False, True)] == ["ok", "ok"]
    assert outcome(rules, private, trusted=False, write=False) == "zeros"
    module, (tdr,) = platform.module, platform.module.tds
    module.td_read(tdr, GFN)
    assert outcome(rules, private, trusted=False) == "dma.machine_check"
    with pytest.raises(MachineCheck):
        module.td_read(tdr, GFN)
    module.mem_range_block(tdr, GFN, 0)
    assert outcome(rules, private, trusted=True) == "dma.sept"
    assert rules.fits(private)  # it is still the TD's


def test_tdx_a_page_that_is_not_accepted_is_not_there() -> None:
    platform, pages, rules = _td()
    (tdr,) = platform.module.tds
    guest = platform.guests[tdr]
    platform.module.mem_page_aug(tdr, GFN + 1, 0, pages.block(1).pfn, pages.block(1).hva)
    guest.gfns[pages.block(1).pfn] = GFN + 1
    assert outcome(rules, pages.block(1), trusted=True) == "dma.sept"
    platform.module.page_accept(tdr, GFN + 1, 0)
    assert outcome(rules, pages.block(1), trusted=True) == "ok"


def test_cca() -> None:
    """A granule that is delegated and no realm's is neither world's. Source: RMM specification, granule states."""
    platform, pages = CcaPlatform(), Pages(2)
    guest = platform.new_guest(1, 101)
    guest.start()
    guest.finalize({0: b""})
    guest.make_private(GFN, pages.block())
    assert [outcome(guest.dma, pages.block(), trusted=trusted) for trusted in (False, True)] == ["dma.gpt", "ok"]
    assert [outcome(guest.dma, pages.block(1), trusted=trusted) for trusted in (False, True)] == ["ok", "dma.gpt"]
    platform.monitor.granule_delegate(pages.block(1).pfn)
    assert [outcome(guest.dma, pages.block(1), trusted=trusted) for trusted in (False, True)] == ["dma.gpt"] * 2


def test_pkvm() -> None:
    """A page that the guest has lent is the host's to use, and its devices'. From memory, see pkvm/dma.py."""
    platform, pages = PkvmPlatform(), Pages(1)
    guest = platform.new_guest(1, 101)
    guest.start()
    guest.make_private(GFN, pages.block())
    private = [outcome(guest.dma, pages.block(), trusted=trusted) for trusted in (False, True)]
    assert private == ["dma.hypervisor", "ok"]
    guest.make_shared([pages.block()])
    lent = [outcome(guest.dma, pages.block(), trusted=trusted) for trusted in (False, True)]
    assert lent == ["ok", "dma.hypervisor"]
