"""A TDX module with two packages and a few pages, and how it comes to each state that a test begins with."""

from __future__ import annotations

from guestmem.arch.tdx.manage import TDCS_PAGES
from guestmem.arch.tdx.memory_calls import MemoryCalls
from guestmem.arch.tdx.td import LEVEL_2M, LEVEL_4K, LEVEL_ROOT
from guestmem.memory import PAGE_SIZE, Pfn
from tests.arch.memory import Pages

TDR, HKID, CPU = Pfn(1), 5, 3
VCPU, TABLES = Pfn(20), (Pfn(30), Pfn(31), Pfn(32))
PAGE, OTHER = 0, 1
GFN = 0x200


class Machine(MemoryCalls):
    """A module and memory; `busy` is the call that is to find something locked."""

    def __init__(self, **options: object) -> None:
        self.busy = ""
        super().__init__(packages=2, fails=lambda call: call == self.busy, **options)  # type: ignore[arg-type]
        self.memory = Pages(1024, first=1024)

    def page(self, number: int = PAGE) -> Pfn:
        return self.memory.block(number).pfn

    def hva(self, number: int = PAGE) -> int:
        return self.memory.block(number).hva


def created(m: Machine) -> None:
    m.mng_create(TDR, HKID)


def keyed(m: Machine) -> None:
    created(m)
    for package in m.packages:
        m.mng_key_config(TDR, package)


def with_tdcs(m: Machine) -> None:
    keyed(m)
    for page in range(TDCS_PAGES):
        m.mng_addcx(TDR, Pfn(10 + page))


def initialized(m: Machine) -> None:
    with_tdcs(m)
    m.mng_init(TDR)


def with_tables(m: Machine) -> None:
    initialized(m)
    for table, level in zip(TABLES, range(LEVEL_ROOT, LEVEL_4K, -1), strict=True):
        m.mem_sept_add(TDR, GFN >> 9 * level << 9 * level, level, table)


def with_vcpu(m: Machine) -> None:
    with_tables(m)
    m.vp_create(TDR, VCPU)
    m.vp_init(TDR, VCPU, CPU)


def added(m: Machine) -> None:
    with_vcpu(m)
    m.mem_page_add(TDR, GFN, m.page(), m.hva(), b"image".ljust(PAGE_SIZE, b"\0"))


def runnable(m: Machine) -> None:
    added(m)
    m.mr_finalize(TDR)


def pending(m: Machine) -> None:
    runnable(m)
    m.mem_page_aug(TDR, GFN + 1, LEVEL_4K, m.page(OTHER), m.hva(OTHER))


def blocked(m: Machine) -> None:
    runnable(m)
    m.mem_range_block(TDR, GFN, LEVEL_4K)


def blocked_while_inside(m: Machine) -> None:
    runnable(m)
    m.vp_enter(TDR, VCPU, CPU)
    m.mem_range_block(TDR, GFN, LEVEL_4K)
    m.mem_track(TDR)


def tracked(m: Machine) -> None:
    blocked(m)
    m.mem_track(TDR)


def large(m: Machine) -> None:
    with_vcpu(m)
    m.mr_finalize(TDR)
    m.mem_sept_add(TDR, 0x40000, 2, Pfn(40))
    m.mem_page_aug(TDR, 0x40000, LEVEL_2M, m.page(), m.hva())


def flushed(m: Machine) -> None:
    runnable(m)
    m.vp_flush(TDR, VCPU, CPU)
    m.mng_vpflushdone(TDR)


def torn_down(m: Machine) -> None:
    flushed(m)
    for package in m.packages:
        m.phymem_cache_wb(package)
    m.mng_key_freeid(TDR)


def half_keyed(m: Machine) -> None:
    created(m)
    m.mng_key_config(TDR, 0)


def half_written_back(m: Machine) -> None:
    flushed(m)
    m.phymem_cache_wb(0)


def nothing(m: Machine) -> None:
    """A module that has just been started."""
