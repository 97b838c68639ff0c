"""fallocate of 4 GiB in huge pages, against 4 KiB pages of the real guest_memfd and a memset of the same memory.

As root the host is asked for the huge pages, and for huge pages of memfds, while this runs; it gets them back whatever
happens. A first round is not counted: on a virtual machine the hypervisor may have to find the memory first.

The real guest_memfd does not zero in fallocate but at the first touch of each page, so a row has both together. Memsets
are of memory that is there and mapped in huge pages; some CPUs write zeros faster than other bytes if they are very
many, hence two. Memory without a pool of its own goes back to the host at a hole, and a hypervisor may take it from
there; to leave that out, it is allocated, punched and timed while it is allocated again.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.harness import ROUNDS, Row, report, show
from bench.realkvm import RealGuestMemfd
from guestmem.host import Gmem, Host
from guestmem.memory import MemfdBacking, PageIndex, Range
from guestmem.memory.backing import fallocate as host_fallocate
from guestmem.memory.host_pages import more_host_pages
from guestmem.memory.pages import ORDER_1G, ORDER_2M, PAGE_SHIFT
from guestmem.uapi.kvm import VmType

GIB = 1 << 30
SIZE = 4 * GIB
KEEP, PUNCH = 1, 3
_SHMEM_POLICY = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")

Measurement = Callable[[], float]
"""Does the thing once and gives back the seconds that it took, preparation and clearing up left out."""


def run() -> None:
    with contextlib.ExitStack() as stack:
        real = stack.enter_context(RealGuestMemfd.open(SIZE))
        if real is None:
            print("real guest_memfd: none here, compared with memfd")
        peer = real.fd if real is not None else _memfd(stack)
        name = "guest_memfd, 4K" if real is not None else "memfd, 4K"
        rows = [row for order in (ORDER_2M, ORDER_1G) for row in _hugetlb(order, peer)]
        with _memfds_may_be_huge():
            rows += _without_hugetlb("memfd+THP", ORDER_2M, peer)
        rows += _without_hugetlb("memfd", 0, peer)
        report("fallocate of huge pages, each GiB", f"{name}; or memset", rows)


def _hugetlb(order: int, peer: int) -> list[Row]:
    page_size = 1 << (order + PAGE_SHIFT)
    name = "1G" if order == ORDER_1G else "2M"
    with contextlib.ExitStack() as stack:
        try:
            got = stack.enter_context(more_host_pages({order: SIZE // page_size}))[order]
        except OSError as error:
            print(f"hugetlb {name}: {error.strerror}, no rows")
            return []
        size = min(SIZE, got * page_size) // GIB * GIB
        if not size:
            print(f"hugetlb {name}: the host has set aside {got} pages of {SIZE // page_size}, no rows")
            return []
        _warm(size, order)
        kind = f"hugetlb {name}, {size // GIB} GiB"
        return [
            _compare(f"{kind}: fallocate", size, _allocate(size, order), _peer_allocate(peer, size)),
            _compare("  the same; memset of ones", size, _allocate(size, order), _memset(size, order, 1)),
            _compare("  the same; memset of zeros in one go", size, _allocate(size, order), _memset(size, order, 0)),
            _compare("  after a hole, and zeroed; memset of ones", size, _again(size, order), _memset(size, order, 1)),
            _compare("  and all of it written", size, _write_all(size, order), _peer_write_all(peer, size), rounds=2),
        ]


def _without_hugetlb(kind: str, order: int, peer: int) -> list[Row]:
    with _file(GIB, order) as gmem:
        backing = gmem.inode.backing
        assert isinstance(backing, MemfdBacking)
        if backing.kind != kind:
            print(f"{kind}: this host has {backing.kind} only, no rows")
            return []
    return [_compare(f"{kind}, 1 GiB: fallocate", GIB, _allocate(GIB, order, warm=True), _peer_allocate(peer, GIB))]


def _compare(name: str, size: int, subject: Measurement, peer: Measurement, rounds: int = ROUNDS) -> Row:
    """In turns, after one round that is not counted; seconds for each GiB."""
    times = [(subject(), peer()) for _ in range(rounds + 1)][1:]
    ours, theirs = (statistics.median(time) * GIB / size for time in zip(*times, strict=True))
    return Row(name, show(ours, "GiB"), show(theirs, "GiB"), statistics.median(a / b for a, b in times))


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# Ours


@contextlib.contextmanager
def _file(size: int, order: int) -> Iterator[Gmem]:
    """A file of a new machine; bytes."""
    hugepages = {order: size >> (order + PAGE_SHIFT)} if order else {}
    with Host(memory=2 * size, hugepages=hugepages) as host:
        yield host.create_vm(VmType.SW_PROTECTED).create_guest_memfd(size, order=order)


def _warm(size: int, order: int) -> None:
    """Pages that are new to the host's pool are slow for longer than one round where there is a hypervisor."""
    for _ in range(3):
        with _file(size, order) as gmem:
            gmem.allocate(0, size)
            ctypes.memset(gmem.inode.backing.hva(PageIndex(0)), 1, size)


