"""UnicornEngine: the default engine, the library of native/ in this process.

The library executes, on Unicorn (QEMU's TCG), and stops at what it needs somebody for; here the leaves of stage 2 are
asked of GuestMemory and the stops are put into `engine`'s words. Limits: no virtual-8086 mode, no task gates; TCG
checks no segment limits; see also native/code.c, native/mmio.c and holds_descriptors() of native/tlb.c.
"""

from __future__ import annotations

import ctypes
import time
import weakref
from typing import Any

from guestmem.cpu import block as b
from guestmem.cpu import cpuid, stops
from guestmem.cpu.block import CpuBlock
from guestmem.cpu.block_state import BlockState
from guestmem.cpu.engine import GuestMemory, SliceOver, Stop

_ALL = (1 << 52) // 4096
_EPOCH_NS = time.monotonic_ns()  # at which the TSC of every vCPU of this process is 0
_BOTH = 1 << b.SHARED | 1 << b.PRIVATE


class UnicornEngine(BlockState):
    """One virtual CPU, in the state after reset. Implements `guestmem.cpu.engine.Engine` and `CpuState`.

    Once it is closed, whatever gets, sets, queues or runs raises ValueError. Raises: CpuUnavailableError.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self._library = b.library()
        super().__init__(CpuBlock())
        self._library.cpu_block_init(ctypes.byref(self.block))
        self._memory = memory
        self.set_page_bit(memory.page_bit)
        self._space = self._library.cpu_space_create()
        self._cpu = self._library.cpu_create(self._space, ctypes.byref(self.block)) if self._space else None
        if not self._cpu:
            why = b.last_error() or "no memory for a CPU"
            if self._space:
                self._library.cpu_space_destroy(self._space)
            raise b.CpuUnavailableError(why)
        self._library.cpu_install_handlers()
        self._finalizer = weakref.finalize(self, _destroy, self._library, self._cpu, self._space, self.block)
        self._finalizer.atexit = False
        self.block.tsc_offset = -_EPOCH_NS
        self._device_page: int | None = None
        self.set_cpuid(cpuid.default(memory.page_bit))

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise ValueError("the engine is closed")

    def run(self) -> Stop:
        """Execute until a stop. Raises: what GuestMemory raises."""
        self._check_open()
        run, block = self._library.cpu_run, self.block
        while run(self._cpu) == stops.MISS:
            if not self._map(block.stop.gpa & -4096, bool(block.stop.write), stops.asserted_kind(block.stop)):
                break
        return stops.decode(block)

    def _map(self, gpa: int, write: bool, private: bool | None) -> bool:
        """Whether stage 2 holds the page, which the CPU may use from now on."""
        page = self._memory.translate(gpa, write, private)
        if page is None:
            return False
        kinds = _BOTH if private is None else 1 << (b.PRIVATE if private else b.SHARED)
        if self._library.cpu_space_map(self._space, gpa >> 12, 1, kinds, page.hva, page.writable):
            raise MemoryError("no memory for a leaf of stage 2")
        return True

    def emulate_mmio(self, gpa: int, write: bool) -> Stop:
        """Execute the instruction that missed stage 2 at `gpa`. What it does there is seen, `write` is not needed."""
        self._check_open()
        stops.answer_mmio(self.block, gpa)
        stop = self.run()
        while isinstance(stop, SliceOver):
            stop = self.run()
        return stop

    def complete(self, value: int) -> None:
        """The value for the last stop, with which its instruction is finished at once.

        Dropped if nothing asks any more, because RIP was set meanwhile. Raises: what GuestMemory raises.
        """
        self._check_open()
        stops.answer_value(self.block, value)
        self._library.cpu_settle(self._cpu)

    def raise_exception(self, vector: int, error_code: int) -> None:
        """Delivered at the next run, at the instruction of the last stop."""
        self._check_open()
        stops.answer_raise(self.block, vector, error_code)
        self._library.cpu_settle(self._cpu)

    def flush_tlb(self) -> None:
        """Forget every translation of addresses, also right inside of GuestMemory.translate."""
        self._check_open()
        self._library.cpu_space_drop(self._space, 0, _ALL, _BOTH, False)

    def kick(self) -> None:
        """Have a run end with SliceOver soon: the one that goes on, or the next. From any thread."""
        self._check_open()
        self._library.cpu_kick(self._cpu)

    def close(self) -> None:
        """Give the memory back. Idempotent."""
        self._finalizer()


def _destroy(library: Any, cpu: int, space: int, _block: CpuBlock) -> None:
    library.cpu_destroy(cpu)
    library.cpu_space_destroy(space)
