"""A guest touches a page: what is mapped, what exits, and with which numbers."""

from __future__ import annotations

import errno

import pytest

from guestmem.cpu.scripted import Load, Store
from guestmem.host import Gmem
from guestmem.kvm.addresses import Gfn
from guestmem.kvm.exits import HltExit, MemoryFaultExit
from guestmem.memory import PAGE_SIZE, Access, PageIndex
from guestmem.trace import EHWPOISON
from guestmem.trace import events as event
from guestmem.uapi.kvm import VmType
from guestmem.uapi.levels import LEVELS
from tests.kvm.conftest import Bench

K = PAGE_SIZE
SMALL = 8 * K
LARGE = 64 * K


def test_guest_and_host_share_bytes_both_ways(bench: Bench) -> None:
    gmem = bench.gmem(gpa=0x10000)
    view = gmem.mmap()
    view[0x41] = 0x41
    assert bench.guest(Load(0x10041), Store(0x10042, 0x77)) == (HltExit(), [0x41])
    assert view[0x42] == 0x77


def test_private_bytes_are_the_guests_alone_and_come_back_on_conversion(bench: Bench) -> None:
    gmem = bench.gmem(init_shared=False)
    assert bench.guest(Store(K, 0x5A), Load(K)) == (HltExit(), [0x5A])
    assert len(bench.vm.kvm.stage2.tables[Access.PRIVATE]) == 1
    gmem.convert(0, 8 * K, Access.SHARED)
    assert not len(bench.vm.kvm.stage2.tables[Access.PRIVATE])
    assert gmem.mmap()[K] == 0x5A


@pytest.mark.parametrize("asserted", [True, False])
def test_an_asserted_access_that_is_not_the_pages_is_an_exit_with_its_kind(bench: Bench, asserted: bool) -> None:
    """uapi.md section 11: gpa page aligned, one page, the flag is the access and not the state."""
    gmem = bench.gmem(init_shared=asserted)
    exit_, _ = bench.guest(Load(3 * K + 0x123, private=asserted))
    assert isinstance(exit_, MemoryFaultExit)
    assert (exit_.gpa, exit_.size, exit_.private) == (3 * K, K, asserted)
    assert (exit_.refusal.errno, exit_.refusal.rule) == (errno.EFAULT, "fault.mismatch")
    assert gmem.statistics().allocated == 0
    gmem.convert(3 * K, K, Access.PRIVATE if asserted else Access.SHARED)
    assert bench.guest(Load(3 * K, private=asserted)) == (HltExit(), [0])


def test_a_default_vms_guest_cannot_reach_a_private_page() -> None:
    bench = Bench(vm_type=VmType.DEFAULT)
    bench.gmem(init_shared=False)
    exit_, _ = bench.guest(Load(0))
    assert isinstance(exit_, MemoryFaultExit)
    assert (exit_.private, exit_.refusal.rule) == (False, "fault.mismatch")
    bench.close()


def test_before_conversion_existed_the_file_serves_whatever_it_has() -> None:
    """v6.18: a file with MMAP alone is GMEM_ONLY; the host cannot touch it, a default VM's guest can."""
    bench = Bench(vm_type=VmType.DEFAULT, level=LEVELS["v6.18"])
    bench.gmem(mmap=True, init_shared=False)
    assert bench.guest(Store(0, 3), Load(0)) == (HltExit(), [3])
    bench.close()


def test_a_closed_file_is_a_memory_fault_and_its_slot_stays(bench: Bench) -> None:
    gmem = bench.gmem(init_shared=False)
    bench.guest(Store(0, 1))
    gmem.close()
    assert gmem.inode.destroyed
    exit_, _ = bench.guest(Load(0))
    assert isinstance(exit_, MemoryFaultExit)
    assert (exit_.refusal.errno, exit_.refusal.rule) == (errno.EFAULT, "fault.file_gone")
    assert exit_.private is False, "no live file counts as shared"
    bench.vm.set_memory_region(0, 0, 0)


