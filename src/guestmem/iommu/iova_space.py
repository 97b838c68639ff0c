"""Which IOVAs may be used: the ranges that the hardware reserves, those that the user allows, and where there is room.

Source: drivers/iommu/iommufd/io_pagetable.c iopt_alloc_iova, iopt_check_iova, iopt_set_allow_iova,
iopt_reserve_iova.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from guestmem.iommu.addresses import Iova
from guestmem.memory import PAGE_SIZE
from guestmem.trace import Refusal

U64_MAX = (1 << 64) - 1
ADDRESS_BITS = 48
_INTERRUPTS = (0xFEE0_0000, 0xFEEF_FFFF)


class IovaRange(NamedTuple):
    """From `start` to `last`, both included, as struct iommu_iova_range has it."""

    start: int
    last: int

    def overlaps(self, other: IovaRange) -> bool:
        return self.start <= other.last and other.start <= self.last


RESERVED = (IovaRange(*_INTERRUPTS), IovaRange(1 << ADDRESS_BITS, U64_MAX))
"""What no domain of our hardware can map: writes that are interrupts, and what has more than 48 bits."""


class IovaSpace:
    """`reserved` is in force while there is a domain. `allowed` is the user's list; empty allows all."""

    def __init__(self) -> None:
        self.reserved: tuple[IovaRange, ...] = ()
        self.allowed: tuple[IovaRange, ...] = ()

    def reserve(self, used: Iterable[IovaRange]) -> None:
        """A domain comes: what it cannot map is reserved. Raises: Refusal EADDRINUSE `iommu.reserved`."""
        for taken in (*used, *self.allowed):
            if any(taken.overlaps(reserved) for reserved in RESERVED):
                raise Refusal(errno.EADDRINUSE, "iommu.reserved", start=taken.start, last=taken.last)
        self.reserved = RESERVED

    def allow(self, ranges: tuple[IovaRange, ...]) -> None:
        """Replace the user's list. Raises: Refusal EADDRINUSE `iommu.reserved`."""
        for wanted in ranges:
            if any(wanted.overlaps(reserved) for reserved in self.reserved):
                raise Refusal(errno.EADDRINUSE, "iommu.reserved", start=wanted.start, last=wanted.last)
        self.allowed = ranges

    def usable(self) -> Iterator[IovaRange]:
        """What is not reserved, in order."""
        yield from _holes(IovaRange(0, U64_MAX), sorted(self.reserved))

    def check(self, iova: int, length: int, used: Iterable[IovaRange]) -> None:
        """Whether a fixed IOVA may be used. Raises: Refusal EINVAL `iommu.unaligned`; EOVERFLOW `iommu.overflow`;
        EINVAL `iommu.iova`; EEXIST `iommu.exists`; in this order."""
        if iova % PAGE_SIZE:
            raise Refusal(errno.EINVAL, "iommu.unaligned", iova=iova)
        wanted = IovaRange(iova, iova + length - 1)
        if wanted.last > U64_MAX:
            raise Refusal(errno.EOVERFLOW, "iommu.overflow", iova=iova, length=length)
        if any(wanted.overlaps(reserved) for reserved in self.reserved):
            raise Refusal(errno.EINVAL, "iommu.iova", iova=iova, length=length)
        if any(wanted.overlaps(taken) for taken in used):
            raise Refusal(errno.EEXIST, "iommu.exists", iova=iova, length=length)

    def find(self, length: int, start: int, used: Iterable[IovaRange]) -> Iova:
        """Room for `length` bytes that begin at `start` in their own space: as aligned as that is, so that large leaves
        fit. Never IOVA 0. Raises: Refusal EOVERFLOW `iommu.overflow`; ENOSPC `iommu.no_room`."""
        if length >= U64_MAX // 2:
            raise Refusal(errno.EOVERFLOW, "iommu.overflow", length=length)
        alignment = 1 << (length - 1).bit_length()
        if start:
            alignment = min(alignment, start & -start)
        taken = sorted((*self.reserved, *used))
        for allowed in self.allowed or (IovaRange(PAGE_SIZE, U64_MAX - PAGE_SIZE),):
            inside = IovaRange(max(allowed.start, PAGE_SIZE), min(allowed.last, U64_MAX - PAGE_SIZE))
            for hole in _holes(inside, taken):
                aligned = -(-hole.start // alignment) * alignment
                if aligned + length - 1 <= hole.last:
                    return Iova(aligned)
        raise Refusal(errno.ENOSPC, "iommu.no_room", length=length)


def _holes(inside: IovaRange, taken: list[IovaRange]) -> Iterator[IovaRange]:
    start = inside.start
    for each in taken:
        if each.last < start:
            continue
        if each.start > inside.last:
            break
        if start < each.start:
            yield IovaRange(start, each.start - 1)
        start = max(start, each.last + 1)
    if start <= inside.last:
        yield IovaRange(start, inside.last)
