"""Timers: what is to happen at a time, and the clock that says what time it is.

Nobody is woken here: whoever runs the loop asks `fire_due`, and sleeps no longer than until `next_deadline`. A callback
runs between two awaits, as an hrtimer's does in interrupt context, so it waits for nothing.

Source: include/linux/hrtimer.h, whose CLOCK_MONOTONIC and absolute mode these have.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from typing import Protocol

_SWEEP_AT = 256


class Clock(Protocol):
    """Nanoseconds that never go back."""

    def now(self) -> int: ...

    def sleep_until(self, deadline: int) -> None: ...


class MonotonicClock:
    """This machine's CLOCK_MONOTONIC."""

    def now(self) -> int:
        return time.monotonic_ns()

    def sleep_until(self, deadline: int) -> None:
        time.sleep(max(0, deadline - self.now()) / 1e9)


class ManualClock:
    """A clock that stands still until somebody sets `time`; who sleeps on it wakes at once, and it is that time."""

    def __init__(self, start: int = 0) -> None:
        self.time = start

    def now(self) -> int:
        return self.time

    def sleep_until(self, deadline: int) -> None:
        self.time = max(self.time, deadline)


class Timer:
    """Calls `callback` once at each time that it is started for. `deadline` is None while it is not running."""

    __slots__ = ("_callback", "_entry", "_timers", "deadline")

    def __init__(self, timers: Timers, callback: Callable[[], None]) -> None:
        self._timers = timers
        self._callback = callback
        self._entry = 0  # the number of its entry in the heap: all others that name it are void
        self.deadline: int | None = None

    def start(self, deadline: int) -> None:
        """Run from now on, for this time alone. In the past: the next `fire_due` fires it."""
        self.deadline = deadline
        self._entry = self._timers._add(deadline, self)

    def cancel(self) -> None:
        """Idempotent."""
        self.deadline, self._entry = None, 0

    def _fire(self) -> None:
        self.cancel()
        self._callback()


class Timers:
    """All timers of one scheduler: a heap of (deadline, number, timer)."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock: Clock = clock if clock is not None else MonotonicClock()
        self._heap: list[tuple[int, int, Timer]] = []
        self._count = 0
        self._sweep_at = _SWEEP_AT

    def now(self) -> int:
        return self.clock.now()

    def new(self, callback: Callable[[], None]) -> Timer:
        return Timer(self, callback)

    @property
    def next_deadline(self) -> int | None:
        """When the next timer is due; None if none runs."""
        heap = self._heap
        while heap and heap[0][2]._entry != heap[0][1]:
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def fire_due(self) -> bool:
        """Fire every timer that is due, earliest first; whether one was. A timer that its own callback starts again for
        a time that is over by now fires at the next call, so that this one ends."""
        if not self._heap or self._heap[0][0] > (now := self.clock.now()):
            return False
        due: list[tuple[int, int, Timer]] = []
        while self._heap and self._heap[0][0] <= now:
            due.append(heapq.heappop(self._heap))
        fired = False
        for _, number, timer in due:
            if timer._entry == number:  # and no callback before it has stopped it
                timer._fire()
                fired = True
        return fired

    def sleep(self) -> bool:
        """Sleep until the next timer is due, and fire. False if none runs: nothing will ever happen here."""
        deadline = self.next_deadline
        if deadline is None:
            return False
        self.clock.sleep_until(deadline)
        self.fire_due()
        return True

    def _add(self, deadline: int, timer: Timer) -> int:
        """A timer that is put off again and again leaves void entries far ahead: they are swept when they are most."""
        self._count += 1
        if len(self._heap) > self._sweep_at:
            self._heap = [entry for entry in self._heap if entry[2]._entry == entry[1]]
            heapq.heapify(self._heap)
            self._sweep_at = max(_SWEEP_AT, 2 * len(self._heap))
        heapq.heappush(self._heap, (deadline, self._count, timer))
        return self._count
