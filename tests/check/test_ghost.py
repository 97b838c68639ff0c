"""Each ghost can be offended: a machine made wrong in just that way is reported under its property."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest

from guestmem.check.arena import PAGES, Arena, page_digest
from guestmem.check.ghost import GhostPool
from guestmem.check.invariants import Violation
from guestmem.check.machine import Machine
from guestmem.memory import PAGE_SIZE, Access, PageIndex, Pfn, Range
from guestmem.trace import events as event


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine()
    yield made
    made.forget()


def test_a_page_that_changed_access_by_no_conversion_is_s19(machine: Machine) -> None:
    gmem = machine.gmem(pages=2)
    gmem.convert(0, PAGE_SIZE, Access.PRIVATE)
    machine.check_state()
    gmem.inode.attributes.set(Range(PageIndex(1), PageIndex(2)), Access.PRIVATE)
    with pytest.raises(Violation, match=r"S19 .*page 0x1 of inode 1 is not shared"):
        machine.check_state()


def test_a_second_zeroing_and_stale_bytes_are_s12(machine: Machine) -> None:
    view = machine.gmem(pages=2).mmap()
    view.read(0, 1)
    with pytest.raises(Violation, match="zeroed a second time"):
        machine.tracer.emit(event.GmemFolioZero(1, 0, 1))
    view[PAGE_SIZE] = 7
    machine.tracer.emit(event.GmemFolioFree(1, 1, 2, 0))
    with pytest.raises(Violation, match=r"S12 .*stale bytes"):
        machine.tracer.emit(event.GmemFolioZero(1, 1, 2))


def test_a_leaf_from_an_earlier_life_of_its_page_is_s3(machine: Machine) -> None:
    """The pool gives the page out again at once, to the same place: only its life tells."""
    pool = machine.pool
    assert isinstance(pool, GhostPool)
    view = machine.gmem().mmap()
    view[0] = 1
    pfn = machine.inodes[0].folios.pfn(PageIndex(0))
    assert pfn is not None
    machine.tracer.emit(event.GmemFault(1, 0, "kvm", "shared", pfn, 0))
    machine.run(machine.punch(_only_gmem(machine)))
    view[0] = 2
    assert machine.inodes[0].folios.pfn(PageIndex(0)) == pfn
    with pytest.raises(Violation, match=r"S3 .*earlier life"):
        machine.ghost._mapped(event.KvmMap(0, 0, 0, "shared", pfn))


def _only_gmem(machine: Machine):  # type: ignore[no-untyped-def]
    from guestmem.host import Gmem

    context = machine.vms[0].memslots.by_gfn[0].context
    assert context is not None
    return Gmem(machine, context.file, 0)


def test_a_bad_page_that_changes_hands_is_s19(machine: Machine) -> None:
    machine.gmem()
    machine.inodes[0].unmap_failed.add(0)
    with pytest.raises(Violation, match=r"S19 .*changes hands"):
        machine.tracer.emit(event.GmemConvert(1, 0, 1, "private"))


def test_lives_are_counted_by_allocation() -> None:
    pool = GhostPool(4)
    (run,) = pool.allocate(2)
    pool.free(Range(run.start, Pfn(run.start + 1)))
    pool.allocate(1)
    assert pool.life == {run.start: 2, run.start + 1: 1}


def test_a_leak_is_l3(machine: Machine) -> None:
    machine.gmem()
    machine.pool.allocate(1)
    with pytest.raises(Violation, match=r"L3 .*1 pages left"):
        machine.check_end()


def test_an_arena_is_clean_for_the_next_machine() -> None:
    arena = Arena()
    backing = arena.take(2)
    first = backing.hva(PageIndex(1))
    ctypes.memset(first, 7, 8)
    backing.free(Range(PageIndex(0), PageIndex(1)))
    assert [page_digest(backing.hva(PageIndex(index))) for index in (0, 1)] == [1, b"\7" * 8]
    backing.zero(Range(PageIndex(0), PageIndex(1)))
    assert page_digest(backing.hva(PageIndex(0))) == 0
    arena.reset()
    again = arena.take(2)
    assert again.hva(PageIndex(1)) == first
    assert again.__fingerprint__() == (0, 0)
    with pytest.raises(MemoryError):
        arena.take(PAGES)
