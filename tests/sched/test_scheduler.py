"""Tasks, the loop, the blocking facade, and the plug for exploring policies."""

from __future__ import annotations

import pytest

from guestmem.sched import Deadlock, Lock, LockClass, Scheduler
from tests.explore import Follow, every_schedule


async def value(result: int) -> int:
    return result


def test_run_returns_the_coroutines_result() -> None:
    assert Scheduler().run(value(7)) == 7


def test_run_raises_the_coroutines_exception() -> None:
    async def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        Scheduler().run(fail())


def test_run_inside_a_task_is_an_error() -> None:
    scheduler = Scheduler()

    async def outer() -> None:
        scheduler.run(value(1))

    with pytest.raises(RuntimeError, match="blocking call inside task 'outer'"):
        scheduler.run(outer(), "outer")


def test_fifo_runs_a_task_until_it_waits_and_then_the_longest_parked() -> None:
    scheduler = Scheduler()
    seen: list[str] = []

    async def actor(name: str) -> None:
        for step in range(2):
            seen.append(f"{name}{step}")
            await scheduler.preempt("not a switch under fifo")
            await scheduler.cond_resched("a switch")

    for name in "abc":
        scheduler.spawn(actor(name), name)
    scheduler.drain()
    assert seen == ["a0", "b0", "c0", "a1", "b1", "c1"]


def test_join_waits_and_hands_over_result_and_exception() -> None:
    scheduler = Scheduler()

    async def fail() -> None:
        await scheduler.cond_resched("later")
        raise ValueError("late")

    async def main() -> int:
        good = scheduler.spawn(value(3), "good")
        bad = scheduler.spawn(fail(), "bad")
        with pytest.raises(ValueError, match="late"):
            await scheduler.join(bad)
        return await scheduler.join(good)

    assert scheduler.run(main()) == 3


def test_an_exploring_policy_decides_every_step() -> None:
    orders: set[str] = set()

    def scenario(policy: Follow) -> None:
        scheduler = Scheduler(policy)
        seen: list[str] = []

        async def actor(name: str) -> None:
            for _ in range(3):
                seen.append(name)
                await scheduler.preempt("between")

        scheduler.spawn(actor("a"), "a")
        scheduler.spawn(actor("b"), "b")
        scheduler.drain()
        orders.add("".join(seen))

    runs = every_schedule(scenario)
    assert len(orders) == 20  # 6! / (3! 3!)
    assert runs == 70  # each actor has a fourth, last step: 8! / (4! 4!)


def test_exploring_finds_a_lost_update_that_fifo_never_shows() -> None:
    def final(scheduler: Scheduler) -> int:
        counter = [0]

        async def increment() -> None:
            read = counter[0]
            await scheduler.preempt("between load and store")
            counter[0] = read + 1

        for name in ("a", "b"):
            scheduler.spawn(increment(), name)
        scheduler.drain()
        return counter[0]

    assert final(Scheduler()) == 2
    results: set[int] = set()
    every_schedule(lambda policy: results.add(final(Scheduler(policy))))
    assert results == {1, 2}


def test_failures_are_choices_of_the_schedule() -> None:
    outcomes: list[bool] = []

    def scenario(policy: Follow) -> None:
        scheduler = Scheduler(policy)

        async def allocate() -> None:
            outcomes.append(scheduler.fails("allocate"))

        scheduler.run(allocate())

    assert every_schedule(scenario, failures=1) == 2
    assert sorted(outcomes) == [False, True]
    outcomes.clear()
    scheduler = Scheduler()

    async def under_fifo() -> bool:
        return scheduler.fails("allocate")

    assert scheduler.run(under_fifo()) is False


def test_observers_see_every_step() -> None:
    scheduler = Scheduler()
    steps: list[str] = []
    scheduler.observers.append(lambda task: steps.append(task.name))

    async def actor() -> None:
        await scheduler.cond_resched("once")

    scheduler.spawn(actor(), "other")
    scheduler.run(actor(), "main")
    assert steps == ["main", "other", "main"]


def test_deadlock_names_who_waits_for_what() -> None:
    scheduler = Scheduler()
    first = Lock(scheduler, LockClass.INVALIDATE_LOCK, "first")

    async def holder() -> None:
        async with first:
            await scheduler.join(blocked)

    async def wants() -> None:
        async with first:
            pass

    hold = scheduler.spawn(holder(), "holder")
    blocked = scheduler.spawn(wants(), "blocked")
    with pytest.raises(Deadlock) as caught:
        scheduler.drain()
    message = str(caught.value)
    assert "holder waits for join blocked, holding first" in message
    assert "blocked waits for lock first (held by holder), holding nothing" in message
    scheduler.close()
    assert hold.done
    assert first.owner is None


def test_run_raises_deadlock_when_its_own_task_cannot_go_on() -> None:
    scheduler = Scheduler()

    async def forever() -> None:
        await scheduler.join(stuck)

    async def never() -> None:
        await scheduler.join(main_task)

    main_task = scheduler.spawn(forever(), "first")
    stuck = scheduler.spawn(never(), "second")
    with pytest.raises(Deadlock):
        scheduler.run(forever(), "main")
    scheduler.close()


def test_close_unwinds_parked_tasks_and_releases_their_locks() -> None:
    scheduler = Scheduler()
    lock = Lock(scheduler, LockClass.MMU_LOCK, "lock")

    async def holder() -> None:
        async with lock:
            await scheduler.cond_resched("parked with the lock")
            await scheduler.cond_resched("never reached")

    scheduler.spawn(value(0), "other")
    scheduler.spawn(holder(), "holder")
    scheduler.step()
    scheduler.spawn(value(0), "another")
    scheduler.step()
    assert lock.owner is not None
    scheduler.close()
    assert lock.owner is None
    assert not scheduler.parked


def test_a_task_that_ends_with_a_lock_is_a_bug() -> None:
    scheduler = Scheduler()
    lock = Lock(scheduler, LockClass.MMU_LOCK, "leaked")

    async def leak() -> None:
        await lock.__aenter__()

    with pytest.raises(AssertionError, match="ended holding leaked"):
        scheduler.run(leak(), "leaker")
