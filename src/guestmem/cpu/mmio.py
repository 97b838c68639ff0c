"""One instruction that uses MMIO, executed by Unicorn and not by a decoder of ours.

The instruction is single-stepped (RFLAGS.TF) while the TLB maps the missed page, for the missed kind of access only, to
an area in which a memory hook sees each access whole: its address, its size, its value. A write is recorded. A read
whose value is not known yet ends the step before the value is used, everything is rolled back, and the step is repeated
when the value has been given; so an instruction that reads and writes gives a read exit and then a write exit, and one
that reads twice gives two. Each iteration of a REP is an instruction. An access that lies in two pages, one of which is
MMIO, is given up.
"""

from __future__ import annotations

from collections import deque

from guestmem.cpu import uc_native
from guestmem.cpu.engine import MmioRead, MmioWrite
from guestmem.cpu.guest_memory import PAGE
from guestmem.cpu.tlb import MMIO_BASE, Tlb
from guestmem.cpu.uc_core import HOOK_MEMORY, Cause, Core, Signal

_UC_MEM_READ = 16


class Mmio:
    """The instruction under emulation, if `active`: the pages, what was read so far, what it wrote."""

    def __init__(self, core: Core, tlb: Tlb) -> None:
        self._core, self._tlb = core, tlb
        self._mapped = False
        self._values: list[int] = []
        self._next = 0
        self._image = (0, 1, 0)
        self._aborted = False
        self._hook: int | None = None
        self.writes: deque[MmioWrite] = deque()
        self._access_hook = uc_native.MemoryHook(core.guard(self._access))
        self._read_hook = uc_native.MmioReadHook(core.guard(self._read, 0))
        self._write_hook = uc_native.MmioWriteHook(core.guard(self._write))

    @property
    def active(self) -> bool:
        """Whether the next instruction is one that uses MMIO."""
        return bool(self._tlb.mmio)

    def add_page(self, gpa: int) -> None:
        """The page of `gpa` is no memory for the next instruction."""
        if not self._mapped:
            uc_native.check(
                uc_native.mmio_map(
                    self._core.handle, MMIO_BASE, MMIO_BASE, self._read_hook, None, self._write_hook, None
                ),
                "uc_mmio_map",
            )
            self._mapped = True
        self._tlb.mmio |= {gpa & -PAGE}

    def supply(self, value: int) -> None:
        """The answer to the read that ended the last step."""
        self._values.append(value)

    def begin(self) -> None:
        """Watch a step."""
        core = self._core
        self._next, self._image, self._aborted = 0, (0, 1, 0), False
        self.writes.clear()
        core.cpu.save()
        if self._hook is None:
            last = 2 * MMIO_BASE - 1
            self._hook = uc_native.hook_add(core.handle, HOOK_MEMORY, self._access_hook, MMIO_BASE, last)

    def end(self) -> None:
        """The step is over. What was aborted is taken back."""
        if self._aborted:
            self._core.cpu.restore()

    def release(self) -> None:
        """No step follows: the hook and the translations to the device must go before anything else is executed.

        A deleted hook stays in its list until a pass ends, and code that is translated meanwhile is slow for good: a
        pass that does nothing takes it out.
        """
        if self._hook is not None:
            uc_native.hook_del(self._core.handle, self._hook)
            self._hook = None
            self._core.sealed_pass()

    def next_write(self) -> MmioWrite | None:
        """The oldest write that was not reported yet."""
        return self.writes.popleft() if self.writes else None

    def forget(self) -> None:
        """The instruction is done, or something else happens in its place."""
        self._tlb.mmio = frozenset()
        self._values.clear()

    def _access(self, _uc: int, kind: int, address: int, size: int, value: int, _data: int) -> None:
        """An access, before Unicorn takes it to pieces. A helper goes on after the read that ends its step."""
        if self._core.cause is not None:
            return
        gpa = address - MMIO_BASE
        self._image = (gpa, size, 0)
        if (gpa & PAGE - 1) + size > PAGE:
            self._abort(Signal.MMIO_CROSSED)
        elif kind != _UC_MEM_READ:
            self.writes.append(MmioWrite(gpa, size, value & (1 << size * 8) - 1))
        elif self._next < len(self._values):
            self._image = (gpa, size, self._values[self._next] & (1 << size * 8) - 1)
            self._next += 1
        else:
            self._abort(MmioRead(gpa, size))

    def _read(self, _uc: int, gpa: int, size: int, _data: int) -> int:
        """A piece of the read that `_access` saw: at most four bytes, aligned, perhaps more than was asked for."""
        self._check_piece(gpa)
        start, _, value = self._image
        shift = (gpa - start) * 8
        return (value >> shift if shift >= 0 else value << -shift) & (1 << size * 8) - 1

    def _write(self, _uc: int, gpa: int, size: int, value: int, _data: int) -> None:
        """A piece of the write that `_access` saw, which was told the value before MOVBE swaps its bytes."""
        self._check_piece(gpa)
        if self._core.cause is None:
            whole = self.writes.pop()
            shift, mask = (gpa - whole.gpa) * 8, (1 << size * 8) - 1
            self.writes.append(
                MmioWrite(whole.gpa, whole.size, whole.value & ~(mask << shift) | (value & mask) << shift)
            )

    def _check_piece(self, gpa: int) -> None:
        """A piece of something that was not announced belongs to an access that began in another page."""
        start, length, _ = self._image
        first = start - start % length
        if not first <= gpa < first + 2 * length:
            self._abort(Signal.MMIO_CROSSED)

    def _abort(self, cause: Cause) -> None:
        """End the step; what it has changed is taken back."""
        self._aborted = True
        self._core.stop(cause)
