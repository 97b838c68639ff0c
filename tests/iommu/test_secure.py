"""T=1 leaves against the ownership tables, with pages of real sizes: what is installed, and what follows a change."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from guestmem import Access, DmaFault, Host, Refusal
from guestmem.check.invariants import PROPERTIES
from guestmem.cpu.engine import GuestMemory
from guestmem.cpu.scripted import Load, ScriptedEngine, Store
from guestmem.host import Gmem, Vm
from guestmem.iommu.addresses import IoPage
from guestmem.iommu.leaves import GmemLeaf
from guestmem.iommu.script import DeviceHandle, IoasHandle
from guestmem.memory import PAGE_SIZE, PageIndex, Pfn, Range
from guestmem.memory.pages import ORDER_2M
from guestmem.uapi.kvm import VmType

K = PAGE_SIZE
M2 = K << ORDER_2M
BASE = 1 << 30
PAGE = IoPage(BASE >> 12)
KINDS = pytest.mark.parametrize("vm_type", [VmType.SNP, VmType.TDX, VmType.ARM_REALM, VmType.ARM_PROTECTED])


class Huge:
    """A launched guest that has touched the two huge pages of its memory, and a trusted device that cannot ask for
    pages. With `slot_at` the memslot begins there, in bytes: not congruent, if that is odd."""

    def __init__(self, vm_type: VmType, slot_at: int = 0) -> None:
        self.host = Host(memory=64 << 20, hugepages={ORDER_2M: 2}, engine=self._engine, debug=True)
        self._script: list[Load | Store] = [Store(slot_at, 7), Store(slot_at + M2, 7)]
        self.vm: Vm = self.host.create_vm(vm_type)
        self.gmem: Gmem = self.vm.create_guest_memfd(2 * M2, mmap=True, order=ORDER_2M)
        self.vm.set_memory_region(0, slot_at, 2 * M2, gmem=self.gmem)
        vcpu = self.vm.create_vcpu()
        self.vm.launch.start()
        self.vm.launch.finish()
        vcpu.run()
        self.iommu = self.host.open_iommu()
        self.space: IoasHandle = self.iommu.alloc_ioas()
        self.device: DeviceHandle = self.iommu.bind(self.host.new_dma_device(page_requests=False))
        self.device.attach(self.iommu.alloc_hwpt(self.space, trusted=True))

    def _engine(self, memory: GuestMemory) -> ScriptedEngine:
        return ScriptedEngine(memory, self._script)

    def map(self) -> None:
        self.space.map_gmem(self.gmem.file, 0, 2 * M2, iova=BASE)

    def orders(self) -> dict[int, int]:
        """How many leaves there are, by order."""
        found: dict[int, int] = {}
        for _, order, _ in self.space.ioas.domains[0].table.leaves():
            found[order] = found.get(order, 0) + 1
        return found

    def check(self) -> None:
        """Every leaf agrees with the tables; nothing else is cached."""
        self.host.check()
        domain = self.space.ioas.domains[0]
        for leaf in [*(leaf for _, _, leaf in domain.table.leaves()), *domain.iotlb.leaves()]:
            assert isinstance(leaf, GmemLeaf)
            assert leaf.rules is not None
            assert leaf.rules.fits(leaf.block)


@pytest.fixture
def snp() -> Iterator[Huge]:
    huge = Huge(VmType.SNP)
    huge.map()
    yield huge
    huge.check()
    huge.host.close()


@KINDS
def test_a_conversion_of_a_part_splits_leaf_and_entry_alike(vm_type: VmType) -> None:
    huge = Huge(vm_type)
    huge.map()
    assert huge.orders() == {ORDER_2M: 2}
    assert huge.device.read(BASE, 1) == b"\7"
    huge.gmem.convert(3 * K, K, Access.SHARED)
    assert huge.orders() == {ORDER_2M: 1, 0: 511} if vm_type in (VmType.SNP, VmType.TDX) else huge.orders()
    huge.check()
    assert (huge.device.read(BASE, 1), huge.device.read(BASE + M2, 1)) == (b"\7", b"\7")
    with pytest.raises(DmaFault, match=r"dma\.unmapped"):
        huge.device.read(BASE + 3 * K, 1)
    huge.host.close()


@KINDS
def test_small_entries_get_small_leaves(vm_type: VmType) -> None:
    """Frame and file page are not congruent: the guest has small entries where large leaves would have room."""
    huge = Huge(vm_type, slot_at=K)
    huge.map()
    huge.check()
    if vm_type is not VmType.ARM_PROTECTED:  # whose states are of single pages, under leaves of any size
        assert ORDER_2M not in huge.orders()
    assert huge.device.read(BASE, 1) == b"\7"
    huge.host.close()


@KINDS
def test_a_deleted_slot_takes_the_leaves_along(vm_type: VmType) -> None:
    """Under the policy `binding` the pages are nobody's then."""
    huge = Huge(vm_type)
    huge.map()
    huge.device.read(BASE, 1)
    huge.vm.set_memory_region(0, 0, 0)
    assert not list(huge.host.platforms[vm_type].owned())
    assert huge.orders() == {}
    huge.check()
    with pytest.raises(DmaFault, match=r"dma\.unmapped"):
        huge.device.read(BASE, 1)
    huge.host.close()


