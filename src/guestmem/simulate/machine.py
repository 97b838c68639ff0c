"""The machine of a row: a Host without host memory, with as many huge pages as the trace needs."""

from __future__ import annotations

import os

from guestmem.host import Host
from guestmem.memory import Backing, Inode
from guestmem.memory.interface import Abilities
from guestmem.memory.pages import PAGE_SHIFT, PAGE_SIZE
from guestmem.simulate.backing import NoBacking
from guestmem.simulate.row import Combination
from guestmem.simulate.source import Survey, folios_for

MAX_BYTES = 64 << 40
"""Memory of the largest machine: sparse files may be larger, huge pages have to be there. What is beyond is refused."""
_MMAP, _INIT_SHARED = 1, 2


class Machine(Host):
    """`spare` is how many bytes are free beside the files' own memory; None: all that HVO saves."""

    def __init__(self, combination: Combination, survey: Survey, spare: int | None) -> None:
        self.combination = combination
        pages = min(survey.most[combination.order], MAX_BYTES // PAGE_SIZE >> combination.order)
        super().__init__(
            memory=pages * PAGE_SIZE << combination.order,
            hugepages={combination.order: pages} if combination.order else {},
            huge_policy=combination.policy,
        )
        if spare is not None and combination.order:
            used = self.pool.available - (spare >> PAGE_SHIFT)
            self.pool.allocate(max(used, 0))  # somebody else has it

    def create(self, size: int, flags: int) -> Inode:
        """A file as the trace has it, its size rounded up to this row's page size. Bytes."""
        order = self.combination.order
        inode = self.new_inode(
            size=folios_for(size, order) * PAGE_SIZE << order,
            abilities=Abilities(mmap=bool(flags & _MMAP), init_shared=bool(flags & _INIT_SHARED), convertible=True),
            order=order,
        )
        inode.allocate_batch = 1 << 18
        return inode

    def _new_backing(self, pages: int, name: str, order: int = 0, mappable: bool = False) -> Backing:
        return NoBacking(pages)


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
