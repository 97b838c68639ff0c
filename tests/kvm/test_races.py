"""Two or three actors on one file, in every schedule or in many: each S-property is checked after every step.

The scenarios that the explorer's own issue will grow out of; here they show that the code holds, and that with one line
taken out (`broken`) the properties notice. Known bugs by their number in spec/known_bugs.md.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from guestmem.check.invariants import Violation
from guestmem.cpu.scripted import Load, Store
from guestmem.kvm.addresses import Gfn
from guestmem.kvm.context import KvmGmemContext
from guestmem.kvm.gmem import set_memory_attributes2
from guestmem.kvm.memslots import SlotTable
from guestmem.kvm.prefault import pre_fault_memory
from guestmem.kvm.set_region import set_user_memory_region2
from guestmem.kvm.stage2 import Stage2
from guestmem.memory import PAGE_SIZE, Access, Inode, Invalidation, PageIndex, Window, convert
from guestmem.memory.notifier import Telling
from guestmem.sched import Policy, fingerprint
from guestmem.trace import Refusal
from guestmem.uapi.kvm import KVM_MEMORY_ATTRIBUTE_PRIVATE
from guestmem.uapi.structs import MemoryAttributes2, PreFaultMemory, UserspaceMemoryRegion2
from guestmem.userspace import SigBus
from tests.explore import Random, every_schedule
from tests.kvm.conftest import Bench

K = PAGE_SIZE
RANDOM_SEEDS = 300


class Race:
    """A bench under a policy, with actors; `go` runs them and takes everything down."""

    last: Race

    def __init__(self, policy: Policy, pages: int = 1, *, init_shared: bool = True) -> None:
        self.bench = Bench(policy=policy, pages=32)
        Race.last = self
        self.gmem = self.bench.gmem(pages, init_shared=init_shared)
        self.view = self.gmem.mmap()
        self.answers: dict[str, str] = {}

    def actor(self, name: str, *calls: Coroutine[Any, Any, object]) -> None:
        """A task that makes `calls`, one after another, and notes how the last one was answered."""

        async def act() -> None:
            for call in calls:
                try:
                    await call
                    self.answers[name] = "ok"
                except Refusal as refusal:
                    self.answers[name] = refusal.rule
                except SigBus:
                    self.answers[name] = "SIGBUS"

        self.bench.host.scheduler.spawn(act(), name)

    def go(self) -> dict[str, str]:
        scheduler = self.bench.host.scheduler
        tasks = list(scheduler.parked)
        scheduler.drain()
        for task in tasks:
            task.outcome()
        for pin in list(self.bench.host.userspace.pins):
            pin.unpin()
        self.bench.host.check()
        self.bench.close()
        return self.answers

    def abandon(self) -> None:
        """Let go of a world that a mutation has broken."""
        host = self.bench.host
        host.scheduler.observers.clear()
        host.scheduler.close()
        for inode in host.inodes:
            inode.backing.close()

    # What actors do

    def convert(self, to: Access, pages: int = 1) -> Coroutine[Any, Any, None]:
        bits = KVM_MEMORY_ATTRIBUTE_PRIVATE if to is Access.PRIVATE else 0
        return set_memory_attributes2(self.gmem.file, MemoryAttributes2(0, pages * K, bits))

    def guest(self, *script: Load | Store) -> Coroutine[Any, Any, object]:
        return self.bench.vcpu(*script, number=len(self.bench.vm.kvm.vcpus)).vcpu.run()

    def host_write(self) -> Coroutine[Any, Any, None]:
        return self.bench.host.process.mm.write(self.view.hva, b"h")

    def pin(self) -> Coroutine[Any, Any, object]:
        return self.bench.host.process.pin(self.view.hva, 1)

    def punch(self) -> Coroutine[Any, Any, None]:
        return self.gmem.inode.fallocate(3, 0, K)

    def delete_slot(self) -> Coroutine[Any, Any, None]:
        region = UserspaceMemoryRegion2(0, 0, 0, 0)
        return set_user_memory_region2(self.bench.vm.kvm, self.bench.host.process.fds, region)

    def bind(self, slot: int, gpa: int) -> Coroutine[Any, Any, None]:
        region = UserspaceMemoryRegion2(slot, 4, gpa, K, guest_memfd=self.gmem.fd)
        return set_user_memory_region2(self.bench.vm.kvm, self.bench.host.process.fds, region)

    def close(self) -> Coroutine[Any, Any, None]:
        return self.bench.host.process.fds.close(self.gmem.fd)

    def unmap(self) -> Coroutine[Any, Any, None]:
        return self.bench.host.process.mm.unmap(self.view.hva, len(self.view))


Scenario = Callable[[Policy], dict[str, str]]


def conversion_against_guest(policy: Policy) -> dict[str, str]:
    race = Race(policy)
    race.actor("guest", race.guest(Store(0, 1)))
    race.actor("convert", race.convert(Access.PRIVATE))
    return race.go()


def conversion_against_host(policy: Policy) -> dict[str, str]:
    race = Race(policy)
    race.actor("host", race.host_write())
    race.actor("convert", race.convert(Access.PRIVATE))
    return race.go()


def conversion_against_pin(policy: Policy) -> dict[str, str]:
    race = Race(policy)
    race.view[0] = 1
    race.actor("pin", race.pin())
    race.actor("convert", race.convert(Access.PRIVATE))
    return race.go()


def conversion_there_and_back_against_guest(policy: Policy) -> dict[str, str]:
    race = Race(policy)
    race.actor("guest", race.guest(Load(0), Store(0, 1)))
    race.actor("convert", race.convert(Access.PRIVATE), race.convert(Access.SHARED))
    return race.go()


def punch_against_guest_and_host(policy: Policy) -> dict[str, str]:
    race = Race(policy)
    race.actor("guest", race.guest(Store(0, 1)))
    race.actor("host", race.host_write())
    race.actor("punch", race.punch())
    return race.go()


def slot_deletion_against_guest(policy: Policy) -> dict[str, str]:
    race = Race(policy)
    race.actor("guest", race.guest(Store(0, 1)))
    race.actor("delete", race.delete_slot())
    return race.go()


def slot_deletion_against_prefault(policy: Policy) -> dict[str, str]:
    race = Race(policy)
    race.actor("prefault", pre_fault_memory(race.bench.vm.kvm, PreFaultMemory(0, K)))
    race.actor("delete", race.delete_slot())
    return race.go()


def slot_deletion_against_last_close(policy: Policy) -> dict[str, str]:
    race = Race(policy)
    race.bench.run(race.unmap())
    race.actor("close", race.close())
    race.actor("delete", race.delete_slot())
    return race.go()


def conversion_against_slot_deletion(policy: Policy) -> dict[str, str]:
    race = Race(policy)
    race.bench.run(race.guest(Store(0, 1)))
    race.actor("convert", race.convert(Access.PRIVATE))
    race.actor("delete", race.delete_slot())
    return race.go()


def two_binds_of_one_page(policy: Policy) -> dict[str, str]:
    race = Race(policy)
    race.bench.run(race.delete_slot())
    race.actor("one", race.bind(1, 0))
    race.actor("two", race.bind(2, 16 * K))
    return race.go()


def host_unmap_against_guest_of_a_plain_slot(policy: Policy) -> dict[str, str]:
    race = Race(policy)
    race.bench.run(race.delete_slot())
    race.bench.vm.set_memory_region(1, 0, K, memory=race.view)
    race.actor("guest", race.guest(Load(0)))
    race.actor("unmap", race.unmap())
    return race.go()


def host_invalidation_against_slot_update(policy: Policy) -> dict[str, str]:
    race = Race(policy)
    race.bench.run(race.delete_slot())
    race.bench.vm.set_memory_region(1, 0, K, memory=race.view)
    race.actor("punch", race.punch())
    race.actor("delete", set_user_memory_region2(race.bench.vm.kvm, race.bench.host.process.fds, _delete(1)))
    return race.go()


def poison_against_guest(policy: Policy) -> dict[str, str]:
    race = Race(policy)
    race.view[0] = 1
    race.actor("guest", race.guest(Store(0, 1)))
    race.actor("poison", race.gmem.inode.memory_failure(PageIndex(0)))
    return race.go()


def poison_against_host(policy: Policy) -> dict[str, str]:
    race = Race(policy)
    race.view[0] = 1
    race.bench.run(race.bench.host.process.mm.discard(race.view.hva, K))
    race.actor("host", race.host_write())
    race.actor("poison", race.gmem.inode.memory_failure(PageIndex(0)))
    return race.go()


def mmap_against_last_close(policy: Policy) -> dict[str, str]:
    race = Race(policy)
    race.bench.run(race.unmap())
    race.actor("mmap", race.bench.host.process.mmap(race.gmem.fd, K))
    race.actor("close", race.close())
    return race.go()


def closing_everything_at_once(policy: Policy) -> dict[str, str]:
    race = Race(policy)
    race.actor("guest", race.guest(Store(0, 1)))
    race.actor("close", race.close())
    race.actor("unmap", race.unmap())
    return race.go()


def _delete(slot: int) -> UserspaceMemoryRegion2:
    return UserspaceMemoryRegion2(slot, 0, 0, 0)


EXHAUSTED: list[Scenario] = [
    conversion_against_host,
    conversion_against_pin,
    mmap_against_last_close,
    poison_against_host,
    slot_deletion_against_last_close,
    two_binds_of_one_page,
]
SAMPLED: list[Scenario] = [
    conversion_against_guest,
    conversion_there_and_back_against_guest,
    punch_against_guest_and_host,
    slot_deletion_against_guest,
    slot_deletion_against_prefault,
    conversion_against_slot_deletion,
    host_unmap_against_guest_of_a_plain_slot,
    host_invalidation_against_slot_update,
    poison_against_guest,
    closing_everything_at_once,
]

SOMETIMES: dict[Scenario, set[tuple[str, str]]] = {
    conversion_against_host: {("host", "ok"), ("host", "SIGBUS"), ("convert", "ok")},
    conversion_against_pin: {("pin", "ok"), ("pin", "user.page"), ("convert", "ok"), ("convert", "convert.busy")},
    two_binds_of_one_page: {("one", "ok"), ("one", "bind.overlap"), ("two", "ok"), ("two", "bind.overlap")},
    slot_deletion_against_prefault: {("prefault", "ok"), ("prefault", "prefault.no_slot"), ("delete", "ok")},
    slot_deletion_against_last_close: {("close", "ok"), ("delete", "ok")},
    mmap_against_last_close: {("mmap", "ok"), ("mmap", "fd.not_open"), ("close", "ok")},
    poison_against_host: {("host", "ok"), ("host", "SIGBUS"), ("poison", "ok")},
    punch_against_guest_and_host: {("host", "ok"), ("punch", "ok")},
}


@pytest.mark.parametrize("scenario", EXHAUSTED, ids=lambda scenario: scenario.__name__)
def test_in_every_schedule(scenario: Scenario) -> None:
    seen: set[tuple[str, str]] = set()
    assert every_schedule(lambda policy: seen.update(scenario(policy).items())) >= 10
    assert SOMETIMES.get(scenario, set()) <= seen, "a scenario in which nothing happens proves nothing"


@pytest.mark.parametrize("scenario", SAMPLED, ids=lambda scenario: scenario.__name__)
def test_in_many_schedules(scenario: Scenario) -> None:
    seen: set[tuple[str, str]] = set()
    for seed in range(RANDOM_SEEDS):
        seen.update(scenario(Random(seed)).items())
    assert SOMETIMES.get(scenario, set()) <= seen, "a scenario in which nothing happens proves nothing"


def test_the_same_choices_make_the_same_states() -> None:
    """What pruning and replay stand on: nothing but the policy decides, and addresses are not state."""

    def states(seed: int) -> list[int]:
        race = Race(Random(seed), pages=2)
        host = race.bench.host
        seen: list[int] = []
        race.actor("guest", race.guest(Store(0, 1), Load(K)))
        race.actor("convert", race.convert(Access.PRIVATE, pages=2))
        race.actor("pin", race.pin())
        host.scheduler.observers.append(
            lambda task: seen.append(hash(fingerprint(host.inodes, host.vms, host.pool, host.userspace, task)))
        )
        race.go()
        return seen

    for seed in range(5):
        once = states(seed)
        assert once == states(seed)
        assert len(set(once)) > len(once) / 2
    assert states(1) != states(2)


# With one line taken out, a property notices


def breaks(scenario: Scenario) -> str:
    """The property that some schedule of `scenario` breaks; "" if none does."""
    for seed in range(RANDOM_SEEDS):
        try:
            scenario(Random(seed))
        except AssertionError as error:
            Race.last.abandon()
            return error.name if isinstance(error, Violation) else str(error)
    return ""


def test_b01_unbinding_nothing_from_a_dying_file(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = KvmGmemContext.unbind

    async def unbind(self: KvmGmemContext, slot: Any) -> Any:
        return await whole(self, slot) if self.file.references.value else None

    monkeypatch.setattr(KvmGmemContext, "unbind", unbind)
    assert breaks(slot_deletion_against_last_close) == "S6"


def test_b19_filter_from_the_creation_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = KvmGmemContext.invalidate_begin

    async def begin(self: KvmGmemContext, invalidation: Invalidation) -> None:
        born = (self.inode.attributes.birth,)
        await whole(self, Invalidation(invalidation.pages, invalidation.reason, born))

    monkeypatch.setattr(KvmGmemContext, "invalidate_begin", begin)
    assert breaks(conversion_there_and_back_against_guest) == "S2"


def test_b24_looking_for_references_before_unmapping(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Telling.begin
    look = convert.check_no_references

    async def begin(self: Telling, through_references: bool = False, last: bool = True) -> None:
        if not through_references:
            await whole(self, last=last)

    async def look_then_convert(self: Inode, pages: Any, to: Access) -> None:
        look(self, pages)
        await self.scheduler.preempt("looked, not unmapped yet")
        await real_convert(self, pages, to)

    real_convert = Inode.convert
    monkeypatch.setattr(convert, "check_no_references", lambda inode, pages: None)
    monkeypatch.setattr(Inode, "convert", look_then_convert)
    monkeypatch.setattr(Telling, "begin", begin)
    assert breaks(conversion_against_pin) == "S1"


def test_b30_memslots_swapped_inside_a_host_invalidation(monkeypatch: pytest.MonkeyPatch) -> None:
    from guestmem.kvm.vm import Kvm

    async def swap(self: Kvm, table: SlotTable) -> None:
        self.memslots = table
        await self.srcu.synchronize()

    monkeypatch.setattr(Kvm, "swap_memslots", swap)
    assert breaks(host_invalidation_against_slot_update) == "S4"


def test_a_window_that_lets_stale_look_ups_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Window, "blocks", lambda self, seen, numbers: False)
    assert breaks(punch_against_guest_and_host) in ("S3", "S10")


def test_a_zap_that_forgets_the_tlb(monkeypatch: pytest.MonkeyPatch) -> None:
    whole: Any = Stage2.__init__

    def init(self: Stage2, *args: Any) -> None:
        whole(self, *args[:-1], lambda: None)

    monkeypatch.setattr(Stage2, "__init__", init)
    assert breaks(punch_against_guest_and_host) == "S3"


def test_b26_prefault_that_waits_inside_its_read_section() -> None:
    """The shape of the bug on the primitives: the deadlock is reported at once, by name."""
    from guestmem.sched import Srcu

    race = Race(Random(0))
    srcu: Srcu = race.bench.vm.kvm.srcu

    async def prefault_forever() -> None:
        with srcu.read():
            await race.delete_slot()

    with pytest.raises(AssertionError, match="inside its own read"):
        race.bench.run(prefault_forever())
    assert race.bench.vm.kvm.memslots.find(Gfn(0)) is not None
    race.bench.vm.kvm.memslots.by_gfn[0].invalid = False
    race.go()
