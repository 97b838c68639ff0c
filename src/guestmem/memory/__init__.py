"""The memory provider: guest_memfd itself.

It imports `sched` and `trace` and nothing else of guestmem. Start with `guest_memfd.py`.
"""

from guestmem.memory.backing import Backing, MemfdBacking, read_host, write_host
from guestmem.memory.file import File
from guestmem.memory.folio import FolioReference, Folios
from guestmem.memory.guest_memfd import Inode
from guestmem.memory.hugetlb import HugePool, Hugetlb, Subpool
from guestmem.memory.interface import Abilities, Conversion, HugePolicy, InodeStatistics, Owner, Page, Split
from guestmem.memory.notifier import Access, Invalidation, MemoryUser, Reason, Registration, UnmapFailed, Window
from guestmem.memory.page_table import PageTable
from guestmem.memory.pages import (
    ORDER_1G,
    ORDER_2M,
    ORDER_4K,
    PAGE_SHIFT,
    PAGE_SIZE,
    Offset,
    PageIndex,
    PageRange,
    Pfn,
    Range,
    page_range,
)
from guestmem.memory.pool import FolioSource, Pool, PoolStatistics
from guestmem.memory.vmemmap import Vmemmap

__all__ = [
    "ORDER_1G",
    "ORDER_2M",
    "ORDER_4K",
    "PAGE_SHIFT",
    "PAGE_SIZE",
    "Abilities",
    "Access",
    "Backing",
    "Conversion",
    "File",
    "FolioReference",
    "FolioSource",
    "Folios",
    "HugePolicy",
    "HugePool",
    "Hugetlb",
    "Inode",
    "InodeStatistics",
    "Invalidation",
    "MemfdBacking",
    "MemoryUser",
    "Offset",
    "Owner",
    "Page",
    "PageIndex",
    "PageRange",
    "PageTable",
    "Pfn",
    "Pool",
    "PoolStatistics",
    "Range",
    "Reason",
    "Registration",
    "Split",
    "Subpool",
    "UnmapFailed",
    "Vmemmap",
    "Window",
    "page_range",
    "read_host",
    "write_host",
]
