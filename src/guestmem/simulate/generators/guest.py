"""The words that generated traces are made of. One guest_memfd, number 1, mappable and private at birth, behind all of
the guest's memory; page and guest frame are the same number, so there is no hole below 4 GiB."""

from __future__ import annotations

from collections.abc import Iterator

from guestmem.memory.pages import ORDER_1G, PAGE_SHIFT
from guestmem.simulate.source import Replayable
from guestmem.trace import events as event

INODE = 1
_MMAP = 1
LOW_MEMORY = 3 << (30 - PAGE_SHIFT)
"""Pages below the 32-bit devices: where a guest puts what must have 32-bit addresses. QEMU's q35 has 2 or 3 GiB."""


def create(pages: int) -> event.GmemCreate:
    return event.GmemCreate(INODE, pages << PAGE_SHIFT, _MMAP)


def destroy() -> event.GmemDestroy:
    return event.GmemDestroy(INODE)


def convert(start: int, end: int, to: str) -> event.GmemConvert:
    return event.GmemConvert(INODE, start, end, to)


def punch(start: int, end: int) -> event.GmemFolioFree:
    return event.GmemFolioFree(INODE, start, end, 0)


def touch(start: int, end: int, access: str = "private") -> Iterator[event.GmemFault]:
    """The guest reaches all of the pages, in the largest aligned blocks."""
    while start < end:
        aligned = (start & -start).bit_length() - 1 if start else ORDER_1G
        order = min(aligned, (end - start).bit_length() - 1, ORDER_1G)
        yield event.GmemFault(INODE, start, "kvm", access, 0, order)
        start += 1 << order


def share(start: int, end: int) -> Iterator[Replayable]:
    """One request, and the guest uses what it asked for."""
    yield convert(start, end, "shared")
    yield from touch(start, end, "shared")


def unshare(start: int, end: int) -> Iterator[Replayable]:
    yield convert(start, end, "private")
    yield from touch(start, end, "private")


def share_in_pieces(start: int, end: int, piece: int = 512) -> Iterator[Replayable]:
    """2 MiB a request: KVM handles no more of a TDX guest's MapGPA at a time (TDX_MAP_GPA_MAX_LEN), and an entry of an
    SNP guest's page state change is one 2M page."""
    for first in range(start, end, piece):
        yield from share(first, min(first + piece, end))


def unshare_in_pieces(start: int, end: int, piece: int = 512) -> Iterator[Replayable]:
    for first in range(start, end, piece):
        yield from unshare(first, min(first + piece, end))
