"""Bandwidth of fallocate and of punching, against a plain memfd and the real guest_memfd where there is one."""

from __future__ import annotations

import os

from bench.harness import Row, Work, compare, report
from bench.realkvm import RealGuestMemfd
from guestmem.host import Host
from guestmem.memory import MemfdBacking, PageIndex, Range
from guestmem.memory.backing import fallocate as host_fallocate
from guestmem.uapi.kvm import VmType

SIZE = 1 << 30
PAGES = Range(PageIndex(0), PageIndex(SIZE >> 12))
KEEP, PUNCH = 1, 3


def run() -> None:
    backing = MemfdBacking(SIZE >> 12, "peer")
    rows = [compare("allocate and punch 1 GiB", ours(), theirs(backing.fd), "GiB")]
    backing.close()
    report("fallocate", "memfd", rows)
    with RealGuestMemfd.open(SIZE) as real:
        if real is None:
            print("real guest_memfd: none here, no ratio")
        else:
            row: Row = compare("allocate and punch 1 GiB", ours(), theirs(real.fd), "GiB")
            report("fallocate against the real guest_memfd", "guest_memfd", [row])


def ours() -> Work:
    host = Host()
    inode = host.create_vm(VmType.SW_PROTECTED).create_guest_memfd(SIZE).inode

    def work(count: int) -> None:
        for _ in range(count):
            host.run(inode.fallocate(KEEP, 0, SIZE))
            host.run(inode.fallocate(PUNCH, 0, SIZE))

    return work


def theirs(fd: int) -> Work:
    def work(count: int) -> None:
        for _ in range(count):
            host_fallocate(fd, KEEP, PAGES)
            host_fallocate(fd, PUNCH, PAGES)

    os.fstat(fd)
    return work
