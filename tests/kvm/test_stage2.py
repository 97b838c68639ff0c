"""Stage 2 by itself: translation, installation against windows, zapping, huge leaves."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

import pytest

from guestmem.cpu.engine import HostWindow, Translation
from guestmem.kvm.addresses import Gfn
from guestmem.kvm.stage2 import Leaf, Stage2
from guestmem.memory import PAGE_SIZE, Access, Pfn, Range
from guestmem.memory.notifier import BOTH
from guestmem.sched import Scheduler
from guestmem.trace import Tracer

K = PAGE_SIZE
BASE = 0x7000_0000_0000
WINDOW = (BASE, 1 << 30)


class Table:
    """A Stage2 and how often it had TLBs flushed."""

    def __init__(self) -> None:
        self.scheduler = Scheduler()
        self.flushes = 0
        self.stage2 = Stage2(self.scheduler, Tracer(), 0, self._flush)

    def _flush(self) -> None:
        self.flushes += 1

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.scheduler.run(coroutine)

    async def install(self, leaf: Leaf, access: Access, seen: int = 0) -> bool:
        async with self.stage2.mmu_lock:
            return self.stage2.install(leaf, access, seen)

    async def zap(self, start: int, end: int, *accesses: Access) -> None:
        async with self.stage2.mmu_lock:
            self.stage2.zap(Range(Gfn(start), Gfn(end)), accesses)


def leaf(gfn: int, order: int = 0, writable: bool = True) -> Leaf:
    return Leaf(Gfn(gfn), order, Pfn(gfn + 1), BASE + gfn * K, WINDOW, writable)


def test_translation_is_by_page_and_by_asserted_access() -> None:
    table = Table()
    table.run(table.install(leaf(5), Access.PRIVATE))
    translate = table.stage2.translate
    expected = Translation(BASE + 5 * K, True, HostWindow(*WINDOW))
    assert translate(5 * K + 123, False, None) == expected
    assert translate(5 * K, True, True) == expected
    assert translate(5 * K, False, False) is None
    assert translate(6 * K, False, None) is None


def test_a_read_only_leaf_refuses_writes() -> None:
    table = Table()
    table.run(table.install(leaf(5, writable=False), Access.SHARED))
    assert table.stage2.translate(5 * K, False, None) is not None
    assert table.stage2.translate(5 * K, True, None) is None


@pytest.mark.parametrize("order", [9, 18])
def test_a_huge_leaf_translates_each_of_its_pages(order: int) -> None:
    table = Table()
    table.run(table.install(leaf(1 << order, order), Access.SHARED))
    last = (2 << order) - 1
    assert table.stage2.translate(last * K, False, None) == Translation(BASE + last * K, True, HostWindow(*WINDOW))
    assert table.stage2.translate((2 << order) * K, False, None) is None


def test_a_window_over_any_frame_of_a_leaf_keeps_it_out() -> None:
    """S13: not only the frame that faulted counts."""
    table = Table()
    table.run(table.stage2.begin([Range(Gfn(700), Gfn(701))], BOTH))
    seen = table.stage2.window.sequence.read()
    assert table.run(table.install(leaf(512, 9), Access.SHARED, seen)) is False
    assert table.run(table.install(leaf(699), Access.SHARED, seen)) is True
    table.run(table.stage2.end())
    assert table.run(table.install(leaf(512, 9), Access.SHARED, seen)) is False, "the look-up is older than the window"
    assert table.run(table.install(leaf(512, 9), Access.SHARED, seen + 1)) is True


def test_zapping_takes_one_kind_and_flushes_only_if_something_went() -> None:
    table = Table()
    table.run(table.install(leaf(1), Access.SHARED))
    table.run(table.install(leaf(2), Access.PRIVATE))
    table.run(table.zap(0, 9, Access.PRIVATE))
    assert (table.flushes, table.stage2.lookup(Gfn(1)) is not None) == (1, True)
    table.run(table.zap(0, 9, Access.PRIVATE))
    assert table.flushes == 1
    table.run(table.zap(0, 9, *BOTH))
    assert table.stage2.lookup(Gfn(1)) is None


def test_changing_without_the_lock_is_a_bug() -> None:
    table = Table()
    with pytest.raises(AssertionError, match="without mmu_lock"):
        table.stage2.install(leaf(1), Access.SHARED, 0)
    with pytest.raises(AssertionError, match="without mmu_lock"):
        table.stage2.zap(Range(Gfn(0), Gfn(1)), BOTH)
