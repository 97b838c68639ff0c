"""Where a file meets an address space: what the provider tells, and what is left of it in page tables and IOTLBs."""

from __future__ import annotations

import pytest

from guestmem import Access, DmaFault, Host, Refusal, VmType
from guestmem.iommu.context import IommuGmemContext
from guestmem.memory import PAGE_SIZE, PageIndex, Range
from guestmem.memory.backing import MemfdBacking
from guestmem.memory.pages import ORDER_2M
from guestmem.trace import events as event
from tests.iommu.conftest import BASE, Io

K = PAGE_SIZE


def fault(io: Io, iova: int, device: object = None) -> str:
    with pytest.raises(DmaFault) as caught:
        (device or io.device).read(iova, 1)  # type: ignore[attr-defined]
    return caught.value.refusal.rule


def end_of_memory(io: Io) -> None:
    """Mapping, file and VM are closed."""
    io.bench.run(io.host.process.mm.unmap(io.view.hva, len(io.view)))
    io.gmem.close()
    io.bench.vm.close()


def test_a_conversion_takes_the_page_out_and_leaves_its_neighbours(io: Io) -> None:
    io.map()
    plain = io.plug(page_requests=False)
    io.view[0:1] = b"a"
    io.view[K : K + 1] = b"b"
    assert (plain.read(BASE, 1), plain.read(BASE + K, 1)) == (b"a", b"b")
    io.gmem.convert(0, K, Access.PRIVATE)
    assert fault(io, BASE, plain) == "dma.unmapped"
    assert fault(io, BASE) == "fault.access"
    assert plain.read(BASE + K, 1) == b"b"
    io.gmem.convert(0, K, Access.SHARED)
    assert fault(io, BASE, plain) == "dma.unmapped"
    assert io.device.read(BASE, 1) == b"a"
    assert plain.read(BASE, 1) == b"a"


def test_the_trusted_device_reaches_what_the_other_does_not(io: Io) -> None:
    io.view[0:1] = b"a"
    trusted = io.plug(trusted=True)
    io.map()
    assert fault(io, BASE, trusted) == "fault.access"
    io.gmem.convert(0, K, Access.PRIVATE)
    assert trusted.read(BASE, 1) == b"a"
    assert fault(io, BASE) == "fault.access"
    io.gmem.convert(0, K, Access.SHARED)
    assert fault(io, BASE, trusted) == "fault.access"
    assert io.device.read(BASE, 1) == b"a"


def test_a_conversion_concerns_a_domain_wholly_or_not_at_all(io: Io) -> None:
    """To shared nothing of a T=0 domain goes, and its window is not opened."""
    trusted = io.plug(trusted=True)
    io.map()
    io.gmem.convert(0, 4 * K, Access.PRIVATE)
    trusted.read(BASE, 1)
    untrusted, secure = io.space.ioas.domains
    before = untrusted.window.sequence.value, secure.window.sequence.value
    io.gmem.convert(0, K, Access.SHARED)
    assert (untrusted.window.sequence.value, secure.window.sequence.value) == (before[0], before[1] + 1)


def test_a_hole_takes_the_page_from_both_kinds(io: Io) -> None:
    trusted = io.plug(trusted=True)
    io.gmem.convert(0, K, Access.PRIVATE)
    io.map()
    io.view[K : K + 1] = b"x"
    trusted.write(BASE, b"y")
    io.gmem.punch_hole(0, 2 * K)
    assert (trusted.read(BASE, 1), io.device.read(BASE + K, 1)) == (b"\0", b"\0")


def test_poison_goes_from_everybody_and_does_not_come_back(io: Io) -> None:
    io.map()
    io.bench.run(io.gmem.inode.memory_failure(PageIndex(0)))
    assert fault(io, BASE) == "fault.poisoned"
    io.gmem.punch_hole(0, K)
    assert io.device.read(BASE, 1) == b"\0"


def test_a_core_operation_maps_nothing(io: Io) -> None:
    """R9: the trace of a conversion has invalidations only."""
    io.map()
    del io.bench.events[:]
    io.gmem.convert(0, K, Access.PRIVATE)
    io.gmem.convert(0, K, Access.SHARED)
    io.gmem.punch_hole(0, K)
    assert not io.named("iommu_map")
    assert len(io.named("iommu_unmap")) == 1


