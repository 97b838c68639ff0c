"""Each property can fail: a world broken by hand in just that way is reported under its name."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from guestmem.arch.snp import SnpPlatform
from guestmem.arch.snp.rmp import State
from guestmem.check.invariants import NOT_YET, PROPERTIES, Violation, ZeroGhost, check_all, snapshot
from guestmem.cpu.engine import HostWindow, Translation
from guestmem.cpu.scripted import Store
from guestmem.kvm.addresses import Gfn
from guestmem.kvm.identity import Identity
from guestmem.memory import PAGE_SIZE, Access, PageIndex, Range
from guestmem.sched import Lock, LockClass
from guestmem.trace import Refusal
from guestmem.trace import events as event
from guestmem.uapi.kvm import VmType
from tests.kvm.conftest import Bench

K = PAGE_SIZE


class World:
    """A machine in which something is mapped everywhere: page 0 shared, page 1 private."""

    def __init__(self) -> None:
        self.bench = Bench()
        self.host = self.bench.host
        self.gmem = self.bench.gmem()
        self.view = self.gmem.mmap()
        self.inode = self.gmem.inode
        self.kvm = self.bench.vm.kvm
        self.gmem.convert(K, K, Access.PRIVATE)
        self.vcpu = self.bench.vcpu(Store(0, 1), Store(K, 1))
        self.vcpu.run()
        self.view[0]
        self.slot = self.kvm.memslots.by_gfn[0]
        self.context = self.slot.context
        assert self.context is not None
        self.host.scheduler.observers.clear()

    def leaf(self, access: Access, gfn: int):  # type: ignore[no-untyped-def]
        leaf = self.kvm.stage2.tables[access].lookup(Gfn(gfn))
        assert leaf is not None
        return leaf


def s1(world: World) -> None:
    world.inode.attributes.set(Range(PageIndex(0), PageIndex(1)), Access.PRIVATE)


def s2(world: World) -> None:
    world.inode.attributes.set(Range(PageIndex(1), PageIndex(2)), Access.SHARED)


def s3_page_replaced(world: World) -> None:
    world.inode.folios.remove(Range(PageIndex(1), PageIndex(2)))


def s3_stale_tlb(world: World) -> None:
    world.vcpu.engine.tlb[7, None] = Translation(0x1000, True, HostWindow(0, K))  # type: ignore[attr-defined]


def s4(world: World) -> None:
    world.kvm.stage2.window.begin(Range(Gfn(0), Gfn(1)))


def s5_slot_unknown_to_file(world: World) -> None:
    assert world.context is not None
    world.context.bindings.clear()


def s5_bound_past_the_end(world: World) -> None:
    world.slot.pages = Range(PageIndex(7), PageIndex(15))
    for table in world.kvm.stage2.tables.values():
        table.zap(Range(Gfn(0), Gfn(99)))


def s6_freed_slot(world: World) -> None:
    world.slot.freed = True


def s6_released_file(world: World) -> None:
    world.gmem.file.released = True


def s7(world: World) -> None:
    stranger = world.host.create_vm()
    world.inode.owner = stranger.kvm.machine


def s8(world: World) -> None:
    world.host.identities.live.clear()


def s9(world: World) -> None:
    """The RMP gives a page of this VM to a guest of another architecture."""
    snp = world.host.platforms[VmType.SNP]
    assert isinstance(snp, SnpPlatform)
    snp.new_guest(7, 7)
    snp.rmp.rmpupdate(world.leaf(Access.SHARED, 0).pfn, State(True, 7, 0))


def s10(world: World) -> None:
    world.host.pool.allocated.remove(world.leaf(Access.SHARED, 0).pfn)


def s12(world: World) -> None:
    world.inode.folios.uptodate.discard(0)


def s13(world: World) -> None:
    leaf = world.leaf(Access.SHARED, 0)
    world.inode.folios.uptodate.add_range(0, 512)
    world.kvm.stage2.tables[Access.SHARED].zap(Range(Gfn(0), Gfn(1)))
    world.kvm.stage2.tables[Access.PRIVATE].zap(Range(Gfn(0), Gfn(9)))
    world.kvm.memslots.by_gfn[0].gfns = Range(Gfn(0), Gfn(1024))
    world.kvm.stage2.tables[Access.SHARED].map(Gfn(0), 9, leaf._replace(order=9))


def s14_reference_without_holder(world: World) -> None:
    world.inode.folios.references[PageIndex(0)] = 1


def s14_page_without_owner(world: World) -> None:
    world.host.pool.allocate(1)


def s16(world: World) -> None:
    world.slot.flags |= 2


def s17(world: World) -> None:
    scheduler = world.host.scheduler
    locks = [Lock(scheduler, lock_class, lock_class.name) for lock_class in (LockClass.MMU_LOCK, LockClass.KVM_LOCK)]

    async def hold() -> None:
        await scheduler.cond_resched("holding")

    task = scheduler.spawn(hold(), "holder")
    task.held.extend(locks)


def s18(world: World) -> None:
    world.vcpu.vcpu.identity = Identity(9, 99)


def s8_helper_left_alone(world: World) -> None:
    helper = world.host.create_vm(VmType.SW_PROTECTED)
    helper.kvm.mirror_of = world.kvm


def s19(world: World) -> None:
    world.inode.folios.poisoned.add(0)


def s20(world: World) -> None:
    from guestmem.memory import Invalidation, Reason
    from guestmem.memory.notifier import BOTH

    telling = world.inode.users.tell(Invalidation(Range(PageIndex(0), PageIndex(1)), Reason.POISON, BOTH))
    telling.told = list(world.inode.users.registrations)
    world.inode.users.open.append(telling)
    world.gmem.file.released = True
    world.kvm.memslots = type(world.kvm.memslots)()


BREAKS: list[tuple[str, Callable[[World], None]]] = [
    ("S1", s1),
    ("S2", s2),
    ("S3", s3_page_replaced),
    ("S3", s3_stale_tlb),
    ("S4", s4),
    ("S5", s5_slot_unknown_to_file),
    ("S5", s5_bound_past_the_end),
    ("S6", s6_freed_slot),
    ("S6", s6_released_file),
    ("S7", s7),
    ("S8", s8),
    ("S8", s8_helper_left_alone),
    ("S9", s9),
    ("S10", s10),
    ("S12", s12),
    ("S13", s13),
    ("S14", s14_reference_without_holder),
    ("S14", s14_page_without_owner),
    ("S16", s16),
    ("S17", s17),
    ("S18", s18),
    ("S19", s19),
    ("S20", s20),
]


@pytest.mark.parametrize(("name", "break_it"), BREAKS, ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_world_is_reported_under_the_propertys_name(name: str, break_it: Callable[[World], None]) -> None:
    world = World()
    check_all(world.host)
    break_it(world)
    facts = list(PROPERTIES[name].broken(world.host))
    assert facts, "not noticed"
    with pytest.raises(Violation, match=r"^S\d+ "):
        check_all(world.host)
    world.host.scheduler.close()
    world.inode.backing.close()


def test_every_property_is_executable_or_says_why_not() -> None:
    enforced_elsewhere = {"S15": snapshot, "S21": Bench}
    numbers = {f"S{number}" for number in range(1, 22)}
    assert set(PROPERTIES) | set(NOT_YET) | set(enforced_elsewhere) == numbers
    assert {name for name, _ in BREAKS} == set(PROPERTIES)


def test_statements_are_ours_and_numbers_the_specifications() -> None:
    for name, prop in PROPERTIES.items():
        assert re.fullmatch(r"S\d+", name)
        assert prop.name == name
        assert prop.statement[0].islower()


def test_zeroing_twice_is_noticed() -> None:
    bench = Bench()
    ghost_sees = ZeroGhost(bench.host.tracer)
    zero = event.GmemFolioZero(1, 5, 6)
    bench.host.tracer.emit(zero)
    with pytest.raises(Violation, match=r"S12 .* a second time"):
        bench.host.tracer.emit(zero)
    ghost_sees.stop()
    bench.close()


def test_a_refused_call_leaves_the_snapshot_alone() -> None:
    """S15, on the refusals that come latest in their calls."""
    world = World()
    pin = world.gmem.pin(world.view, 0, 1)
    before = snapshot(world.host)
    calls: list[Callable[[], None]] = [
        lambda: world.gmem.convert(0, 8 * K, Access.PRIVATE),
        lambda: world.bench.vm.set_memory_region(1, 1 << 52, K, gmem=world.gmem, offset=0),
        lambda: world.bench.vm.set_memory_region(1, 1 << 20, 8 * K, gmem=world.gmem),
        lambda: world.gmem.allocate(0, 1 << 20),
    ]
    for call in calls:
        with pytest.raises(Refusal):
            call()
        assert snapshot(world.host) == before
    pin.unpin()
    world.bench.close()
