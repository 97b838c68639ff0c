"""View: bytes of a host process for a script, guarded: a touch that would be a signal is an exception."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, Protocol, TypeVar

from guestmem.userspace.address_space import AddressSpace

T = TypeVar("T")


class Run(Protocol):
    """How a blocking caller runs a coroutine: Scheduler.run."""

    def __call__(self, coroutine: Coroutine[Any, None, T], name: str = ...) -> T: ...


class View:
    """`size` bytes of `mm` from `hva` on. Index or slice it like a bytearray of fixed length.

    Reading or writing raises SigBus where the client would get SIGBUS: on a private page, and past the end of the file
    (a view, like a mapping, may be longer than its file).
    """

    def __init__(self, run: Run, mm: AddressSpace, hva: int, size: int) -> None:
        self.hva = hva
        self._run = run
        self._mm = mm
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, key: int | slice) -> int | bytes:
        if isinstance(key, slice):
            start, size = self._span(key)
            return self.read(start, size)
        return self.read(self._place(key), 1)[0]

    def __setitem__(self, key: int | slice, value: int | bytes) -> None:
        if isinstance(key, slice):
            start, size = self._span(key)
            data = bytes([value]) * size if isinstance(value, int) else bytes(value)
            if len(data) != size:
                raise ValueError(f"{len(data)} bytes into a slice of {size}")
            self.write(start, data)
        else:
            assert isinstance(value, int)
            self.write(self._place(key), bytes([value]))

    def read(self, offset: int, size: int) -> bytes:
        self._check(offset, size)
        return self._run(self._mm.read(self.hva + offset, size), "host read")

    def write(self, offset: int, data: bytes) -> None:
        self._check(offset, len(data))
        self._run(self._mm.write(self.hva + offset, data), "host write")

    def _place(self, index: int) -> int:
        place = index + self._size if index < 0 else index
        if not 0 <= place < self._size:
            raise IndexError(f"byte {index} of {self._size}")
        return place

    def _span(self, key: slice) -> tuple[int, int]:
        start, stop, step = key.indices(self._size)
        if step != 1:
            raise ValueError("a view has no steps")
        return start, max(stop - start, 0)

    def _check(self, offset: int, size: int) -> None:
        if offset < 0 or size < 0 or offset + size > self._size:
            raise IndexError(f"bytes {offset}..{offset + size} of {self._size}")
