"""The debug file gup_test: long-term pins of a client's memory, as its selftests take them.

Three ioctls of CONFIG_GUP_TEST (mm/gup_test.h): start and stop a set of long-term pins, and read what is pinned. Pins
hold references to pages of a guest_memfd, so that a conversion of them is busy; other memory needs none here.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from guestmem.kvm.vm import PinnedPage
from guestmem.memory import PAGE_SIZE
from guestmem.serve.files import ServedFile
from guestmem.serve.pins import pin_long_term
from guestmem.serve.wire import FileKind
from guestmem.trace import Refusal

if TYPE_CHECKING:
    from guestmem.serve.call import Call
    from guestmem.serve.client import Client

PIN_LONGTERM_TEST_START = 0x40186707
PIN_LONGTERM_TEST_STOP = 0x6708
PIN_LONGTERM_TEST_READ = 0x40086709
_START = struct.Struct("<QQII")  # addr, size, flags, padding
_FLAG_USE_WRITE, _FLAG_USE_FAST = 1, 2


class GupTest(ServedFile):
    """One open gup_test."""

    kind = FileKind.GUP_TEST

    def __init__(self, owner: Client) -> None:
        super().__init__(owner)
        self.pinned: list[PinnedPage] = []

    async def release(self) -> None:
        self.unpin()

    def unpin(self) -> None:
        for page in self.pinned:
            page.put()
        self.pinned.clear()

    async def ioctl(self, call: Call, request: int, argument: int) -> int:
        """Source: lib/test/gup_test.c, pin_longterm_test_*."""
        if request == PIN_LONGTERM_TEST_START:
            return await self._start(call, argument)
        if request == PIN_LONGTERM_TEST_STOP:
            self.unpin()
            return 0
        if request == PIN_LONGTERM_TEST_READ:
            return await self._read(call, argument)
        raise Refusal(errno.EINVAL, "ioctl.unknown", request=request, on="gup_test")

    async def _start(self, call: Call, argument: int) -> int:
        address, size, flags, _ = _START.unpack(await call.client.memory.copy_from_user(argument, _START.size))
        if self.pinned or flags & ~(_FLAG_USE_WRITE | _FLAG_USE_FAST) or (address | size) % PAGE_SIZE:
            raise Refusal(errno.EINVAL, "gup_test.argument", address=address, size=size, flags=flags)
        try:
            for hva in range(address, address + size, PAGE_SIZE):
                self.pinned.append(await pin_long_term(call.client, hva, bool(flags & _FLAG_USE_WRITE)))
        except Refusal:
            self.unpin()
            raise
        return 0

    async def _read(self, call: Call, argument: int) -> int:
        target = int.from_bytes(await call.client.memory.copy_from_user(argument, 8), "little")
        if not self.pinned:
            raise Refusal(errno.EINVAL, "gup_test.argument", pinned=0)
        for number, page in enumerate(self.pinned):
            await call.client.memory.copy_to_user(target + number * PAGE_SIZE, await page.read(0, PAGE_SIZE))
        return 0
