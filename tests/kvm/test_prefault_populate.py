"""KVM_PRE_FAULT_MEMORY and populate."""

from __future__ import annotations

import errno

import pytest

from guestmem.cpu.scripted import Load
from guestmem.kvm.addresses import Gfn
from guestmem.kvm.exits import HltExit
from guestmem.kvm.populate import populate
from guestmem.kvm.prefault import pre_fault_memory
from guestmem.memory import PAGE_SIZE, Access
from guestmem.trace import Refusal
from guestmem.trace import events as event
from guestmem.uapi.structs import PreFaultMemory
from tests.kvm.conftest import Bench

K = PAGE_SIZE


@pytest.mark.parametrize(
    ("gpa", "size", "flags", "rule"),
    [  # each with every later fault beside it
        (1, 0, 1, "prefault.flags"),
        (1, 0, 0, "prefault.unaligned"),
        (0, 100, 0, "prefault.unaligned"),
        (0, 0, 0, "prefault.range"),
        (2**64 - K, K, 0, "prefault.range"),
    ],
)
def test_pre_fault_misuse_by_rule_and_in_order(bench: Bench, gpa: int, size: int, flags: int, rule: str) -> None:
    """uapi.md section 12; golden rows G40 to G42."""
    with pytest.raises(Refusal) as caught:
        bench.run(pre_fault_memory(bench.vm.kvm, PreFaultMemory(gpa, size, flags)))
    assert (caught.value.errno, caught.value.rule) == (errno.EINVAL, rule)


@pytest.mark.parametrize("access", list(Access))
def test_pre_fault_maps_what_the_state_says_before_the_guest_runs(bench: Bench, access: Access) -> None:
    gmem = bench.gmem(init_shared=access is Access.SHARED)
    assert bench.vm.pre_fault(K, 4 * K) == 0
    assert len(bench.vm.kvm.stage2.tables[access]) == 4
    assert gmem.statistics().allocated == 4
    bench.events.clear()
    assert bench.guest(Load(K), Load(4 * K)) == (HltExit(), [0, 0])
    assert not [seen for seen in bench.events if isinstance(seen, event.KvmPageFault)]


def test_pre_fault_succeeds_if_one_page_was_mapped(bench: Bench) -> None:
    bench.gmem()
    assert bench.vm.pre_fault(6 * K, 4 * K) == 2 * K, "two pages beyond the slot are left"
    with pytest.raises(Refusal) as caught:
        bench.vm.pre_fault(8 * K, K)
    assert (caught.value.errno, caught.value.rule) == (errno.ENOENT, "prefault.no_slot")


def test_pre_fault_stops_at_a_signal(bench: Bench) -> None:
    bench.gmem()

    async def interrupted() -> None:
        current = bench.host.scheduler.current
        assert current is not None
        current.signal_pending = True
        await pre_fault_memory(bench.vm.kvm, PreFaultMemory(0, K))

    with pytest.raises(Refusal) as caught:
        bench.run(interrupted())
    assert (caught.value.errno, caught.value.rule) == (errno.EINTR, "prefault.interrupted")


def test_populate_puts_the_sources_bytes_into_private_pages(bench: Bench) -> None:
    gmem = bench.gmem(init_shared=False)
    source = bench.host.anonymous(3 * K)
    for page in range(3):
        source[page * K] = page + 1
    assert bench.vm.populate(2 * K, source, 3) == 3
    assert bench.guest(Load(2 * K), Load(3 * K), Load(4 * K)) == (HltExit(), [1, 2, 3])
    assert not bench.host.userspace.pins
    gmem.convert(0, 8 * K, Access.SHARED)


def test_populate_in_place_leaves_bytes_and_zeroes_what_is_new(bench: Bench) -> None:
    gmem = bench.gmem()
    gmem.mmap()[0] = 9
    gmem.convert(0, 8 * K, Access.PRIVATE)
    assert bench.vm.populate(0, None, 2) == 2
    assert bench.guest(Load(0), Load(K)) == (HltExit(), [9, 0])


def test_populate_from_a_mapping_of_the_very_file(bench: Bench) -> None:
    """Known bug B13: faulting the source in takes locks that come before invalidate_lock."""
    gmem = bench.gmem()
    view = gmem.mmap()
    view[7 * K] = 0x33
    gmem.convert(0, K, Access.PRIVATE)
    bench.run(bench.host.process.mm.discard(view.hva, 8 * K))
    bench.run(populate(bench.vm.kvm, Gfn(0), view.hva + 7 * K, 1))
    assert bench.guest(Load(0)) == (HltExit(), [0x33])


def test_populate_refuses_and_says_how_far_it_came(bench: Bench) -> None:
    gmem = bench.gmem()
    gmem.convert(0, 2 * K, Access.PRIVATE)
    source = bench.host.anonymous(4 * K)
    assert bench.vm.populate(0, source, 4) == 2, "the third page is shared (known bug B12)"
    bench.vm.set_memory_region(1, 1 << 30, K, memory=source)
    for gpa, hva, pages, expected in (
        (2 * K, source.hva, 1, (errno.EINVAL, "populate.shared")),
        (0, source.hva, 0, (errno.EINVAL, "populate.range")),
        (0, source.hva + 1, 1, (errno.EINVAL, "populate.range")),
        (1 << 40, source.hva, 1, (errno.EINVAL, "populate.not_gmem")),
        (1 << 30, source.hva, 1, (errno.EINVAL, "populate.not_gmem")),
        (0, 0x1000, 1, (errno.EFAULT, "user.page")),
    ):
        with pytest.raises(Refusal) as caught:
            bench.run(populate(bench.vm.kvm, Gfn(gpa // K), hva, pages))
        assert (caught.value.errno, caught.value.rule) == expected
    gmem.close()
    with pytest.raises(Refusal) as caught:
        bench.vm.populate(0, source, 1)
    assert (caught.value.errno, caught.value.rule) == (errno.EFAULT, "fault.file_gone")


def test_populate_stops_at_a_signal(bench: Bench) -> None:
    bench.gmem(init_shared=False)

    async def interrupted() -> int:
        current = bench.host.scheduler.current
        assert current is not None
        current.signal_pending = True
        return await populate(bench.vm.kvm, Gfn(0), None, 2)

    with pytest.raises(Refusal) as caught:
        bench.run(interrupted())
    assert (caught.value.errno, caught.value.rule) == (errno.EINTR, "populate.interrupted")
