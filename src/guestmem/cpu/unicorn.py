"""UnicornEngine: the default engine, one virtual CPU of libguestmem_cpu.so in this process.

What it executes, and how, is in `native` (run.c is the loop). Here its stage 2 is asked when it misses, and its stops and
state become Python's.

Limits: no virtual-8086 mode, no task gates; TCG checks no segment limits; see also native/code.c, mmio.c and tlb.c.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import weakref

from guestmem.cpu.block import (
    ACCESS_ANY,
    ACCESS_PRIVATE,
    BLOCK_SIZE,
    STOP_MISS,
    BlockState,
    new_block,
    read_stop,
)
from guestmem.cpu.engine import GuestMemory, SliceOver, Stage2Miss, Stop, Translation
from guestmem.cpu.library import MODE_SLICES, Library, load

_PAGE_SHIFT, _PAGE = 12, 4096
_EVERY_FRAME = 1 << 45
_BOTH_KINDS = 3
_MISSES_MAX = 64
"""Misses that one run answers by itself; then others have their turn."""


@functools.cache
def _library() -> Library:
    """Ready for CPUs of this process, which the scheduler runs one at a time."""
    library = load()
    library.set_mode(MODE_SLICES)
    library.install_handlers()
    return library


class UnicornEngine(BlockState):
    """One virtual CPU, in the state after reset. Implements `guestmem.cpu.engine.Engine` and `CpuState`.

    All methods but `close` raise ValueError once it is closed.
    """

    def __init__(self, memory: GuestMemory) -> None:
        library = _library()
        self._buffer = mmap.mmap(-1, -(-BLOCK_SIZE // mmap.PAGESIZE) * mmap.PAGESIZE)
        super().__init__(new_block(self._buffer, 0, memory.page_bit), memory.page_bit)
        self._memory = memory
        self._space = library.space_create()
        self._cpu = library.create(self._space, ctypes.addressof(self.block)) if self._space else None
        if not self._cpu:
            raise RuntimeError(f"no CPU: {library.last_error().decode() if self._space else 'no memory'}")
        self._finalizer = weakref.finalize(self, _destroy, library, self._cpu, self._space)
        self._finalizer.atexit = False

    def run(self) -> Stop:
        """Execute until a stop. Raises: what GuestMemory raises."""
        block, run, memory = self.block, self._library.run, self._memory
        for _ in range(_MISSES_MAX):
            if run(self._cpu) != STOP_MISS:
                return read_stop(block)
            missed = block.stop
            access = missed.access
            private = None if access == ACCESS_ANY else access == ACCESS_PRIVATE
            found = memory.translate(missed.gpa & -_PAGE, bool(missed.write), private)
            if found is None:
                return Stage2Miss(missed.gpa, bool(missed.write), bool(missed.fetch), private)
            self._map(missed.gpa, found, _BOTH_KINDS if private is None else 1 << access)
        return SliceOver()

    def _map(self, gpa: int, found: Translation, kinds: int) -> None:
        if self._library.space_map(self._space, gpa >> _PAGE_SHIFT, 1, kinds, found.hva, found.writable):
            raise MemoryError(f"no memory for the leaf of {gpa:#x}")

    def emulate_mmio(self, gpa: int, write: bool) -> Stop:
        """Execute the access that missed stage 2 at `gpa` as MMIO; of a page that can be read, the writes are."""
        found = self._memory.translate(gpa & -_PAGE, False, None) if write else None
        frame = gpa >> _PAGE_SHIFT
        if found is None:
            self._library.space_map_mmio(self._space, frame, 1)
        else:
            self._library.space_map_rom(self._space, frame, 1, _BOTH_KINDS, found.hva)
        return self.run()

    def complete(self, value: int) -> None:
        """The value for the last stop, with which its instruction is finished at once.

        Dropped if nothing asks any more, because RIP was set meanwhile.
        """
        super().complete(value)
        self._library.settle(self._cpu)

    def raise_exception(self, vector: int, error_code: int) -> None:
        """See Engine."""
        super().raise_exception(vector, error_code)
        self._library.settle(self._cpu)

    def flush_tlb(self) -> None:
        """Forget every translation: the next access of each page asks GuestMemory again."""
        self.block  # noqa: B018 - raises if it is closed
        self._library.space_drop(self._space, 0, _EVERY_FRAME, _BOTH_KINDS, False)

    def close(self) -> None:
        """Give back what the engine holds. Idempotent."""
        if self._block is not None:
            self._finalizer()
            self.close_block()


def _destroy(library: Library, cpu: int, space: int) -> None:
    library.destroy(cpu)
    library.space_destroy(space)
