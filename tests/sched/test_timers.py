"""Timers: by hand, and under a scheduler."""

from __future__ import annotations

import time

import pytest

from guestmem.sched import Deadlock, ManualClock, Operation, Scheduler, Timers, park


def test_they_fire_in_order_and_once() -> None:
    timers = Timers(ManualClock())
    fired: list[str] = []
    late, early = (timers.new(lambda name=name: fired.append(name)) for name in ("late", "early"))  # type: ignore[misc]
    late.start(20)
    early.start(10)
    assert timers.next_deadline == 10
    assert not timers.fire_due()
    timers.clock.sleep_until(25)
    assert timers.fire_due() and not timers.fire_due()
    assert fired == ["early", "late"]
    assert timers.next_deadline is None and late.deadline is None


def test_the_last_start_counts_and_a_cancelled_timer_is_silent() -> None:
    timers = Timers(ManualClock())
    fired: list[int] = []
    timer, other = timers.new(lambda: fired.append(timers.now())), timers.new(lambda: fired.append(-1))
    timer.start(10)
    timer.start(30)
    other.start(5)
    other.cancel()
    timers.clock.sleep_until(20)
    timers.fire_due()
    assert fired == [] and timers.next_deadline == 30
    timer.start(30)
    timers.clock.sleep_until(30)
    timers.fire_due()
    assert fired == [30]


def test_a_timer_that_starts_itself_for_the_past_does_not_hang() -> None:
    timers = Timers(ManualClock(100))
    count: list[int] = []

    def again() -> None:
        count.append(1)
        timer.start(50)

    timer = timers.new(again)
    timer.start(0)
    timers.fire_due()
    assert len(count) == 1
    timers.fire_due()
    assert len(count) == 2


def test_one_that_a_former_one_cancels_does_not_fire() -> None:
    timers = Timers(ManualClock(100))
    fired: list[int] = []
    second = timers.new(lambda: fired.append(2))
    timers.new(second.cancel).start(1)
    second.start(2)
    timers.fire_due()
    assert fired == []


def test_a_timer_that_is_put_off_for_ever_takes_no_memory() -> None:
    timers = Timers(ManualClock())
    kept = timers.new(lambda: None)
    kept.start(7)
    timer = timers.new(lambda: None)
    for deadline in range(10**6, 10**6 + 10_000):
        timer.start(deadline)
        timer.start(deadline)
    assert len(timers._heap) <= 300
    assert timers.next_deadline == 7


def test_a_scheduler_sleeps_until_a_timer_wakes_its_task() -> None:
    scheduler = Scheduler()
    scheduler.timers.clock = ManualClock()
    woken: list[int] = []
    scheduler.timers.new(lambda: woken.append(1)).start(1_000)
    scheduler.run(park(Operation("wait", "timer", lambda: bool(woken))))
    assert scheduler.timers.now() == 1_000
    with pytest.raises(Deadlock):
        scheduler.run(park(Operation("wait", "nothing", lambda: False)))


def test_the_machine_s_clock() -> None:
    timers = Timers()
    before = time.monotonic_ns()
    timers.new(lambda: None).start(timers.now() + 3_000_000)
    assert timers.sleep()
    assert time.monotonic_ns() - before >= 3_000_000
    assert not timers.sleep()
