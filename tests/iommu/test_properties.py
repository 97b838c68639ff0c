"""Each property of a device's memory can fail: a page table or an IOTLB broken by hand in just that way is reported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from guestmem import Access, Refusal
from guestmem.check.dma import Dma
from guestmem.check.explore import VIOLATED, explore
from guestmem.check.invariants import PROPERTIES, Violation, check_all
from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.check.strategies.states import States
from guestmem.iommu.addresses import IoPage
from guestmem.iommu.domain import Domain
from guestmem.memory import PAGE_SIZE, Invalidation, PageIndex, Range, Reason
from guestmem.memory.notifier import BOTH
from tests.iommu.conftest import BASE, Io
from tests.kvm.conftest import Bench

K = PAGE_SIZE
FIRST = Range(PageIndex(0), PageIndex(1))


class World(Io):
    """Page 0 is mapped and cached for the device, page 1 for the trusted one, page 2 is pinned."""

    def __init__(self) -> None:
        super().__init__()
        self.secure = self.plug(trusted=True)
        self.gmem.convert(K, K, Access.PRIVATE)
        self.map(0, 2)
        self.space.map_pinned(self.view.hva + 2 * K, K, iova=BASE + 2 * K)
        self.device.read(BASE, 1)
        self.secure.read(BASE + K, 1)
        self.bench.host.scheduler.observers.clear()
        self.domain, self.secure_domain = self.space.ioas.domains

    @property
    def inode(self):  # type: ignore[no-untyped-def]
        return self.gmem.inode


def s1(world: World) -> None:
    world.inode.attributes.set(FIRST, Access.PRIVATE)
    world.view._run(world.host.process.mm.unmap(world.view.hva, K))


def s2(world: World) -> None:
    world.inode.attributes.set(Range(PageIndex(1), PageIndex(2)), Access.SHARED)


def s3_page_replaced(world: World) -> None:
    world.inode.folios.remove(Range(PageIndex(1), PageIndex(2)))


def s3_not_flushed(world: World) -> None:
    world.domain.table.zap(Range(IoPage(BASE >> 12), IoPage((BASE >> 12) + 1)))


def s3_pin_given_back(world: World) -> None:
    area: Any = world.space.ioas.area_at((BASE >> 12) + 2)
    area.source.held.clear()


def s4(world: World) -> None:
    world.domain.window.begin(Range(IoPage(0), IoPage(1)))


def s10(world: World) -> None:
    world.host.pool.allocated.discard(world.inode.folios.pfn(PageIndex(1)))


def s13(world: World) -> None:
    leaf: Any = world.domain.table.lookup(IoPage(BASE >> 12))
    world.domain.table.map(leaf.page, 9, leaf._replace(order=9))


def s14(world: World) -> None:
    world.inode.folios.get(PageIndex(2))


def s19(world: World) -> None:
    world.inode.folios.poisoned.add(1)


def s20(world: World) -> None:
    telling = world.inode.users.tell(Invalidation(FIRST, Reason.POISON, BOTH))
    telling.told = list(world.inode.users.registrations)
    world.inode.users.open.append(telling)
    next(iter(world.space.ioas.contexts.values())).closed = True


BREAKS = [s1, s2, s3_page_replaced, s3_not_flushed, s3_pin_given_back, s4, s10, s13, s14, s19, s20]


@pytest.mark.parametrize("break_it", BREAKS, ids=lambda value: value.__name__)
def test_a_broken_world_is_reported(break_it: Callable[[World], None]) -> None:
    world = World()
    check_all(world.host)
    break_it(world)
    facts = list(PROPERTIES[break_it.__name__.partition("_")[0].upper()].broken(world.host))
    assert any("domain" in fact or "IOTLB" in fact or "address space" in fact or "references" in fact for fact in facts)
    with pytest.raises(Violation):
        check_all(world.host)
    world.host.scheduler.close()
    world.inode.backing.close()


def test_a_forgotten_flush_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page table is right, and the device goes on through what it has cached."""

    @scenario(sometimes={"device: ok"})
    def dma_twice(m: Machine) -> None:
        gmem = m.gmem()
        dma = Dma(m)
        dma.map(gmem)
        m.actor("device", dma.write(b"d"), dma.write(b"e"))
        m.actor("punch", m.punch(gmem))

    monkeypatch.setattr(Domain, "flush", lambda self, pages: None)
    result = explore(dma_twice, States())
    assert (result.verdict, result.property) == (VIOLATED, "S3")


def test_a_late_leaf_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look-up that a conversion has overtaken, and a window that nobody asks."""

    @scenario(sometimes={"device: ok"})
    def late(m: Machine) -> None:
        gmem = m.gmem()
        dma = Dma(m)
        dma.map(gmem, follow=True)
        m.actor("device", dma.write(b"d"))
        m.actor("convert", m.convert(gmem, Access.PRIVATE))

    original = Domain.install

    def install(self: Domain, leaf: Any, seen: int) -> bool:
        self.window.hull = None
        return original(self, leaf, self.window.sequence.read())

    monkeypatch.setattr(Domain, "install", install)
    result = explore(late, States())
    assert (result.verdict, result.property) == (VIOLATED, "S1")


def test_a_refused_mapping_leaves_what_was_there() -> None:
    """S15: the pool gives out half way through."""
    bench = Bench(pages=16)
    gmem = bench.gmem(12)
    iommu = bench.host.open_iommu()
    space = iommu.alloc_ioas()
    device = iommu.bind(bench.host.new_dma_device())
    device.attach(space)
    space.map_gmem(gmem.file, 0, 4 * K, iova=BASE)
    memory = bench.host.anonymous(8 * K)
    space.map_pinned(memory.hva, 8 * K, iova=2 * BASE)
    with pytest.raises(Refusal, match=r"pool.empty"):
        space.map_gmem(gmem.file, 4 * K, 8 * K)
    assert [area.pages.pages for area in space.ioas.areas] == [4, 8]
    assert len(space.ioas.domains[0].table) == 12
    bench.host.check()
    bench.close()
