"""The IOMMU: mapping and unmapping, translation, and what a mapped domain adds to a conversion.

Peers: mmap and munmap of a memfd of the same size with every page there (MAP_POPULATE); the bare copy of the bytes; the
same conversion with no domain.
"""

from __future__ import annotations

import mmap
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

from bench.harness import ROUNDS, Row, Work, compare, report
from guestmem.host import Gmem, Host
from guestmem.iommu import Domain
from guestmem.iommu.addresses import IoPage
from guestmem.iommu.script import DeviceHandle, IoasHandle
from guestmem.memory import Access, read_host
from guestmem.memory.pages import ORDER_1G, ORDER_2M
from guestmem.uapi.kvm import VmType

BASE = 1 << 40
SIZES = {"4K": 1 << 12, "2M": 1 << 21, "1G": 1 << 30}
_MAP_POPULATE = 0x8000


class Set:
    """A file, an address space and a device on it. Of huge pages the file is private and the device trusted: shared
    pages are always of 4K."""

    def __init__(self, host: Host, size: int, order: int = 0) -> None:
        self.host = host
        vm = host.create_vm(VmType.SW_PROTECTED)
        self.gmem: Gmem = vm.create_guest_memfd(size, mmap=True, init_shared=not order, order=order)
        iommu = host.open_iommu()
        self.space: IoasHandle = iommu.alloc_ioas()
        self.device: DeviceHandle = iommu.bind(host.new_dma_device())
        self.device.attach(iommu.alloc_hwpt(self.space, trusted=bool(order)))
        self.gmem.allocate(0, size)

    @property
    def domain(self) -> Domain:
        return self.space.ioas.domains[0]


def run() -> None:
    rows = []
    for name, order in (("4K", 0), ("2M", ORDER_2M), ("1G", ORDER_1G)):
        with _with(order) as it:
            rows.append(compare(f"{name}, one leaf", _map(it, SIZES[name]), _mmap(SIZES[name]), "map and unmap"))
    with _with(0) as it:
        rows.append(compare("2M of 4K pages", _map(it, SIZES["2M"]), _mmap(SIZES["2M"]), "map and unmap"))
        rows.append(compare("2M, following", _map(it, SIZES["2M"], follow=True), _mmap(SIZES["2M"]), "map and unmap"))
    report("mapping a guest_memfd for DMA", "mmap of a memfd, populated, and munmap", rows)
    with _with(0) as it:
        it.space.map_gmem(it.gmem.file, 0, SIZES["2M"], iova=BASE)
        rows = [
            compare("IOTLB hit", _translate(it, flush=False), None, "translation"),
            compare("IOTLB miss, a walk", _translate(it, flush=True), None, "translation"),
            compare("DMA read of 64 bytes", _read(it, 64), _copy(it, 64), "DMA"),
            compare("DMA read of 4K", _read(it, 4096), _copy(it, 4096), "DMA"),
        ]
    report("DMA", "the copy alone", rows)
    with _with(0) as it, _with(0) as bare:
        it.space.map_gmem(it.gmem.file, 0, SIZES["2M"], iova=BASE, follow=True)
        rows = [
            compare("one mapped domain", _convert(it), _convert(bare), "conversion"),
            compare("and a DMA each time it is shared", _convert(it, touch=True), _convert(bare), "conversion"),
            Row("what one mapped domain adds", _added(_convert(it), _convert(bare)), "", None),
        ]
    report("conversion of 4K, to private and back in turns", "no domain", rows)


def _added(subject: Work, peer: Work) -> str:
    """The median of the differences, in turns, in time of this CPU: the difference of two waits would be noise."""

    def cpu_seconds(work: Work) -> float:
        began = time.process_time()
        work(500)
        return (time.process_time() - began) / 500

    differences = [cpu_seconds(subject) - cpu_seconds(peer) for _ in range(8 * ROUNDS)]
    return f"{statistics.median(differences) * 1e6:.1f} us a conversion"


@contextmanager
def _with(order: int) -> Iterator[Set]:
    size = max(1 << order + 12, SIZES["2M"])
    with Host(memory=4 << 30, hugepages={order: 1} if order else None) as host:
        yield Set(host, size, order)


def _map(it: Set, size: int, follow: bool = False) -> Work:
    def work(count: int) -> None:
        for _ in range(count):
            it.space.map_gmem(it.gmem.file, 0, size, iova=BASE, follow=follow)
            it.space.unmap(BASE, size)

    return work


def _mmap(size: int) -> Work:
    fd = os.memfd_create("peer")
    os.ftruncate(fd, size)
    os.posix_fallocate(fd, 0, size)

    def work(count: int) -> None:
        for _ in range(count):
            mmap.mmap(fd, size, flags=mmap.MAP_SHARED | _MAP_POPULATE).close()

    return work


def _translate(it: Set, flush: bool) -> Work:
    page, domain = IoPage(BASE >> 12), it.domain

    def work(count: int) -> None:
        for _ in range(count):
            if flush:
                domain.iotlb.entries.clear()
            domain.translate(page)

    return work


def _read(it: Set, size: int) -> Work:
    async def many(count: int) -> None:
        for _ in range(count):
            await it.device.device.read(BASE, size)

    return lambda count: it.host.run(many(count))


def _copy(it: Set, size: int) -> Work:
    hva = it.gmem.inode.backing.hva(0)  # type: ignore[arg-type]

    def work(count: int) -> None:
        for _ in range(count):
            read_host(hva, size)

    return work


def _convert(it: Set, touch: bool = False) -> Work:
    turn = 0

    def work(count: int) -> None:
        nonlocal turn
        for _ in range(count):
            turn += 1
            it.gmem.convert(0, 4096, Access.PRIVATE if turn % 2 else Access.SHARED)
            if touch and not turn % 2:
                it.device.read(BASE, 1)

    return work
