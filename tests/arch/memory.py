"""A few pages of memory for models of firmware to act on."""

from __future__ import annotations

import ctypes

from guestmem.arch import Block
from guestmem.memory import PAGE_SIZE, Pfn, read_host, write_host


class Pages:
    """`count` pages, of which the first has number `first`."""

    def __init__(self, count: int, first: int = 0x1000) -> None:
        self._buffer = ctypes.create_string_buffer((count + 1) * PAGE_SIZE)
        self._base = -(-ctypes.addressof(self._buffer) // PAGE_SIZE) * PAGE_SIZE
        self.first = first

    def block(self, number: int = 0, order: int = 0) -> Block:
        return Block(Pfn(self.first + number), order, self._base + number * PAGE_SIZE)

    def write(self, number: int, text: bytes) -> None:
        write_host(self.block(number).hva, text.ljust(PAGE_SIZE, b"\0"))

    def read(self, number: int) -> bytes:
        """The page without trailing zeros."""
        return read_host(self.block(number).hva, PAGE_SIZE).rstrip(b"\0")
