"""Files of huge pages through the calls: creation, the posted conversion calls, fallocate; every misuse by its rule."""

from __future__ import annotations

import errno
import struct

import pytest

from guestmem.host import Gmem, Host
from guestmem.kvm.gmem import create_guest_memfd, gmem_convert
from guestmem.memory import ORDER_1G, ORDER_2M, PAGE_SIZE, Access
from guestmem.trace import Refusal
from guestmem.uapi import kvm as uapi
from guestmem.uapi.kvm import VmType
from guestmem.uapi.levels import LEVELS
from guestmem.uapi.structs import CreateGuestMemfd, GmemConvert
from tests.kvm.conftest import Bench, ask

K = PAGE_SIZE
M2 = 2 << 20
G1 = 1 << 30
HUGETLB = uapi.GUEST_MEMFD_FLAG_HUGETLB


def flags(log2: int, others: int = HUGETLB) -> int:
    return log2 << 58 | others


@pytest.fixture
def host() -> Host:
    return Host(memory=8 * G1, hugepages={ORDER_2M: 16, ORDER_1G: 2})


@pytest.mark.parametrize(
    ("size", "alleged", "expected"),
    [
        (M2, HUGETLB, (errno.EINVAL, "create.huge_size")),  # the size must be stated
        (M2, flags(21, 0), (errno.EINVAL, "create.huge_size")),  # a size without the flag
        (M2, flags(21, uapi.GUEST_MEMFD_FLAG_MMAP), (errno.EINVAL, "create.huge_size")),
        (16 * K, flags(14), (errno.EINVAL, "create.huge_size")),  # 16K: of another architecture
        (M2, flags(12), (errno.EINVAL, "create.huge_size")),
        (M2, flags(63), (errno.EINVAL, "create.huge_size")),
        (M2, flags(21, HUGETLB | 8), (errno.EINVAL, "create.flags")),
        (M2, flags(13, 8), (errno.EINVAL, "create.flags")),
        (0, flags(21), (errno.EINVAL, "create.size")),
        (K - 1, flags(21), (errno.EINVAL, "create.size")),
        (K, flags(21), (errno.EINVAL, "create.huge_unaligned")),
        (M2 + K, flags(21), (errno.EINVAL, "create.huge_unaligned")),
        (M2, flags(30), (errno.EINVAL, "create.huge_unaligned")),
        (17 * M2, flags(21), (errno.ENOMEM, "create.reservation")),
        (3 * G1, flags(30), (errno.ENOMEM, "create.reservation")),
        (1 << 62, flags(30), (errno.ENOMEM, "create.reservation")),
    ],
)
def test_misuse_of_create_by_rule(host: Host, size: int, alleged: int, expected: tuple[int, str]) -> None:
    vm = host.create_vm(VmType.SW_PROTECTED)
    before = host.process.fds.open_fds()
    with pytest.raises(Refusal) as caught:
        host.run(create_guest_memfd(vm.kvm, host.process.fds, CreateGuestMemfd(size, alleged)))
    assert (caught.value.errno, caught.value.rule) == expected
    assert host.process.fds.open_fds() == before
    assert not host.inodes
    host.check()
    host.close()


@pytest.mark.parametrize("others", [HUGETLB | extra for extra in range(4)])
@pytest.mark.parametrize(("log2", "order"), [(21, ORDER_2M), (30, ORDER_1G)])
def test_huge_beside_mmap_and_init_shared(host: Host, log2: int, order: int, others: int) -> None:
    vm = host.create_vm(VmType.SW_PROTECTED)
    size = 32 << 20 if order == ORDER_2M else G1
    fd = host.run(create_guest_memfd(vm.kvm, host.process.fds, CreateGuestMemfd(size, flags(log2, others))))
    (inode,) = host.inodes
    assert inode.order == order
    assert (inode.abilities.mmap, inode.abilities.init_shared) == (bool(others & 1), bool(others & 2))
    assert host.hugetlb.pools[order].reserved == inode.pages >> order
    host.run(host.process.fds.close(fd))
    host.check()
    assert host.hugetlb.pools[order].reserved == 0
    host.close()


@pytest.mark.parametrize("level", ["v6.18", "v7.3", "v7.4"])
def test_older_kernels_know_neither_the_flag_nor_the_calls(level: str) -> None:
    with Host(level=LEVELS[level], hugepages={ORDER_2M: 1}) as host:
        vm = host.create_vm(VmType.SW_PROTECTED)
        with pytest.raises(Refusal) as caught:
            host.run(create_guest_memfd(vm.kvm, host.process.fds, CreateGuestMemfd(M2, flags(21))))
        assert caught.value.rule == "create.flags"
        gmem = vm.create_guest_memfd(K)
        answer, _ = ask(host, gmem.fd, uapi.KVM_GMEM_CONVERT_SHARED, GmemConvert(0, K).pack())
        assert answer == "ENOTTY"


# KVM_GMEM_CONVERT_SHARED and _PRIVATE


@pytest.fixture
def gmem(host: Host) -> Gmem:
    return host.create_vm(VmType.SW_PROTECTED).create_guest_memfd(4 * M2, mmap=True, order=ORDER_2M)