def test_poison_is_an_exit_with_ehwpoison(bench: Bench) -> None:
    gmem = bench.gmem()
    bench.guest(Store(0, 1))
    bench.run(gmem.inode.memory_failure(PageIndex(0)))
    exit_, _ = bench.guest(Load(0))
    assert isinstance(exit_, MemoryFaultExit)
    assert (exit_.refusal.errno, exit_.refusal.rule) == (EHWPOISON, "fault.poisoned")


def test_no_slot_is_mmio(bench: Bench) -> None:
    bench.gmem()
    assert bench.guest(Load(1 << 30), Store(1 << 30, 1)) == (HltExit(), [0xFF])


def test_a_read_only_slot_takes_reads_and_makes_writes_mmio(bench: Bench) -> None:
    memory = bench.host.anonymous(K)
    memory[0] = 7
    bench.vm.set_memory_region(0, 0, K, memory=memory, flags=2)
    assert bench.guest(Load(0), Store(0, 9), Load(0)) == (HltExit(), [7, 7])


def test_a_hole_is_seen_by_the_guest_as_zero(bench: Bench) -> None:
    gmem = bench.gmem()
    assert bench.guest(Store(0, 9), Load(0)) == (HltExit(), [9])
    gmem.punch_hole(0, K)
    assert bench.guest(Load(0)) == (HltExit(), [0])


def test_a_cached_translation_goes_with_the_leaf(bench: Bench) -> None:
    gmem = bench.gmem()
    vcpu = bench.vcpu(Store(0, 9), Load(0), number=5)
    vcpu.run()
    assert vcpu.engine.tlb  # type: ignore[attr-defined]
    gmem.punch_hole(0, K)
    assert not vcpu.engine.tlb  # type: ignore[attr-defined]


def test_a_plain_slot_over_a_guest_memfd_mapping(bench: Bench) -> None:
    """Rows G29 to G37: KVM goes through the host's page table, and is told when the host loses the page."""
    gmem = bench.gmem(gpa=None)
    view = gmem.mmap()
    bench.vm.set_memory_region(1, 0, 8 * K, memory=view)
    view[0] = 0x61
    assert bench.guest(Load(0), Store(0, 0x77)) == (HltExit(), [0x61])
    assert view[0] == 0x77
    gmem.punch_hole(0, K)
    assert bench.guest(Load(0)) == (HltExit(), [0])
    gmem.convert(0, K, Access.PRIVATE)
    exit_, _ = bench.guest(Load(0))
    assert isinstance(exit_, MemoryFaultExit)
    assert exit_.refusal.rule == "user.page"


def test_another_vm_may_show_a_mapping_of_the_file(bench: Bench) -> None:
    """Row G34, golden surprise 16."""
    gmem = bench.gmem()
    view = gmem.mmap()
    other = bench.host.create_vm(VmType.DEFAULT)
    other.set_memory_region(0, 0, 8 * K, memory=view)
    view[5] = 0x62
    vcpu = bench.vcpu(Load(5), vm=other)
    vcpu.run()
    assert vcpu.engine.loaded == [0x62]  # type: ignore[attr-defined]
    gmem.convert(0, K, Access.PRIVATE)
    assert not len(other.kvm.stage2.tables[Access.SHARED])


def test_unmapped_host_memory_is_a_memory_fault(bench: Bench) -> None:
    bench.vm.set_memory_region(0, 0, K)
    exit_, _ = bench.guest(Load(0))
    assert isinstance(exit_, MemoryFaultExit)
    assert (exit_.private, exit_.refusal.errno) == (False, errno.EFAULT)


def test_a_lost_host_page_is_zapped_before_it_goes(bench: Bench) -> None:
    memory = bench.host.anonymous(2 * K)
    bench.vm.set_memory_region(0, 0, 2 * K, memory=memory)
    bench.guest(Store(0, 1), Store(K, 2))
    bench.run(bench.host.process.mm.discard(memory.hva, K))
    assert [leaf[0] for leaf in bench.vm.kvm.stage2.tables[Access.SHARED].leaves()] == [1]
    assert bench.guest(Load(0), Load(K)) == (HltExit(), [0, 2])


def test_faults_are_told_by_their_kernel_name(bench: Bench) -> None:
    bench.gmem()
    bench.guest(Store(K, 1), Load(1 << 40))
    faults = [seen for seen in bench.events if isinstance(seen, event.KvmPageFault)]
    assert [(fault.gpa, fault.write, fault.result) for fault in faults] == [
        (K, True, "mapped"),
        (1 << 40, False, "mmio"),
    ]


