"""Lock and RwLock: exclusion, fairness, and the order of invariants.md section 2 in every mode."""

from __future__ import annotations

import pytest

from guestmem.sched import AllOf, Lock, LockClass, LockOrderViolation, RwLock, Scheduler
from tests.explore import Follow, every_schedule

ORDER = list(LockClass)


def test_the_order_is_the_one_of_the_specification() -> None:
    names = [lock_class.name for lock_class in ORDER]
    specified = ["KVM_LOCK", "VCPU_MUTEX", "SLOTS_LOCK", "INVALIDATE_LOCK", "FOLIO_LOCK", "MMU_LOCK"]
    assert [name for name in names if name in specified] == specified
    assert names.index("MMAP_LOCK") < names.index("INVALIDATE_LOCK")


@pytest.mark.parametrize("explores", [False, True])
@pytest.mark.parametrize("outer", ORDER)
@pytest.mark.parametrize("inner", ORDER)
def test_taking_classes_out_of_order_is_an_error_in_every_mode(
    outer: LockClass, inner: LockClass, explores: bool
) -> None:
    scheduler = Scheduler(Follow() if explores else None)
    first, second = Lock(scheduler, outer, "first"), Lock(scheduler, inner, "second")

    async def nest() -> None:
        async with first, second:
            pass

    if outer < inner:
        scheduler.run(nest())
    else:
        with pytest.raises(LockOrderViolation, match="takes second while holding first"):
            scheduler.run(nest(), "task")
    assert first.owner is None
    assert second.owner is None


def test_order_counts_for_rwlocks_and_shared_holders_too() -> None:
    scheduler = Scheduler()
    inner = RwLock(scheduler, LockClass.INVALIDATE_LOCK, "inner")
    outer = Lock(scheduler, LockClass.SLOTS_LOCK, "outer")

    async def wrong() -> None:
        async with inner.shared, outer:
            pass

    async def twice() -> None:
        async with inner.shared, inner.shared:
            pass

    for nesting in (wrong, twice):
        with pytest.raises(LockOrderViolation):
            scheduler.run(nesting())
    assert not inner.readers


def test_might_lock_reports_what_could_not_be_taken() -> None:
    scheduler = Scheduler()
    lock = Lock(scheduler, LockClass.MMU_LOCK, "mmu_lock")

    async def main() -> None:
        task = scheduler.current
        assert task is not None
        task.might_lock(LockClass.SLOTS_LOCK)
        async with lock:
            task.might_lock(LockClass.PAGE_TABLE_LOCK)
            with pytest.raises(LockOrderViolation, match="SLOTS_LOCK"):
                task.might_lock(LockClass.SLOTS_LOCK)

    scheduler.run(main())


def test_out_of_order_release_keeps_the_check_right() -> None:
    scheduler = Scheduler()
    a = Lock(scheduler, LockClass.KVM_LOCK, "a")
    b = Lock(scheduler, LockClass.SLOTS_LOCK, "b")
    c = Lock(scheduler, LockClass.MMU_LOCK, "c")

    async def main() -> None:
        await a.__aenter__()
        await b.__aenter__()
        await a.__aexit__(None, None, None)
        async with c:
            pass
        with pytest.raises(LockOrderViolation):
            await a.__aenter__()
        await b.__aexit__(None, None, None)

    scheduler.run(main())


def test_lock_excludes_in_every_schedule() -> None:
    def scenario(policy: Follow) -> None:
        scheduler = Scheduler(policy)
        lock = Lock(scheduler, LockClass.MMU_LOCK, "lock")
        inside = [0]

        async def actor() -> None:
            async with lock:
                inside[0] += 1
                assert inside[0] == 1
                assert lock.held_by_me
                await scheduler.preempt("inside")
                inside[0] -= 1
            assert not lock.held_by_me

        for name in "abc":
            scheduler.spawn(actor(), name)
        scheduler.drain()
        for task in scheduler.parked:
            task.outcome()

    assert every_schedule(scenario) > 6


def test_rwlock_lets_readers_together_and_a_writer_alone() -> None:
    most_readers = [0]

    def scenario(policy: Follow) -> None:
        scheduler = Scheduler(policy)
        lock = RwLock(scheduler, LockClass.INVALIDATE_LOCK, "lock")
        readers, writers = [0], [0]

        async def read() -> None:
            async with lock.shared:
                readers[0] += 1
                most_readers[0] = max(most_readers[0], readers[0])
                assert not writers[0]
                await scheduler.preempt("reading")
                readers[0] -= 1

        async def write() -> None:
            async with lock.exclusive:
                writers[0] += 1
                assert writers[0] == 1
                assert not readers[0]
                assert lock.held_exclusive_by_me
                await scheduler.preempt("writing")
                writers[0] -= 1

        tasks = [scheduler.spawn(read(), "r1"), scheduler.spawn(read(), "r2"), scheduler.spawn(write(), "w")]
        scheduler.drain()
        for task in tasks:
            task.outcome()

    every_schedule(scenario)
    assert most_readers[0] == 2


def test_under_fifo_a_waiting_writer_keeps_new_readers_out() -> None:
    scheduler = Scheduler()
    lock = RwLock(scheduler, LockClass.INVALIDATE_LOCK, "lock")
    order: list[str] = []

    async def read(name: str) -> None:
        async with lock.shared:
            order.append(name)
            await scheduler.cond_resched("reading")
            await scheduler.cond_resched("reading")

    async def write() -> None:
        async with lock.exclusive:
            order.append("writer")

    for coroutine, name in ((read("r1"), "r1"), (write(), "w"), (read("r2"), "r2")):
        scheduler.spawn(coroutine, name)
    scheduler.drain()
    assert order == ["r1", "writer", "r2"]


def test_several_locks_of_a_class_are_taken_when_all_are_free_and_by_one_task() -> None:
    """Every schedule of two that take the same two, in either order, and one that takes one of them."""

    def run(policy: Follow) -> None:
        scheduler = Scheduler(policy)
        first, second = (Lock(scheduler, LockClass.KVM_LOCK, name) for name in ("first", "second"))
        inside: list[str] = []

        async def both(name: str, *locks: Lock) -> None:
            async with AllOf(scheduler, locks, "both", on_kill=TimeoutError()):
                assert first.held_by_me
                assert second.held_by_me
                inside.append(name)
                await scheduler.preempt("inside")
                assert inside == [name]
                inside.remove(name)

        async def one() -> None:
            async with second:
                await scheduler.preempt("inside")
                assert not inside

        tasks = [
            scheduler.spawn(both("a", first, second), "a"),
            scheduler.spawn(both("b", second, first), "b"),
            scheduler.spawn(one(), "c"),
        ]
        while scheduler.step():
            pass
        assert all(task.done for task in tasks)
        for task in tasks:
            task.outcome()
        assert first.owner is second.owner is None

    assert every_schedule(run) > 6


def test_several_locks_have_the_order_of_their_class() -> None:
    scheduler = Scheduler()
    inner, outer = Lock(scheduler, LockClass.MMU_LOCK, "inner"), Lock(scheduler, LockClass.KVM_LOCK, "outer")

    async def wrong() -> None:
        async with inner, AllOf(scheduler, [outer], "all", on_kill=TimeoutError()):
            pass

    with pytest.raises(LockOrderViolation, match="takes all while holding inner"):
        scheduler.run(wrong())
