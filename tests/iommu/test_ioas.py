"""IO address spaces: what is mapped, what is taken away, and that a refusal has changed nothing."""

from __future__ import annotations

import pytest

from guestmem import Access, DmaFault, Refusal
from guestmem.iommu.areas import GmemArea, PinnedArea
from guestmem.memory import PAGE_SIZE
from tests.iommu.conftest import BASE, Io

K = PAGE_SIZE


def leaves(io: Io) -> int:
    return sum(statistics.leaves for statistics in io.space.statistics())


def test_a_mapped_file_is_there_when_the_call_returns(io: Io) -> None:
    io.map()
    assert leaves(io) == 8
    assert io.gmem.statistics().faults["iommu", "shared"] == 8
    io.device.write(BASE + K - 2, b"across")
    assert io.view[K - 2 : K + 4] == b"across"
    assert not io.gmem.inode.folios.references


def test_one_that_follows_has_nothing_until_a_device_asks(io: Io) -> None:
    io.gmem.convert(K, K, Access.PRIVATE)
    io.map(follow=True)
    assert leaves(io) == 0
    io.view[0] = 7
    assert io.device.read(BASE, 1) == b"\7"
    assert leaves(io) == 1
    with pytest.raises(DmaFault, match=r"fault.access"):
        io.device.read(BASE + K, 1)


def test_a_page_of_the_wrong_access_refuses_the_whole_mapping(io: Io) -> None:
    io.gmem.convert(5 * K, K, Access.PRIVATE)
    with pytest.raises(Refusal, match=r"EFAULT \[iommu.access\] iova 0x40005000"):
        io.map()
    assert leaves(io) == 0
    assert not io.space.ioas.areas and not io.space.ioas.contexts
    assert io.gmem.inode.users.registrations == [
        registration for registration in io.gmem.inode.users.registrations if registration.user.kind != "iommu"
    ]


def test_with_a_trusted_page_table_private_pages_have_a_place_too(io: Io) -> None:
    trusted = io.plug(trusted=True)
    io.gmem.convert(5 * K, K, Access.PRIVATE)
    io.map()
    assert [(each.trusted, each.leaves) for each in io.space.statistics()] == [(False, 7), (True, 1)]
    assert trusted.read(BASE + 5 * K, 1) == b"\0"


def test_without_memory_nothing_is_mapped(io: Io) -> None:
    other = io.bench.vm.create_guest_memfd(300 * K, mmap=True, init_shared=True)
    with pytest.raises(Refusal, match=r"pool.empty"):
        io.space.map_gmem(other.file, 0, 300 * K, iova=BASE)
    assert leaves(io) == 0 and not io.space.ioas.areas
    other.close()


def test_a_poisoned_page_refuses(io: Io) -> None:
    io.view[0] = 1
    io.bench.run(io.gmem.inode.memory_failure(0))  # type: ignore[arg-type]
    with pytest.raises(Refusal, match=r"EHWPOISON \[fault.poisoned\]"):
        io.map()
    io.gmem.punch_hole(0, K)


def test_beyond_the_end_and_unaligned(io: Io) -> None:
    for start, length, rule in ((0, 9 * K, "iommu.past_end"), (1, K, "iommu.unaligned"), (0, 0, "iommu.unaligned")):
        with pytest.raises(Refusal, match=rf"EINVAL \[{rule}\]"):
            io.space.map_gmem(io.gmem.file, start, length)


def test_permissions_are_the_mappings(io: Io) -> None:
    io.map(writable=False)
    assert io.device.read(BASE, 1) == b"\0"
    with pytest.raises(DmaFault, match=r"dma.permission") as caught:
        io.device.write(BASE, b"x")
    assert (caught.value.iova, caught.value.write, caught.value.done) == (BASE, True, 0)


def test_a_part_of_a_guest_memfd_can_be_unmapped(io: Io) -> None:
    io.map()
    assert io.space.unmap(BASE + 2 * K, 3 * K) == 3 * K
    assert [(area.pages.start - (BASE >> 12), area.pages.pages) for area in io.space.ioas.areas] == [(0, 2), (5, 3)]
    assert leaves(io) == 5
    io.view[5 * K] = 5
    assert io.device.read(BASE + 5 * K, 1) == b"\5"
    with pytest.raises(DmaFault, match=r"dma.unmapped"):
        io.device.read(BASE + 2 * K, 1)
    assert io.space.unmap(0, 1 << 40) == 5 * K
    assert not io.space.ioas.contexts
    with pytest.raises(Refusal, match=r"ENOENT \[iommu.not_mapped\]"):
        io.space.unmap(BASE, K)


def test_a_part_of_pinned_memory_cannot(io: Io) -> None:
    """And nothing at all is unmapped then: iommufd would take away what lies before it."""
    io.space.map_pinned(io.view.hva, 2 * K, iova=BASE)
    io.space.map_pinned(io.view.hva + 2 * K, 2 * K, iova=BASE + 2 * K)
    with pytest.raises(Refusal, match=r"ENOENT \[iommu.part\]"):
        io.space.unmap(BASE, 3 * K)
    assert leaves(io) == 4
    assert io.space.unmap(BASE, 4 * K) == 4 * K