@pytest.mark.parametrize(
    ("alleged", "rule"),
    [
        (GmemConvert(0, M2, error_offset=1), "error_offset"),
        (GmemConvert(2**64 - K, 2 * K), "range"),
        (GmemConvert(4 * M2, K), "range"),
        (GmemConvert(1, 8 * M2), "range"),
        (GmemConvert(1, K), "unaligned"),
        (GmemConvert(0, K + 1), "unaligned"),
    ],
)
def test_misuse_of_the_posted_calls_in_their_order(host: Host, gmem: Gmem, alleged: GmemConvert, rule: str) -> None:
    for to, request in ((Access.SHARED, uapi.KVM_GMEM_CONVERT_SHARED), (Access.PRIVATE, uapi.KVM_GMEM_CONVERT_PRIVATE)):
        with pytest.raises(Refusal) as caught:
            host.run(gmem_convert(gmem.file, alleged, to))
        assert (caught.value.errno, caught.value.rule) == (errno.EINVAL, f"gmem_convert.{rule}")
        assert ask(host, gmem.fd, request, alleged.pack()) == ("EINVAL", alleged.pack())
    assert gmem.accesses() == [(0, 4 * M2, Access.PRIVATE)]
    host.close()


def test_both_calls_convert_and_an_empty_range_is_nothing(host: Host, gmem: Gmem) -> None:
    def call(request: int, offset: int, size: int) -> str:
        return ask(host, gmem.fd, request, GmemConvert(offset, size, reserved=(1, 2, 3, 4, 5)).pack())[0]

    assert call(uapi.KVM_GMEM_CONVERT_SHARED, M2 + K, K) == "0"
    assert call(uapi.KVM_GMEM_CONVERT_SHARED, 64 * M2, 0) == "0"
    assert gmem.accesses() == [
        (0, M2 + K, Access.PRIVATE),
        (M2 + K, K, Access.SHARED),
        (M2 + 2 * K, 3 * M2 - 2 * K, Access.PRIVATE),
    ]
    assert call(uapi.KVM_GMEM_CONVERT_PRIVATE, 0, 4 * M2) == "0"
    assert gmem.accesses() == [(0, 4 * M2, Access.PRIVATE)]
    host.close()


def test_a_busy_page_comes_back_in_error_offset(host: Host, gmem: Gmem) -> None:
    gmem.convert(0, 4 * M2, Access.SHARED)
    view = gmem.mmap()
    pin = gmem.pin(view, M2 + 5 * K, 1)
    answer, after = ask(host, gmem.fd, uapi.KVM_GMEM_CONVERT_PRIVATE, GmemConvert(0, 4 * M2).pack())
    assert answer == "EAGAIN"
    assert struct.unpack_from("<Q", after, 16) == (M2 + 5 * K,)
    pin.unpin()
    host.close()


def test_a_vm_without_private_memory_has_nothing_to_convert(host: Host) -> None:
    gmem = host.create_vm(VmType.DEFAULT).create_guest_memfd(M2, mmap=True, init_shared=True, order=ORDER_2M)
    answer, _ = ask(host, gmem.fd, uapi.KVM_GMEM_CONVERT_PRIVATE, GmemConvert(0, M2).pack())
    assert answer == "EINVAL"
    host.close()


# With users


def test_a_pin_through_a_mapping_holds_a_part_and_not_the_huge_page() -> None:
    """The parts of a shared huge page are pinned one by one; the others convert, and merge when the last can."""
    bench = Bench(pages=64, hugepages={2: 2}, orders=(2, 1, 0))
    gmem = bench.vm.create_guest_memfd(8 * K, mmap=True, init_shared=True, order=2)
    view = gmem.mmap()
    view[0] = 1
    pin = gmem.pin(view, K, 1)
    for page in (0, 2, 3):
        gmem.convert(page * K, K, Access.PRIVATE)
    assert gmem.statistics().folios == {2: 0, 1: 1, 0: 2}
    with pytest.raises(Refusal) as caught:
        gmem.convert(0, 4 * K, Access.PRIVATE)
    assert caught.value.rule == "convert.busy"
    pin.unpin()
    gmem.convert(0, 4 * K, Access.PRIVATE)
    assert gmem.statistics().folios == {2: 1, 1: 0, 0: 0}
    bench.close()


def test_close_while_pinned_returns_the_huge_page_after_the_file_and_the_vm_are_gone() -> None:
    bench = Bench(pages=64, hugepages={2: 2}, orders=(2, 1, 0))
    gmem = bench.vm.create_guest_memfd(8 * K, mmap=True, init_shared=True, order=2)
    view = gmem.mmap()
    view[K] = 0x5A
    pin = gmem.pin(view, K, 1)
    bench.run(bench.host.process.mm.unmap(view.hva, len(view)))
    gmem.close()
    bench.vm.close()
    pool = bench.host.hugetlb.pools[2]
    assert bench.host.inodes[0].destroyed
    assert bench.host.vms[0].destroyed
    assert (pool.free, pool.reserved, pool.charged) == (1, 0, 1)
    pin.unpin()
    assert (pool.free, pool.charged) == (2, 0)
    bench.close()
