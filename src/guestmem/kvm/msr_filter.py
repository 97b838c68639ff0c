"""MsrFilter: which MSRs a guest may read and write itself, and what becomes of the others.

KVM_X86_SET_MSR_FILTER gives ranges with a bit for each register; the first range that an access is in decides, else the
default. What is not allowed is #GP, or an exit if KVM_CAP_X86_USER_SPACE_MSR asked for it. The VMM itself reads and
writes what it likes. x2APIC registers are not filtered.

Source: arch/x86/kvm/x86.c kvm_msr_allowed, kvm_vm_ioctl_set_msr_filter, kvm_add_msr_filter; Documentation/virt/kvm/
api.rst 4.97.
"""

from __future__ import annotations

import functools
import heapq
import itertools
from typing import NamedTuple

READ, WRITE = 1, 2
MAX_RANGES = 16
MAX_BITMAP = 0x600  # bytes
_UNFILTERED = range(0x800, 0x900)
_MOST_STOPS = 12  # an engine stops at 32 ranges at most, and not for the filter alone
_INDICES = 1 << 32


class MsrRange(NamedTuple):
    """`size` registers from `first` on; a set bit of `bitmap` allows. `flags`: READ, WRITE or both are decided here."""

    flags: int
    first: int
    size: int
    bitmap: bytes

    def decides(self, index: int, access: int) -> bool:
        return bool(self.flags & access) and 0 <= index - self.first < self.size

    def allows(self, index: int) -> bool:
        place = index - self.first
        return bool(self.bitmap[place >> 3] >> (place & 7) & 1)


class MsrFilter(NamedTuple):
    """All of it. Without ranges, and allowed by default, it is no filter."""

    ranges: tuple[MsrRange, ...] = ()
    allow_by_default: bool = True

    def allows(self, index: int, write: bool) -> bool:
        access = WRITE if write else READ
        if index in _UNFILTERED:
            return True
        for range_ in self.ranges:
            if range_.decides(index, access):
                return range_.allows(index)
        return self.allow_by_default

    def stops(self) -> tuple[range, ...]:
        """Where the engine has to stop: everything that is denied to either access, and where that would be too many
        ranges, what lies between them as well."""
        return _stops(self)


@functools.lru_cache(maxsize=8)  # every vCPU of a VM asks
def _stops(asked: MsrFilter) -> tuple[range, ...]:
    if not asked.allow_by_default:
        return (range(_UNFILTERED.start), range(_UNFILTERED.stop, _INDICES))
    denied = sorted(
        index
        for range_ in asked.ranges
        for index in range(range_.first, range_.first + range_.size)
        if not (asked.allows(index, False) and asked.allows(index, True))
    )
    return tuple(_joined(denied, _MOST_STOPS))


def _joined(numbers: list[int], most: int) -> list[range]:
    """Ranges that cover the sorted numbers, at most so many: the smallest gaps are covered too."""
    ranges: list[range] = []
    for number in numbers:
        if ranges and number <= ranges[-1].stop:
            ranges[-1] = range(ranges[-1].start, max(number + 1, ranges[-1].stop))
        else:
            ranges.append(range(number, number + 1))
    if len(ranges) <= most:
        return ranges
    widest = heapq.nlargest(most - 1, range(1, len(ranges)), key=lambda at: ranges[at].start - ranges[at - 1].stop)
    cuts = (0, *sorted(widest), len(ranges))
    return [range(ranges[first].start, ranges[end - 1].stop) for first, end in itertools.pairwise(cuts)]