def test_pins_last_as_long_as_a_device_can_reach_the_memory(io: Io) -> None:
    references = io.gmem.inode.folios.references
    io.device.detach()
    io.space.map_pinned(io.view.hva, 2 * K, iova=BASE)
    assert not references
    io.device.attach(io.space)
    assert len(references) == 2
    with pytest.raises(Refusal, match=r"EAGAIN \[convert.busy\]"):
        io.gmem.convert(0, K, Access.PRIVATE)
    io.device.detach()
    assert not references
    io.gmem.convert(0, K, Access.PRIVATE)
    with pytest.raises(Refusal, match=r"user.page"):
        io.device.attach(io.space)
    assert io.device.device.attachment is None


def test_a_pinned_page_outlives_its_hole(io: Io) -> None:
    """The stale IOMMU page of the discard design."""
    io.view[0] = 7
    io.space.map_pinned(io.view.hva, K, iova=BASE)
    io.gmem.punch_hole(0, K)
    io.view[0] = 9
    assert io.device.read(BASE, 1) == b"\7"
    io.space.unmap(BASE, K)


def test_private_memory_cannot_be_pinned(io: Io) -> None:
    io.gmem.convert(K, K, Access.PRIVATE)
    with pytest.raises(Refusal, match=r"EFAULT \[user.page\]"):
        io.space.map_pinned(io.view.hva, 2 * K, iova=BASE)
    assert not io.gmem.inode.folios.references and not io.space.ioas.areas


def test_anonymous_memory_is_pinned_too(io: Io) -> None:
    memory = io.host.anonymous(4 * K)
    iova = io.space.map_pinned(memory.hva, 4 * K)
    io.device.write(iova + K - 1, b"ab")
    assert memory[K - 1 : K + 1] == b"ab"
    io.space.unmap(iova, 4 * K)


def test_a_copy_shares_the_pins(io: Io) -> None:
    second = io.iommu.alloc_ioas()
    other = io.iommu.bind(io.host.new_dma_device())
    other.attach(second)
    io.space.map_pinned(io.view.hva, 3 * K, iova=BASE)
    assert io.space.copy_to(second, BASE + K, K) % K == 0
    assert set(io.gmem.inode.folios.references.values()) == {1}
    io.space.unmap(BASE, 3 * K)
    assert list(io.gmem.inode.folios.references) == [1]
    second.unmap(0, 1 << 40)
    assert not io.gmem.inode.folios.references


def test_a_copy_of_a_guest_memfd_is_told_by_itself(io: Io) -> None:
    second = io.iommu.alloc_ioas()
    other = io.iommu.bind(io.host.new_dma_device(page_requests=False))
    other.attach(second)
    io.map()
    iova = io.space.copy_to(second, BASE + K, 2 * K)
    io.space.unmap(BASE, 8 * K)
    io.gmem.convert(K, K, Access.PRIVATE)
    with pytest.raises(DmaFault, match=r"dma.unmapped"):
        other.read(iova, 1)
    assert other.read(iova + K, 1) == b"\0"


def test_a_copy_of_a_hole_is_refused(io: Io) -> None:
    io.map(0, 2)
    with pytest.raises(Refusal, match=r"ENOENT \[iommu.not_mapped\] iova 0x40002000"):
        io.space.copy_to(io.space, BASE, 3 * K)


def test_areas_are_of_two_kinds(io: Io) -> None:
    io.map(0, 1)
    io.space.map_pinned(io.view.hva + K, K, iova=BASE + K)
    assert [type(area) for area in io.space.ioas.areas] == [GmemArea, PinnedArea]
    with pytest.raises(Refusal, match=r"EEXIST \[iommu.exists\]"):
        io.map(1, 1)


def test_a_new_page_table_is_filled_and_a_used_address_space_stays(io: Io) -> None:
    io.map()
    hwpt = io.iommu.alloc_hwpt(io.space)
    assert [each.leaves for each in io.space.statistics()] == [8, 8]
    with pytest.raises(Refusal, match=r"EBUSY \[iommufd.in_use\]"):
        io.iommu.destroy(io.space)
    io.iommu.destroy(hwpt)
    assert [each.leaves for each in io.space.statistics()] == [8]


def test_the_hardware_reserves_some_addresses(io: Io) -> None:
    with pytest.raises(Refusal, match=r"EINVAL \[iommu.iova\]"):
        io.space.map_gmem(io.gmem.file, 0, K, iova=0xFEE0_0000)
    empty = io.iommu.alloc_ioas()
    empty.map_gmem(io.gmem.file, 0, K, iova=0xFEE0_0000)
    device = io.iommu.bind(io.host.new_dma_device())
    with pytest.raises(Refusal, match=r"EADDRINUSE \[iommu.reserved\]"):
        device.attach(empty)