def test_an_unmapped_part_splits_the_entry(snp: Huge) -> None:
    assert snp.space.unmap(BASE, K) == K
    assert snp.orders() == {ORDER_2M: 1, 0: 511}
    assert snp.device.read(BASE + K, 1)


def test_an_entry_that_cannot_be_split_takes_the_leaf(snp: Huge, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part that stays mapped has none then, and nothing is larger than its entry."""
    monkeypatch.setattr(snp.host.scheduler, "fails", lambda step: step == "snp: PSMASH")
    snp.host.platforms[VmType.SNP].rmp._fails = snp.host.scheduler.fails  # type: ignore[attr-defined]
    assert snp.space.unmap(BASE, K) == K
    assert snp.orders() == {ORDER_2M: 1}
    with pytest.raises(DmaFault, match=r"dma\.unmapped"):
        snp.device.read(BASE + K, 1)


def test_without_memory_for_the_smaller_table_the_area_is_revoked(snp: Huge, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry is split by somebody else, so the leaf cannot stay."""
    pfn = snp.gmem.inode.folios.pfn(PageIndex(0))
    assert pfn is not None
    rules = snp.host.vms[0].machine.architecture.dma
    assert rules is not None
    monkeypatch.setattr(snp.host.scheduler, "fails", lambda step: step == "IO page table: split a leaf")
    rules.cut(Pfn(pfn + 3), 1)
    assert snp.orders() == {}
    with pytest.raises(Refusal, match=r"iommu\.revoked"):
        snp.host.run(snp.space.ioas.page_request(snp.space.ioas.domains[0], PAGE, False))


def test_two_places_of_one_page_follow(snp: Huge) -> None:
    snp.space.map_gmem(snp.gmem.file, 0, M2, iova=2 * BASE)
    snp.gmem.convert(0, K, Access.SHARED)
    assert snp.orders() == {ORDER_2M: 1, 0: 2 * 511}
    assert snp.device.read(2 * BASE + K, 1)


def test_a_leaf_of_4k_over_a_large_entry_is_not_installed(snp: Huge) -> None:
    """IOMMU_OPTION_HUGE_PAGES is off: the walk would end at 4K, and the RMP has no entry of that size."""
    snp.space.unmap(BASE, 2 * M2)
    snp.space.ioas.large_pages = False
    snp.map()
    assert snp.orders() == {}
    with pytest.raises(Refusal, match=r"iommu\.not_guests"):
        snp.host.run(snp.space.ioas.page_request(snp.space.ioas.domains[0], PAGE, False))


def test_a_page_that_was_not_validated_is_a_fault(snp: Huge) -> None:
    """It is in the RMP, so a leaf may show it; the guest has not accepted it."""
    snp.host.platforms[VmType.SNP].rmp.lookup(Pfn(_pfn(snp)))[1].validated = False  # type: ignore[attr-defined]
    with pytest.raises(DmaFault, match=r"dma\.rmp"):
        snp.device.read(BASE, 1)


def _pfn(huge: Huge) -> int:
    pfn = huge.gmem.inode.folios.pfn(PageIndex(0))
    assert pfn is not None
    return pfn


def test_many_leaves_come_and_go(snp: Huge) -> None:
    """What is noted of places for pages does not grow with the number of mappings."""
    domain = snp.space.ioas.domains[0]
    for number in range(1, 300):
        snp.space.map_gmem(snp.gmem.file, 0, M2, iova=BASE + number * 2 * M2)
        snp.space.unmap(BASE + number * 2 * M2, M2)
    assert sum(map(len, domain._frames._pages.values())) < 80 + 2 * 64
    snp.gmem.convert(0, K, Access.SHARED)
    assert snp.orders() == {ORDER_2M: 1, 0: 511}


def test_a_reachable_page_of_a_guest_breaks_s1_and_a_wrong_size_s13(snp: Huge) -> None:
    """The properties look at the RMP: an untrusted leaf over a guest's page, a trusted one that is too small."""
    domain = snp.space.ioas.domains[0]
    leaf = domain.table.lookup(PAGE)
    assert isinstance(leaf, GmemLeaf)
    stranger = snp.iommu.bind(snp.host.new_dma_device())
    stranger.attach(snp.space)
    snp.space.ioas.domains[1].table.map(PAGE, ORDER_2M, leaf)
    assert any("reaches pfn" in facts for facts in PROPERTIES["S1"].broken(snp.host))
    snp.space.ioas.domains[1].table.zap(Range(PAGE, leaf.end))
    domain.table.map(PAGE, 0, leaf.part(PAGE, 0))
    assert any("entries of another size" in facts for facts in PROPERTIES["S13"].broken(snp.host))
    domain.forget(Range(PAGE, leaf.end))
