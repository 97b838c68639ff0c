"""One history of a file of huge pages, on every kind of host memory: what is counted and what is read is the same."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestmem import Access, Host, Refusal, VmType
from guestmem.memory import PAGE_SIZE, InodeStatistics
from guestmem.memory.host_pages import more_host_pages
from guestmem.memory.hugetlb import HugePoolStatistics
from guestmem.memory.pages import ORDER_2M
from tests.host_pages import one_at_a_time

HUGE = PAGE_SIZE << ORDER_2M
SHMEM_POLICY = Path("/sys/kernel/mm/transparent_hugepage/hugepages-2048kB/shmem_enabled")
History = tuple[list[InodeStatistics], list[dict[int, HugePoolStatistics]], list[int | bytes]]


def history(kind: str) -> History:
    """Clients would map the file unless its memory is to be hugetlb's."""
    statistics: list[InodeStatistics] = []
    pools: list[dict[int, HugePoolStatistics]] = []
    read: list[int | bytes] = []
    with Host(memory=64 * HUGE, hugepages={ORDER_2M: 8}, clients=not kind.startswith("hugetlb")) as host:
        vm = host.create_vm(VmType.SW_PROTECTED)
        gmem = vm.create_guest_memfd(4 * HUGE, mmap=True, order=ORDER_2M)
        assert gmem.statistics().memory == kind
        vm.set_memory_region(slot=0, gpa=0, size=4 * HUGE, gmem=gmem)
        view = gmem.mmap()

        def look() -> None:
            host.check()
            statistics.append(dataclasses.replace(gmem.statistics(), memory=""))
            pools.append(host.hugetlb.statistics())

        gmem.allocate(0, 2 * HUGE)
        vm.pre_fault(HUGE, 2 * HUGE)
        look()
        gmem.convert(HUGE, 3 * PAGE_SIZE, Access.SHARED)
        view[HUGE : HUGE + 3 * PAGE_SIZE] = b"abc" * PAGE_SIZE
        look()
        gmem.punch_hole(HUGE - PAGE_SIZE, 2 * PAGE_SIZE)
        read.append(view[HUGE : HUGE + 3 * PAGE_SIZE])
        look()
        pin = gmem.pin(view, HUGE + PAGE_SIZE, pages=1)
        with pytest.raises(Refusal, match=r"convert\.busy"):
            gmem.convert(0, 4 * HUGE, Access.PRIVATE)
        with pytest.raises(Refusal, match=r"punch\.busy"):
            gmem.punch_hole(HUGE, HUGE)
        pin.unpin()
        look()
        gmem.convert(0, 4 * HUGE, Access.PRIVATE)
        look()
        gmem.punch_hole(0, 2 * HUGE)
        gmem.convert(0, 4 * HUGE, Access.SHARED)
        read.append(view[HUGE : HUGE + 3 * PAGE_SIZE])
        look()
        gmem.close()
        pools.append(host.hugetlb.statistics())
    return statistics, pools, read


@contextlib.contextmanager
def host_with(kind: str) -> Iterator[None]:
    """A host whose files of huge pages have this memory. Raises: OSError where that cannot be."""
    with one_at_a_time(), contextlib.ExitStack() as stack:
        before = SHMEM_POLICY.read_text().split("[")[1].split("]")[0]
        SHMEM_POLICY.write_text("advise" if kind == "memfd+THP" else "never")
        stack.callback(SHMEM_POLICY.write_text, before)
        if kind.startswith("hugetlb") and stack.enter_context(more_host_pages({ORDER_2M: 8}))[ORDER_2M] < 8:
            raise OSError("no memory for eight huge pages")
        yield


@pytest.mark.parametrize("kind", ["memfd+THP", "hugetlb 2M"])
def test_the_books_are_the_same_whatever_the_memory(kind: str) -> None:
    try:
        with host_with("memfd"):
            expected = history("memfd")
        with host_with(kind):
            assert history(kind) == expected
    except OSError as error:
        pytest.skip(f"this host cannot have {kind}: {error}")
    reads = expected[2]
    assert reads[0] == bytes(PAGE_SIZE) + (b"abc" * PAGE_SIZE)[PAGE_SIZE:], "a part that was punched"
    assert reads[1] == bytes(3 * PAGE_SIZE), "all of it was"
