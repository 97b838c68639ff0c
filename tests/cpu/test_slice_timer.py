"""The timer: whom it tells to end, and when it rests. The tests wait for its events, with a time limit and no sleep."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from guestmem.cpu import slice_timer
from guestmem.cpu.slice_timer import PERIOD_S, SliceTimer

LIMIT_S = 5.0


class Run:
    """Something that runs until it is told to end."""

    def __init__(self) -> None:
        self.ended = threading.Event()

    def end_slice(self) -> None:
        self.ended.set()


def wait_for(condition: Callable[[], bool]) -> bool:
    limit = time.monotonic() + LIMIT_S
    while not condition() and time.monotonic() < limit:
        pass
    return condition()


def test_a_long_run_is_told_to_end() -> None:
    timer, run = SliceTimer(), Run()
    start = time.monotonic()
    timer.enter(run)
    assert run.ended.wait(LIMIT_S)
    assert time.monotonic() - start >= PERIOD_S
    timer.leave()


def test_only_the_run_that_is_still_the_same() -> None:
    """Many short runs, then one that stays: it is told, and of the others at most some that the machine held up."""
    timer = SliceTimer()
    limit = time.monotonic() + 20 * PERIOD_S
    short = []
    while time.monotonic() < limit:
        run = Run()
        timer.enter(run)
        timer.leave()
        short.append(run)
    long = Run()
    timer.enter(long)
    assert long.ended.wait(LIMIT_S)
    timer.leave()
    assert len(short) > 100
    assert sum(run.ended.is_set() for run in short) < len(short) // 20


def test_a_tick_for_an_earlier_run_is_void() -> None:
    timer, run = SliceTimer(), Run()
    timer._started = True
    timer.enter(run)
    timer._end_slice(timer._serial - 1)
    assert not run.ended.is_set()
    timer._end_slice(timer._serial)
    assert run.ended.is_set()


def test_it_parks_and_wakes() -> None:
    timer, run = SliceTimer(), Run()
    timer.enter(run)
    timer.leave()
    assert wait_for(lambda: timer._parked)
    timer.enter(run)
    assert run.ended.wait(LIMIT_S)
    timer.leave()


def test_its_thread_keeps_nothing_alive() -> None:
    timer, run = SliceTimer(), Run()
    timer.enter(run)
    timer.leave()
    threads = [thread for thread in threading.enumerate() if thread.name == "guestmem-slices"]
    assert threads
    assert all(thread.daemon for thread in threads)


def test_after_a_fork_the_shared_timer_starts_again() -> None:
    timer, run = SliceTimer(), Run()
    timer.enter(run)
    timer.leave()
    timer.lock.acquire()
    timer._reset()
    assert not timer.lock.locked()
    timer.enter(run)
    assert run.ended.wait(LIMIT_S)
    timer.leave()
    assert slice_timer.shared is not timer
