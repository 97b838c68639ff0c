"""Faults a second, by kind of user: a page that is there, and a page that must be allocated and zeroed.

The peers are the real kernel's: the first touch of a page of a plain memfd through mmap, in this process, and of a real
guest_memfd where /dev/kvm has one.
"""

from __future__ import annotations

import mmap
import os

from bench.harness import Row, Work, compare, report
from bench.realkvm import RealGuestMemfd
from guestmem.host import Host
from guestmem.kvm.addresses import Gfn
from guestmem.kvm.mmu import page_fault
from guestmem.memory import PAGE_SIZE, Access, PageIndex, Range
from guestmem.uapi.kvm import VmType

PAGES = 1 << 14
EVERYTHING = Range(PageIndex(0), PageIndex(PAGES))


def run() -> None:
    memfd = os.memfd_create("peer")
    os.ftruncate(memfd, PAGES * PAGE_SIZE)
    peer = _touch(memfd)
    with Host() as host:
        users = {
            "userspace, new page": _userspace(host, fresh=True),
            "userspace, page is there": _userspace(host, fresh=False),
            "KVM shared, new page": _kvm(host, Access.SHARED, fresh=True),
            "KVM shared, page is there": _kvm(host, Access.SHARED, fresh=False),
            "KVM private, page is there": _kvm(host, Access.PRIVATE, fresh=False),
        }
        rows: list[Row] = [compare(name, work, peer, "fault") for name, work in users.items()]
    report("faults", "memfd, new page", rows)
    os.close(memfd)
    with RealGuestMemfd.open(PAGES * PAGE_SIZE) as real, Host() as host:
        if real is None:
            print("real guest_memfd: none here, no ratio")
        else:
            row = compare("userspace, new page", _userspace(host, fresh=True), _touch(real.fd), "fault")
            report("faults against the real guest_memfd", "guest_memfd, new page", [row])


def _userspace(host: Host, fresh: bool) -> Work:
    """Touch pages in turn; the entries (and with `fresh` the pages) are dropped once a round."""
    gmem = host.create_vm(VmType.SW_PROTECTED).create_guest_memfd(PAGES * PAGE_SIZE, mmap=True, init_shared=True)
    view = gmem.mmap()
    if not fresh:
        view.write(0, bytes(PAGES * PAGE_SIZE))
    mm = host.process.mm
    turn = 0

    def work(count: int) -> None:
        nonlocal turn
        for _ in range(count):
            if turn % PAGES == 0:
                host.run(gmem.inode.punch_hole(EVERYTHING) if fresh else mm.discard(view.hva, PAGES * PAGE_SIZE))
            host.run(mm.touch(view.hva + turn % PAGES * PAGE_SIZE, write=False))
            turn += 1

    return work


def _kvm(host: Host, access: Access, fresh: bool) -> Work:
    vm = host.create_vm(VmType.SW_PROTECTED)
    gmem = vm.create_guest_memfd(PAGES * PAGE_SIZE, mmap=True, init_shared=access is Access.SHARED)
    vm.set_memory_region(0, 0, PAGES * PAGE_SIZE, gmem=gmem)
    if not fresh:
        gmem.allocate(0, PAGES * PAGE_SIZE)
    stage2 = vm.kvm.stage2
    turn = 0

    async def zap() -> None:
        async with stage2.mmu_lock:
            stage2.zap(Range(Gfn(0), Gfn(PAGES)), (access,))

    def work(count: int) -> None:
        nonlocal turn
        for _ in range(count):
            if turn % PAGES == 0:
                host.run(gmem.inode.punch_hole(EVERYTHING) if fresh else zap())
            host.run(page_fault(vm.kvm, turn % PAGES * PAGE_SIZE, write=True))
            turn += 1

    return work


def _touch(fd: int) -> Work:
    """First touches through a shared mapping, page after page; a hole over all of it once a round."""
    mapping = mmap.mmap(fd, PAGES * PAGE_SIZE)
    turn = 0

    def work(count: int) -> None:
        nonlocal turn
        for _ in range(count):
            if turn % PAGES == 0:
                mapping.madvise(mmap.MADV_REMOVE)
            mapping[turn % PAGES * PAGE_SIZE]
            turn += 1

    return work
