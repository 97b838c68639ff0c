"""The end of a slice: one thread that ticks about every half millisecond while some engine runs.

A run that is still the same at the next tick is told to end, so a slice takes one to two ticks. The thread starts with
the first run, parks after `_IDLE_TICKS` ticks without one, is a daemon, and is not there in a forked child, where the
next run starts another. A run that ends at once pays two attribute writes and a comparison. (Unicorn's own `timeout`
starts a thread for each run, 155 us, and stops in the middle of an instruction: see `unicorn.py`.)

Only one engine runs at a time, so one slot is enough.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Protocol

PERIOD_S = 0.0004
_IDLE_TICKS = 100


class Sliced(Protocol):
    """What can be told to end its run."""

    def end_slice(self) -> None:
        """End the run. Called by the timer's thread, which holds `SliceTimer.lock`."""
        ...


class SliceTimer:
    """The timer; `shared` is the one that engines use.

    `lock` is held while a run is told to end: who takes it knows that the timer is not inside of `end_slice`.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.lock = threading.Lock()
        self._wake = threading.Event()
        self._started = False
        self._parked = True
        self._running: Sliced | None = None
        self._serial = 0

    def enter(self, engine: Sliced) -> None:
        """`engine` starts a run."""
        self._serial += 1
        self._running = engine
        if self._parked:
            self._unpark()

    def leave(self) -> None:
        """Its run has ended. It may still be told to end, by a tick that is on its way."""
        self._running = None

    def _unpark(self) -> None:
        self._parked = False
        self._wake.set()
        if not self._started:
            self._started = True
            threading.Thread(target=self._tick, args=(self._wake,), name="guestmem-slices", daemon=True).start()

    def _tick(self, wake: threading.Event) -> None:
        seen, idle = 0, 0
        while True:
            time.sleep(PERIOD_S)
            serial = self._serial
            if self._running is None:
                idle += 1
                if idle >= _IDLE_TICKS:
                    self._park(wake)
                    idle = 0
            elif serial == seen:
                self._end_slice(serial)
            else:
                seen, idle = serial, 0

    def _end_slice(self, serial: int) -> None:
        with self.lock:
            engine = self._running
            if engine is not None and self._serial == serial:
                engine.end_slice()

    def _park(self, wake: threading.Event) -> None:
        """Wait for a run. A run that starts between the two lines is seen by the third."""
        wake.clear()
        self._parked = True
        if self._running is None:
            wake.wait()
        self._parked = False


shared = SliceTimer()
os.register_at_fork(after_in_child=shared._reset)