def _allocate(size: int, order: int, warm: bool = False) -> Measurement:
    def measure() -> float:
        with _file(size, order) as gmem:
            if warm:
                gmem.allocate(0, size)
                gmem.punch_hole(0, size)
            return _timed(lambda: gmem.allocate(0, size))

    return measure


def _again(size: int, order: int) -> Measurement:
    """Allocated, written and punched before, so it must be zeroed here; its zeroing, at the first fault, is counted."""

    def measure() -> float:
        with _file(size, order) as gmem:
            gmem.allocate(0, size)
            ctypes.memset(gmem.inode.backing.hva(PageIndex(0)), 1, size)
            gmem.punch_hole(0, size)
            return _timed(lambda: _allocate_and_zero(gmem, order))

    return measure


def _allocate_and_zero(gmem: Gmem, order: int) -> None:
    gmem.allocate(0, gmem.inode.size)
    for start in range(0, gmem.inode.pages, 1 << order):
        gmem.inode.backing.zero(Range(PageIndex(start), PageIndex(start + (1 << order))))


def _memset(size: int, order: int, byte: int) -> Measurement:
    def measure() -> float:
        with _file(size, order) as gmem:
            gmem.allocate(0, size)
            return _timed(lambda: ctypes.memset(gmem.inode.backing.hva(PageIndex(0)), byte, size))

    return measure


def _write_all(size: int, order: int) -> Measurement:
    def work(gmem: Gmem) -> None:
        _allocate_and_zero(gmem, order)
        ctypes.memset(gmem.inode.backing.hva(PageIndex(0)), 1, size)

    def measure() -> float:
        with _file(size, order) as gmem:
            return _timed(lambda: work(gmem))

    return measure


# The peer's


def _memfd(stack: contextlib.ExitStack) -> int:
    backing = MemfdBacking(SIZE >> PAGE_SHIFT, "peer")
    stack.callback(backing.close)
    return backing.fd


def _peer_allocate(fd: int, size: int) -> Measurement:
    pages = Range(PageIndex(0), PageIndex(size >> PAGE_SHIFT))

    def measure() -> float:
        try:
            return _timed(lambda: host_fallocate(fd, KEEP, pages))
        finally:
            host_fallocate(fd, PUNCH, pages)

    return measure


def _peer_write_all(fd: int, size: int) -> Measurement:
    pages = Range(PageIndex(0), PageIndex(size >> PAGE_SHIFT))

    def work(address: int) -> None:
        host_fallocate(fd, KEEP, pages)
        ctypes.memset(address, 1, size)

    def measure() -> float:
        with mmap.mmap(fd, size) as mapping:
            byte = ctypes.c_char.from_buffer(mapping)
            address = ctypes.addressof(byte)
            del byte
            try:
                return _timed(lambda: work(address))
            finally:
                host_fallocate(fd, PUNCH, pages)

    return measure


@contextlib.contextmanager
def _memfds_may_be_huge() -> Iterator[None]:
    """Where that may be changed."""
    try:
        before = _SHMEM_POLICY.read_text().split("[")[1].split("]")[0]
        _SHMEM_POLICY.write_text("advise")
    except OSError:
        yield
        return
    try:
        yield
    finally:
        _SHMEM_POLICY.write_text(before)
