"""Real memory for files of huge pages, the best that the host has at the moment.

    hugetlb 1G, hugetlb 2M    pages that the host has set aside and nobody else has reserved
    memfd+THP                 a memfd whose pages the host makes huge where it can
    memfd                     pages of 4 KiB

Which of them it is changes what memory costs and nothing that the provider answers. A file that client processes may
map is never hugetlb: their mappings are closed and opened by pages of 4 KiB, which those of hugetlb cannot be.

A huge page is brought into being by touching its last 4 KiB. Kernels before 7.0 clear it so that the part that was
touched comes last, backwards if that is the first, and backwards takes twice as long on some machines; see DESIGN.md.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator

from guestmem.memory.backing import JUNK, WINDOW_SHIFT, MemfdBacking, advise, map_window
from guestmem.memory.host_pages import usage_is_limited
from guestmem.memory.pages import ORDER_1G, ORDER_2M, PAGE_SHIFT, PAGE_SIZE, PageIndex, PageRange, Range

_MFD_HUGETLB, _MFD_HUGE_SHIFT = 0x4, 26
_MADV_HUGEPAGE, _MADV_POPULATE_WRITE = 14, 23


class HugetlbBacking(MemfdBacking):
    """`pages` pages in huge pages of `order`, from the host's pool.

    They are reserved when the file is made, all of them, so that no touch can find the pool empty, which would be
    SIGBUS. So a page that leaves the file stays here, to be zeroed when it is next used: the reservation keeps it from
    everybody else anyway, and the kernel forgets the reservation of what is punched.

    `fd` is what a client may be given: a memfd of the file's size, without memory.

    Raises: OSError: the host cannot reserve so many, or has no huge pages of this size.
    """

    def __init__(self, pages: int, name: str, order: int, junk: bool = False) -> None:
        super().__init__(pages, name, junk)
        self.kind = f"hugetlb {'1G' if order == ORDER_1G else '2M'}"
        self._order = order
        self._memory = -1
        try:
            log2 = order + PAGE_SHIFT
            self._memory = os.memfd_create(name, os.MFD_CLOEXEC | _MFD_HUGETLB | log2 << _MFD_HUGE_SHIFT)
            os.ftruncate(self._memory, self._size)
            for part in self._parts(Range(PageIndex(0), PageIndex(pages))):
                self.hva(part.start)
            if usage_is_limited(
                order
            ):  # the cgroup counts pages as they are used, and a touch past the limit is SIGBUS
                self.populate(Range(PageIndex(0), PageIndex(pages)))
        except OSError:
            self.close()
            raise

    @property
    def memory_fd(self) -> int:
        return self._memory

    def __fingerprint__(self) -> tuple[bytes, ...]:
        return tuple(os.pread(self._memory, PAGE_SIZE, offset) for offset in range(0, self._size, PAGE_SIZE))

    def populate(self, pages: PageRange) -> None:
        for index in range(pages.start >> self._order, -(-pages.end >> self._order)):
            last = PageIndex(((index + 1) << self._order) - 1)
            advise(self.hva(last), PAGE_SIZE, _MADV_POPULATE_WRITE)

    def free(self, pages: PageRange) -> None:
        if self._junk:
            self._fill(pages, JUNK)
        self._dirty.add_range(pages.start, pages.end)

    def clear(self, pages: PageRange) -> None:
        self._fill(pages, 0)
        self._dirty.remove_range(pages.start, pages.end)

    def existing(self, pages: PageRange) -> Iterator[PageRange]:
        """Nobody else maps it. The kernel could not say: to SEEK_DATA a file of hugetlb has no holes."""
        return iter(())

    def close(self) -> None:
        super().close()
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1

    def _map(self, window: int) -> int:
        return map_window(self._memory, window << WINDOW_SHIFT, self._window_size(window), reserve=True)

    def _fill(self, pages: PageRange, byte: int) -> None:
        for part in self._parts(pages):
            ctypes.memset(self.hva(part.start), byte, part.pages << PAGE_SHIFT)


class ThpBacking(MemfdBacking):
    """A memfd that the host is asked to make of huge pages of 2 MiB. Whether it does is `is_huge`."""

    kind = "memfd+THP"

    def is_huge(self) -> bool:
        """Whether the first huge page of the file, which must be empty yet, comes as one. It is empty afterwards."""
        first = Range(PageIndex(0), PageIndex(1 << ORDER_2M))
        try:
            advise(self.hva(first.start), PAGE_SIZE, _MADV_POPULATE_WRITE)
            return next(self.existing(first), first) == first
        except OSError:
            return False
        finally:
            super().clear(first)

    def populate(self, pages: PageRange) -> None:
        """fallocate(2) knows nothing of the advice, so the huge pages are touched first. It makes what is missing."""
        for start in range(pages.start >> ORDER_2M << ORDER_2M, pages.end, 1 << ORDER_2M):
            advise(self.hva(PageIndex(start)), PAGE_SIZE, _MADV_POPULATE_WRITE)
        super().populate(pages)

    def clear(self, pages: PageRange) -> None:
        """A hole would break the huge page up."""
        for run in self.existing(pages):
            for part in self._parts(run):
                ctypes.memset(self.hva(part.start), 0, part.pages << PAGE_SHIFT)
        self._dirty.remove_range(pages.start, pages.end)

    def _map(self, window: int) -> int:
        """At a multiple of 2 MiB, or no page of it could be huge. The kernel sees to that only where the policy for all
        memfds, rather than that for their 2 MiB pages, allows for them."""
        base = map_window(self.fd, window << WINDOW_SHIFT, self._window_size(window), align=PAGE_SIZE << ORDER_2M)
        advise(base, self._window_size(window), _MADV_HUGEPAGE)
        return base


def new_huge_backing(pages: int, name: str, order: int, *, mappable: bool, junk: bool = False) -> MemfdBacking:
    """The best memory that the host has for a file of huge pages of `order`. `mappable`: by client processes.

    Never fails for want of huge pages. Raises: OSError as memfd_create(2) does.
    """
    if not mappable:
        for size in (ORDER_1G, ORDER_2M):
            if size <= order:
                try:
                    return HugetlbBacking(pages, name, size, junk)
                except OSError:  # too few, or none of this size
                    continue
    huge = ThpBacking(pages, name, junk)
    if huge.is_huge():
        return huge
    huge.close()
    return MemfdBacking(pages, name, junk)
