"""CPUs as the library has them, several on one space, each in a thread of its own. For what no Engine can show."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

from guestmem.cpu import block as b
from guestmem.cpu import boot, stops
from guestmem.cpu.block_state import BlockState
from guestmem.cpu.engine import Stop
from tests.cpu.guests import SIZE, STACK, TABLES, Memory

BOTH = 1 << b.SHARED | 1 << b.PRIVATE


class Space:
    """Leaves of stage 2: all of `memory` as one run of frames."""

    def __init__(self, memory: Memory) -> None:
        self.library, self.memory = b.library(), memory
        self.library.cpu_install_handlers()
        self.handle = self.library.cpu_space_create()
        self.map(0, SIZE // 4096, memory.window.base)

    def map(self, gfn: int, count: int, hva: int, writable: bool = True, kinds: int = BOTH) -> None:
        assert self.library.cpu_space_map(self.handle, gfn, count, kinds, hva, writable) == 0

    def drop(self, gfn: int, count: int, wait: bool = True) -> None:
        self.library.cpu_space_drop(self.handle, gfn, count, BOTH, wait)

    def close(self) -> None:
        self.library.cpu_space_destroy(self.handle)


class Cpu(BlockState):
    """One CPU on a space; `run` comes back with the block's stop."""

    def __init__(self, space: Space) -> None:
        self.library: Any = space.library
        super().__init__(b.CpuBlock())
        self.library.cpu_block_init(ctypes.byref(self.block))
        self.handle = self.library.cpu_create(space.handle, ctypes.byref(self.block))
        assert self.handle, b.last_error()

    def start(self, rip: int, memory: Memory, stack: int = STACK, **registers: int) -> None:
        """64-bit code in ring 0; the tables are written."""
        regs, sregs = boot.long_mode(rip, stack, TABLES, SIZE, memory.write, boot.PAGE_4K)
        for name, value in registers.items():
            setattr(regs, name, value)
        self.set_sregs(sregs)
        self.set_regs(regs)

    def run(self) -> Stop:
        self.library.cpu_run(self.handle)
        return stops.decode(self.block)

    def run_until(self, kind: type, limit: int = 100_000) -> Stop:
        """Run on over ends of slices."""
        for _ in range(limit):
            stop = self.run()
            if isinstance(stop, kind):
                return stop
            assert type(stop).__name__ == "SliceOver", stop
        raise AssertionError(f"no {kind.__name__} in {limit} runs")

    def kick(self) -> None:
        self.library.cpu_kick(self.handle)

    def close(self) -> None:
        self.library.cpu_destroy(self.handle)


def at_once(*actions: Callable[[], object]) -> list[object]:
    """Each in a thread; their results. What one raises is raised."""
    results: list[object] = [None] * len(actions)

    def act(i: int) -> None:
        try:
            results[i] = actions[i]()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=act, args=(i,)) for i in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a CPU hangs"
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
