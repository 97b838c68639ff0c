"""RefCount, SeqCount, WaitQueue, Srcu."""

from __future__ import annotations

import pytest

from guestmem.sched import Deadlock, RefCount, Scheduler, SeqCount, Srcu, WaitQueue
from tests.explore import Follow, every_schedule


def test_refcount_dies_once_and_cannot_be_had_again() -> None:
    count = RefCount(Scheduler(), "count")
    count.get()
    assert count.put() is False
    assert count.put() is True
    assert count.get_unless_zero() is False
    with pytest.raises(AssertionError, match="taken from zero"):
        count.get()
    with pytest.raises(AssertionError, match="put without"):
        count.put()


def test_refcount_wait_until_returns_when_the_others_have_gone() -> None:
    scheduler = Scheduler()
    count = RefCount(scheduler, "count", 3)
    order: list[str] = []

    async def wait() -> None:
        await count.wait_until(1)
        order.append("waited")

    async def drop() -> None:
        order.append("drop")
        count.put()

    scheduler.spawn(wait(), "waiter")
    scheduler.spawn(drop(), "one")
    scheduler.spawn(drop(), "two")
    scheduler.drain()
    assert order == ["drop", "drop", "waited"]


def test_seqcount_tells_that_it_moved() -> None:
    sequence = SeqCount("seq")
    seen = sequence.read()
    assert not sequence.moved_since(seen)
    sequence.bump()
    assert sequence.moved_since(seen)


def test_waitqueue_goes_on_after_a_wake_up_if_the_condition_holds() -> None:
    scheduler = Scheduler()
    queue = WaitQueue(scheduler, "queue")
    ready = [False]
    order: list[str] = []

    async def sleeper() -> None:
        await queue.wait_until(lambda: ready[0])
        order.append("awake")

    async def waker() -> None:
        queue.wake_all()
        await scheduler.cond_resched("spurious wake-up")
        ready[0] = True
        order.append("wake")
        queue.wake_all()

    scheduler.spawn(sleeper(), "sleeper")
    scheduler.spawn(waker(), "waker")
    scheduler.drain()
    assert order == ["wake", "awake"]


def test_waitqueue_loses_a_change_that_nobody_announces() -> None:
    scheduler = Scheduler()
    queue = WaitQueue(scheduler, "queue")
    ready = [False]

    async def sleeper() -> None:
        await queue.wait_until(lambda: ready[0])

    async def forgets_to_wake() -> None:
        ready[0] = True

    scheduler.spawn(sleeper(), "sleeper")
    scheduler.spawn(forgets_to_wake(), "other")
    with pytest.raises(Deadlock, match="sleeper waits for wait queue"):
        scheduler.drain()
    scheduler.close()


def test_srcu_waits_for_earlier_readers_and_not_for_later_ones() -> None:
    ends: set[tuple[str, ...]] = set()

    def scenario(policy: Follow) -> None:
        scheduler = Scheduler(policy)
        srcu = Srcu(scheduler, "srcu")
        value = ["old"]
        log: list[str] = []

        async def reader() -> None:
            with srcu.read():
                seen = value[0]
                await scheduler.preempt("reading")
                assert seen != "freed"
                assert value[0] != "freed" or seen == "new"
                log.append(f"read {seen}")

        async def updater() -> None:
            value[0] = "new"
            await srcu.synchronize()
            log.append("old freed")

        tasks = [scheduler.spawn(reader(), "r"), scheduler.spawn(updater(), "u")]
        scheduler.drain()
        for task in tasks:
            task.outcome()
        ends.add(tuple(log))

    every_schedule(scenario)
    assert ("old freed", "read old") not in ends
    assert {("read old", "old freed"), ("old freed", "read new"), ("read new", "old freed")} <= ends


def test_srcu_grace_period_inside_its_own_read_section_is_an_error() -> None:
    scheduler = Scheduler()
    srcu = Srcu(scheduler, "kvm->srcu")

    async def wrong() -> None:
        with srcu.read():
            await srcu.synchronize()

    with pytest.raises(AssertionError, match=r"L5: .* kvm->srcu inside its own read"):
        scheduler.run(wrong(), "prefault")
    assert not srcu.readers