# Huge leaves: the order of the folio, the fit of slot and file, one access throughout


def huge(bench: Bench, gpa: int, size: int, order: int) -> Gmem:
    """A file of huge pages, bound at `gpa`."""
    gmem = bench.vm.create_guest_memfd(size, mmap=True, order=order)
    bench.vm.set_memory_region(0, gpa, size, gmem=gmem)
    return gmem


def huge_bench() -> Bench:
    """Huge pages of 64 and 8 pages stand for 1G and 2M, since every property is checked at every step."""
    return Bench(pages=512, hugepages={6: 4, 3: 8}, orders=(6, 3, 0))


def leaves(bench: Bench) -> list[tuple[str, int, int]]:
    """(access, first frame, order) of each leaf."""
    tables = bench.vm.kvm.stage2.tables
    return sorted((access.value, number, order) for access in Access for number, order, _ in tables[access].leaves())


@pytest.mark.parametrize(
    ("gpa", "size", "order", "leaf"),
    [
        (4 * SMALL, 2 * SMALL, 3, 3),
        (4 * SMALL + K, 2 * SMALL, 3, 0),
        (LARGE, LARGE, 6, 6),
        (LARGE + SMALL, LARGE, 6, 3),
        (LARGE + K, LARGE, 6, 0),
    ],
)
def test_leaf_size_follows_the_fit_of_frame_and_file_page(gpa: int, size: int, order: int, leaf: int) -> None:
    bench = huge_bench()
    huge(bench, gpa, size, order)
    bench.guest(Store(gpa + 12 * K, 1))
    ((access, number, got),) = leaves(bench)
    assert (access, got) == ("private", leaf)
    assert number == (gpa // K + 12) >> leaf << leaf
    assert bench.vm.kvm.stage2.lookup(Gfn(gpa // K + 12)) is not None
    bench.close()


def test_one_shared_page_leaves_its_neighbours_as_large_as_they_can_be() -> None:
    """S13: that page is 4K, the rest of its 2M too, the rest of the 1G 2M; and back."""
    bench = huge_bench()
    gmem = huge(bench, 0, LARGE, 6)
    assert bench.guest(Store(0, 1), Store(12 * K, 2), Store(5 * SMALL, 3)) == (HltExit(), [])
    assert leaves(bench) == [("private", 0, 6)]
    gmem.convert(12 * K, K, Access.SHARED)
    assert leaves(bench) == [], "the leaf that spanned it went whole"
    touched = (Load(0), Load(12 * K), Load(13 * K), Load(5 * SMALL))
    assert bench.guest(*touched) == (HltExit(), [1, 2, 0, 3])
    assert leaves(bench) == [("private", 0, 3), ("private", 13, 0), ("private", 40, 3), ("shared", 12, 0)]
    gmem.convert(12 * K, K, Access.PRIVATE)
    assert ("shared", 12, 0) not in leaves(bench)
    assert bench.guest(Load(12 * K)) == (HltExit(), [2])
    assert leaves(bench) == [("private", 0, 6)], "merged: a leaf over all of it took the place of the smaller ones"
    bench.close()


def test_a_shared_huge_page_is_mapped_by_small_leaves() -> None:
    bench = huge_bench()
    gmem = huge(bench, 0, 2 * SMALL, 3)
    gmem.convert(0, SMALL, Access.SHARED)
    assert bench.guest(Store(0, 1), Load(0), Load(SMALL)) == (HltExit(), [1, 0])
    assert leaves(bench) == [("private", 8, 3), ("shared", 0, 0)]
    bench.close()


def test_a_leaf_of_2_mib_serves_its_whole_block() -> None:
    bench = Bench(pages=4096, hugepages={9: 2})
    huge(bench, 0, 4 << 20, 9)
    assert bench.guest(Store(0, 1), Store(511 * K, 2), Load(0), Load(511 * K)) == (HltExit(), [1, 2])
    assert leaves(bench) == [("private", 0, 9)]
    bench.close()
