"""The memory provider: guest_memfd itself.

It imports `sched` and `trace` and nothing else of guestmem. Start with `guest_memfd.py`.
"""

from guestmem.memory.backing import Backing, MemfdBacking, read_host, write_host
from guestmem.memory.file import File
from guestmem.memory.folio import FolioReference, Folios
from guestmem.memory.guest_memfd import Inode
from guestmem.memory.interface import Abilities, InodeStatistics, Owner, Page
from guestmem.memory.notifier import Access, Invalidation, MemoryUser, Reason, Registration, UnmapFailed, Window
from guestmem.memory.page_table import PageTable
from guestmem.memory.pages import PAGE_SHIFT, PAGE_SIZE, Offset, PageIndex, PageRange, Pfn, Range, page_range
from guestmem.memory.pool import Pool, PoolStatistics

__all__ = [
    "PAGE_SHIFT",
    "PAGE_SIZE",
    "Abilities",
    "Access",
    "Backing",
    "File",
    "FolioReference",
    "Folios",
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
    "UnmapFailed",
    "Window",
    "page_range",
    "read_host",
    "write_host",
]
