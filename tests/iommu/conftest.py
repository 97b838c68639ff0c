"""A watched host with a file, an IO address space and a device attached to it: every S-property after every step."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from guestmem.host import Gmem
from guestmem.iommu.script import DeviceHandle
from guestmem.memory import PAGE_SIZE
from guestmem.userspace import View
from tests.kvm.conftest import Bench

K = PAGE_SIZE
BASE = 1 << 30


class Io:
    """`view` shows the 8 pages of `gmem`; `device` (T=0, page requests) and `trusted` (T=1) are attached to `space`."""

    def __init__(self) -> None:
        self.bench = Bench()
        self.host = self.bench.host
        self.gmem: Gmem = self.bench.gmem()
        self.view: View = self.gmem.mmap()
        self.iommu = self.host.open_iommu()
        self.space = self.iommu.alloc_ioas()
        self.device = self.plug()

    def plug(self, *, page_requests: bool = True, trusted: bool = False) -> DeviceHandle:
        device = self.iommu.bind(self.host.new_dma_device(page_requests=page_requests))
        device.attach(self.iommu.alloc_hwpt(self.space, trusted=True) if trusted else self.space)
        return device

    def map(self, page: int = 0, pages: int = 8, *, follow: bool = False, writable: bool = True) -> int:
        """Pages of the file at BASE, at their own places."""
        return self.space.map_gmem(
            self.gmem.file, page * K, pages * K, iova=BASE + page * K, follow=follow, writable=writable
        )

    def named(self, tag: str) -> list[object]:
        """The events of a kind."""
        return [event for event in self.bench.events if event.__struct_config__.tag == tag]


@pytest.fixture
def io() -> Iterator[Io]:
    io = Io()
    yield io
    io.host.check()
    io.bench.close()
    assert not io.host.iommu.ioases