def test_nothing_holds_the_memory(io: Io) -> None:
    """The VM and its file end while they are mapped: the areas are revoked, and can still be unmapped."""
    io.map()
    end_of_memory(io)
    assert io.gmem.inode.destroyed
    assert [seen.why for seen in io.bench.events if isinstance(seen, event.IommuRevoke)] == ["the memory is gone"]
    assert fault(io, BASE) == "iommu.revoked"
    with pytest.raises(Refusal, match=r"EEXIST"):
        io.space.map_pinned(io.host.anonymous(K).hva, K, iova=BASE)
    assert io.space.unmap(BASE, 8 * K) == 8 * K


def test_a_mapping_of_a_memory_that_is_gone_is_refused_in_a_copy(io: Io) -> None:
    io.map()
    end_of_memory(io)
    with pytest.raises(Refusal, match=r"EIO \[iommu.revoked\]"):
        io.space.copy_to(io.space, BASE, K, to=2 * BASE)


def test_the_user_is_told_once_however_many_ranges_are_mapped(io: Io) -> None:
    for page in range(8):
        io.map(page, 1)
    io.space.map_gmem(io.gmem.file, 0, 8 * K, iova=2 * BASE)
    del io.bench.events[:]
    io.gmem.convert(0, 8 * K, Access.PRIVATE)
    told = [each for each in io.bench.events if isinstance(each, event.GmemInvalidateBegin) and each.user == "iommu"]
    assert len(told) == 1
    assert not len(io.space.ioas.domains[0].table)


def test_the_last_area_takes_the_registration_with_it(io: Io) -> None:
    def registered() -> int:
        return sum(isinstance(each.user, IommuGmemContext) for each in io.gmem.inode.users.registrations)

    io.map(0, 1)
    io.map(1, 1)
    assert registered() == 1
    io.space.unmap(BASE, K)
    assert registered() == 1
    io.space.unmap(BASE + K, K)
    assert registered() == 0


def test_a_leaf_is_as_large_as_page_area_and_addresses_allow() -> None:
    """A private block of a file of 2M pages, for a trusted device; converted in part it is mapped in parts."""
    with Host(memory=64 << 20, hugepages={ORDER_2M: 2}) as host:
        huge = host.create_vm(VmType.SW_PROTECTED).create_guest_memfd(2 << 20, order=ORDER_2M)
        iommu = host.open_iommu()
        space = iommu.alloc_ioas()
        trusted = iommu.bind(host.new_dma_device())
        trusted.attach(iommu.alloc_hwpt(space, trusted=True))
        (domain,) = space.ioas.domains
        space.map_gmem(huge.file, 0, 2 << 20, iova=BASE)
        assert [(number, order) for number, order, _ in domain.table.leaves()] == [(BASE >> 12, 9)]
        trusted.write(BASE + 5 * K, b"five")
        huge.convert(4 * K, K, Access.SHARED)
        assert len(domain.table) == 511
        assert trusted.read(BASE + 5 * K, 4) == b"five"
        with pytest.raises(DmaFault, match=r"fault.access"):
            trusted.read(BASE + 4 * K, 1)
        huge.convert(4 * K, K, Access.PRIVATE)
        space.map_gmem(huge.file, 0, 2 << 20, iova=2 * BASE)
        space.map_gmem(huge.file, 0, 2 << 20, iova=3 * BASE + K)
        orders = [order for number, order, _ in domain.table.leaves() if number >= 2 * BASE >> 12]
        assert sorted(set(orders)) == [0, 9] and len(orders) == 513
        host.check()


def test_memory_is_read_where_it_lies(io: Io) -> None:
    """No copy is made: what the CPU writes the device reads, at once and the other way round."""
    io.map()
    assert isinstance(io.gmem.inode.backing, MemfdBacking)
    for turn in range(3):
        io.view[0] = turn
        assert io.device.read(BASE, 1) == bytes([turn])
        io.device.write(BASE, bytes([turn + 100]))
        assert io.view[0] == turn + 100
    assert Range(PageIndex(0), PageIndex(8)).pages == 8
