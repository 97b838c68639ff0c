"""Backing: the real host memory behind a file, and where in the server's address space it is.

A memfd of the file's size, sparse. A page of the file is the page of the memfd at the same offset, so the memfd itself
can be given to a client as its guest_memfd, and a conversion moves no byte. The server maps it in windows of 1 TiB, on
first use; an engine that executes guest code addresses guest memory through the same windows.

Freeing a page returns it to the host by punching the memfd, which also makes it read as zero. With `junk` the page is
kept and filled with 0xFA instead, so that whoever reads it through a stale mapping sees that it does; zeroing is then
real work that happens once, when the page is next used. xv6's kalloc does the same.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Iterator
from typing import Protocol

from pyroaring import BitMap64

from guestmem.memory.pages import PAGE_SHIFT, PAGE_SIZE, PageIndex, PageRange, Range

WINDOW_SHIFT = 40
JUNK = 0xFA

_PROT_READ_WRITE = 3
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS, _MAP_NORESERVE = 0x01, 0x02, 0x10, 0x20, 0x4000
_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]


class Backing(Protocol):
    """What the provider needs of memory: place, populate, free, zero, and keep a copy for a holder."""

    @property
    def kind(self) -> str:
        """What memory it is, for the reader."""
        ...

    def hva(self, index: PageIndex) -> int:
        """The server's address of a page's first byte."""
        ...

    def window(self, index: PageIndex) -> tuple[int, int]:
        """Base address and size in bytes of the mapping that `hva(index)` is in."""
        ...

    def populate(self, pages: PageRange) -> None:
        """Have host memory for the pages now rather than at first touch. Raises: OSError(ENOSPC)."""
        ...

    def free(self, pages: PageRange) -> None:
        """Give the host its memory back (or fill it with junk)."""
        ...

    def zero(self, pages: PageRange) -> None:
        """Make the pages read as zero. Cheap where they already do."""
        ...

    def clear(self, pages: PageRange) -> None:
        """Make the pages read as zero, whatever was written to them. They stay in the file."""
        ...

    def existing(self, pages: PageRange) -> Iterator[PageRange]:
        """The stretches of `pages` that have host memory now."""
        ...

    def close(self) -> None: ...


class MemfdBacking:
    """A memfd of `pages` pages. `name` shows in /proc/PID/fd."""

    kind = "memfd"

    def __init__(self, pages: int, name: str, junk: bool = False, fd: int | None = None) -> None:
        """`fd`: a memfd of this size that there is already, with what is in it; taken over."""
        if fd is None:
            fd = os.memfd_create(name, os.MFD_CLOEXEC)
            os.fchmod(fd, 0o600)
            os.ftruncate(fd, pages << PAGE_SHIFT)
        self.fd = fd
        self._size = pages << PAGE_SHIFT
        self._junk = junk
        self._dirty = BitMap64()  # freed pages that hold junk
        self._windows: dict[int, int] = {}

    def __fingerprint__(self) -> tuple[bytes, ...]:
        """The bytes of the file are state; where they are is not. For files of the size that an explorer uses."""
        if self.fd < 0:
            return ()
        return tuple(os.pread(self.fd, PAGE_SIZE, offset) for offset in range(0, self._size, PAGE_SIZE))

    @property
    def memory_fd(self) -> int:
        """The file that has the pages."""
        return self.fd

    def hva(self, index: PageIndex) -> int:
        offset = index << PAGE_SHIFT
        window = offset >> WINDOW_SHIFT
        base = self._windows.get(window)
        if base is None:
            base = self._windows[window] = self._map(window)
        return base + (offset & ((1 << WINDOW_SHIFT) - 1))

    def window(self, index: PageIndex) -> tuple[int, int]:
        self.hva(index)
        window = index >> (WINDOW_SHIFT - PAGE_SHIFT)
        return self._windows[window], self._window_size(window)

    def populate(self, pages: PageRange) -> None:
        fallocate(self.fd, _FALLOC_FL_KEEP_SIZE, pages)

    def free(self, pages: PageRange) -> None:
        if self._junk:
            for part in self._parts(pages):
                ctypes.memset(self.hva(part.start), JUNK, part.pages << PAGE_SHIFT)
            self._dirty.add_range(pages.start, pages.end)
        else:
            fallocate(self.fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, pages)

    def zero(self, pages: PageRange) -> None:
        if not self._dirty.range_cardinality(pages.start, pages.end):
            return
        for part in self._parts(pages):
            ctypes.memset(self.hva(part.start), 0, part.pages << PAGE_SHIFT)
        self._dirty.remove_range(pages.start, pages.end)

    def clear(self, pages: PageRange) -> None:
        fallocate(self.fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, pages)
        self._dirty.remove_range(pages.start, pages.end)

    def existing(self, pages: PageRange) -> Iterator[PageRange]:
        position, end = pages.start << PAGE_SHIFT, pages.end << PAGE_SHIFT
        while position < end:
            try:
                data = os.lseek(self.fd, position, os.SEEK_DATA)
            except OSError:  # ENXIO: no data from here on
                return
            if data >= end:
                return
            position = min(os.lseek(self.fd, data, os.SEEK_HOLE), end)
            yield Range(PageIndex(data >> PAGE_SHIFT), PageIndex(position >> PAGE_SHIFT))

    def close(self) -> None:
        """Unmap and close. Idempotent."""
        for window, base in self._windows.items():
            unmap_window(base, self._window_size(window))
        self._windows.clear()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _map(self, window: int) -> int:
        return map_window(self.fd, window << WINDOW_SHIFT, self._window_size(window))

    def _window_size(self, window: int) -> int:
        return min(1 << WINDOW_SHIFT, self._size - (window << WINDOW_SHIFT))

    def _parts(self, pages: PageRange) -> list[PageRange]:
        """`pages` cut at window borders: within a part addresses are contiguous."""
        per_window = 1 << (WINDOW_SHIFT - PAGE_SHIFT)
        cuts = [pages.start, *range((pages.start // per_window + 1) * per_window, pages.end, per_window), pages.end]
        return [Range(PageIndex(a), PageIndex(b)) for a, b in itertools.pairwise(cuts)]


def map_window(fd: int, offset: int, size: int, *, reserve: bool = False, align: int = 0) -> int:
    """Map a stretch of a file into the server, readable and writable; its address, a multiple of `align` if given.
    Bytes. With `reserve` the host sets memory aside for it, which means something for hugetlb only. Raises: OSError."""
    flags = _MAP_SHARED if reserve else _MAP_SHARED | _MAP_NORESERVE
    if not align:
        return _mmap(0, size, _PROT_READ_WRITE, flags, fd, offset)
    room = _mmap(0, size + align, 0, _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0)
    base = -(-room // align) * align
    try:
        _mmap(base, size, _PROT_READ_WRITE, flags | _MAP_FIXED, fd, offset)
    except OSError:
        unmap_window(room, size + align)
        raise
    for start, end in ((room, base), (base + size, room + size + align)):
        if start < end:
            unmap_window(start, end - start)
    return base


def _mmap(address: int, size: int, protection: int, flags: int, fd: int, offset: int) -> int:
    base = _libc.mmap(address, size, protection, flags, fd, offset)
    if base is None or base == ctypes.c_void_p(-1).value:
        error = ctypes.get_errno()
        raise OSError(error, f"mmap of {size:#x} bytes: {os.strerror(error)}")
    return int(base)


def unmap_window(base: int, size: int) -> None:
    _libc.munmap(base, size)


def advise(hva: int, size: int, advice: int) -> None:
    """madvise(2) of the server's own memory. Bytes. Raises: OSError."""
    if _libc.madvise(hva, size, advice):
        error = ctypes.get_errno()
        raise OSError(error, f"madvise {advice} of {size:#x} bytes: {os.strerror(error)}")


def read_host(hva: int, size: int) -> bytes:
    """Bytes of the server's own memory."""
    return ctypes.string_at(hva, size)


def write_host(hva: int, data: bytes) -> None:
    ctypes.memmove(hva, data, len(data))


def fallocate(fd: int, mode: int, pages: PageRange) -> None:
    if _libc.fallocate(fd, mode, pages.start << PAGE_SHIFT, pages.pages << PAGE_SHIFT):
        error = ctypes.get_errno()
        raise OSError(error, f"fallocate of the backing: {os.strerror(error)}")
